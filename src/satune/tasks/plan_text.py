"""What plans written in the two planning domains share: where in a message the plan stands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from satune.tasks.strips import Fact

ReadLine = Callable[[str], Sequence[Fact]]

_HEADING = "### plan:"
_SHORT = 120
_START, _END, _NEXT = "[plan]", "[plan end]", "[statement]"


def read_plan(text: str, read_line: ReadLine) -> list[Fact]:
    """The steps of a message, line by line (``read_line`` is given them lowered).

    A plan between [PLAN] and [PLAN END] (the first that holds an action), or after "### Plan:", is
    all that counts. The official prompt ends with [PLAN]: a message that goes on from it ends at
    [PLAN END], and at a [STATEMENT] that a base model may add. Thoughts before </think> are no part
    of the answer.
    """
    text = text.rsplit("</think>", 1)[-1].lower()
    if _HEADING in text:
        text = text.split(_HEADING)[1]
    before, *sections = text.split(_START)
    continued = before.split(_END)[0].split(_NEXT)[0]
    if not sections or len(continued) < len(before):
        plan = _steps(continued, read_line)
        if plan or not sections:
            return plan
    for section in sections:
        plan = _steps(section.split(_END)[0].split(_NEXT)[0], read_line)
        if plan:
            return plan
    return []


def write_plan(plan: Sequence[Fact]) -> str:
    """A plan in PDDL, a step a line."""
    return "\n".join(f"({' '.join(step)})" for step in plan)


def enumerated(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1] if items else "")))


def write_problem(
    name: str, domain: str, objects: Sequence[str], init: Sequence[Fact], goal: Sequence[Fact]
) -> str:
    """A problem in PDDL."""
    return (
        f"(define (problem {name})\n(:domain {domain})\n(:objects {' '.join(objects)})\n"
        f"(:init\n{write_plan(init)}\n)\n(:goal (and\n{write_plan(goal)}\n)))"
    )


def _steps(text: str, read_line: ReadLine) -> list[Fact]:
    plan: list[Fact] = []
    for line in text.split("\n"):
        plan += _remembered(read_line, line) if len(line) <= _SHORT else read_line(line)
    return plan


@functools.lru_cache(maxsize=1 << 14)
def _remembered(read_line: ReadLine, line: str) -> tuple[Fact, ...]:
    # A domain of a few objects has a few hundred actions, and plans are made of nothing else.
    return tuple(read_line(line))
