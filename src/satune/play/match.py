"""What conversations are played with, as one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from satune.task_parts import HasEnvironment
from satune.types import (
    FAILURES,
    GRADING_SECONDS,
    Engine,
    Progress,
    Seat,
    Task,
    TeamProtocol,
    Turn,
    UserError,
    no_progress,
)


@dataclass(frozen=True, slots=True)
class Match:
    """A team (who sits where), its protocol, the engine that writes its messages, and the task that
    it plays; and how conversations of it are to be run.

    ``progress`` is told after each episode how many of how many are done, and of what. ``failures``
    is the share of conversations of one rollout that may fail; beyond it the rollout stops.
    ``grading_seconds`` is the longest that a message may take to be graded. With ``grade_seats``
    each seat's last message is graded as if it were the answer, and the seat credited with that,
    where the task credits no seats itself and is no environment. ``concurrency`` bounds
    how many conversations are open at a time (None: all of a rollout). ``keep_ids`` False leaves
    ids and log-probabilities out of the turns: only training reads them, and they take many times
    what the text does. ``on_turn`` is given each turn once the other seats see it; where the world
    has ended a conversation, and it is played anew, those of the new one too.

    Raises UserError for no seats, two seats of one name, and a number out of its range.
    """

    seats: Sequence[Seat]
    protocol: TeamProtocol
    engine: Engine
    task: Task
    progress: Progress = no_progress
    failures: float = FAILURES
    grading_seconds: float = GRADING_SECONDS
    grade_seats: bool = False
    concurrency: int | None = None
    keep_ids: bool = True
    on_turn: Callable[[Turn], None] = lambda turn: None

    def __post_init__(self) -> None:
        names = [seat.name for seat in self.seats]
        if not names:
            raise UserError("team: it has no seats; give at least one")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"team: two seats are named {name!r}; make their names unique")
        if self.concurrency is not None and self.concurrency < 1:
            raise UserError(
                f"rollout: concurrency is {self.concurrency}; give at least 1, or leave it out"
            )
        if not 0.0 <= self.failures <= 1.0:
            raise UserError(f"rollout.failures: is {self.failures}; give a share from 0 to 1")
        if not self.grading_seconds > 0.0:
            raise UserError(f"rollout.grading_seconds: is {self.grading_seconds}; give more than 0")

    @property
    def acting(self) -> bool:
        """Whether the task is an environment, in which the team's answers are actions."""
        return isinstance(self.task, HasEnvironment)

    def greedy(self) -> Match:
        """The same team with greedy decoding (temperature 0)."""
        cold = [replace(s, sampling=replace(s.sampling, temperature=0.0)) for s in self.seats]
        return replace(self, seats=cold)
