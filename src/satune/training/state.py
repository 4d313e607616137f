"""The state of a run, as data. Anybody may read it; ``stage.py`` is who has it written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from satune.agents.anchor import Snapshot
from satune.core.confidence import Spending
from satune.core.ratios import effective_sample_size
from satune.types import Episode


@dataclass(slots=True)
class Batch:
    """The experience in use and log w of each of its episodes.

    ``drawn_before`` is the step it was rolled out for (0: it was drawn ahead, before its stage),
    ``reward`` the mean over all episodes drawn then. A batch is ``spent`` when the gate did not
    keep a change as it was from which the batch's episodes, or the weights that the schedule gives
    them, come. ``log_ratios`` has the part of log w that each turn of each episode has, where a
    credit rule asks for it; None: nobody was updated.
    """

    episodes: list[Episode]
    log_weights: list[float]
    drawn_before: int
    reward: float
    spent: bool = False
    log_ratios: list[list[float]] | None = None

    @property
    def heard(self) -> list[float]:
        """Log w of the episodes that an update learns from: the world's failures left out."""
        pairs = zip(self.episodes, self.log_weights, strict=True)
        return [log_weight for episode, log_weight in pairs if not episode.masked]

    @property
    def effective_size(self) -> float:
        """Of those episodes: how many of equal weight tell as much; NaN if a w is not finite."""
        return effective_sample_size(torch.tensor(self.heard, dtype=torch.float64))

    def reweight(self, log_ratio_E: Tensor) -> None:
        """w ← w · r of the agent just updated."""
        self.log_weights = [
            w + float(u) for w, u in zip(self.log_weights, log_ratio_E, strict=True)
        ]

    def note_ratios(self, agent: str, log_ratio_H: Tensor) -> None:
        """Keep log r of each turn of the agent just updated, in the order of the episodes."""
        if self.log_ratios is None:
            self.log_ratios = [[0.0] * len(episode.turns) for episode in self.episodes]
        found = iter(log_ratio_H.tolist())
        for episode, ratios in zip(self.episodes, self.log_ratios, strict=True):
            for place, turn in enumerate(episode.turns):
                if turn.agent == agent:
                    ratios[place] += next(found)


@dataclass(frozen=True, slots=True)
class Early:
    """A batch that is drawn before its ``stage``: on the problems from ``offset`` on, by the team
    whose agents' weights have the numbers ``versions``. It follows from these alone."""

    stage: int
    offset: int
    versions: dict[str, int]


Past = dict[str, dict[int, Mapping[str, Tensor]]]
"""Weights on the CPU by agent and version number."""


@dataclass(frozen=True, slots=True)
class Held:
    """An agent as it was at the last certificate, on the CPU, and the version number of those
    weights. ``since`` is the (stage, step) of the first change that the agent has made after, and
    ``changes`` how many it has made."""

    snapshot: Snapshot
    version: int
    since: tuple[int, int]
    changes: int = 1


@dataclass(frozen=True, slots=True)
class CertifyState:
    """What certification has used up, and what the next certificate compares with.

    ``offset`` counts the problems drawn, ``steps`` the steps since the last certificate; ``held``
    has the agents that have changed since then.
    """

    spending: Spending
    offset: int = 0
    steps: int = 0
    held: dict[str, Held] = field(default_factory=dict)


def _nothing_yet() -> dict[str, float]:
    return {"episodes": 0, "sampled_tokens": 0, "seconds": 0.0, "updates": 0}


@dataclass(slots=True)
class State:
    """Where a run is.

    ``stage`` counts finished stages and ``step`` finished steps of the next one. ``versions`` has
    the number of each agent's weights in the team, ``issued`` the highest number that any weights
    of the agent ever had: candidates that were refused keep theirs, so the next one is higher.
    ``accepted`` tells which steps of ``order`` the team took.
    ``batch`` is None where the next step rolls out anyway. ``early`` are the batches that are drawn
    for later stages, ``past`` the weights that draw them, of all agents that learn. ``opening``
    collects what the stage event will say, ``totals`` what the run cost and, under ``updates``, how
    many steps the team took and still has.
    """

    betas: dict[str, float]
    versions: dict[str, int]
    issued: dict[str, int]
    certify: CertifyState
    stage: int = 0
    step: int = 0
    order: list[str] = field(default_factory=list)
    accepted: dict[str, bool] = field(default_factory=dict)
    batch: Batch | None = None
    early: list[Early] = field(default_factory=list)
    past: Past = field(default_factory=dict)
    opening: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=_nothing_yet)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def beginning(cls, agents: list[str], beta: float, spending: Spending) -> State:
        """The state of a run that has not begun: every agent's weights have the number 0."""
        numbers = dict.fromkeys(agents, 0)
        return cls(dict.fromkeys(agents, beta), numbers, dict(numbers), CertifyState(spending))
