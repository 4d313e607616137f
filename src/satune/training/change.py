"""A change of the team: some agents have other weights than at the last certificate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from satune.agents.anchor import Snapshot
from satune.agents.ports import Learner
from satune.agents.weights import weights_digest
from satune.core.ratios import sequence_log_ratio
from satune.core.trust_region import TrustRegionSettings
from satune.training.ascent import own_turns
from satune.training.ports import Agents, Host
from satune.training.settings import TrainingSettings
from satune.training.state import Held
from satune.types import Episode


@dataclass(frozen=True, slots=True)
class Change:
    """The agents that have changed since the last certificate.

    The learners hold the new weights and ``held`` has the old ones. Once a smaller change is tried,
    ``proposed`` keeps the weights of the whole one.
    """

    learners: Agents
    held: Mapping[str, Held]
    proposed: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many accepted steps the change consists of."""
        return sum(held.changes for held in self.held.values())

    @property
    def since(self) -> dict[str, int]:
        """The first step that the change consists of; the old team is the team before that step."""
        stage, step = min(held.since for held in self.held.values())
        return {"stage": stage, "step": step}

    def digests(self) -> tuple[dict[str, str], dict[str, str]]:
        """What tells the old and the new weights of each agent from any others."""
        old = {n: _digest(self.learners[n], h.snapshot.weights) for n, h in self.held.items()}
        new = {name: _digest(learner, learner.export()) for name, learner in self.learners.items()}
        return old, new

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put back the old weights of all agents that changed, for as long as the block runs.
        Optimisers stay as they are."""
        with ExitStack() as stack:
            for name, learner in self.learners.items():
                stack.enter_context(undone(learner, self.held[name].snapshot))
            yield

    def shrink(self, scale: float) -> None:
        """Go ``scale`` of the way from the old weights to those of the whole change."""
        for name, learner in self.learners.items():
            if name not in self.proposed:
                self.proposed[name] = learner.export()
            learner.interpolate(self.held[name].snapshot.weights, self.proposed[name], scale)

    def revert(self) -> None:
        """Put weights and optimisers back to the old ones, bit for bit."""
        for name, learner in self.learners.items():
            learner.restore(self.held[name].snapshot)


@contextmanager
def undone(learner: Learner | Host, before: Snapshot) -> Iterator[None]:
    """Put the weights of ``before`` in place for as long as the block runs; the optimiser stays."""
    present = learner.export()
    learner.load_weights(before.weights)
    try:
        yield
    finally:
        learner.load_weights(present)


def _digest(learner: Learner | Host, weights: Mapping[str, Tensor]) -> str:
    """What tells these weights of the agent from any others."""
    return learner.digest(weights) if isinstance(learner, Host) else weights_digest(weights)


def log_ratios(change: Change, episodes: Sequence[Episode]) -> Tensor:
    """u of THEORY §5 [E]: log(new/old) over the own tokens of every agent that changed."""
    total_E = torch.zeros(len(episodes), dtype=torch.float64)
    for name, learner in change.learners.items():
        total_E += log_ratios_of(learner, change.held[name].snapshot, name, episodes)
    return total_E


def log_ratios_of(
    learner: Learner | Host, before: Snapshot, agent: str, episodes: Sequence[Episode]
) -> Tensor:
    """One agent's part of it: log(present weights/``before``) over its own tokens [E]."""
    if isinstance(learner, Host):
        return learner.log_ratios(before, episodes)
    packed = own_turns(agent, episodes)
    if packed.tokens == 0:
        return torch.zeros(len(episodes), dtype=torch.float64)
    new_T = learner.score(packed).double()
    with undone(learner, before):
        old_T = learner.score(packed).double()
    return sequence_log_ratio(new_T, old_T, packed.episode_T, len(episodes))


def region_of(
    learner: Learner | Host, agent: str, settings: TrainingSettings
) -> TrustRegionSettings:
    """The trust region that held the agent's step; its owner's, where it lives elsewhere."""
    return learner.region if isinstance(learner, Host) else settings.region(agent)
