"""Pretrained models for tests marked ``real``: fetched once as ``make models`` does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "models.py"


def models_script() -> ModuleType:
    """``benchmarks/models.py`` as a module."""
    spec = importlib.util.spec_from_file_location("models", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["models"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def real_model(name: str) -> Path:
    """The directory of a model; skips the test, with the reason, where it cannot be fetched."""
    pytest.importorskip("gguf")
    script = models_script()
    try:
        return script.provide(name, script.models_directory())
    except script.Unreachable as error:
        pytest.skip(str(error))
