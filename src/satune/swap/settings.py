"""What a swap is told. Nothing here imports torch, so that its options are shown at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from satune.core.trust_region import Unit
from satune.types import UserError

DELTA, DELTA_OF_ALL = 0.01, 0.004
"""Trust region of a projection in nats: for some seats of the team, for all of them (the paper)."""


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """``delta`` (nats) bounds the ``quantile`` of KL(student‖incumbent) over ``unit``.

    The mixture taught lies at ``aim`` x delta, because a student misses it by something. Each of at
    most ``rounds`` rounds plays ``problems`` problems anew and learns from them, and from episodes
    of earlier rounds ``passes`` - 1 times as many, ``batch`` episodes an optimiser step; rounds end
    when the quantile, over states that gave no gradient yet, is at most ``stop`` x delta
    ``confirm`` times in a row, the weights at rest meanwhile: the first low reading of many is low
    by luck. ``measure_problems`` are played anew for the measurement, by either team.
    ``otherwise`` is what becomes of a student outside delta; "outside" leaves that to the caller.
    The learning rate rises to ``lr`` over the first ``warmup`` of all rounds and falls with half a
    cosine to zero. Raises: ValueError if a value lies outside its range.
    """

    delta: float = DELTA
    quantile: float = 0.99
    unit: Unit = "token"
    aim: float = 0.1
    stop: float = 0.9
    confirm: int = 3
    rounds: int = 30
    problems: int = 16
    passes: int = 4
    batch: int = 16
    warmup: float = 0.05
    measure_problems: int = 64
    confidence: float = 0.95
    otherwise: Literal["mixture", "refused", "outside"] = "mixture"
    seed: int = 0
    lr: float = 1e-5

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"distill.delta {self.delta}: give a positive number of nats")
        for name in ("quantile", "aim", "stop", "warmup"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"distill.{name} {getattr(self, name)}: give a value in (0, 1]")
        for name in ("confirm", "rounds", "problems", "passes", "batch", "measure_problems"):
            if getattr(self, name) < 1:
                raise ValueError(f"distill.{name} {getattr(self, name)}: give at least 1")


@dataclass(frozen=True, slots=True)
class HandOverSettings:
    """``tolerance``: what the team's reward may fall by. ``confidence``: the probability that it
    falls by more all the same. ``problems`` that hold both sides at the last of ``looks`` looks;
    each look before has half as many. ``samples``: coins a problem.
    Raises UserError for a value outside its range.
    """

    tolerance: float = 0.02
    confidence: float = 0.05
    problems: int = 2048
    samples: int = 8
    looks: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance <= 1:
            raise UserError(f"--tolerance {self.tolerance:g}: give a loss of reward in [0, 1]")
        if not 0 < self.confidence < 0.5:
            raise UserError(
                f"--confidence {self.confidence:g}: give a small probability, such as 0.05"
            )
        for name in ("problems", "samples", "looks"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give at least 1")

    def sizes(self) -> list[int]:
        """Problems in all at each look."""
        halved = [self.problems >> left for left in reversed(range(self.looks))]
        return [max(number, at) for at, number in enumerate(halved, start=1)]
