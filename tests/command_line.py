"""Commands run in this process, and the surroundings of those that run in their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., tuple[int, str, str]]
SOURCES = str(Path(__file__).resolve().parents[1] / "src")
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": SOURCES
}  # fmt: skip


def refused(ended: tuple[int, str, str]) -> str:
    """The one line of a refusal."""
    code, out, err = ended
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()
