"""From episodes to advantages: a credit rule says how much better than expected each episode was
for one agent.

A rule is a callable ``rule(episodes, agent, max_new_tokens) -> Tensor [E]`` whose options are what
its class (or, beyond these three, its function) takes:

    episodes        those of one experience that tell something about the policy: whole groups of at
                    least two, the world's failures left out
    agent           the agent that is about to learn
    max_new_tokens  the most tokens that a message may have
    result          one advantage an episode, in the order of ``episodes``; 0 teaches nothing

``gae`` is another kind: it asks the agent's critic and gives an advantage a turn or a token.
A recipe names one of CREDIT or the user's own, ``credit: path/to/file.py:name``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from satune.agents.packing import PackedTurns
from satune.agents.ports import ValueTargets
from satune.agents.specs import CriticSettings
from satune.core.advantages import Baseline, group_advantages, overlong_penalty
from satune.core.objectives import Per
from satune.core.ratios import capped_weights
from satune.core.values import explained_variance
from satune.loading import load_named
from satune.ranges import Positive, Whole, check
from satune.training.gae import own_advantages, own_moments
from satune.types import Episode, UserError

Rule = Callable[[Sequence[Episode], str, int], Tensor]


@dataclass(frozen=True, slots=True)
class Lesson:
    """What an update learns from an experience: an advantage and a weight ``per`` episode, own turn
    or own token of it, in the order of the packed turns."""

    per: Per
    advantages_U: Tensor
    weights_U: Tensor


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
            groups(episodes),
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
class Estimate:
    """What ``gae`` makes of an experience: the lesson of the agent, that of its critic, and how
    much of the discounted rewards the critic's values explained (None: all rewards are equal)."""

    lesson: Lesson
    targets: ValueTargets
    explained_variance: float | None


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

    def estimate(
        self,
        agent: str,
        episodes: Sequence[Episode],
        packed: PackedTurns,
        values_T: Tensor,
        critic: CriticSettings,
        log_weights_E: Tensor,
        log_ratios: Sequence[Sequence[float]] | None = None,
        cap: float | None = None,
    ) -> Estimate:
        """Advantages, weights and the critic's targets of an experience without what the world
        ended. ``log_weights_E`` are log w of whole episodes, of which ``log_ratios`` has each
        turn's part; ``cap`` bounds w."""
        per = critic.boundary
        ratios = log_ratios if self.traces else None
        moments = own_moments(packed, episodes, agent, ratios)
        worth = seats_reward if self.reward == "seats" else lambda episode, _: episode.reward
        rewards_E = torch.tensor([worth(e, agent) for e in episodes], dtype=torch.float64)

        def advantages(lam: float) -> Tensor:
            return own_advantages(
                moments, values_T, rewards_E, gamma=critic.discount, lam=lam, per=per
            )

        log_weights_S = log_weights_E[moments.episode_S]
        if ratios is not None:
            whole_E = torch.tensor([sum(each) for each in ratios], dtype=torch.float64)
            log_weights_S = log_weights_S - whole_E[moments.episode_S] + moments.before_S
        weights_S, _ = capped_weights(log_weights_S, cap)
        spoke_H = moments.step_H >= 0
        weights_H = torch.zeros(len(spoke_H), dtype=torch.float64)
        weights_H[spoke_H] = weights_S[moments.step_H[spoke_H]]
        weights_U = weights_H if per == "turn" else weights_H[packed.turn_T]
        tokens_N = moments.first_H[spoke_H] if per == "turn" else torch.arange(packed.tokens)
        asked_U = spoke_H if per == "turn" else torch.ones(packed.tokens, dtype=torch.bool)

        advantages_U = advantages(critic.lam)
        values_N, weights_N = values_T.double()[tokens_N], weights_U[asked_U]
        targets = ValueTargets(tokens_N, values_N + advantages_U[asked_U], values_N, weights_N)
        returns_N = values_N + advantages(1.0)[asked_U]
        explained = explained_variance(values_N, returns_N, weights_N)
        if self.whiten:
            advantages_U = torch.where(asked_U, _whitened(advantages_U, weights_U), 0.0)
        if self.clip is not None:
            advantages_U = advantages_U.clamp(-self.clip, self.clip)
        return Estimate(Lesson(per, advantages_U, weights_U), targets, explained)


def _whitened(advantages_U: Tensor, weights_U: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 under the weights; 0 where all that count are equal."""
    counted = advantages_U[weights_U != 0]
    if not len(counted) or bool((counted == counted[0]).all()):
        return torch.zeros_like(advantages_U)
    share_U = weights_U / weights_U.sum()
    centred_U = advantages_U - (share_U * advantages_U).sum()
    return centred_U / ((share_U * centred_U**2).sum().sqrt() + 1e-8)


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
    label: dict[str, int] = {}
    return torch.tensor([label.setdefault(e.problem.id, len(label)) for e in episodes])


def _longest(episode: Episode, agent: str) -> int:
    return max((t.completion_tokens for t in episode.turns if t.agent == agent), default=0)
