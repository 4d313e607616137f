"""An event loop whose clock jumps to the next thing that is due, so that hours of waiting take no
time and nothing depends on the machine's speed. For coroutines that do no input or output."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class _Jumping(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        assert ready or timeout is not None, "everyone waits and nothing is due"
        if not ready and timeout is not None:
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_virtually(work: Coroutine[Any, Any, _T]) -> _T:
    """``asyncio.run`` in virtual time. The loop's own clock is ``get_running_loop().time``."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
