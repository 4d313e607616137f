"""Overlap of training problems with evaluation problems, by their text.

Texts are compared by their letters and digits alone, whatever case and layout. Two problems overlap
if these are all the same, or if the first 120 are and single this text out: a beginning that
several different problems of one file share (an instruction, a fixed preamble) says nothing.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from satune.task_parts import PARTS, is_fresh
from satune.types import Problem, Task

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
    with the first evaluation problem it matches. Problems without letters and digits match none.

    Where one text stands for several problems of a file (a game whose prompt is always the same),
    the answers must be equal too.
    """
    ours, theirs = _texts(train), _texts(held_out)
    whole: dict[str, str] = {}
    answered: dict[tuple[str, str], str] = {}
    beginnings: dict[str, str] = {}
    for identity, text, answer in theirs:
        whole.setdefault(text, identity)
        answered.setdefault((text, answer), identity)
        beginnings.setdefault(text[:BEGINNING], identity)
    shared = _several((text[:BEGINNING], text) for _, text, _ in ours)
    shared |= _several((text[:BEGINNING], text) for _, text, _ in theirs)
    # Within one file only: a problem that was printed with two answers is still one problem.
    ambiguous = _several((t, a) for _, t, a in ours) | _several((t, a) for _, t, a in theirs)
    found = []
    for identity, text, answer in ours:
        beginning = text[:BEGINNING]
        if not text:
            continue
        if text in ambiguous:
            if (text, answer) in answered:
                found.append(Overlap(identity, answered[text, answer], "text"))
        elif text in whole:
            found.append(Overlap(identity, whole[text], "text"))
        elif len(beginning) == BEGINNING and beginning in beginnings and beginning not in shared:
            found.append(Overlap(identity, beginnings[beginning], "beginning"))
    return found


class Without:
    """A task without some of its problems; all else is the task's, with the optional parts that it
    has and none that it lacks."""

    def __init__(self, task: Task, left_out: Sequence[Overlap]) -> None:
        self._task = task
        self.name = task.name
        self.extract, self.equal, self.grade = task.extract, task.equal, task.grade
        for part in PARTS:
            if hasattr(task, part):
                setattr(self, part, getattr(task, part))
        self.left_out = tuple(left_out)
        self._ids = {overlap.train for overlap in left_out}

    def problems(self, split: str) -> Iterator[Problem]:
        return (problem for problem in self._task.problems(split) if problem.id not in self._ids)


def training_overlaps(task: Task, held_out: Task) -> list[Overlap]:
    """``overlaps`` of a task's training problems with all of an evaluation's; none for a task that
    generates its problems, whose prompts need not tell them apart."""
    if is_fresh(task) or is_fresh(held_out):
        return []
    return overlaps(task.problems("train"), held_out.problems("all"))


def note(found: Sequence[Overlap], dropped: bool) -> str:
    """One line about ``found``; empty if nothing was found."""
    if not found:
        return ""
    first = ", ".join(f"{o.train} (there {o.held_out})" for o in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    count = "1 training problem is" if len(found) == 1 else f"{len(found)} training problems are"
    mend = "left out" if dropped else "evaluate.drop_overlap=true leaves them out"
    return f"overlap: {count} also in evaluate.data: {first}{more}; {mend}"


def _texts(problems: Iterable[Problem]) -> list[tuple[str, str, str]]:
    return [(p.id, normalised(statement(p)), str(p.answer).strip()) for p in problems]


def _several(pairs: Iterable[tuple[str, str]]) -> set[str]:
    """The firsts that stand with more than one second."""
    seconds: dict[str, set[str]] = defaultdict(set)
    for first, second in pairs:
        seconds[first].add(second)
    return {first for first, members in seconds.items() if len(members) > 1}
