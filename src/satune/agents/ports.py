"""What a learner is asked for, whether its parameters lie in this process or elsewhere, and what it
raises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from satune.agents.anchor import Anchor, Measurement, Snapshot
from satune.agents.mixture import Distances, MixturePolicy
from satune.agents.packing import PackedTurns
from satune.agents.rounding import Gauged
from satune.core.settings import ObjectiveSettings


class NonFinite(ArithmeticError):
    """A loss, a gradient or logits were NaN or infinite; the step has to be reverted."""


class Learner(Protocol):
    """What training and swaps talk to: one agent's parameters and optimiser, never the module.

    ``agents.learner.LocalLearner`` says what each call does. ``steps`` counts optimiser steps; a
    ``frozen`` learner is never updated.
    """

    frozen: bool
    steps: int

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
        advantages_E: Tensor,
        weights_E: Tensor,
        objective: ObjectiveSettings,
    ) -> dict[str, float]: ...

    def distil(
        self, packed: PackedTurns, episodes: Sequence[int], mixture: MixturePolicy
    ) -> float: ...

    def distances(self, packed: PackedTurns, mixture: MixturePolicy) -> Distances: ...

    def step(self, rate: float | None = None) -> float: ...

    def drop_gradients(self) -> None: ...

    def gradient(self, packed: PackedTurns, coefficients_T: Tensor) -> dict[str, Tensor]: ...

    def measure(self, anchor: Anchor) -> Measurement: ...

    def gauge(self, packed: PackedTurns, anchor: Mapping[str, Tensor]) -> Gauged: ...

    def snapshot(self) -> Snapshot: ...

    def restore(self, snapshot: Snapshot) -> None: ...

    def interpolate(
        self, anchor: Mapping[str, Tensor], target: Mapping[str, Tensor], scale: float
    ) -> None: ...

    def export(self) -> dict[str, Tensor]:
        """The agent's own parameters by name, copied."""
        ...

    def load_weights(self, weights: Mapping[str, Tensor]) -> None: ...

    def optimizer_state(self) -> dict[str, Tensor]: ...

    def load_optimizer_state(self, state: Mapping[str, Tensor], steps: int) -> None: ...

    def keep_reference(self, weights: Mapping[str, Tensor] | None = None) -> None: ...

    @property
    def reference_weights(self) -> Mapping[str, Tensor] | None: ...

    @property
    def device(self) -> str: ...
