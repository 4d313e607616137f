"""Where a step's experience comes from, and how it is re-weighted inside a stage (THEORY §6).

A schedule is a subclass of ``Schedule``; the options in a recipe are what its class takes. A recipe
names one of SCHEDULES or the user's own, ``schedule: path/to/file.py:Name``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from satune.loading import load_named
from satune.ranges import Part, Positive, check
from satune.types import Experience, UserError

if TYPE_CHECKING:  # a recipe is read without torch
    from satune.training.state import Batch


@dataclass(frozen=True)
class Schedule:
    """One rollout a stage, weighted for the agents already updated; the others change that.

    ``cap`` is the largest weight used in training (None: none; the mass cut off is reported).
    ``weighted``: whether an agent learns with the weights w of the agents before it. ``together``:
    whether all agents learn from what the team wrote before the sweep and are judged together.
    """

    weighted: ClassVar[bool] = True
    together: ClassVar[bool] = False

    cap: Positive | None = None

    def __post_init__(self) -> None:
        check(self, "schedule")

    @property
    def name(self) -> str:
        """How events call it."""
        return type(self).__name__.lower()

    def renews(self, batch: Batch) -> bool:
        """Whether to roll out anew before the next agent, ``batch`` being what there is. It is
        asked more than once about one batch."""
        return False

    def log_weights(self, batch: Batch) -> Sequence[float]:
        """Log of the weight with which each episode of ``batch`` is learnt from."""
        return batch.log_weights if self.weighted else [0.0] * len(batch.episodes)

    @classmethod
    def rollouts(cls, steps: int) -> tuple[int, int]:
        """The fewest and the most rollouts of a stage of so many steps, for forecasts."""
        return 1, steps


class Reuse(Schedule):
    """One rollout a stage, weighted by the ratios of the agents already updated."""

    @classmethod
    def rollouts(cls, steps: int) -> tuple[int, int]:
        return 1, 1


class Fresh(Schedule):
    """A rollout before every agent."""

    def renews(self, batch: Batch) -> bool:
        return True

    @classmethod
    def rollouts(cls, steps: int) -> tuple[int, int]:
        return steps, steps


@dataclass(frozen=True)
class Hybrid(Schedule):
    """As reuse, with a new rollout when the effective sample size falls below the share ``ess`` of
    the episodes."""

    ess: Part = 0.5

    def renews(self, batch: Batch) -> bool:
        # Written so that a weight that is not finite, and its NaN, also rolls out again.
        return not batch.effective_size >= self.ess * len(batch.heard)


class Stale(Reuse):
    """One rollout a stage, not weighted."""

    weighted = False


class Simultaneous(Stale):
    """All agents learn from one rollout as it was drawn, as if they took their steps at once."""

    together = True


SCHEDULES: dict[str, type[Schedule]] = {
    "fresh": Fresh,
    "reuse": Reuse,
    "hybrid": Hybrid,
    "stale": Stale,
    "simultaneous": Simultaneous,
}


def load_schedule(
    name: str, options: Mapping[str, Any] | None = None, base: Path | None = None
) -> Schedule:
    """The schedule of that name, or the user's own, made with its options. Raises UserError."""
    found = load_named("schedule", name, SCHEDULES, options or {}, skip=0, base=base)
    if not isinstance(found, Schedule):
        raise UserError(
            f"schedule {name}: not a schedule; derive the class from "
            "satune.training.schedules.Schedule"
        )
    return found


def needs_rollout(schedule: Schedule, batch: Batch, step: int) -> bool:
    """Whether ``step`` has to be rolled out for anew: never twice for one step, always where the
    batch is spent, else as the schedule says."""
    if step <= batch.drawn_before:
        return False
    return batch.spent or schedule.renews(batch)


def experience_for(schedule: Schedule, batch: Batch) -> Experience:
    """What the next agent learns from: the batch, weighted as the schedule says.

    Raises: UserError if that is not one weight an episode.
    """
    log_weights = tuple(float(weight) for weight in schedule.log_weights(batch))
    if len(log_weights) != len(batch.episodes):
        raise UserError(
            f"schedule {schedule.name}: gave {len(log_weights)} weights for "
            f"{len(batch.episodes)} episodes; return one an episode"
        )
    ratios = batch.log_ratios if schedule.weighted else None
    by_turn = None if ratios is None else tuple(map(tuple, ratios))
    return Experience(tuple(batch.episodes), log_weights, by_turn)
