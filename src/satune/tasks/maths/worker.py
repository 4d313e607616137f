r"""Equality of mathematical answers, by what they say and exactly; it lives in a worker process.

Readings of the same kind are compared part by part, expressions by their ``values``. Units, names
of what is asked for, bases and the brackets of a set may be left out of an answer, but where they
are given they must agree.
"""

from __future__ import annotations

import functools
import importlib.util
import resource
from collections.abc import Callable

from satune.types import UserError

CALL_SECONDS = 10.0
"""Limit of a whole call; then the process is replaced. Costs are bounded, so that none is known to
come near it."""

_MEMORY = 4 << 30


def check_installed(task: str) -> None:
    """Raises UserError if what grading computes with is not there."""
    if importlib.util.find_spec("mpmath") is None:
        raise UserError(
            f"task {task}: grading needs mpmath; install it with pip install 'satune[math]'"
        )


def build() -> Callable[[str, str, bool], bool]:
    """``equals(reference, answer, symmetric)``; symmetric also accepts them the other way round."""
    # A bound that was overlooked would otherwise cost the whole machine's memory.
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > _MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, hard))
    from satune.tasks.maths.comparison import same
    from satune.tasks.maths.reading import Reading, read

    @functools.lru_cache(maxsize=4096)
    def reading(answer: str) -> Reading:
        return read(answer)

    def equals(reference: str, answer: str, symmetric: bool) -> bool:
        left, right = reading(reference), reading(answer)
        return same(left, right) or (symmetric and same(right, left))

    return equals
