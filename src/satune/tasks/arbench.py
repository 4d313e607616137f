"""What the AR-Bench games (tmlr-group/AR-Bench) share: the roles that are not players, the score.

A role answers questions: a suspect of a detective case, the host of a situation puzzle. Who plays
it is the option ``host`` of a task:

- ``scripted``: fixed rules over the row. For tests and dry runs; no figure of the benchmark.
- ``model:PATH_OR_ID``: a Hugging Face model in this process.
- ``http://ADDRESS/v1#MODEL`` (or https): any OpenAI-compatible server.

The last two speak through the ``generate`` that an environment is given.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from satune.loading import model_in
from satune.tasks.sources import Row, identity, read_rows
from satune.tasks.splits import RowTask, check_integer
from satune.thoughts import without_thoughts
from satune.types import (
    Generate,
    Grade,
    Message,
    Problem,
    Sampling,
    ServedModel,
    StepResult,
    UserError,
)

MAX_TURNS = 25
LONGEST_QUESTION = 2000
"""Characters of a question that a model is shown."""
HOST_TOKENS = 512
"""At most so many tokens of a role's answer; the prompts ask for one sentence or one word."""

_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
_WORD = re.compile(r"[^\W_]{4,}")


class Role(Protocol):
    """Somebody who can be asked something in the course of one conversation."""

    async def answer(self, question: str) -> str: ...


class ModelRole:
    """A role played by a model from its instructions. ``remembers``: it sees what it was asked and
    said before; otherwise each question stands alone."""

    def __init__(
        self, instructions: str, generate: Generate, sampling: Sampling, remembers: bool
    ) -> None:
        self._messages: list[Message] = [{"role": "system", "content": instructions}]
        self._generate = generate
        self._sampling = sampling
        self._remembers = remembers

    async def answer(self, question: str) -> str:
        asked: list[Message] = [
            *self._messages,
            {"role": "user", "content": question[:LONGEST_QUESTION]},
        ]
        completion = await self._generate(asked, self._sampling)
        said = without_thoughts(completion.text)
        if self._remembers:
            self._messages = [*asked, {"role": "assistant", "content": said}]
        return said


class ScriptedSuspect:
    """Answers with the sentence of the story that shares most words with the question, the first of
    them if several do."""

    def __init__(self, story: str) -> None:
        self._sentences = [s.strip() for s in _SENTENCE.findall(story) if s.strip()] or ["..."]
        self._words = [words_of(sentence) for sentence in self._sentences]

    async def answer(self, question: str) -> str:
        asked = words_of(question)
        best = max(range(len(self._words)), key=lambda i: len(asked & self._words[i]))
        return self._sentences[best]


class ScriptedHost:
    """Answers "Yes" to a key question of the row, and to a question whose words of four letters or
    more all stand in the puzzle or its solution; "Unknown" to others."""

    def __init__(self, key_questions: Sequence[str], surface: str, bottom: str) -> None:
        self._keys = {plain(question) for question in key_questions}
        self._words = words_of(f"{surface} {bottom}")

    async def answer(self, question: str) -> str:
        asked = words_of(question)
        known = plain(question) in self._keys or (bool(asked) and asked <= self._words)
        return "Yes" if known else "Unknown"


class HostedGame(RowTask, ABC):
    """A game in which questions are put to roles: the rows of ``data``, ``max_turns`` questions.

    ``host`` says who plays the roles (see above), at ``host_temperature`` and top_p 0.7 as in the
    benchmark. Raises UserError for a bad option or a bad row (file and line).
    """

    needs: ClassVar[str]
    """What to give as data."""

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        eval_fraction: float = 0.1,
        max_turns: int = MAX_TURNS,
        host: str = "scripted",
        host_temperature: float = 0.7,
    ) -> None:
        self.role_player = check_game(self.name, host, max_turns, host_temperature)
        if data is None:
            raise UserError(f"task {self.name}: it needs data: {self.needs}")
        self.seed = seed
        self.host = host
        self.max_turns = max_turns
        self.sampling = Sampling(HOST_TOKENS, temperature=float(host_temperature), top_p=0.7)
        self._secrets: dict[str, list[Any]] = {}
        rows = [(p, self._problem(i, p, row)) for i, (p, row) in enumerate(read_rows(data), 1)]
        self._keep(rows, eval_fraction)

    def equal(self, a: str, b: str) -> bool:
        return plain(a) == plain(b)

    @abstractmethod
    def grade(self, problem: Problem, answer: str | None) -> Grade: ...

    @abstractmethod
    def _problem(self, number: int, place: str, row: Row) -> Problem:
        """A row's problem; what its roles alone know goes to ``_secrets``, by its id."""

    def _named(self, number: int, row: Row) -> str:
        return identity(row, f"{self.name}-{identity(row, str(number), 'index')}")


class Questions(ABC):
    """One game. Components of its grade: the task's and ``malformed``, the share of turns that were
    lost to a message that asks nobody anything."""

    def __init__(self, task: HostedGame, problem: Problem) -> None:
        self._task = task
        self._problem = problem
        self._turns = 0
        self._malformed = 0

    async def step(self, action: str | None) -> StepResult:
        """Have a question answered; grade what follows the last turn."""
        limit = self._problem.metadata["max_turns"]
        if self._turns == limit:
            graded = self._task.grade(self._problem, action)
            components = {**graded.components, "malformed": self._malformed / limit}
            detail = f"{graded.detail}; host {self._task.host}"
            return StepResult("", True, grade=Grade(graded.score, components, detail))
        self._turns += 1
        text = await self._reply(without_thoughts(action or ""))
        if self._turns == limit:
            text += f"\n\n{self._final()}"
        return StepResult(text)

    @abstractmethod
    async def _reply(self, action: str) -> str:
        """What a message is answered; counts a turn that is lost."""

    @abstractmethod
    def _final(self) -> str:
        """What is asked after the last turn."""


def check_game(
    name: str, host: str, max_turns: int, host_temperature: float
) -> str | ServedModel | None:
    """``parse_host`` of the option. Raises UserError for options that no game allows."""
    check_integer(f"task {name}: max_turns", max_turns, 1)
    temperature = host_temperature
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        temperature = -1.0
    if not 0.0 <= temperature <= 2.0:
        raise UserError(
            f"task {name}: host_temperature is {host_temperature!r}; give a number from 0 to 2"
        )
    return parse_host(name, host)


def parse_host(name: str, host: str) -> str | ServedModel | None:
    """The model that the option ``host`` names; None for "scripted".

    Raises UserError for any other form.
    """
    if host == "scripted":
        return None
    if isinstance(host, str) and host.startswith("model:") and host[6:]:
        return host[6:]
    try:
        model = model_in(str(host))
    except UserError as error:
        raise UserError(f"task {name}: host: {error}") from None
    if isinstance(model, ServedModel):
        return model
    raise UserError(
        f"task {name}: host is {host!r}; give scripted, model:PATH_OR_ID or http://ADDRESS/v1#MODEL"
    )


def f1_score(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """2PR/(P+R) over the items that both have, each as often as both have it; 0 if there are none.

    Given two strings the items are characters, given lists of words they are words. Written as
    2·common/(sum of lengths), which is the same and exactly 1 for equals.
    """
    common = sum((Counter(prediction) & Counter(reference)).values())
    return 2.0 * common / (len(prediction) + len(reference)) if common else 0.0


def plain(text: str) -> str:
    """Letters and digits alone, in lower case, one space between words."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def words_of(text: str) -> set[str]:
    """The words of four letters or more, in lower case."""
    return set(_WORD.findall(text.casefold()))
