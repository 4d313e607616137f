"""How the process treats memory that was freed.

By default glibc gives large pieces back to the system at once and asks for them again a moment
later, page by page. Training frees and takes again hundreds of megabytes a second: what the pages
cost is measured in docs/performance.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""glibc's numbers of M_TRIM_THRESHOLD and M_MMAP_MAX (mallopt(3))."""
_HUGE_PAGE = 2**21
_MADV_HUGEPAGE = 14
_LEAST = 2**28
"""Bytes below which large pages are not worth asking for."""
_PART = 0.75
"""What of the machine's memory the heap may reach in large pages. None of it is taken before it is
used."""


def keep_freed_memory() -> bool:
    """Have this process keep what it frees for its next allocations, in large pages where the
    system lends them. Tells whether it does: it leaves alone what is no glibc, and a process whose
    environment says how memory is to be allocated (``MALLOC_…``, ``GLIBC_TUNABLES``,
    ``LD_PRELOAD``)."""
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if sys.platform != "linux" or any(name.startswith(chosen) for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    with contextlib.suppress(ValueError, OSError):  # a system that does not say how much it has
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        _ask_for_large_pages(libc, int(_PART * machine))
    return True


def _ask_for_large_pages(libc: ctypes.CDLL, size: int) -> None:
    """Let the heap's next ``size`` bytes, or as many as it can have, come in large pages: one piece
    is taken, marked, and given back to the heap. Where there are no large pages nothing happens."""
    libc.malloc.restype = ctypes.c_void_p
    piece: int | None = None
    while piece is None:
        if size < _LEAST:
            return
        piece = libc.malloc(ctypes.c_size_t(size))
        size = size if piece is not None else size // 2
    start = -(-piece // _HUGE_PAGE) * _HUGE_PAGE
    length = (piece + size - start) // _HUGE_PAGE * _HUGE_PAGE
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(piece))
