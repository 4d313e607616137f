"""One conversation, from the problem to its grade or its failure.

A failed conversation is an episode too, with the turns it came to. What the policy brought about
(its text overflowed the context, its action broke the environment, its thought never ended) has
reward 0. What the world did to it (a server, a connection) is played again with the same key, and,
if that does not help, left for others to mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from satune.play.conversation import Conversation, on_its_text
from satune.play.grading import Graders, check_grade
from satune.play.match import Match
from satune.task_parts import HasEnvironment
from satune.thoughts import answer_part, is_cut
from satune.types import (
    Completion,
    Engine,
    Environment,
    Episode,
    EpisodeFailure,
    Failure,
    Grade,
    Key,
    Message,
    Problem,
    Prompt,
    Sampling,
    StepResult,
    UserError,
)

CUT_THOUGHT = "unfinished thought"
"""The kind of failure that a policy may show often while it learns to come to an end."""
REDRAWN = 2
"""How often a conversation is played anew that the world has ended."""


async def play(match: Match, problem: Problem, key: Key) -> Episode:
    """One conversation of the match. ``key`` gives the sample's number; the problem's id is filled
    in.

    With ``task.environment(problem, rng, generate)`` the protocol is called once for every action
    until the environment is done. The engine is told of the end before the answer is graded, and
    after a failure too.

    Raises UserError if the protocol's answer is not text, the environment's reply is not a
    StepResult, no seat speaks before an action, or a grade lies outside [0, 1].
    """
    key = key.at(problem=problem.id)
    match.engine.begin(key)
    try:
        played = await converse(match, problem, key)
    finally:
        match.engine.end(key)
    return await graded(played, match, Graders(match.task, match.grading_seconds))


@dataclass(frozen=True, slots=True)
class Played:
    """A conversation that is over, before it is graded (``grade`` None: the task has to)."""

    conversation: Conversation
    key: Key
    answer: str | None = None
    grade: Grade | None = None
    environment_tokens: int = 0
    failure: Failure | None = None


async def converse(match: Match, problem: Problem, key: Key) -> Played:
    """Play one conversation whose beginning the engine has been told of. Raises as ``play``."""
    for again in reversed(range(REDRAWN + 1)):
        attempt = _Attempt(match, problem, key)
        try:
            return await attempt.play()
        except EpisodeFailure as failure:
            if failure.policy or not again:
                why = Failure(failure.reason, failure.policy)
                return attempt.over(None, Grade(0.0, detail=failure.reason), why)
        # Nothing that was written before the world failed is gone on with.
        match.engine.end(key)
        match.engine.begin(key)
    raise AssertionError("the last attempt returns")


async def graded(played: Played, match: Match, graders: Graders) -> Episode:
    """The episode of a conversation of the match that is over. Raises as ``Graders.grade``, but for
    failures."""
    talk, failure, grade = played.conversation, played.failure, played.grade
    if grade is None:
        try:
            grade = await graders.grade(talk.problem, played.answer, talk.seats)
            if match.grade_seats and grade.seats is None:
                grade = replace(grade, seats=await _seats_graded(played, grade, graders))
        except EpisodeFailure as found:
            failure = Failure(found.reason, found.policy)
            grade = Grade(0.0, detail=found.reason)
    check_grade(grade, talk.problem, graders.task, talk.seats)
    return Episode(
        problem=talk.problem,
        sample=played.key.sample,
        turns=tuple(talk.turns),
        answer=played.answer,
        grade=grade,
        observations=tuple(talk.observations),
        environment_tokens=played.environment_tokens,
        failure=failure,
    )


async def _seats_graded(played: Played, grade: Grade, graders: Graders) -> dict[str, float]:
    """What each seat's last message is worth as an answer; 0 where it cannot be graded."""
    talk = played.conversation
    last = {turn.seat: turn.text for turn in talk.turns}
    # The answer is mostly some seat's last message, and seats say the same.
    scores = {played.answer: grade.score}
    for text in last.values():
        if text not in scores:
            try:
                scores[text] = (await graders.grade(talk.problem, text, talk.seats)).score
            except EpisodeFailure:
                scores[text] = 0.0
    return {seat: scores[text] for seat, text in last.items()}


@dataclass(slots=True)
class _Attempt:
    """One time that a conversation is played."""

    match: Match
    problem: Problem
    key: Key
    conversation: Conversation = field(init=False)
    roles: _Roles = field(init=False)

    def __post_init__(self) -> None:
        match = self.match
        self.roles = _Roles(match.engine, self.key)
        self.conversation = Conversation(
            self.problem,
            self.key,
            seats=match.seats,
            engine=match.engine,
            task=match.task,
            acting=match.acting,
            keep_ids=match.keep_ids,
            on_turn=match.on_turn,
        )

    def over(
        self, answer: str | None, grade: Grade | None, failure: Failure | None = None
    ) -> Played:
        return Played(self.conversation, self.key, answer, grade, self.roles.tokens, failure)

    async def play(self) -> Played:
        """Raises EpisodeFailure where the conversation cannot go on, and as ``play``."""
        task = self.match.task
        if not isinstance(task, HasEnvironment):
            answer = await self._answer()
            if answer is not None and answer_part(answer) is None and is_cut(answer):
                raise EpisodeFailure(f"{CUT_THOUGHT}: the answer was never given", policy=True)
            return self.over(_said(answer), None)
        environment = task.environment(
            self.problem, self.key.rng("environment"), self.roles.generate
        )
        while True:
            before = len(self.conversation.turns)
            answer = _said(await self._answer())
            if len(self.conversation.turns) == before:
                raise UserError("protocol: no seat spoke before the action; let one say something")
            result = await self._step(environment, answer)
            self.conversation.observe(result.text, to=result.seats)
            if result.done:
                return self.over(answer, result.grade)

    async def _answer(self) -> str | None:
        answer: Any = await self.match.protocol(self.conversation)
        if answer is not None and not isinstance(answer, str):
            raise UserError(
                f"protocol: its answer is a {type(answer).__name__}; "
                "return a message's text or None"
            )
        return answer

    async def _step(self, environment: Environment, action: str | None) -> StepResult:
        # What the engine raised for one of the roles is not the action's doing.
        with on_its_text("action", spared=lambda error: error is self.roles.broken):
            result: Any = await environment.step(action)
        if not isinstance(result, StepResult):
            raise UserError(
                f"task {self.match.task.name}: environment.step gave a {type(result).__name__}; "
                "return a StepResult"
            )
        return result


@dataclass(slots=True)
class _Roles:
    """Who speaks for an environment, and what that cost. ``broken`` is what the engine raised."""

    engine: Engine
    key: Key
    tokens: int = 0
    calls: int = 0
    broken: Exception | None = None

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        own = self.key.at(purpose="environment", seat="environment", own_index=self.calls)
        self.calls += 1
        prompt = Prompt(tuple(messages))
        try:
            completion = await self.engine.generate("environment", prompt, sampling, own)
        except Exception as error:
            self.broken = error
            raise
        self.tokens += completion.prompt_tokens + completion.completion_tokens
        return completion


def _said(answer: str | None) -> str | None:
    """A message that is nothing but thoughts is no answer, whatever the task would read in it."""
    return None if answer is None or answer_part(answer) is None else answer
