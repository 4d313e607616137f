"""Guess-number (ARBench GN): find four distinct digits by guessing and feedback.

The rules are those of the benchmark's own evaluation (tmlr-group/AR-Bench): the team may guess
``max_turns`` times; each guess is answered by how many digits are right in the right place and how
many more are right in the wrong place; then a final guess is asked for, and only that one counts.
The game does not end when a guess hits. A guess may repeat digits; a message without a guess costs
the turn.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from satune.tasks.arbench import MAX_TURNS
from satune.tasks.sources import Row, field, identity, read_rows
from satune.tasks.splits import TENTHS, RowTask, check_integer, generator, lies_in
from satune.tasks.sweep import neighbours, sweep
from satune.thoughts import without_thoughts
from satune.types import Entry, Generate, Grade, Problem, StepResult, UserError

DIGITS = 4

_MARKUP = re.compile(r"[\[\](){}*`_$<>\"']")
# Possessive repeats: no blank is gone over twice.
_NAMED = re.compile(
    r"guess(?: is)?[ \t]*+[:=]?\s*+([0-9](?:[ \t,]*+[0-9]){3})(?![0-9])", re.IGNORECASE
)
_RUN = re.compile(r"(?<![0-9])[0-9]{4}(?![0-9])")
_REPEATED = re.compile(r"Guess [0-9]+ was ([0-9]{4}):")
_FEEDBACK = re.compile(r"([0-4])A([0-4])B")

_FULL_PROMPT = """\
Find a secret number of four digits, all of them different (it may start with 0). You have \
{max_turns} guesses. Each guess is answered in the form xAyB: x digits are right and in the right \
place, y digits occur in the secret but in another place. After the last guess you are asked for \
your final answer, and only that one counts. Write each guess in the form "Guess: 1234"."""
_FULL_FINAL = 'That was the last guess. What is the secret number? Write it as "Guess: 1234".'


def feedback(secret: str, guess: str) -> tuple[int, int]:
    """(digits right in the right place, further digits right in the wrong place).

    A digit that the guess repeats counts as often as the secret has it.
    """
    right_place = sum(a == b for a, b in zip(secret, guess, strict=True))
    common = sum((Counter(secret) & Counter(guess)).values())
    return right_place, common - right_place


@functools.cache
def _secrets(split: str) -> tuple[str, ...]:
    secrets = ("".join(p) for p in itertools.permutations("0123456789", DIGITS))
    digests = ((s, hashlib.blake2b(b"guess_number " + s.encode()).digest()) for s in secrets)
    return tuple(secret for secret, digest in digests if lies_in(split, digest))


class GuessNumber(RowTask):
    """The game as a task with an environment; the protocol's answer is the team's next guess.

    ``data`` is a JSONL file with ``secret`` and, if they differ, ``id`` and ``max_turns``, or
    upstream's JSON list of secrets; ``eval_fraction`` is for its rows. Without ``data`` secrets are
    generated: "train", "eval" and "certify" are disjoint whatever the seed (together they are all
    5,040 secrets, those of the benchmark included). ``prompt`` "full" explains the game; "short"
    gives a tiny agent single characters.
    ``stop_on_hit`` asks for the final guess as soon as a guess hits, unlike the official game.

    Raises UserError for a bad option or a bad row (file and line).
    """

    name = "guess_number"
    alphabet = "0123456789AB?-G"
    """Every character that prompts, observations and a player's messages hold in short form."""

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        eval_fraction: float = 0.1,
        prompt: str = "full",
        max_turns: int = MAX_TURNS,
        stop_on_hit: bool = False,
    ) -> None:
        if prompt not in ("short", "full"):
            raise UserError(f"task guess_number: prompt is {prompt!r}; give 'short' or 'full'")
        check_integer("task guess_number: max_turns", max_turns, 1)
        self.seed = seed
        self.prompt = prompt
        self.max_turns = max_turns
        self.stop_on_hit = stop_on_hit
        self.fresh = data is None
        if data is not None:
            rows = enumerate(read_rows(data, bare="secret"), 1)
            self._keep([(p, self._from_row(i, p, row)) for i, (p, row) in rows], eval_fraction)

    def problem_at(self, split: str, index: int) -> Problem:
        """Problem ``index`` (from 0) of a generated split's stream."""
        if not self.fresh:
            raise UserError("task guess_number: its secrets come from a file; use problems(split)")
        rng = generator("guess_number", self.seed, split, index)
        secret = rng.choice(_secrets(split))
        return self._problem(f"guess_number-{split}-{index:06d}", secret, self.max_turns)

    def problems(self, split: str) -> Iterator[Problem]:
        """A file's rows of that split, or an endless stream of generated secrets."""
        if self.fresh:
            return (self.problem_at(split, index) for index in itertools.count())
        return super().problems(split)

    def extract(self, text: str) -> str | None:
        """The last four digits after the word "guess" (brackets, commas and spaces are allowed),
        else the last run of exactly four digits; None if there is neither outside a thought."""
        cleaned = _MARKUP.sub("", without_thoughts(text))
        named = _NAMED.findall(cleaned)
        if named:
            return re.sub(r"[^0-9]", "", named[-1])
        runs = _RUN.findall(cleaned)
        return runs[-1] if runs else None

    def equal(self, a: str, b: str) -> bool:
        return a == b

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """The official metric: 1 if the final guess is the secret, else 0."""
        guess = None if answer is None else self.extract(answer)
        score = float(guess == problem.answer)
        return Grade(score, {"final": score}, f"read {guess}, expected {problem.answer}")

    def environment(self, problem: Problem, rng: random.Random, generate: Generate) -> Game:
        return Game(self, problem)

    def validate(self) -> None:
        """Check that every problem's secret has four distinct digits and scores 1, written plainly
        and as "Guess: 1234", and that another guess scores 0.

        Raises ValueError naming the problem that fails.
        """
        drawn = (p for s in TENTHS for p in itertools.islice(self.problems(s), 50))
        for problem in drawn if self.fresh else self.problems("all"):
            secret = problem.answer
            gold = [self.grade(problem, a).score for a in (secret, f"Guess: {secret}")]
            spoilt = (secret[1:] + secret[0], secret[:3], "", None)
            if gold != [1.0, 1.0] or any(self.grade(problem, a).score for a in spoilt):
                raise ValueError(f"task guess_number: {problem.id} grades its own secret wrongly")

    def expert(self, entries: Sequence[Entry], rng: random.Random, error: float) -> str:
        """What a player who sweeps the positions and errs with probability ``error`` writes.

        It starts at 0000 and counts one position up as long as the feedback stays the same; a
        digit that raised the count of right places is kept, one that lowered it is taken back, and
        the next position follows (see ``sweep``). After 4A it repeats its guess. An error changes a
        random digit of the best known guess by one instead. Everything is read off ``entries``.
        """
        best, move = sweep(self._history(entries))
        shown = [entry.text for entry in entries if entry.kind == "observation"]
        asked_for_final = bool(shown) and "?" in shown[-1]
        guess = best if asked_for_final else move
        if rng.random() < error:
            guess = rng.choice([g for g in neighbours(best) if g != guess])
        return guess if self.prompt == "short" else f"Guess: {guess}"

    def _history(self, entries: Sequence[Entry]) -> list[tuple[str, int]]:
        """(guess, digits in the right place) for each answered guess, as far as it can be seen.

        Feedback in short form does not repeat the guess. Of several messages before it, the action
        was what most of them say (a vote), or the last one if they all differ (a chain).
        """
        history: list[tuple[str, int]] = []
        said: list[str] = []
        for entry in entries:
            if entry.kind in ("own", "foreign"):
                guess = self.extract(entry.text)
                said += [] if guess is None else [guess]
            elif entry.kind == "observation":
                found = _FEEDBACK.search(entry.text)
                repeated = _REPEATED.search(entry.text)
                said = [repeated[1]] if repeated else said
                if found and said:
                    action = max(reversed(said), key=said.count)
                    history.append((action, int(found[1])))
                said = []
        return history

    def _from_row(self, number: int, place: str, row: Row) -> Problem:
        secret = field(place, row, "secret")
        if not isinstance(secret, str) or not re.fullmatch(r"[0-9]{4}", secret):
            raise UserError(f"{place}: secret is {secret!r}; write four digits as a string")
        if len(set(secret)) < DIGITS:
            raise UserError(f"{place}: secret {secret!r} repeats a digit; all four must differ")
        turns = row.get("max_turns", self.max_turns)
        check_integer(f"{place}: max_turns", turns, 1)
        return self._problem(identity(row, f"row-{number}"), secret, turns)

    def _problem(self, identity: str, secret: str, max_turns: int) -> Problem:
        text = "G" if self.prompt == "short" else _FULL_PROMPT.format(max_turns=max_turns)
        return Problem.of(identity, text, secret, max_turns=max_turns, fresh=self.fresh)


class ArbenchGN(GuessNumber):
    """GuessNumber under its benchmark's name; the defaults are the official game's."""

    name = "arbench_gn"


class Game:
    """One game. Components of its grade: ``final`` (the final guess is the secret), ``hit`` (some
    guess before it was), ``malformed`` (share of turns without a guess) and, if there was a hit,
    ``turns_to_hit`` (from 1)."""

    def __init__(self, task: GuessNumber, problem: Problem) -> None:
        self._task = task
        self._problem = problem
        self._turns = 0
        self._malformed = 0
        self._hit_at: int | None = None
        self._final = False

    async def step(self, action: str | None) -> StepResult:
        """Answer a guess; grade the one that follows the last turn."""
        if self._final:
            return StepResult("", done=True, grade=self._grade(action))
        self._turns += 1
        guess = None if action is None else self._task.extract(action)
        short = self._task.prompt == "short"
        if guess is None:
            self._malformed += 1
            text = "-" if short else 'No guess found: the turn is lost. Write "Guess: 1234".'
        else:
            right_place, wrong_place = feedback(self._problem.answer, guess)
            text = f"{right_place}A{wrong_place}B"
            text = text if short else f"Guess {self._turns} was {guess}: {text}"
            if right_place == DIGITS and self._hit_at is None:
                self._hit_at = self._turns
        stopped = self._task.stop_on_hit and self._hit_at is not None
        if stopped or self._turns >= self._problem.metadata["max_turns"]:
            self._final = True
            text += "?" if short else f"\n{_FULL_FINAL}"
        return StepResult(text)

    def _grade(self, action: str | None) -> Grade:
        graded = self._task.grade(self._problem, action)
        components = {
            **graded.components,
            "hit": float(self._hit_at is not None),
            "malformed": self._malformed / self._turns,
        }
        if self._hit_at is not None:
            components["turns_to_hit"] = float(self._hit_at)
        return Grade(graded.score, components, graded.detail)
