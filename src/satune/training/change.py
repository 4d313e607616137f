"""A change of the team: some agents have other weights than at the last certificate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from satune.agents.ports import Learner
from satune.agents.weights import weights_digest
from satune.core.ratios import sequence_log_ratio
from satune.training.state import Held
from satune.training.update import own_turns
from satune.types import Episode


@dataclass(frozen=True, slots=True)
class Change:
    """The agents that have changed since the last certificate.

    The learners hold the new weights and ``held`` has the old ones. Once a smaller change is tried,
    ``proposed`` keeps the weights of the whole one.
    """

    learners: Mapping[str, Learner]
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
        old = {name: weights_digest(held.snapshot.weights) for name, held in self.held.items()}
        new = {name: weights_digest(learner.export()) for name, learner in self.learners.items()}
        return old, new

    @contextmanager
    def undone(self, *names: str) -> Iterator[None]:
        """Put back the old weights of the agents named, or of all that changed, for as long as the
        block runs. Optimisers stay as they are."""
        learners = {name: self.learners[name] for name in names or self.learners}
        present = {name: learner.export() for name, learner in learners.items()}
        for name, learner in learners.items():
            learner.load_weights(self.held[name].snapshot.weights)
        try:
            yield
        finally:
            for name, learner in learners.items():
                learner.load_weights(present[name])

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


def log_ratios(change: Change, episodes: Sequence[Episode]) -> Tensor:
    """u of THEORY §5 [E]: log(new/old) over the own tokens of every agent that changed."""
    total_E = torch.zeros(len(episodes), dtype=torch.float64)
    for name, learner in change.learners.items():
        packed = own_turns(name, episodes)
        if packed.tokens == 0:
            continue
        new_T = learner.score(packed).double()
        with change.undone(name):
            old_T = learner.score(packed).double()
        total_E += sequence_log_ratio(new_T, old_T, packed.episode_T, len(episodes))
    return total_E
