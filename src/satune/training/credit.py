"""The credit rules: each says how much better than expected every episode was for one agent
(``training.advantages`` asks them).

A rule is a callable ``rule(episodes, agent, max_new_tokens) -> Tensor [E]`` whose options are what
its class (or, beyond these three, its function) takes:

    episodes        those of one experience that tell something about the policy: whole groups of at
                    least two, the world's failures left out
    agent           the agent that is about to learn
    max_new_tokens  the most tokens that a message may have
    result          one advantage an episode, in the order of ``episodes``; 0 teaches nothing

``gae`` is another kind: it asks the agent's critic and gives an advantage a turn or a token
(``training.gae``).
A recipe names one of CREDIT or the user's own, ``credit: path/to/file.py:name``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from satune.core.settings import Baseline
from satune.loading import load_named
from satune.ranges import Positive, Whole, check
from satune.types import Episode

if TYPE_CHECKING:  # a recipe is read without torch
    from torch import Tensor

Rule = Callable[[Sequence[Episode], str, int], "Tensor"]


@dataclass(frozen=True, slots=True)
class GroupCredit:
    """The team's reward compared with those of the same problem's other episodes (THEORY §6).

    ``baseline`` is what a reward is compared with, ``normalise`` divides by the group's standard
    deviation, ``clip`` bounds the absolute advantage. With ``overlong_buffer`` the agent's longest
    message of an episode is charged as it nears the limit (DAPO).
    """

    baseline: Baseline = "mean"
    normalise: bool = True
    clip: Positive = 5.0
    overlong_buffer: Whole = 0

    def __post_init__(self) -> None:
        check(self, "credit")

    def __call__(self, episodes: Sequence[Episode], agent: str, max_new_tokens: int) -> Tensor:
        import torch

        from satune.core.advantages import group_advantages, overlong_penalty

        rewards = [self.reward(episode, agent) for episode in episodes]
        rewards_E = torch.tensor(rewards, dtype=torch.float64)
        if self.overlong_buffer > 0:
            longest_E = torch.tensor([_longest(episode, agent) for episode in episodes])
            rewards_E = (
                rewards_E
                + overlong_penalty(
                    longest_E, limit=max_new_tokens, buffer=self.overlong_buffer
                ).double()
            )
        return group_advantages(
            rewards_E,
            torch.tensor(labels(episodes)),
            baseline=self.baseline,
            normalise=self.normalise,
            clip=self.clip,
        )

    def reward(self, episode: Episode, agent: str) -> float:
        """What the episode was worth to the agent."""
        return episode.reward


@dataclass(frozen=True, slots=True)
class SeatCredit(GroupCredit):
    """As ``group``, with the reward that the grade gives to the agent's own seats.

    An episode is worth the mean of ``Grade.seats`` over the seats in which the agent spoke. Seats
    that the grade does not name are left out; where it names none of them, as after the policy's
    own failure, the episode is worth the team's reward.
    """

    def reward(self, episode: Episode, agent: str) -> float:
        return seats_reward(episode, agent)


def seats_reward(episode: Episode, agent: str) -> float:
    """The mean reward of the agent's own seats, as ``SeatCredit`` says."""
    given = episode.grade.seats or {}
    own = {turn.seat: given[turn.seat] for turn in episode.turns
           if turn.agent == agent and turn.seat in given}  # fmt: skip
    return sum(own.values()) / len(own) if own else episode.reward


@dataclass(frozen=True, slots=True)
class GaeCredit:
    """Generalised advantages by the agent's critic, over its own turns or tokens (THEORY §6).

    ``reward`` is the "team"'s, or of the agent's own "seats" as the credit rule of that name has
    it. Where agents were updated since the rollout, every turn has the weight w of its whole
    episode; with ``traces`` it has that of what the others wrote before it, and truncated traces
    correct what they wrote after. ``whiten`` takes the mean away from the advantages and divides
    them by their standard deviation, both weighted; ``clip`` then bounds their absolute value
    (None: no bound).
    """

    reward: Literal["team", "seats"] = "team"
    traces: bool = False
    whiten: bool = True
    clip: Positive | None = 5.0

    def __post_init__(self) -> None:
        check(self, "credit")

    def worth(self, episode: Episode, agent: str) -> float:
        """What the episode pays the agent at its end."""
        return seats_reward(episode, agent) if self.reward == "seats" else episode.reward


Credit = Rule | GaeCredit
CREDIT: dict[str, Callable[..., Any]] = {
    "group": GroupCredit,
    "seats": SeatCredit,
    "gae": GaeCredit,
}


def load_credit(
    name: str, options: Mapping[str, Any] | None = None, base: Path | None = None
) -> Credit:
    """The rule of that name, or the user's own, with its options filled in. Raises UserError."""
    return load_named("credit", name, CREDIT, options or {}, skip=3, base=base)


def labels(episodes: Sequence[Episode]) -> list[int]:
    """The problem of each episode as a label, counted in order of first appearance."""
    label: dict[str, int] = {}
    return [label.setdefault(episode.problem.id, len(label)) for episode in episodes]


def _longest(episode: Episode, agent: str) -> int:
    return max((t.completion_tokens for t in episode.turns if t.agent == agent), default=0)
