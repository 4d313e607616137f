"""The first half of a step: what an agent hears of an experience, and its ascent on that.

THEORY §6. The learner is left holding the proposal; ``update`` measures it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from satune.agents.anchor import Anchor, Snapshot
from satune.agents.packing import PackedTurns, mini_batches, pack
from satune.agents.ports import Critic, Learner
from satune.core.ratios import capped_weights, sequence_log_ratio
from satune.core.settings import ObjectiveSettings
from satune.training.advantages import advantages
from satune.training.credit import GaeCredit
from satune.training.gae import Estimate, Lesson, estimate
from satune.training.likelihoods import written
from satune.training.settings import UpdateSettings
from satune.types import Episode, Experience, Key


class NothingLearnt(Exception):
    """No advantage is left that differs from 0."""


def own_turns(agent: str, episodes: Sequence[Episode]) -> PackedTurns:
    """The agent's turns of every episode, packed for its learner."""
    return pack([[turn for turn in e.turns if turn.agent == agent] for e in episodes])


@dataclass(frozen=True, slots=True)
class Heard:
    """What of an experience an agent learns from: the episodes that the world did not end, at
    ``places`` among all; its own turns of them, and w of each episode, at most the cap."""

    agent: str
    experience: Experience
    places: list[int]
    episodes: list[Episode]
    packed: PackedTurns
    log_weights_E: Tensor
    weights_E: Tensor
    cap: float | None
    capped_mass: float

    @classmethod
    def of(cls, agent: str, experience: Experience, cap: float | None) -> Heard:
        places = [index for index, e in enumerate(experience.episodes) if not e.masked]
        episodes = [experience.episodes[index] for index in places]
        log_weights_E = torch.tensor(
            [experience.log_weights[i] for i in places], dtype=torch.float64
        )
        weights_E, capped_mass = capped_weights(log_weights_E, cap)
        packed = own_turns(agent, episodes)
        return cls(
            agent, experience, places, episodes, packed, log_weights_E, weights_E, cap, capped_mass
        )

    @property
    def masked(self) -> int:
        """How many episodes the world ended."""
        return len(self.experience.episodes) - len(self.episodes)

    @property
    def log_ratios(self) -> list[Sequence[float]] | None:
        """Log w by turn, where the schedule has it."""
        by_turn = self.experience.log_ratios
        return None if by_turn is None else [by_turn[index] for index in self.places]

    def by_episode(self, new_T: Tensor, old_T: Tensor) -> Tensor:
        """Log r of each episode of the whole experience, 0 for those that the world ended."""
        found_E = torch.zeros(len(self.experience.episodes), dtype=torch.float64)
        packed = self.packed
        found_E[self.places] = sequence_log_ratio(new_T, old_T, packed.episode_T, packed.episodes)
        return found_E

    def by_turn(self, new_T: Tensor, old_T: Tensor) -> Tensor:
        """Log r of each own turn of the whole experience, 0 in episodes that the world ended."""
        heard_H = sequence_log_ratio(new_T, old_T, self.packed.turn_T, self.packed.turns)
        everyone = self.experience.episodes
        masked_H = torch.tensor(
            [e.masked for e in everyone for t in e.turns if t.agent == self.agent]
        )
        found_H = torch.zeros(len(masked_H), dtype=heard_H.dtype)
        found_H[~masked_H] = heard_H
        return found_H


def group_lesson(heard: Heard, settings: UpdateSettings) -> Lesson | None:
    """What a rule that compares episodes teaches; None where the agent's critic has to be asked."""
    if isinstance(settings.credit, GaeCredit):
        return None
    advantages_E = advantages(settings.credit, heard.episodes, heard.agent, settings.max_new_tokens)
    return Lesson("episode", advantages_E, heard.weights_E)


def teaching(packed: PackedTurns, lesson: Lesson, settings: UpdateSettings) -> Tensor:
    """True [E] for the episodes that have a gradient of their own: own tokens with a weight, and an
    advantage or else a regulariser. KL(proposal‖anchor) alone gives no step a direction."""
    teaches_U = lesson.weights_U != 0
    if not (settings.objective.entropy or settings.objective.reference_kl):
        teaches_U &= lesson.advantages_U != 0
    teaches_T = teaches_U[packed.units(lesson.per)]
    teaches_E = torch.zeros(packed.episodes, dtype=torch.bool)
    teaches_E[packed.episode_T[teaches_T]] = True
    return teaches_E


@dataclass(slots=True)
class Ascent:
    """A step on its way to its proposal. ``seconds`` says what went into scoring and the critic,
    ``critic`` what the event says of the latter (empty: it was not asked)."""

    learner: Learner
    heard: Heard
    settings: UpdateSettings
    anchor: Anchor
    seconds: dict[str, float]
    critic: dict[str, float | None]

    @classmethod
    def begin(
        cls, learner: Learner, heard: Heard, before: Snapshot, settings: UpdateSettings
    ) -> Ascent:
        """``before`` is the learner as it is."""
        reference = settings.objective.reference_kl > 0
        anchor = learner.anchor(heard.packed, before.weights, reference=reference)
        return cls(learner, heard, settings, anchor, {"score": 0.0}, {})

    def ask_critic(self, rule: GaeCredit, key: Key) -> Lesson:
        """The lesson by the critic's values, and have it learn what came. How much it explained is
        measured before, on an experience that it had not seen. Raises NonFinite."""
        heard, critic = self.heard, _critic(self.learner)
        written_TF = written(heard.packed, heard.episodes, heard.agent, critic.settings)
        values_T = critic_values(self.learner, self.anchor, written_TF, self.seconds)
        found = estimate(
            rule,
            heard.agent,
            heard.episodes,
            heard.packed,
            values_T,
            critic.settings,
            heard.log_weights_E,
            heard.log_ratios,
            heard.cap,
        )
        self.critic = self._fit(critic, written_TF, found, key)
        return found.lesson

    def _fit(
        self, critic: Critic, written_TF: Tensor, found: Estimate, key: Key
    ) -> dict[str, float | None]:
        started = time.perf_counter()
        loss = critic.fit(self.anchor, written_TF, found.targets, key)
        self.seconds["critic"] += time.perf_counter() - started
        mean = float(found.targets.before_N.mean())
        return {"explained_variance": found.explained_variance, "value": mean, "loss": loss}

    def climb(
        self, lesson: Lesson, beta: float, key: Key, tell: Callable[[int], None]
    ) -> dict[str, Any]:
        """The epochs and mini-batches; returns what the event says of them. A mini-batch in which
        no episode teaches anything takes no step: momentum and decay alone would move it. ``tell``
        is given how many are over.

        Raises NonFinite and NothingLearnt."""
        learner, anchor, settings = self.learner, self.anchor, self.settings
        objective: ObjectiveSettings = replace(settings.objective, beta=beta)
        teaches_E = teaching(anchor.packed, lesson, settings)
        if not bool(teaches_E.any()):
            raise NothingLearnt("no advantage differs from 0")
        totals: dict[str, float] = {}
        norms: list[float] = []
        for epoch in range(settings.epochs):
            order = list(range(anchor.packed.episodes))
            key.rng("mini-batches", epoch).shuffle(order)
            for number, mini in enumerate(mini_batches(order, settings.mini_batches)):
                tell(epoch * settings.mini_batches + number)
                if not bool(teaches_E[mini].any()):
                    continue
                metrics = learner.accumulate(
                    anchor, mini, lesson.advantages_U, lesson.weights_U, objective, lesson.per
                )
                before = time.perf_counter()
                learner.complete(anchor)
                self.seconds["score"] += time.perf_counter() - before
                norms.append(learner.step())
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0.0) + value
        clipped = {}
        if "clippable" in totals:  # an objective of the user's own need not say
            clipped["clip_fraction"] = totals["clipped"] / max(totals["clippable"], 1.0)
        return {
            "objective": -totals["policy_loss"] / len(norms),
            **clipped,
            "grad_norm": max(norms),
            "optimizer_steps": len(norms),
        }


def advantages_by_token(
    learner: Learner,
    agent: str,
    episodes: Sequence[Episode],
    packed: PackedTurns,
    settings: UpdateSettings,
) -> Tensor:
    """The advantage [T] of each own token of an experience right after its rollout, which the world
    ended nothing of."""
    rule = settings.credit
    if not isinstance(rule, GaeCredit):
        advantages_E = advantages(rule, episodes, agent, settings.max_new_tokens)
        return advantages_E[packed.episode_T]
    critic, fresh_E = _critic(learner).settings, torch.zeros(len(episodes), dtype=torch.float64)
    written_TF = written(packed, episodes, agent, critic)
    values_T = critic_values(learner, learner.anchor(packed), written_TF, {"score": 0.0})
    lesson = estimate(rule, agent, episodes, packed, values_T, critic, fresh_E).lesson
    return lesson.advantages_U[packed.units(lesson.per)]


def critic_values(
    learner: Learner, anchor: Anchor, written_TF: Tensor, seconds: dict[str, float]
) -> Tensor:
    """The critic's values [T] of the anchor's own tokens; completes the anchor."""
    started = time.perf_counter()
    learner.complete(anchor)
    seconds["score"] += time.perf_counter() - started
    started = time.perf_counter()
    values_T = _critic(learner).values(anchor, written_TF)
    seconds["critic"] = time.perf_counter() - started
    return values_T


def _critic(learner: Learner) -> Critic:
    critic = learner.critic
    assert critic is not None, "an agent without a critic has no values"
    return critic
