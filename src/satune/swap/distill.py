"""The projection realised in the newcomer's own weights (THEORY §7, b).

On-policy distillation of KL(π_θ‖π_λ): the team plays with the newcomer-being-trained in the seat,
and where it spoke it is drawn to the mixture. Then it is measured, on problems that gave no
gradient, and taken only where it lies inside δ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor

from satune.agents.mixture import Distances, MixturePolicy
from satune.agents.packing import PackedTurns, mini_batches
from satune.agents.policy import Policy
from satune.agents.ports import Learner, NonFinite
from satune.agents.weights import Weights
from satune.core.divergence import DivergenceStatistics
from satune.files.events import Distillation, Divergence, Round
from satune.swap.measurement import statistics_of
from satune.swap.settings import DistillSettings
from satune.training.ports import Draw
from satune.training.update import own_turns
from satune.types import Episode, Key, UserError

Publish = Callable[[int, Mapping[str, Tensor]], None]
"""Gives the engine the student's weights under their version number."""
Decision = Literal["distilled", "mixture", "refused", "outside"]


@dataclass(frozen=True, slots=True)
class Distilled:
    """What came of it. ``event`` holds plain figures: ``rounds`` one by one, and the measurement;
    ``version`` is the number of the student's weights.

    "distilled": the student holds the accepted weights; "outside": those that are not.
    "mixture" and "refused": it holds the newcomer's, bit for bit, and the seat is filled by a
    MixturePolicy or stays the incumbent's.
    """

    decision: Decision
    reason: str
    event: Distillation
    version: int = 0


def distill(
    agent: str,
    incumbent: Policy,
    newcomer: Policy,
    student: Learner,
    settings: DistillSettings,
    *,
    draw: Draw,
    draw_incumbent: Draw,
    publish: Publish,
    version: int = 0,
    offset: int = 0,
    watch: Callable[[Round], None] = lambda row: None,
) -> Distilled:
    """Draw ``student``, which learns from the newcomer's weights on, to the mixture of both;
    measure; accept or not.

    ``draw`` plays with the student in the seats of ``agent``, ``draw_incumbent`` with the
    incumbent; turns of either bear the agent's name. ``offset`` is the first problem used; the
    measurement's follow those that gave gradients. ``watch`` sees each round's row as it ends.
    The student's optimiser is its own, and no other policy is touched.
    Raises: UserError where the tokenizers differ or the agent never speaks, RuntimeError if the
    engine kept old weights.
    """
    started = time.perf_counter()
    teacher = MixturePolicy(agent, incumbent, newcomer, settings.aim * settings.delta)
    before = student.snapshot()
    rows: list[Round] = []
    visited: dict[str, list[Episode]] = {}
    found: dict[str, DivergenceStatistics] = {}
    play = _Play(agent, draw, draw_incumbent, publish, settings, version, offset)
    try:
        _learn(student, teacher, play, rows, watch)
        visited = {"newcomer": play.newcomer(measuring=True), "incumbent": play.incumbent()}
        found = {
            whose: _statistics(student, teacher, agent, episodes, settings)[0]
            for whose, episodes in visited.items()
        }
        decision, reason = _judge(found, settings)
    except NonFinite as error:
        student.drop_gradients()
        decision, reason = "refused", str(error)
    if decision not in ("distilled", "outside"):
        student.restore(before)
        play.published(student)
    student.rest()
    event: Distillation = {
        "delta": settings.delta,
        "aim": settings.aim,
        "quantile": settings.quantile,
        "unit": settings.unit,
        "rounds": rows,
        "decision": decision,
        "reason": reason,
        "version": play.version,
        "seconds": time.perf_counter() - started,
    }
    if found:
        event["kl"] = {whose: cast(Divergence, each.to_dict()) for whose, each in found.items()}
        # Each direction on the states of the policy that its expectation is over.
        event["trajectory"] = {
            "forward": found["newcomer"].trajectory["forward"],
            "reverse": found["incumbent"].trajectory["reverse"],
        }
        event["reward"] = {whose: _reward(episodes) for whose, episodes in visited.items()}
    return Distilled(decision, reason, event, play.version)


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

    def published(self, student: Learner, *, changed: bool = True) -> None:
        """Give the engine the student's weights; a new number if they changed."""
        self.version += changed
        self.publish(self.version, Weights(student.export))

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
    student: Learner,
    teacher: MixturePolicy,
    play: _Play,
    rows: list[Round],
    watch: Callable[[Round], None],
) -> None:
    """Rounds until the student is inside. Raises NonFinite."""
    settings = play.settings
    student.wake()
    play.published(student, changed=False)
    streak = 0
    memory: list[Episode] = []
    for number in range(1, settings.rounds + 1):
        episodes = play.newcomer()
        statistics, distances, packed = _statistics(
            student, teacher, play.agent, episodes, settings
        )
        row: Round = {
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
            row["grad_norm"] = _teach(student, teacher, play, learnt, number)
            memory += episodes
            play.published(student)
        watch(row)
        if streak == settings.confirm:
            return


def _teach(
    student: Learner,
    teacher: MixturePolicy,
    play: _Play,
    episodes: Sequence[Episode],
    number: int,
) -> float:
    """The optimiser steps of round ``number``; returns the largest gradient norm before clipping.
    Raises NonFinite."""
    settings = play.settings
    packed = own_turns(play.agent, episodes)
    batches = mini_batches(range(packed.episodes), math.ceil(packed.episodes / settings.batch))
    norms = []
    for index, batch in enumerate(batches, start=1):
        share = (number - 1 + index / len(batches)) / settings.rounds
        student.distil(packed, batch, teacher)
        norms.append(student.step(settings.lr * _schedule(share, settings.warmup)))
    return max(norms)


def _schedule(share: float, warmup: float) -> float:
    """Of the learning rate, when ``share`` of all steps is done."""
    return min(1.0, share / warmup) * 0.5 * (1 + math.cos(math.pi * share))


def _statistics(
    student: Learner,
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
    distances = student.distances(packed, teacher)
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
