"""A process in place of vLLM's server (``engines/vllm_process``): its environment and notes."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

from satune.engines.vllm.server import PYTHON

_PACKAGE = Path(__file__).parent / "engines" / "vllm_process"


def environment_of(folder: Path) -> dict[str, str]:
    """The variables under which an interpreter in ``folder`` has it for its vLLM, which notes its
    starts in ``folder/starts``."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\nexport PYTHONPATH="$PYTHONPATH{os.pathsep}{_PACKAGE}"\n'
        f'exec "{sys.executable}" -S "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return {PYTHON: str(python), "STARTS": str(folder / "starts")}


def notes(starts: Path) -> list[dict[str, Any]]:
    """What was noted so far."""
    return [json.loads(line) for line in starts.read_text().splitlines()]


def alive(pid: int) -> bool:
    """Whether a process is there that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    """Whether a process is over, within a minute."""
    end = time.monotonic() + 60
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)
