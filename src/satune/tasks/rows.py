"""Rows: any JSONL, Parquet or ``datasets`` source with a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from satune.loading import load_object
from satune.tasks.chats import chat_parts
from satune.tasks.rewards import (
    FunctionReward,
    as_number,
    extract_exact,
    extract_numeric,
    reference,
    same_number,
)
from satune.tasks.sources import Row, field, identity, read_rows
from satune.tasks.splits import RowTask
from satune.thoughts import answer_part, without_thoughts
from satune.types import Grade, Part, Problem, UserError, text_part

_PROMPT_COLUMNS = ("prompt", "question", "problem")
_ROLES = ("system", "developer", "user", "assistant", "tool")


class Rows(RowTask):
    """Problems from the rows of ``data`` (see ``sources.read_rows``).

    ``prompt``: the column with the prompt, a string or a list of chat messages (if it is not named:
    "prompt", else "question" or "problem"). A chat of one user message is taken as it is; a longer
    one becomes one prompt, each message after a line with its role (a system message stands first,
    without one). ``answer``: the column with the reference; of a worked solution that ends with
    "#### ANSWER", as in GSM8K, the answer counts. ``id``: the column with the row's name; rows that
    have none, or null, are numbered.

    ``reward``: "exact" (the last line, or what follows "answer:", equals the reference), "numeric"
    (the last number has the reference's value), or ``file.py:function`` of TRL's signature. The
    values of such a function must lie in ``reward_range``, from which they are rescaled to [0, 1].
    The function is given whole messages, thoughts included; one that says nothing outside a thought
    scores 0 without being asked.

    Raises UserError naming file and line (or row) for anything that is wrong with a row.
    """

    name = "rows"

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        prompt: str | None = None,
        answer: str = "answer",
        id: str = "id",
        reward: str = "exact",
        reward_range: Sequence[float] | None = None,
        eval_fraction: float = 0.1,
    ) -> None:
        if data is None:
            raise UserError("task rows: it needs data: a JSONL or Parquet file, or a data set's id")
        self.seed = seed
        self.reward = reward
        rows = read_rows(data)
        self._prompt_column = _prompt_column(rows[0][1]) if prompt is None else prompt
        self._function = None if reward in ("exact", "numeric") else self._load(rows, reward_range)
        if self._function is None and reward_range is not None:
            raise UserError(f"task rows: reward {reward!r} is 0 or 1 already; drop reward_range")
        needs_answer = self._function is None
        named = [
            (place, self._problem(i, place, row, answer, id, needs_answer))
            for i, (place, row) in enumerate(rows, 1)
        ]
        self._keep(named, eval_fraction)

    def extract(self, text: str) -> str | None:
        """The answer in a message; for a reward function all that is said, without outer space.
        Thoughts are no part of either."""
        said = without_thoughts(text)
        if self._function is not None:
            return said.strip() or None
        return extract_numeric(said) if self.reward == "numeric" else extract_exact(said)

    def equal(self, a: str, b: str) -> bool:
        if self.reward == "numeric":
            return same_number(a, b)
        return a.strip() == b.strip()

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """0 for no answer, else the reward."""
        if answer is None or answer_part(answer) is None:
            return Grade(0.0, detail="no answer")
        if self._function is not None:
            row: Mapping[str, Any] = problem.metadata["row"]
            columns = {k: v for k, v in row.items() if k != self._prompt_column}
            return Grade(self._function(row[self._prompt_column], answer, columns))
        found = self.extract(answer)
        right = found is not None and self.equal(found, str(problem.answer))
        return Grade(float(right), detail=f"read {found}, expected {problem.answer}")

    def validate(self) -> None:
        """With a built-in reward: check that each row's reference scores 1 and a damaged one 0.
        With a function, which may reward anything: check on the first row that it can be called.

        Raises UserError naming file and line of the row that fails.
        """
        if self._function is not None:
            first = next(self.problems("all"))
            self.grade(first, str(first.answer or ""))
            return
        for problem in self.problems("all"):
            gold = str(problem.answer)
            damaged = f"{gold}7" if self.reward == "exact" else _shifted(gold)
            if self.grade(problem, gold).score != 1.0 or self.grade(problem, damaged).score != 0.0:
                raise UserError(
                    f"{self._places[problem.id]}: the answer {gold!r} cannot be told apart by the "
                    f"reward {self.reward!r}; mend the row or give a reward function"
                )

    def _load(
        self, rows: Sequence[tuple[str, Row]], reward_range: Sequence[float] | None
    ) -> FunctionReward:
        if ":" not in self.reward:
            raise UserError(
                f"task rows: unknown reward {self.reward!r}; "
                "give exact, numeric or file.py:function"
            )
        span = tuple(float(v) for v in reward_range) if reward_range is not None else (0.0, 1.0)
        if len(span) != 2 or not span[0] < span[1]:
            raise UserError(f"task rows: reward_range is {reward_range}; give [lowest, highest]")
        return FunctionReward(self.reward, load_object(self.reward), list(rows[0][1]), span)

    def _problem(
        self, number: int, place: str, row: Row, answer: str, id: str, needs_answer: bool
    ) -> Problem:
        parts = _parts(place, self._prompt_column, field(place, row, self._prompt_column))
        gold = field(place, row, answer) if needs_answer else row.get(answer)
        if needs_answer and (gold is None or not str(gold).strip()):
            raise UserError(f"{place}: field {answer!r} is empty; give the reference answer")
        if needs_answer and isinstance(gold, str):
            gold = reference(gold)
        if self.reward == "numeric" and as_number(str(gold)) is None:
            raise UserError(f"{place}: field {answer!r} is {_short(gold)}, which is no number")
        for column in self._function.needed if self._function else ():
            field(place, row, column)
        name = identity(row, f"row-{number}", id)
        return Problem(name, parts, gold, {"row": row} if self._function else {})


def _prompt_column(row: Row) -> str:
    return next((name for name in _PROMPT_COLUMNS if name in row), _PROMPT_COLUMNS[0])


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _shifted(number: str) -> str:
    value = as_number(number)
    assert value is not None
    return str(value + 1)


def _parts(place: str, column: str, prompt: Any) -> tuple[Part, ...]:
    """A prompt column's value as message content."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{place}: field {column!r} is empty; give a prompt")
        return (text_part(prompt),)
    if not isinstance(prompt, list) or not prompt:
        raise UserError(f"{place}: field {column!r} is neither text nor a list of messages")
    if not all(map(_is_message, prompt)):
        raise UserError(f"{place}: field {column!r} holds a message without role and content")
    return chat_parts(prompt)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in _ROLES
        and isinstance(message.get("content"), (str, list))
    )
