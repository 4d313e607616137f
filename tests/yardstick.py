"""What work may cost, in a unit that grows where the machine is slow or busy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

FELT = 0.5
"""Seconds of processor time that no machine is too slow for: less is never compared."""


def yardstick() -> float:
    """Processor seconds of a fixed piece of work, about 0.05 where nothing else runs."""
    started = time.process_time()
    sorted(str(number) for number in range(150_000))
    return time.process_time() - started


@contextmanager
def at_most(yardsticks: float, what: object = "") -> Iterator[None]:
    """The work inside takes at most so many times the processor time of the fixed piece, which is
    measured right after it, in the same process."""
    started = time.process_time()
    yield
    spent = time.process_time() - started
    if spent > FELT:
        unit = yardstick()
        assert spent <= yardsticks * unit, (spent, unit, str(what)[:200])
