"""Overlap of training problems with evaluation problems, by their text.

Texts are compared by their letters and digits alone, whatever case and layout. Two problems overlap
if these are all the same, or if the first 120 are and single this text out: a beginning that
several different problems of one file share (an instruction, a fixed preamble) says nothing.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from satune.types import Problem

BEGINNING = 120
"""Letters and digits of a text that are compared where the whole texts differ."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """A training problem that is also in the evaluation data: the ids of both."""

    train: str
    held_out: str
    by: Literal["text", "beginning"]


def normalised(text: str) -> str:
    """The letters and digits of a text, in lower case and compatibility form (x² is x2)."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


def statement(problem: Problem) -> str:
    """A problem's own text: its metadata's ``statement`` where the task keeps it apart from the
    instruction, else the whole prompt."""
    found = problem.metadata.get("statement")
    return found if isinstance(found, str) else problem.text


def overlaps(train: Iterable[Problem], held_out: Iterable[Problem]) -> list[Overlap]:
    """The training problems that are also evaluation problems, in the order of ``train``, each
    with the first evaluation problem it matches. Problems without letters and digits match none."""
    ours = [(problem.id, normalised(statement(problem))) for problem in train]
    theirs = [(problem.id, normalised(statement(problem))) for problem in held_out]
    whole: dict[str, str] = {}
    beginnings: dict[str, str] = {}
    for identity, text in theirs:
        whole.setdefault(text, identity)
        beginnings.setdefault(text[:BEGINNING], identity)
    shared = _shared_beginnings(ours) | _shared_beginnings(theirs)
    found = []
    for identity, text in ours:
        beginning = text[:BEGINNING]
        if not text:
            continue
        if text in whole:
            found.append(Overlap(identity, whole[text], "text"))
        elif len(beginning) == BEGINNING and beginning in beginnings and beginning not in shared:
            found.append(Overlap(identity, beginnings[beginning], "beginning"))
    return found


def note(found: Sequence[Overlap], problems: int) -> str:
    """One line about ``found`` among so many training problems; empty if nothing was found."""
    if not found:
        return ""
    first = ", ".join(f"{o.train} (there: {o.held_out})" for o in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"{len(found)} of {problems} training problems are also in evaluate.data: {first}{more}; "
        "what is reported on those says little; set task.drop_overlap=true to leave them out"
    )


def _shared_beginnings(texts: Sequence[tuple[str, str]]) -> set[str]:
    distinct: dict[str, set[str]] = defaultdict(set)
    for _, text in texts:
        distinct[text[:BEGINNING]].add(text)
    return {beginning for beginning, members in distinct.items() if len(members) > 1}
