"""What plans written in the two planning domains share: where in a message the plan stands."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

from satune.tasks.strips import Fact
from satune.thoughts import without_thoughts

ReadLine = Callable[[str], Sequence[Fact]]

_HEADING = "### plan:"
_SHORT = 120
_START = re.compile(r"\[ ?plan ?\]|<plan>")
# The prompt's own [PLAN END], and what models write in its place; [STATEMENT] begins what a base
# model may add.
_END = re.compile(
    r"\[ ?(?:plan[ _-]?end(?:s|ed)?|[/\\] ?plan|(?:the )?end(?:[ _-](?:of )?(?:the )?plan)?) ?\]"
    r"|</plan>|\[statement\]"
    r"|^[^\w\n]{0,4}(?:plan[ _]end|end(?: of)?(?: the)? plan)[^\w\n]{0,4}$",
    re.MULTILINE,
)
_ESCAPED = re.compile(r"\\([\\_\-\[\](){}<>#*+.,:`|~!&%$])")
# Underscores that join nothing are emphasis, too.
_EMPHASIS = re.compile(r"(?<![a-z0-9])_++|_++(?![a-z0-9])")
_BLANKS = re.compile(r"[^\S\n]+")
_MEANINGS = str.maketrans(
    {
        # Line ends, hyphens, and what a reader does not see: marks of emphasis, zero widths.
        **dict.fromkeys("\v\f\x1c\x1d\x1e\x85\u2028\u2029", "\n"),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
        **dict.fromkeys("*`\u200b\u200c\u200d\u2060\ufeff\u00ad", None),
    }
)


def read_plan(text: str, read_line: ReadLine) -> list[Fact]:
    """The steps of a message, line by line; thoughts are not read.

    ``read_line`` is given lines as a reader sees them, lowered: Markdown's escapes and emphasis are
    gone, blanks of any kind and number are one space.

    A plan between [PLAN] and [PLAN END] (the first that holds an action), or after "### Plan:", is
    all that counts; [/PLAN], [END], [END OF PLAN] and </plan> end one as well. The official prompt
    ends with [PLAN]: a message that goes on from it ends at such a mark, and at a [STATEMENT] that
    a base model may add.
    """
    text = without_thoughts(text).lower().replace("\r\n", "\n").translate(_MEANINGS)
    text = _BLANKS.sub(" ", _EMPHASIS.sub("", _ESCAPED.sub(r"\1", text)))
    if _HEADING in text:
        text = text.split(_HEADING)[1]
    before, *sections = _START.split(text)
    continued = _up_to_end(before)
    if not sections or len(continued) < len(before):
        plan = _steps(continued, read_line)
        if plan or not sections:
            return plan
    for section in sections:
        plan = _steps(_up_to_end(section), read_line)
        if plan:
            return plan
    return []


def _up_to_end(text: str) -> str:
    found = _END.search(text)
    return text if found is None else text[: found.start()]


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
