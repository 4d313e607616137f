"""Relay: an arithmetic expression that a team reduces by one operation a turn.

"3+4-2+1" becomes "7-2+1", then "5+1", then "6". Operations are taken from left to right, whatever
the operator: "2+3*4" is 20. One slip anywhere spoils the answer, so the team's reward falls with
the product of its members' reliabilities.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence

from satune.tasks.splits import TENTHS, check_integer, generator, lies_in
from satune.tasks.voices import last_said, prompt_of
from satune.thoughts import without_thoughts
from satune.types import Entry, Grade, Problem

LARGEST = 99
"""No intermediate result of a generated expression leaves 0..LARGEST."""

LIMIT = 999_999_999
# Nine digits are far beyond what the task produces and keep int() clear of its length limit.
_EXPRESSION = re.compile(r"(?<!\w)-?[0-9]{1,9}(?![0-9])(?:[-+*][0-9]{1,9}(?![0-9]))*")
_SPACED_OPERATOR = re.compile(r"(?<=[0-9])[ \t]*([-+*])[ \t]*(?=[0-9])")
_ITEM = re.compile(r"(?:^-)?[0-9]+|[-+*]")


def evaluate_step(left: int, operator: str, right: int) -> int:
    """``left operator right`` for the operators + - *."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right


def last_expression(text: str) -> str | None:
    """The last expression (a lone integer is one) in a message, without spaces; None if none."""
    found = _EXPRESSION.findall(_SPACED_OPERATOR.sub(r"\1", text))
    return found[-1] if found else None


def reduce_once(expression: str) -> str:
    """The expression with its leftmost operation carried out; a lone integer stays as it is."""
    items = _ITEM.findall(expression)
    if len(items) < 3:
        return expression
    return str(evaluate_step(int(items[0]), items[1], int(items[2]))) + "".join(items[3:])


def operations(expression: str) -> int:
    """How many operations are left in an expression."""
    return len(_ITEM.findall(expression)) // 2


class Relay:
    """Expressions of ``numbers`` one-digit numbers, generated without end.

    Every intermediate result lies in 0..99: each operator and number is drawn (uniformly) among
    those that keep it there. ``times`` adds multiplication by 2..9. Problems are a function of
    (seed, split, index). Splits: "train", "eval", "certify", disjoint by expression whatever the
    seed. With ``numbers`` 4 a team needs three turns one after the other (or three rounds).

    Raises UserError if ``numbers`` is not an integer from 2 to 30.
    """

    name = "relay"
    fresh = True
    """Problems can be generated without end, see ``problem_at``."""
    alphabet = "0123456789+-*"
    """Every character that prompts and a player's messages may hold."""

    def __init__(self, numbers: int = 4, times: bool = False, seed: int = 0) -> None:
        check_integer("task relay: numbers", numbers, 2, 30)
        self.numbers = numbers
        self.times = bool(times)
        self.seed = seed

    def problem_at(self, split: str, index: int) -> Problem:
        """Problem ``index`` (from 0) of a split's stream."""
        rng = generator("relay", self.seed, split, index)
        while True:
            expression, answer = self._draw(rng)
            if lies_in(split, hashlib.blake2b(expression.encode(), digest_size=8).digest()):
                identity = f"relay-{split}-{index:06d}"
                return Problem.of(identity, expression, str(answer), split=split, fresh=True)

    def problems(self, split: str) -> Iterator[Problem]:
        """The endless stream of a split."""
        return (self.problem_at(split, index) for index in itertools.count())

    def extract(self, text: str) -> str | None:
        """The integer a message ends with, thoughts aside; None if its last expression is not yet
        reduced."""
        expression = last_expression(without_thoughts(text))
        if expression is None or operations(expression) > 0:
            return None
        return str(int(expression))

    def equal(self, a: str, b: str) -> bool:
        return a.strip() == b.strip()

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """1 if the message's integer is the expression's value, else 0."""
        found = None if answer is None else self.extract(answer)
        right = found is not None and self.equal(found, str(problem.answer))
        return Grade(float(right), detail=f"read {found}, expected {problem.answer}")

    def validate(self) -> None:
        """Check, on the first problems of each split, that the gold answer scores 1, that reducing
        the expression step by step leads to it, and that damaged or unfinished answers score 0.

        Raises ValueError naming the problem that fails.
        """
        for split in TENTHS:
            for problem in itertools.islice(self.problems(split), 50):
                reduced = problem.text
                for _ in range(self.numbers - 1):
                    reduced = reduce_once(reduced)
                damaged = str(int(problem.answer) + 1)
                scores = [self.grade(problem, a).score for a in (problem.answer, reduced)]
                spoilt = [self.grade(problem, a).score for a in (damaged, problem.text, "", None)]
                if scores != [1.0, 1.0] or spoilt != [0.0] * 4:
                    raise ValueError(f"task relay: {problem.id} grades its own answer wrongly")

    def expert(self, entries: Sequence[Entry], rng: random.Random, error: float) -> str:
        """What a player who errs with probability ``error`` writes after seeing ``entries``.

        It reduces the last expression it sees by one operation. Where several seats have just
        written with equally many operations left (a round of a debate), it takes the expression
        most of them wrote, the earliest of these on a tie. An error puts a plausible wrong number
        (off by 1 or 2, or another operator's result) in the place of the right one. A lone number
        is repeated.
        """
        expression = last_said(entries, last_expression, operations)
        expression = expression or last_expression(prompt_of(entries)) or "0"
        if operations(expression) == 0:
            return expression
        items = _ITEM.findall(expression)
        left, operator, right = int(items[0]), items[1], int(items[2])
        value = evaluate_step(left, operator, right)
        if rng.random() < error:
            others = [o for o in ("+-*" if self.times else "+-") if o != operator]
            wrong = {value + shift for shift in (-2, -1, 1, 2)}
            wrong |= {evaluate_step(left, other, right) for other in others}
            value = rng.choice(sorted(w for w in wrong if w != value and 0 <= w <= LARGEST) or [0])
        # Far from anything the task produces, and too long to be read as a number again.
        value = max(-LIMIT, min(LIMIT, value))
        return str(value) + "".join(items[3:])

    def _draw(self, rng: random.Random) -> tuple[str, int]:
        value = rng.randrange(10)
        expression = str(value)
        for _ in range(self.numbers - 1):
            choices = {"+": range(min(9, LARGEST - value) + 1), "-": range(min(9, value) + 1)}
            if self.times and 2 * value <= LARGEST:
                choices["*"] = range(2, min(9, LARGEST // max(value, 1)) + 1)
            operator = rng.choice(sorted(choices))
            number = rng.choice(choices[operator])
            value = evaluate_step(value, operator, number)
            expression += f"{operator}{number}"
        return expression, value
