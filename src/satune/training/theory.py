"""What the theory says of a change, from episodes of the old team (THEORY §4, §8).

Shape suffixes: ``T`` own tokens, ``E`` episodes, ``H`` own steps of an episode. An own step is a
moment in which an agent that changed speaks; agents that share one are one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from satune.training.update import own_turns
from satune.types import Episode

if TYPE_CHECKING:
    from satune.training.certification import Change


@dataclass(frozen=True, slots=True)
class OwnSteps:
    """log(new/old) and KL(old‖new) of each own step [E, H], 0 where an episode has fewer."""

    log_ratio_EH: Tensor
    kl_EH: Tensor


def measure_own_steps(change: Change, episodes: Sequence[Episode]) -> OwnSteps:
    """Log-ratios and exact KL(old‖new) of a change's own steps, on the old team's ``episodes``.

    The new weights are in place before and after.
    """
    moments = [_own_moments(e, change.learners) for e in episodes]
    longest = max((len(m) for m in moments), default=0)
    shape = (len(episodes), longest)
    log_ratio_EH = torch.zeros(shape, dtype=torch.float64)
    kl_EH = torch.zeros(shape, dtype=torch.float64)
    for name, learner in change.learners.items():
        packed = own_turns(name, episodes)
        if packed.tokens == 0:
            continue
        with change.undone():
            anchor = learner.anchor(packed)
            learner.complete(anchor)
        measured = learner.measure(anchor)
        place_T = _places(name, episodes, moments, longest)[packed.turn_T]
        difference_T = measured.logprobs_T.double() - anchor.logprobs_T.double()
        log_ratio_EH.view(-1).index_add_(0, place_T, difference_T)
        kl_EH.view(-1).index_add_(0, place_T, measured.reverse_kl_T.double())
    return OwnSteps(log_ratio_EH, kl_EH)


def _own_moments(episode: Episode, agents: Mapping[str, object]) -> dict[int, int]:
    """The moments in which one of the agents speaks, each with its place among them."""
    spoken = sorted({turn.moment for turn in episode.turns if turn.agent in agents})
    return {moment: place for place, moment in enumerate(spoken)}


def _places(
    agent: str, episodes: Sequence[Episode], moments: Sequence[Mapping[int, int]], longest: int
) -> Tensor:
    """Where each of the agent's turns lies in a flat [E, H]."""
    return torch.tensor(
        [
            index * longest + moments[index][turn.moment]
            for index, episode in enumerate(episodes)
            for turn in episode.turns
            if turn.agent == agent
        ]
    )


def theory_rows(episodes, steps, delta):
    return []
