"""Sums: additions, subtractions and word problems of one or two steps, generated without end.

They are small enough for a pretrained model of a hundred million parameters to get some of them
right before it is trained. Every problem comes in one of several wordings (``WORDINGS``), some of
which are never trained on: an evaluation tells of them apart.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from satune.tasks.relay import evaluate_step
from satune.tasks.rewards import extract_numeric, same_number
from satune.tasks.splits import TENTHS, check_integer, generator, lies_in
from satune.thoughts import without_thoughts
from satune.types import Grade, Problem

NAMES = ("Ann", "Ben", "Cara", "Dan", "Ella", "Finn", "Gina", "Hugo", "Ivy", "Jack", "Lena", "Max")
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps")


@dataclass(frozen=True, slots=True)
class Wording:
    """One way to ask. ``text`` has the numbers {0}, {1}, {2} in the order in which ``operators``
    (each of + - *) take them, from left to right; {name} and {other} are two people, {things} what
    is counted. An ``unseen`` one is kept for evaluations."""

    text: str
    operators: str
    unseen: bool = False


WORDINGS: dict[str, Wording] = {
    "plus": Wording("What is {0} + {1}?", "+"),
    "minus": Wording("What is {0} - {1}?", "-"),
    "add": Wording("Add {0} and {1}.", "+"),
    "take": Wording("Take {1} away from {0}.", "-"),
    "gets": Wording("{name} has {0} {things} and gets {1} more. How many {things} now?", "+"),
    "gives": Wording("{name} has {0} {things} and gives {1} away. How many are left?", "-"),
    "together": Wording(
        "{name} has {0} {things}, {other} has {1}. How many {things} are there together?", "+"
    ),
    "boxes": Wording("There are {0} boxes with {1} {things} each. How many {things} in all?", "*"),
    "gets_gives": Wording(
        "{name} has {0} {things}, gets {1} more and gives {2} to {other}. How many are left?", "+-"
    ),
    "boxes_more": Wording(
        "{name} has {0} boxes of {1} {things} and {2} loose ones. How many {things} in all?", "*+"
    ),
    "sum_of": Wording("Find the sum of {0} and {1}.", "+", unseen=True),
    "difference": Wording("How much is {0} minus {1}?", "-", unseen=True),
    "finds": Wording(
        "{name} owns {0} {things}. After finding {1} more, how many {things} does {name} own?",
        "+", unseen=True,
    ),
    "loses": Wording(
        "There were {0} {things} on a table. {name} took {1} of them. How many remain?",
        "-", unseen=True,
    ),
    "days": Wording(
        "{name} collects {0} {things} on Monday, {1} on Tuesday and {2} on Wednesday. "
        "How many {things} is that?",
        "++", unseen=True,
    ),
}  # fmt: skip
SEEN = tuple(name for name, wording in WORDINGS.items() if not wording.unseen)
UNSEEN = tuple(name for name, wording in WORDINGS.items() if wording.unseen)


def value_of(operators: str, numbers: Sequence[int]) -> int:
    """What the numbers come to, from left to right: 2, 3, 4 under "*+" are 10."""
    value = numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        value = evaluate_step(value, operator, number)
    return value


class Sums:
    """Sums and word problems with numbers up to ``largest``.

    No number, intermediate result or answer is below 1; factors lie in 2..9, sums and products
    within what they make. Problems are a function of (seed, split, index). "train" and "certify"
    ask in the seen wordings only, "eval" in seen and unseen ones in turn; all are disjoint by
    their text whatever the seed. A problem's metadata has its ``wording``, and as its ``group``
    "seen" or "unseen". A message is graded by its number (``rewards.extract_numeric``).

    Raises UserError if ``largest`` is not an integer from 5 to 99.
    """

    name = "sums"
    fresh = True
    """Problems can be generated without end, see ``problem_at``."""

    def __init__(self, largest: int = 12, seed: int = 0) -> None:
        check_integer("task sums: largest", largest, 5, 99)
        self.largest = largest
        self.seed = seed

    def problem_at(self, split: str, index: int) -> Problem:
        """Problem ``index`` (from 0) of a split's stream."""
        rng = generator("sums", self.seed, split, index)
        unseen = split == "eval" and index % 2 == 1
        while True:
            name = rng.choice(UNSEEN if unseen else SEEN)
            text, answer = self._draw(WORDINGS[name], rng)
            if lies_in(split, hashlib.blake2b(text.encode(), digest_size=8).digest()):
                return Problem.of(
                    f"sums-{split}-{index:06d}",
                    text,
                    str(answer),
                    split=split,
                    fresh=True,
                    wording=name,
                    group="unseen" if unseen else "seen",
                )

    def problems(self, split: str) -> Iterator[Problem]:
        """The endless stream of a split."""
        return (self.problem_at(split, index) for index in itertools.count())

    def extract(self, text: str) -> str | None:
        """The number a message answers with, thoughts aside; None if it has none."""
        return extract_numeric(without_thoughts(text))

    def equal(self, a: str, b: str) -> bool:
        return same_number(a, b)

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """1 if the message's number is the answer, else 0."""
        found = None if answer is None else self.extract(answer)
        right = found is not None and self.equal(found, str(problem.answer))
        return Grade(float(right), detail=f"read {found}, expected {problem.answer}")

    def validate(self) -> None:
        """Check, on the first problems of each split, that the gold answer scores 1, alone and in a
        sentence, and that damaged answers and none score 0.

        Raises ValueError naming the problem that fails.
        """
        for split in TENTHS:
            for problem in itertools.islice(self.problems(split), 50):
                gold = str(problem.answer)
                good = [self.grade(problem, a).score for a in (gold, f"There are {gold} left.")]
                bad = [self.grade(problem, a).score for a in (f"{gold}0", f"-{gold}", "", None)]
                if good != [1.0, 1.0] or bad != [0.0] * 4:
                    raise ValueError(f"task sums: {problem.id} grades its own answer wrongly")

    def _draw(self, wording: Wording, rng: random.Random) -> tuple[str, int]:
        """A problem in that wording and its answer."""
        numbers = self._numbers(wording.operators, rng)
        name, other = rng.sample(NAMES, 2)
        text = wording.text.format(*numbers, name=name, other=other, things=rng.choice(THINGS))
        return text, value_of(wording.operators, numbers)

    def _numbers(self, operators: str, rng: random.Random) -> list[int]:
        """Numbers of at least 2 under which every intermediate result is at least 1."""
        while True:
            numbers = [rng.randint(2, self.largest)]
            for operator in operators:
                numbers.append(rng.randint(2, 9 if operator == "*" else self.largest))
            if operators[0] == "*":
                numbers[0] = rng.randint(2, 9)
            steps = [value_of(operators[:k], numbers[: k + 1]) for k in range(len(numbers))]
            if min(steps) >= 1:
                return numbers
