"""The words every room shares: what a problem, a turn, an episode and a grade are, and what an
engine, a task, an environment, a renderer and a conversation can be asked for. Standard library
only, so that any room can import it at no cost.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

Part = Mapping[str, Any]
Message = dict[str, Any]
FinishReason = Literal["stop", "length"]
Ids: TypeAlias = "array[int]"
"""Token ids as ``array.array('i')``, int32: made by ``ids_of``, shared, and changed by nobody."""
LogProbs: TypeAlias = "array[float]"
"""Natural logarithms as ``array.array('f')``, float32: made by ``logprobs_of``."""
Progress = Callable[[int, int, str], None]
"""(done, of how many, of what), called while something long goes on."""


def no_progress(done: int, total: int, what: str) -> None:
    """Shows nothing."""


def ids_of(numbers: Iterable[int] = ()) -> Ids:
    """Token ids from whatever gives them one by one. Raises OverflowError beyond 32 bits."""
    # iter: bytes would be taken as memory, not as numbers.
    return array("i", iter(numbers))


def logprobs_of(numbers: Iterable[float] = ()) -> LogProbs:
    """Log-probabilities, each rounded to float32."""
    return array("f", numbers)


class UserError(ValueError):
    """Bad input from the person at the keyboard: one line saying where, what and the mend."""


def text_part(text: str) -> Part:
    """One text part of a message's content, in the form chat templates take."""
    return {"type": "text", "text": text}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model at an OpenAI-compatible server; ``str`` gives what ``loading.model_in`` reads."""

    address: str
    name: str

    def __str__(self) -> str:
        return f"{self.address}#{self.name}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One task instance. ``prompt`` is message content as parts (text today)."""

    id: str
    prompt: tuple[Part, ...]
    answer: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(id: str, text: str, answer: Any = None, **metadata: Any) -> Problem:
        """A problem whose prompt is plain text."""
        return Problem(id, (text_part(text),), answer, metadata)

    @property
    def text(self) -> str:
        """The prompt's text parts joined."""
        return "".join(part["text"] for part in self.prompt if part.get("type") == "text")


@dataclass(frozen=True, slots=True)
class Grade:
    """What an answer is worth: ``score`` in [0, 1], its components, per-seat credit if any."""

    score: float
    components: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""
    seats: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Names one stream of randomness; two draws with equal keys are equal whatever the batching.

    ``stage`` and ``step`` count from 1 (0: before the first one). ``draw`` counts rollouts inside a
    step. ``seat`` and ``own_index`` are filled in when a seat speaks. ``copy``, on which no draw
    depends, tells apart conversations that are open at once and drawn alike."""

    seed: int
    purpose: str
    stage: int = 0
    step: int = 0
    draw: int = 0
    problem: str = ""
    sample: int = 0
    seat: str = ""
    own_index: int = 0
    copy: int = 0

    def at(self, **changes: Any) -> Key:
        return replace(self, **changes)

    def rng(self, *extra: object) -> random.Random:
        """A generator seeded by this key (and ``extra``), the same on every machine."""
        named = (
            self.seed, self.purpose, self.stage, self.step, self.draw,
            self.problem, self.sample, self.seat, self.own_index, *extra,
        )  # fmt: skip
        digest = hashlib.blake2b(repr(named).encode(), digest_size=16).digest()
        return random.Random(int.from_bytes(digest, "big"))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw a completion. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 are off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an engine is given: the messages, and the ids where a tokenizer is known.

    ``dropped`` counts foreign messages left out because the context was full. ``opening`` is the
    thought that the template opens at the prompt's end ("<think>" and what follows it), which the
    message's text then begins with; empty where it opens none, or where nobody here knows."""

    messages: tuple[Message, ...]
    ids: Ids | None = None
    dropped: int = 0
    opening: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns. ``ids`` include EOS if it was sampled, ``text`` no special tokens.

    ``logprobs`` (one a token) are natural logs at the sampling temperature. A turn without ids, or
    a ``handle`` of those that lie elsewhere, cannot be trained on. ``version`` is that of the
    weights that wrote it; ``dropped`` that of a prompt that was rendered elsewhere."""

    text: str
    finish_reason: FinishReason
    version: int
    ids: Ids | None = None
    logprobs: LogProbs | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dropped: int = 0
    handle: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of one seat. Turns that are active together share ``moment``.

    ``own_index`` counts the seat's own turns from 0. ``prompt_ids`` are exactly what was fed.
    ``text`` is the completion's, after the thought that the prompt opened for it, if any."""

    seat: str
    agent: str
    moment: int
    own_index: int
    text: str
    finish_reason: FinishReason
    version: int
    prompt_ids: Ids | None = None
    completion_ids: Ids | None = None
    sampled_logprobs: LogProbs | None = None
    dropped: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    handle: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One item of the transcript as one seat sees it; a renderer turns entries into messages.

    ``parts`` is set for the problem, ``text`` for the rest, ``seat`` for own and foreign messages.
    """

    kind: Literal["problem", "own", "foreign", "observation", "instruction"]
    text: str = ""
    seat: str = ""
    parts: tuple[Part, ...] = ()


class EpisodeFailure(Exception):
    """A conversation cannot go on, while the others can.

    ``policy`` tells whose failure it is: the policy's own (what it wrote led to it: the context is
    full, the server's filter refused the text) or the world's (a connection, a server, a worker).
    ``reason`` is one line that begins with the kind of failure and a colon.
    """

    def __init__(self, reason: str, *, policy: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.policy = policy


FAILURES = 0.2
"""The share of failed conversations that a rollout bears where nothing else is said."""
GRADING_SECONDS = 120.0
"""How long a message may take to be graded where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an episode failed. The policy's own failures have reward 0 and are learnt from; the
    world's say nothing about the policy and are left out of every update."""

    reason: str
    policy: bool

    @property
    def kind(self) -> str:
        """What the reason begins with, up to its first colon."""
        return self.reason.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Episode:
    """One conversation on one problem, from its beginning to its end or its failure.

    ``status`` is "truncated" where a message was cut at its limit, which is no failure, and
    "failed" where the conversation could not go on, for the reason in ``failure``.
    """

    problem: Problem
    sample: int
    turns: tuple[Turn, ...]
    answer: str | None
    grade: Grade
    observations: tuple[tuple[int, str], ...] = ()
    """(number of turns before it, text) for each observation of the environment."""
    environment_tokens: int = 0
    failure: Failure | None = None

    @property
    def reward(self) -> float:
        return self.grade.score

    @property
    def status(self) -> Literal["finished", "truncated", "failed"]:
        if self.failure is not None:
            return "failed"
        return "truncated" if any(t.finish_reason == "length" for t in self.turns) else "finished"

    @property
    def masked(self) -> bool:
        """Whether the world ended it: no update may learn from it, no group may count it."""
        return self.failure is not None and not self.failure.policy


@dataclass(frozen=True, slots=True)
class Experience:
    """What one agent's update learns from: whole groups of episodes and their log weights.

    ``log_weights[e]`` is log w of THEORY §6, the sum over the agents updated since the rollout of
    anchor minus written log-probabilities; 0 right after a rollout. ``log_ratios`` has it by turn.
    """

    episodes: tuple[Episode, ...]
    log_weights: tuple[float, ...]
    log_ratios: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """An environment's reply to an action. ``seats`` None shows the text to every seat.

    ``grade`` may be given with ``done``; otherwise the task grades the last action.
    """

    text: str
    done: bool = False
    seats: tuple[str, ...] | None = None
    grade: Grade | None = None


class View(Protocol):
    """One seat's growing view of one conversation, in its agent's tokenizer and template."""

    def prompt(self, entries: Sequence[Entry], max_new_tokens: int) -> Prompt: ...

    def wrote(self, completion: Completion) -> None: ...


class Renderer(Protocol):
    """Turns what a seat sees into what its model reads. One an agent."""

    def view(self, seat: str) -> View: ...


@dataclass(frozen=True, slots=True)
class Seat:
    """A named place in the team, the agent that fills it, and how it samples."""

    name: str
    agent: str
    renderer: Renderer
    sampling: Sampling


@runtime_checkable
class Engine(Protocol):
    """Draws completions. ``begin`` and ``end`` bracket a conversation, so that a local engine knows
    when no conversation can go on without it, and what it may forget."""

    async def generate(
        self, seat: str, prompt: Prompt, sampling: Sampling, key: Key
    ) -> Completion: ...

    def publish(self, agent: str, version: int, weights: Mapping[str, Any]) -> Any:
        """Take an agent's weights, tensors by parameter name, under their version number; give what
        was seen of their arrival, figures by name for the run's events, or None.

        A number names one set of weights for ever; the same set may be given again under its own.
        ``weights`` are good while the call takes: an engine that shares the learner's parameters
        ignores them, every other one copies them now."""
        ...

    def begin(self, key: Key) -> None: ...

    def end(self, key: Key) -> None: ...

    async def close(self) -> None:
        """Let go of what belongs to the running event loop; the engine may be used in another."""
        ...


Generate = Callable[[Sequence[Message], Sampling], Awaitable[Completion]]


class Environment(Protocol):
    """The world one conversation acts in."""

    async def step(self, action: str | None) -> StepResult: ...


class Task(Protocol):
    """Problems and how answers to them are graded; ``task_parts`` has what a task may have beside.

    Splits are "train", "eval", "certify" and, of rows, "all". ``extract`` reads the answer out of a
    message (None: there is none), ``equal`` compares two of them in majority votes, ``grade`` takes
    a whole message: in threads, several at a time, or awaited where it is a coroutine function.
    """

    name: str

    def problems(self, split: str) -> Iterable[Problem]: ...

    def extract(self, text: str) -> str | None: ...

    def equal(self, a: str, b: str) -> bool: ...

    def grade(self, problem: Problem, answer: str | None) -> Grade | Awaitable[Grade]: ...


class Conversation(Protocol):
    """What a protocol is handed. See ``play.conversation.Conversation``.

    ``acting`` is true in an environment: the protocol is then called once for every action.
    """

    problem: Problem
    acting: bool
    seats: tuple[str, ...]
    turns: list[Turn]
    rng: random.Random

    async def say(self, seat: str, instruction: str | None = None) -> Turn: ...

    async def all_say(
        self, seats: Sequence[str], instruction: str | Mapping[str, str] | None = None
    ) -> list[Turn]: ...

    def observe(self, text: str, to: Sequence[str] | None = None) -> None: ...

    def extract(self, text: str) -> str | None: ...

    def majority(self, turns: Sequence[Turn]) -> str | None: ...


TeamProtocol = Callable[[Conversation], Awaitable[str | None]]
