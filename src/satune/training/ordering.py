"""In which order a stage sweeps over the agents (THEORY §6 "Order").

An order is a callable ``order(sweep: Sweep) -> list of agents``, first to last: any of
``sweep.agents``, each at most once and at least one. Beyond ``sweep`` its parameters are its
options. A recipe names one of ORDERS or the user's own, ``order: path/to/file.py:name``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from satune.loading import load_named
from satune.types import Episode


@dataclass(frozen=True, slots=True)
class Sweep:
    """What an order may look at before a stage begins.

    ``stage`` counts from 1. ``agents`` are those that learn, as the team lists them. ``last`` is
    the order of the stage before (empty before the first), ``accepted`` tells for each agent in it
    whether the team took its step. ``episodes`` are those that the stage begins with (of a team of
    earlier stages with ``rollout.ahead``), ``rng`` is the stage's own. ``gains()`` predicts the
    gain of each agent's step, at the cost of three backward passes an agent; what it predicted is
    noted in the stage's event.
    """

    stage: int
    agents: tuple[str, ...]
    last: tuple[str, ...]
    accepted: Mapping[str, bool]
    episodes: Sequence[Episode]
    rng: random.Random
    gains: Callable[[], Mapping[str, float]]


Order = Callable[[Sweep], Sequence[str]]


def static(sweep: Sweep) -> list[str]:
    """As the team lists them."""
    return list(sweep.agents)


def shuffled(sweep: Sweep) -> list[str]:
    """Drawn anew each stage."""
    names = list(sweep.agents)
    sweep.rng.shuffle(names)
    return names


def greedy(sweep: Sweep) -> list[str]:
    """By the predicted gain of a step, the largest first."""
    gains = sweep.gains()
    return sorted(sweep.agents, key=lambda name: -gains[name])


ORDERS: dict[str, Callable[..., Any]] = {"static": static, "random": shuffled, "greedy": greedy}


def load_order(
    name: str, options: Mapping[str, Any] | None = None, base: Path | None = None
) -> Order:
    """The order of that name, or the user's own, with its options filled in. Raises UserError."""
    return load_named("order", name, ORDERS, options or {}, skip=1, base=base)
