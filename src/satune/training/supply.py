"""Draws the experience that a schedule asks for from the stream of training problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from satune.core.advantages import groups_with_variance
from satune.training.advantages import groups
from satune.training.ports import Draw
from satune.training.settings import TrainingSettings
from satune.training.state import Batch
from satune.types import Episode, Key

MAX_DRAWS = 4
"""Rollouts a step may spend on finding groups whose rewards differ (dynamic sampling)."""


@dataclass(slots=True)
class Supply:
    """Draws batches from the stream of training problems and counts what they cost."""

    draw: Draw
    settings: TrainingSettings
    offset: int = 0
    fresh_episodes: list[Episode] = field(default_factory=list)

    def batch(self, stage: int, step: int) -> Batch:
        """Roll out ``problems`` groups under the team as it is. Dynamic sampling draws again until
        that many groups have rewards that differ, or MAX_DRAWS rollouts were spent."""
        kept: list[Episode] = []
        self.fresh_episodes = []
        dynamic = self.settings.dynamic_sampling
        wanted = self.settings.problems * self.settings.samples
        for draw in range(MAX_DRAWS if dynamic else 1):
            key = Key(self.settings.seed, "train", stage, step, draw)
            episodes = self.draw(key, self.offset, self.settings.problems)
            self.offset += self.settings.problems
            self.fresh_episodes += episodes
            kept += _informative(episodes) if dynamic else episodes
            if len(kept) >= wanted:
                break
        # Without any difference in reward there is no gradient; the step then changes nothing.
        kept = kept[:wanted] or self.fresh_episodes[:wanted]
        return Batch(kept, [0.0] * len(kept), step, mean_reward(self.fresh_episodes))

    def reserve(self) -> int:
        """Where the problems lie of a rollout that is drawn another time; nobody else has them."""
        self.offset += self.settings.problems
        return self.offset - self.settings.problems


def mean_reward(episodes: Sequence[Episode]) -> float:
    """Of the episodes that the world did not end; 0 where there is none."""
    heard = [e.reward for e in episodes if not e.masked]
    return sum(heard) / max(1, len(heard))


def _informative(episodes: list[Episode]) -> list[Episode]:
    """The episodes of problems whose rewards differ among those that the world did not end."""
    heard = [e for e in episodes if not e.masked]
    rewards_E = torch.tensor([e.reward for e in heard], dtype=torch.float64)
    differ_E = groups_with_variance(rewards_E, groups(heard)).tolist()
    problems = {e.problem.id for e, differs in zip(heard, differ_E, strict=True) if differs}
    return [e for e in episodes if e.problem.id in problems]
