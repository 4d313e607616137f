"""What a learner is asked for, whether its parameters lie in this process or elsewhere, and what it
raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from satune.agents.anchor import Anchor, Measurement, Snapshot
from satune.agents.mixture import Distances, MixturePolicy
from satune.agents.packing import PackedTurns
from satune.agents.rounding import Gauged
from satune.agents.specs import CriticSettings
from satune.core.settings import ObjectiveSettings, Per
from satune.types import Key


class NonFinite(ArithmeticError):
    """A loss, a gradient or logits were NaN or infinite; the step has to be reverted."""


@dataclass(frozen=True, slots=True)
class ValueTargets:
    """What a critic learns: at the flat own tokens ``tokens_N``, in rising order, the values
    ``targets_N``, each with its weight. ``before_N`` is what the critic said of them itself."""

    tokens_N: Tensor
    targets_N: Tensor
    before_N: Tensor
    weights_N: Tensor


class Critic(Protocol):
    """The value function of one agent. ``agents.critic.LocalCritic`` says what each call does."""

    @property
    def settings(self) -> CriticSettings: ...

    def values(self, anchor: Anchor, written_TF: Tensor) -> Tensor: ...

    def fit(self, anchor: Anchor, written_TF: Tensor, lesson: ValueTargets, key: Key) -> float: ...

    def weights(self) -> Mapping[str, Tensor]: ...

    def state(self) -> Mapping[str, Tensor]: ...

    def load(self, state: Mapping[str, Tensor]) -> None: ...


class Learner(Protocol):
    """What training and swaps talk to: one agent's parameters and optimiser, never the module.

    ``agents.learner.LocalLearner`` says what each call does. ``steps`` counts optimiser steps; a
    ``frozen`` learner is never updated.
    """

    @property
    def frozen(self) -> bool: ...

    @property
    def steps(self) -> int: ...

    @property
    def critic(self) -> Critic | None:
        """The agent's value function, which snapshots hold and ``restore`` puts back; None: it has
        none."""
        ...

    def wake(self) -> None: ...

    def rest(self) -> None: ...

    def score(self, packed: PackedTurns) -> Tensor: ...

    def anchor(
        self,
        packed: PackedTurns,
        weights: Mapping[str, Tensor] | None = None,
        *,
        reference: bool = False,
    ) -> Anchor: ...

    def complete(self, anchor: Anchor) -> None: ...

    def accumulate(
        self,
        anchor: Anchor,
        episodes: Sequence[int],
        advantages_U: Tensor,
        weights_U: Tensor,
        objective: ObjectiveSettings,
        per: Per = "episode",
    ) -> dict[str, float]: ...

    def distil(
        self, packed: PackedTurns, episodes: Sequence[int], mixture: MixturePolicy
    ) -> float: ...

    def distances(self, packed: PackedTurns, mixture: MixturePolicy) -> Distances: ...

    def step(self, rate: float | None = None) -> float: ...

    def drop_gradients(self) -> None: ...

    def gradient(self, packed: PackedTurns, coefficients_T: Tensor) -> dict[str, Tensor]: ...

    def measure(
        self, anchor: Anchor, stop: Callable[[Measurement], bool] | None = None
    ) -> Measurement: ...

    def gauge(self, packed: PackedTurns, anchor: Mapping[str, Tensor]) -> Gauged: ...

    def snapshot(self) -> Snapshot: ...

    def restore(self, snapshot: Snapshot) -> None: ...

    def interpolate(
        self, anchor: Mapping[str, Tensor], target: Mapping[str, Tensor], scale: float
    ) -> None: ...

    def export(self) -> Mapping[str, Tensor]:
        """The agent's own parameters by name, copied."""
        ...

    def load_weights(self, weights: Mapping[str, Tensor]) -> None: ...

    def optimizer_state(self) -> Mapping[str, Tensor]: ...

    def load_optimizer_state(self, state: Mapping[str, Tensor], steps: int) -> None: ...

    def keep_reference(self, weights: Mapping[str, Tensor] | None = None) -> None: ...

    @property
    def reference_weights(self) -> Mapping[str, Tensor] | None: ...

    @property
    def device(self) -> str: ...
