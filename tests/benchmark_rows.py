"""Where the real rows of benchmarks lie, beside the repository; tests skip themselves without."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1].parent / "shared" / "benchmarks"


def rows_of(name: str) -> Path:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"no {name} beside the repository")
    return path
