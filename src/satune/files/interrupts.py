"""Ctrl-C waits while what must not be left half done is done.

Standard library only.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Lost(KeyboardInterrupt):
    """Another process of the run is gone, so that the run cannot go on; says who noticed. No
    Exception: whoever waits for a conversation must not take it for the conversation's failure."""


@contextmanager
def uninterrupted(ask: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold SIGINT back until the block is done, then deliver it. Other threads are let be.

    ``ask`` is called meanwhile, so that the block may end early; a second SIGINT then waits for
    nothing.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        if ask is not None:
            if len(held) > 1:
                previous(number, frame)
            ask()

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if held:
        previous(*held[-1])


@contextmanager
def ended_by_term() -> Iterator[None]:
    """Answer SIGTERM as ctrl-C inside the block, also where ctrl-C itself is ignored: it is how
    schedulers and other programs end one. Other threads are let be."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        answer = signal.getsignal(signal.SIGINT)
        (answer if callable(answer) else signal.default_int_handler)(signal.SIGINT, frame)

    # Where ctrl-C was ignored it is answered too: else ``uninterrupted`` would hold back neither.
    ignored = signal.getsignal(signal.SIGINT)
    if not callable(ignored):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        if not callable(ignored):
            signal.signal(signal.SIGINT, ignored)
