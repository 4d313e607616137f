"""From episodes to advantages, by a credit rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from satune.training.credit import Rule, labels
from satune.types import Episode, UserError


def advantages(rule: Rule, episodes: Sequence[Episode], agent: str, max_new_tokens: int) -> Tensor:
    """Advantages [E] of an experience in float64, by a rule that sees only what may be judged.

    Episodes that the world ended get 0 and play no part in their group; a group with fewer than
    two others has nothing to compare and gets 0.
    Raises: UserError if the rule does not give one number an episode.
    """
    heard = Counter(episode.problem.id for episode in episodes if not episode.masked)
    judged = [
        index
        for index, episode in enumerate(episodes)
        if not episode.masked and heard[episode.problem.id] >= 2
    ]
    advantages_E = torch.zeros(len(episodes), dtype=torch.float64)
    if judged:
        found = torch.as_tensor(rule([episodes[i] for i in judged], agent, max_new_tokens))
        if found.shape != (len(judged),):
            raise UserError(
                f"credit: the rule gave the shape {tuple(found.shape)} for {len(judged)} episodes; "
                "return one advantage an episode"
            )
        advantages_E[judged] = found.detach().double()
    return advantages_E


def groups(episodes: Sequence[Episode]) -> Tensor:
    """The problem of each episode as a label [E], counted in order of first appearance."""
    return torch.tensor(labels(episodes))
