"""The projection realised in the newcomer's own weights (THEORY §7, b).

On-policy distillation of KL(π_θ‖π_λ): the team plays with the newcomer-being-trained in the seat,
and where it spoke it is drawn to the mixture. Then it is measured, on problems that gave no
gradient, and taken only where it lies inside δ.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from satune.agents.learner import LocalLearner, NonFinite, OptimizerSettings
from satune.agents.mixture import MixturePolicy
from satune.agents.packing import PackedTurns, micro_batches, padded_budget
from satune.agents.policy import Policy
from satune.agents.prefixes import states_of
from satune.agents.weights import Weights
from satune.core.divergence import DivergenceStatistics
from satune.core.logprobs import exact_kl
from satune.core.trust_region import Unit
from satune.swap.measurement import Distances, measure, statistics_of, student_logits, teach
from satune.training.update import own_turns
from satune.types import Episode, Key, UserError

Draw = Callable[[Key, int, int], list[Episode]]
"""(key, offset into the problems, how many) -> whole groups of episodes; as training's."""
Publish = Callable[[int, Mapping[str, Tensor]], None]
"""Gives the engine the student's weights under their version number."""
Decision = Literal["distilled", "mixture", "refused", "outside"]


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """``delta`` (nats) bounds the ``quantile`` of KL(student‖incumbent) over ``unit``.

    The mixture taught lies at ``aim`` x delta, because a student misses it by something. Each of at
    most ``rounds`` rounds plays ``problems`` problems anew and learns from them, and from episodes
    of earlier rounds ``passes`` - 1 times as many, ``batch`` episodes an optimiser step; rounds end
    when the quantile, over states that gave no gradient yet, is at most ``stop`` x delta
    ``confirm`` times in a row, the weights at rest meanwhile: the first low reading of many is low
    by luck. ``measure_problems`` are played anew for the measurement, by either team.
    ``otherwise`` is what becomes of a student outside delta; "outside" leaves that to the caller.
    The learning rate rises to the optimiser's over the first ``warmup`` of all rounds and falls
    with half a cosine to zero. Raises: ValueError if a value lies outside its range.
    """

    delta: float = 0.01
    quantile: float = 0.99
    unit: Unit = "token"
    aim: float = 0.1
    stop: float = 0.9
    confirm: int = 3
    rounds: int = 30
    problems: int = 16
    passes: int = 4
    batch: int = 16
    warmup: float = 0.05
    measure_problems: int = 64
    confidence: float = 0.95
    otherwise: Literal["mixture", "refused", "outside"] = "mixture"
    seed: int = 0
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"distill.delta {self.delta}: give a positive number of nats")
        for name in ("quantile", "aim", "stop", "warmup"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"distill.{name} {getattr(self, name)}: give a value in (0, 1]")
        for name in ("confirm", "rounds", "problems", "passes", "batch", "measure_problems"):
            if getattr(self, name) < 1:
                raise ValueError(f"distill.{name} {getattr(self, name)}: give at least 1")


@dataclass(frozen=True, slots=True)
class Distilled:
    """What came of it. ``event`` holds plain figures: ``rounds`` one by one, and the measurement.

    "distilled": the student holds the accepted weights; "outside": those that are not.
    "mixture" and "refused": it holds the newcomer's, bit for bit, and the seat is filled by a
    MixturePolicy or stays the incumbent's.
    """

    decision: Decision
    reason: str
    event: dict[str, Any]


def student_of(newcomer: Policy, name: str) -> Policy:
    """A copy of the newcomer to be trained, which is called ``name``."""
    return Policy(
        name,
        copy.deepcopy(newcomer.model),
        newcomer.tokenizer,
        newcomer.temperature,
        adapter=newcomer.adapter,
        autocast=newcomer.autocast,
    )


def distill(
    agent: str,
    incumbent: Policy,
    newcomer: Policy,
    student: Policy,
    settings: DistillSettings,
    *,
    draw: Draw,
    draw_incumbent: Draw,
    publish: Publish,
    version: int = 0,
    offset: int = 0,
    watch: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Distilled:
    """Draw ``student``, the newcomer's copy, to the mixture of both; measure; accept or not.

    ``draw`` plays with the student in the seats of ``agent``, ``draw_incumbent`` with the
    incumbent; turns of either bear the agent's name. ``offset`` is the first problem used; the
    measurement's follow those that gave gradients. ``watch`` sees each round's row as it ends.
    The student's optimiser is its own, and no other policy is touched.
    Raises: UserError where the tokenizers differ or the agent never speaks, RuntimeError if the
    engine kept old weights.
    """
    started = time.perf_counter()
    teacher = MixturePolicy(agent, incumbent, newcomer, settings.aim * settings.delta)
    learner = LocalLearner(student, settings.optimizer)
    before = learner.snapshot()
    rows: list[dict[str, Any]] = []
    event: dict[str, Any] = {
        "delta": settings.delta,
        "aim": settings.aim,
        "quantile": settings.quantile,
        "unit": settings.unit,
        "rounds": rows,
    }
    play = _Play(agent, draw, draw_incumbent, publish, settings, version, offset)
    try:
        _learn(learner, teacher, play, rows, watch)
        visited = {"newcomer": play.newcomer(measuring=True), "incumbent": play.incumbent()}
        found = {
            whose: _statistics(student, teacher, agent, episodes, settings)[0]
            for whose, episodes in visited.items()
        }
    except NonFinite as error:
        learner.drop_gradients()
        decision, reason = "refused", str(error)
    else:
        event["kl"] = {whose: each.to_dict() for whose, each in found.items()}
        # Each direction on the states of the policy that its expectation is over.
        event["trajectory"] = {
            "forward": found["newcomer"].trajectory["forward"],
            "reverse": found["incumbent"].trajectory["reverse"],
        }
        event["reward"] = {whose: _reward(episodes) for whose, episodes in visited.items()}
        decision, reason = _judge(found, settings)
    if decision not in ("distilled", "outside"):
        learner.restore(before)
        play.published(learner)
    learner.rest()
    event |= {"decision": decision, "reason": reason, "version": play.version}
    event["seconds"] = time.perf_counter() - started
    return Distilled(decision, reason, event)


@dataclass(slots=True)
class _Play:
    """The two teams as they play: problems used so far, and the student's version."""

    agent: str
    draw: Draw
    draw_incumbent: Draw
    publish: Publish
    settings: DistillSettings
    version: int
    offset: int
    rollouts: int = 0

    def published(self, learner: LocalLearner, *, changed: bool = True) -> None:
        """Give the engine the student's weights; a new number if they changed."""
        self.version += changed
        self.publish(self.version, Weights(learner.export))

    def newcomer(self, *, measuring: bool = False) -> list[Episode]:
        count = self.settings.measure_problems if measuring else self.settings.problems
        episodes = self._next(self.draw, count, move=not measuring)
        for turn in (turn for episode in episodes for turn in episode.turns):
            if turn.agent == self.agent and turn.version != self.version:
                raise RuntimeError(
                    f"seat {turn.seat} was sampled from version {turn.version} of agent "
                    f"{self.agent}, the student is at {self.version}: the engine was not given "
                    "the new weights"
                )
        return episodes

    def incumbent(self) -> list[Episode]:
        """On the problems of the newcomer's measurement."""
        return self._next(self.draw_incumbent, self.settings.measure_problems, move=True)

    def _next(self, draw: Draw, count: int, *, move: bool) -> list[Episode]:
        self.rollouts += 1
        key = Key(self.settings.seed, "swap", draw=self.rollouts)
        episodes = draw(key, self.offset, count)
        self.offset += count if move else 0
        return episodes


def _learn(
    learner: LocalLearner,
    teacher: MixturePolicy,
    play: _Play,
    rows: list[dict[str, Any]],
    watch: Callable[[dict[str, Any]], None],
) -> None:
    """Rounds until the student is inside. Raises NonFinite."""
    settings = play.settings
    learner.wake()
    play.published(learner, changed=False)
    streak = 0
    memory: list[Episode] = []
    for number in range(1, settings.rounds + 1):
        episodes = play.newcomer()
        statistics, distances, packed = _statistics(
            learner.policy, teacher, play.agent, episodes, settings
        )
        row: dict[str, Any] = {
            "round": number,
            "episodes": len(episodes),
            "states": packed.tokens,
            "reward": _reward(episodes),
            "kl": {"mean": statistics.mean, "quantile": statistics.quantile},
            "to_mixture": float(distances.to_mixture_T.mean()),
            "to_newcomer": float(distances.to_newcomer_T.mean()),
        }
        rows.append(row)
        if not math.isfinite(statistics.quantile):
            raise NonFinite("KL to the incumbent is not finite")
        inside = statistics.quantile <= settings.stop * settings.delta
        streak = streak + 1 if inside else 0
        if not inside:
            rng = Key(settings.seed, "swap", draw=play.rollouts).rng("mini-batches")
            again = min(len(memory), (settings.passes - 1) * len(episodes))
            learnt = [*episodes, *rng.sample(memory, again)]
            rng.shuffle(learnt)
            row["grad_norm"] = _teach(learner, teacher, play, learnt, number)
            memory += episodes
            play.published(learner)
        watch(row)
        if streak == settings.confirm:
            return


def _teach(
    learner: LocalLearner,
    teacher: MixturePolicy,
    play: _Play,
    episodes: Sequence[Episode],
    number: int,
) -> float:
    """The optimiser steps of round ``number``; returns the largest gradient norm before clipping.
    Raises NonFinite."""
    settings = play.settings
    packed = own_turns(play.agent, episodes)
    batches = _split(range(packed.episodes), math.ceil(packed.episodes / settings.batch))
    norms = []
    for index, batch in enumerate(batches, start=1):
        share = (number - 1 + index / len(batches)) / settings.rounds
        rate = settings.optimizer.lr * _schedule(share, settings.warmup)
        learner.settings = replace(settings.optimizer, lr=rate)
        norms.append(_step(learner, teacher, packed, batch))
    return max(norms)


def _schedule(share: float, warmup: float) -> float:
    """Of the learning rate, when ``share`` of all steps is done."""
    return min(1.0, share / warmup) * 0.5 * (1 + math.cos(math.pi * share))


def _step(
    learner: LocalLearner, teacher: MixturePolicy, packed: PackedTurns, episodes: Sequence[int]
) -> float:
    """One optimiser step on the mean of KL(π_θ‖π_λ) over the own tokens of ``episodes``; returns
    the gradient's norm before clipping. Raises NonFinite."""
    student, settings = learner.policy, learner.settings
    chosen = torch.zeros(packed.episodes, dtype=torch.bool)
    chosen[list(episodes)] = True
    total = int(chosen[packed.episode_T].sum())
    if total == 0:
        return 0.0
    budget = padded_budget(settings.micro_batch_tokens, student.device)
    with student.checkpointing(settings.gradient_checkpointing):
        for batch in micro_batches(packed, budget, episodes, whole_episodes=False):
            here = batch.to(student.device)
            with torch.no_grad():
                teacher_TH = states_of(teacher, here, share_prompts=True)
            hidden_TH = states_of(student, here, share_prompts=not settings.gradient_checkpointing)
            # Chunk by chunk through the head, then once through the layers below.
            leaf_TH = hidden_TH.detach().requires_grad_()
            for rows, mixed_NV in teach(teacher, teacher_TH):
                logits_NV = student_logits(student, leaf_TH[rows], mixed_NV.shape[-1])
                loss = exact_kl(logits_NV, mixed_NV).sum() / total
                if not math.isfinite(float(loss.detach())):
                    raise NonFinite("KL to the mixture is not finite")
                loss.backward()
            hidden_TH.backward(leaf_TH.grad)
    return learner.step()


def _statistics(
    student: Policy,
    teacher: MixturePolicy,
    agent: str,
    episodes: Sequence[Episode],
    settings: DistillSettings,
) -> tuple[DivergenceStatistics, Distances, PackedTurns]:
    packed = own_turns(agent, episodes)
    if packed.tokens == 0:
        raise UserError(
            f"agent {agent} wrote nothing in {len(episodes)} episodes; is it in a seat?"
        )
    tokens = settings.optimizer.micro_batch_tokens
    distances = measure(student, teacher, packed, tokens=tokens)
    statistics = statistics_of(
        distances,
        packed,
        episodes,
        delta=settings.delta,
        quantile=settings.quantile,
        unit=settings.unit,
        confidence=settings.confidence,
    )
    return statistics, distances, packed


def _judge(
    found: dict[str, DivergenceStatistics], settings: DistillSettings
) -> tuple[Decision, str]:
    worst = max(found, key=lambda whose: _or_infinite(found[whose].quantile))
    quantile = _or_infinite(found[worst].quantile)
    if not math.isfinite(quantile):
        return "refused", "KL to the incumbent is not finite"
    says = f"KL {quantile:.4g} on the {worst}'s states"
    if quantile <= settings.delta:
        return "distilled", f"{says} within delta {settings.delta:g}"
    return settings.otherwise, f"{says} above delta {settings.delta:g}"


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _reward(episodes: Sequence[Episode]) -> float:
    return sum(episode.reward for episode in episodes) / len(episodes)


def _split(order: Sequence[int], parts: int) -> list[list[int]]:
    parts = min(parts, len(order))
    bounds = [len(order) * part // parts for part in range(parts + 1)]
    return [list(order[a:b]) for a, b in pairwise(bounds)]
