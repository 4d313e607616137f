"""A learner whose agent is cut over all processes: rank 0 calls it, the others take part.

In every process there is a part of each agent's learner (``crew.ShardLearner``): a local learner
over its shard of the weights, gradients and moments and its share of an experience. What training
calls on rank 0 (``ShardedLearner``) is told to all of them, with its arguments, and carried out by
all at once. Anchors and sets of weights stay where they were made; rank 0 has their numbers, and
gathers a tensor when somebody looks at it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from satune.agents.anchor import Anchor, Measurement, Snapshot
from satune.agents.crew import Crew, Shards, SharedAnchor
from satune.agents.mixture import Distances, MixturePolicy
from satune.agents.packing import PackedTurns
from satune.agents.policy import Policy
from satune.agents.rounding import Gauged, gauge
from satune.core.settings import ObjectiveSettings, Per
from satune.types import UserError


class _SharedSnapshot(Snapshot):
    """An agent as it was, a shard a process."""

    def rest(self) -> None:
        assert isinstance(self.weights, Shards)
        held = self.weights.held
        held.crew.ask(self.weights.agent, "rest_snapshot", held)


def _never(_: Measurement) -> bool:
    return False


class ShardedLearner:
    """The ``agents.ports.Learner`` of an agent that is cut over all processes, on rank 0.

    ``whole`` is the same agent in one piece, as rank 0's engine has it; rounding is gauged on it.
    """

    critic = None

    def __init__(self, crew: Crew, agent: str, whole: Policy) -> None:
        self._crew, self._agent, self._whole = crew, agent, whole
        self._part = crew.parts[agent]
        self._reference: Shards | None = None

    def _ask(self, method: str, *arguments: Any, **how: Any) -> Any:
        return self._crew.ask(self._agent, method, *arguments, **how)

    @property
    def frozen(self) -> bool:
        return self._part.frozen

    @property
    def steps(self) -> int:
        return self._part.steps

    @property
    def device(self) -> str:
        return self._part.device

    def wake(self) -> None:
        self._ask("wake")

    def rest(self) -> None:
        self._ask("rest")

    # -- scoring ---------------------------------------------------------------------------------

    def score(self, packed: PackedTurns) -> Tensor:
        return self._ask("score", packed)

    def anchor(
        self,
        packed: PackedTurns,
        weights: Mapping[str, Tensor] | None = None,
        *,
        reference: bool = False,
    ) -> Anchor:
        given = None if weights is None else self._shards(weights)
        held = self._ask("hold_anchor", packed, given, reference, keep=True)
        own: Anchor = self._crew.kept(held.number)
        return SharedAnchor(
            packed, own.states, own.logprobs_T, own.known_T, own.reference, held=held
        )

    def complete(self, anchor: Anchor) -> None:
        self._ask("complete", anchor)

    def measure(
        self, anchor: Anchor, stop: Callable[[Measurement], bool] | None = None
    ) -> Measurement:
        told = None if stop is None else _never
        return self._ask("measure", anchor, told, own=stop)

    def gauge(self, packed: PackedTurns, anchor: Mapping[str, Tensor]) -> Gauged:
        budget = self._part.settings.micro_batch_tokens
        with self._whole.holding(self.export()):
            return gauge(self._whole, packed, dict(anchor), budget)

    # -- learning --------------------------------------------------------------------------------

    def accumulate(
        self,
        anchor: Anchor,
        episodes: Sequence[int],
        advantages_U: Tensor,
        weights_U: Tensor,
        objective: ObjectiveSettings,
        per: Per = "episode",
    ) -> dict[str, float]:
        if objective.loss is not None:
            objective = replace(objective, loss=None)
        return self._ask(
            "accumulate", anchor, list(episodes), advantages_U, weights_U, objective, per
        )

    def distil(self, packed: PackedTurns, episodes: Sequence[int], mixture: MixturePolicy) -> float:
        raise UserError(_not_sharded("distillation"))

    def distances(self, packed: PackedTurns, mixture: MixturePolicy) -> Distances:
        raise UserError(_not_sharded("a mixture's distances"))

    def step(self, rate: float | None = None) -> float:
        return self._ask("step", rate)

    def drop_gradients(self) -> None:
        self._ask("drop_gradients")

    def gradient(self, packed: PackedTurns, coefficients_T: Tensor) -> dict[str, Tensor]:
        return dict(self._made("gradient", packed, coefficients_T))

    # -- weights ---------------------------------------------------------------------------------

    def export(self) -> Shards:
        return self._made("export")

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self._ask("load_weights", self._shards(weights))

    def snapshot(self) -> Snapshot:
        held = self._ask("snapshot", keep=True)
        weights, optimizer = (Shards(self._agent, held, part) for part in ("weights", "optimizer"))
        return _SharedSnapshot(weights, optimizer, self.steps)

    def restore(self, snapshot: Snapshot) -> None:
        weights, optimizer = map(self._shards, (snapshot.weights, snapshot.optimizer))
        self._ask("put_back", weights, optimizer, snapshot.steps)

    def interpolate(
        self, anchor: Mapping[str, Tensor], target: Mapping[str, Tensor], scale: float
    ) -> None:
        self._ask("interpolate", self._shards(anchor), self._shards(target), scale)

    def optimizer_state(self) -> Shards:
        return self._made("optimizer_state")

    def load_optimizer_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        self._ask("load_optimizer_state", self._shards(state), steps)

    def keep_reference(self, weights: Mapping[str, Tensor] | None = None) -> None:
        given = None if weights is None else self._shards(weights)
        self._reference = self._made("hold_reference", given)

    @property
    def reference_weights(self) -> Mapping[str, Tensor] | None:
        return self._reference

    def _made(self, method: str, *arguments: Any) -> Shards:
        """What a method of the parts makes, which is shards by name."""
        return Shards(self._agent, self._ask(method, *arguments, keep=True))

    def _shards(self, weights: Mapping[str, Tensor]) -> Shards:
        """``weights`` where they are shards, else as such: rank 0 gives each process its own."""
        if isinstance(weights, Shards):
            return weights
        told = {name: t.cpu() if t.dim() == 0 else None for name, t in weights.items()}
        held = self._ask("scattered", told, keep=True, own=dict(weights))
        return Shards(self._agent, held)


def _not_sharded(what: str) -> str:
    return f"{what} is not computed by a sharded learner; leave sharding out of the recipe"
