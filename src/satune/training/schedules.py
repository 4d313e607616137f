"""Where a step's experience comes from, and how it is re-weighted inside a stage (THEORY §6)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from satune.core.advantages import groups_with_variance
from satune.core.ratios import effective_sample_size
from satune.training.ports import Draw
from satune.training.settings import ScheduleName, ScheduleSettings, TrainingSettings
from satune.training.state import Batch
from satune.training.update import groups
from satune.types import Episode, Experience, Key

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
        dynamic = self.settings.update.advantage.dynamic_sampling
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
        reward = sum(e.reward for e in self.fresh_episodes) / len(self.fresh_episodes)
        return Batch(kept, [0.0] * len(kept), step, reward)


def _informative(episodes: list[Episode]) -> list[Episode]:
    rewards_E = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
    differ_E = groups_with_variance(rewards_E, groups(episodes)).tolist()
    return [episode for episode, differs in zip(episodes, differ_E, strict=True) if differs]


def needs_rollout(settings: ScheduleSettings, batch: Batch, step: int) -> bool:
    """Whether ``step`` has to be rolled out for anew.

    fresh: before every agent. hybrid: when ESS/N has fallen below the limit. reuse, stale and
    simultaneous: once a stage. All: when the batch is spent.
    """
    if step <= batch.drawn_before:
        return False
    if batch.spent:
        return True
    if settings.name == "hybrid":
        ess = effective_sample_size(torch.tensor(batch.log_weights, dtype=torch.float64))
        # Written so that a weight that is not finite, and its NaN, also rolls out again.
        return not ess >= settings.ess * len(batch.episodes)
    return settings.name == "fresh"


def experience_for(schedule: ScheduleName, batch: Batch) -> Experience:
    """What the next agent learns from: the batch, weighted by w unless the schedule is naive."""
    weighted = schedule not in ("stale", "simultaneous")
    weights = batch.log_weights if weighted else [0.0] * len(batch.episodes)
    return Experience(tuple(batch.episodes), tuple(weights))
