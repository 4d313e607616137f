"""How many bytes may still be taken, and what part of them somebody is allowed."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CONTROL_GROUP = Path("/sys/fs/cgroup")
_SYSTEM = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int:
    """Bytes that can be taken on ``device`` now: on a GPU what the driver and PyTorch's allocator
    hold free, elsewhere the system's available memory, within the limit of the process's control
    group. A system that does not say what is available counts with all of its memory."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if _SYSTEM.exists():
        available = _numbers(_SYSTEM)["MemAvailable"] * 1024
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (_CONTROL_GROUP / name for name in ("memory.max", "memory.current"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        # Pages of files that nobody has read lately are given back when memory is short.
        files = _numbers(_CONTROL_GROUP / "memory.stat")["inactive_file"]
        available = min(available, int(most) - int(used.read_text()) + files)
    return max(available, 0)


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line by the line's first word."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines}


def allowed_bytes(allowance: float, device: torch.device) -> int:
    """``allowance`` in bytes: up to 1 it is a share of what is free on ``device`` now, above 1 a
    number of bytes."""
    return int(allowance * free_bytes(device) if allowance <= 1 else allowance)
