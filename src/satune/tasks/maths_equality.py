r"""Equality of mathematical answers by math-verify; it lives in a worker process.

Reference first, both in a box, LaTeX only: math-verify's second reading, which looks for any number
in a text it cannot parse, would take "garbage 7 \frac{}" for 7.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import resource
from collections.abc import Callable
from typing import Any

from satune.types import UserError

STEP_SECONDS = 2
"""Limit of math-verify itself on each parse and comparison; ordinary ones take milliseconds."""

CALL_SECONDS = 10.0
"""Limit of a whole call, for what a signal cannot interrupt; then the process is replaced."""

_MEMORY = 4 << 30


def check_installed(task: str) -> None:
    """Raises UserError if math-verify is not there."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            f"task {task}: grading needs math-verify; install it with pip install 'satune[math]'"
        )


def build() -> Callable[[str, str, bool], bool]:
    """``equals(reference, answer, symmetric)``; symmetric also accepts them the other way round."""
    # What a tower of powers needs would otherwise be the whole machine's memory.
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > _MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, hard))
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    @functools.lru_cache(maxsize=4096)
    def parsed(answer: str) -> list[Any]:
        return parse(f"\\boxed{{{answer}}}", config, parsing_timeout=STEP_SECONDS)

    def equals(reference: str, answer: str, symmetric: bool) -> bool:
        left, right = parsed(reference), parsed(answer)
        if verify(left, right, timeout_seconds=STEP_SECONDS):
            return True
        return symmetric and bool(verify(right, left, timeout_seconds=STEP_SECONDS))

    return equals
