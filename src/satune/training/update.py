"""One agent's step: a proposal by gradient ascent, then the trust region that measures it.

THEORY §6. The learner is left holding what was accepted: the proposal, the proposal shrunk towards
the anchor, or the anchor itself, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from satune.agents.anchor import Anchor, Measurement, Snapshot
from satune.agents.packing import PackedTurns, mini_batches, pack
from satune.agents.ports import Critic, Learner, NonFinite
from satune.core.divergence import DivergenceStatistics, divergence_statistics
from satune.core.ratios import capped_weights, effective_sample_size, sequence_log_ratio
from satune.core.settings import ObjectiveSettings, Per
from satune.core.trust_region import LineSearch, TrustRegionSettings, adapt_beta
from satune.training.advantages import advantages, groups
from satune.training.credit import GaeCredit
from satune.training.gae import Estimate, Lesson, estimate
from satune.training.gauge import MEND, figures_of, findings
from satune.training.settings import UpdateSettings
from satune.types import Episode, Experience, Key, Progress, UserError, no_progress


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step did. ``log_ratio_E`` is log r of the accepted update on each episode, 0 after a
    revert; ``event`` the fields of the update event that are known here; ``before`` the agent
    before the step (None where no step was tried). ``log_ratio_H`` has log r of each own turn of
    all episodes where the credit rule wants traces and the update was accepted."""

    accepted: bool
    beta: float
    log_ratio_E: Tensor
    event: dict[str, Any]
    before: Snapshot | None = None
    log_ratio_H: Tensor | None = None


def own_turns(agent: str, episodes: Sequence[Episode]) -> PackedTurns:
    """The agent's turns of every episode, packed for its learner."""
    return pack([[turn for turn in e.turns if turn.agent == agent] for e in episodes])


def improve(
    learner: Learner,
    agent: str,
    experience: Experience,
    settings: UpdateSettings,
    *,
    beta: float,
    cap: float | None,
    key: Key,
    progress: Progress = no_progress,
) -> Outcome:
    """Make a proposal for ``agent`` from ``experience``, measure it, keep what the trust region
    allows. ``beta`` weighs KL(proposal‖anchor) in the objective; the outcome has its next value.
    ``progress`` is told of each mini-batch, and of the measurement as one more.

    Episodes that the world ended take no part in anything here; their log r is 0."""
    started = time.perf_counter()
    passes = settings.epochs * settings.mini_batches

    def tell(done: int) -> None:
        progress(done, passes + 1, f"update of {agent}")

    heard = [index for index, e in enumerate(experience.episodes) if not e.masked]
    episodes = [experience.episodes[index] for index in heard]
    nothing_E = torch.zeros(len(experience.episodes), dtype=torch.float64)
    packed = own_turns(agent, episodes)
    log_weights_E = torch.tensor([experience.log_weights[i] for i in heard], dtype=torch.float64)
    weights_E, capped_mass = capped_weights(log_weights_E, cap)
    event: dict[str, Any] = {
        "episodes": len(episodes),
        "ess": effective_sample_size(log_weights_E),
        "delta": settings.trust_region.delta,
        "beta": beta,
        "tokens": {"own": packed.tokens},
    }
    if len(heard) < len(nothing_E):
        event["masked"] = len(nothing_E) - len(heard)
    if cap is not None:
        event["capped_mass"] = capped_mass
    if packed.tokens == 0:
        event |= {"accepted": False, "scale": 0.0, "reason": "the agent wrote nothing"}
        return Outcome(False, beta, nothing_E, event)

    rule, lesson = settings.credit, None
    if not isinstance(rule, GaeCredit):
        advantages_E = advantages(rule, episodes, agent, settings.max_new_tokens)
        lesson = Lesson("episode", advantages_E, weights_E)
        if not bool(_teaching(packed, lesson, settings).any()):
            # A zero gradient would still move the weights: by old momentum and weight decay.
            event |= {"accepted": False, "scale": 0.0, "reason": "no group's rewards differ"}
            return Outcome(False, beta, nothing_E, event)
    learner.wake()
    before = learner.snapshot()
    anchor = learner.anchor(packed, before.weights, reference=settings.objective.reference_kl > 0)
    objective = replace(settings.objective, beta=beta)
    seconds = {"score": 0.0}
    try:
        if isinstance(rule, GaeCredit):
            by_turn = experience.log_ratios
            ratios = None if by_turn is None else [by_turn[index] for index in heard]
            values_T = _values(learner, anchor, seconds)
            critic = _critic(learner).settings
            found = estimate(
                rule, agent, episodes, packed, values_T, critic, log_weights_E, ratios, cap
            )
            event["critic"] = _fit(learner, anchor, found, key, seconds)
            lesson = found.lesson
        assert lesson is not None
        learning = _ascend(learner, anchor, lesson, settings, objective, key, tell)
    except (NonFinite, _NothingLearnt) as error:
        learner.drop_gradients()
        learner.restore(before)
        learner.rest()
        event |= {"accepted": False, "scale": 0.0, "reason": str(error)}
        event["seconds"] = {"update": time.perf_counter() - started}
        if isinstance(error, NonFinite):
            beta = _next_beta(beta, math.inf, settings.trust_region)
        return Outcome(False, beta, nothing_E, event)
    tell(passes)
    if settings.gauge.due(key.stage):
        event["rounding"] = _gauged(learner, agent, episodes, before, settings, lesson.per)
    event["mismatch"] = _mismatch(anchor)
    seconds["score"] += learning.pop("scoring")
    event["seconds"] = {**seconds, "update": time.perf_counter() - started - sum(seconds.values())}

    event |= learning
    started = time.perf_counter()
    search, measured, statistics = _enforce(learner, anchor, before, weights_E, episodes, settings)
    learner.rest()
    tell(passes + 1)
    event["seconds"]["measure"] = time.perf_counter() - started
    accepted = search.decision == "accept"
    log_ratio_E, log_ratio_H = nothing_E, None
    if accepted:
        new_T, old_T = measured.logprobs_T.double(), anchor.logprobs_T.double()
        log_ratio_E[heard] = sequence_log_ratio(new_T, old_T, packed.episode_T, len(episodes))
        if isinstance(rule, GaeCredit) and rule.traces:
            heard_H = sequence_log_ratio(new_T, old_T, packed.turn_T, packed.turns)
            log_ratio_H = _with_masked(agent, experience.episodes, heard_H)
    event |= {
        "kl": statistics.to_dict(),
        "unit": settings.trust_region.unit,
        "scale": search.scale,
        "accepted": accepted,
        "reason": search.reason,
        "candidates": [list(candidate) for candidate in search.measured],
    }
    if search.at_least:
        event["at_least"] = search.at_least
    first = search.first_statistic
    assert first is not None
    beta = _next_beta(beta, first, settings.trust_region)
    return Outcome(accepted, beta, log_ratio_E, event, before, log_ratio_H)


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
    values_T = _values(learner, learner.anchor(packed), {"score": 0.0})
    critic, fresh_E = _critic(learner).settings, torch.zeros(len(episodes), dtype=torch.float64)
    lesson = estimate(rule, agent, episodes, packed, values_T, critic, fresh_E).lesson
    return lesson.advantages_U[packed.units(lesson.per)]


def _with_masked(agent: str, episodes: Sequence[Episode], heard_H: Tensor) -> Tensor:
    """Numbers of the own turns that were heard, among those of all episodes: 0 for the others."""
    masked_H = torch.tensor([e.masked for e in episodes for t in e.turns if t.agent == agent])
    found_H = torch.zeros(len(masked_H), dtype=heard_H.dtype)
    found_H[~masked_H] = heard_H
    return found_H


class _NothingLearnt(Exception):
    """No advantage is left that differs from 0."""


def _critic(learner: Learner) -> Critic:
    critic = learner.critic
    assert critic is not None, "an agent without a critic has no values"
    return critic


def _values(learner: Learner, anchor: Anchor, seconds: dict[str, float]) -> Tensor:
    """The critic's values [T] of the anchor's own tokens; completes the anchor."""
    started = time.perf_counter()
    learner.complete(anchor)
    seconds["score"] += time.perf_counter() - started
    started = time.perf_counter()
    values_T = _critic(learner).values(anchor)
    seconds["critic"] = time.perf_counter() - started
    return values_T


def _fit(
    learner: Learner, anchor: Anchor, found: Estimate, key: Key, seconds: dict[str, float]
) -> dict[str, float | None]:
    """Have the critic learn what came; what the event says of it. How much it explained was
    measured before, on an experience that it had not seen."""
    started = time.perf_counter()
    loss = _critic(learner).fit(anchor, found.targets, key)
    seconds["critic"] += time.perf_counter() - started
    mean = float(found.targets.before_N.mean())
    return {"explained_variance": found.explained_variance, "value": mean, "loss": loss}


def _next_beta(beta: float, first_statistic: float, region: TrustRegionSettings) -> float:
    if not region.adapt or region.beta == 0:
        return beta
    return adapt_beta(beta, region.beta, first_statistic, region.delta)


def _teaching(packed: PackedTurns, lesson: Lesson, settings: UpdateSettings) -> Tensor:
    """True [E] for the episodes that have a gradient of their own: own tokens with a weight, and an
    advantage or else a regulariser. KL(proposal‖anchor) alone gives no step a direction."""
    teaches_U = lesson.weights_U != 0
    if not (settings.objective.entropy or settings.objective.reference_kl):
        teaches_U &= lesson.advantages_U != 0
    teaches_T = teaches_U[packed.units(lesson.per)]
    teaches_E = torch.zeros(packed.episodes, dtype=torch.bool)
    teaches_E[packed.episode_T[teaches_T]] = True
    return teaches_E


def _ascend(
    learner: Learner,
    anchor: Anchor,
    lesson: Lesson,
    settings: UpdateSettings,
    objective: ObjectiveSettings,
    key: Key,
    tell: Callable[[int], None],
) -> dict[str, Any]:
    """The epochs and mini-batches of one step; returns what the event says of them. A mini-batch in
    which no episode teaches anything takes no step: momentum and decay alone would move it.
    ``tell`` is given how many are over."""
    teaches_E = _teaching(anchor.packed, lesson, settings)
    if not bool(teaches_E.any()):
        raise _NothingLearnt("no advantage differs from 0")
    totals: dict[str, float] = {}
    norms: list[float] = []
    scoring = 0.0
    count = anchor.packed.episodes
    for epoch in range(settings.epochs):
        order = list(range(count))
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
            scoring += time.perf_counter() - before
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
        "scoring": scoring,
    }


def _enforce(
    learner: Learner,
    anchor: Anchor,
    before: Snapshot,
    weights_E: Tensor,
    episodes: Sequence[Episode],
    settings: UpdateSettings,
) -> tuple[LineSearch, Measurement, DivergenceStatistics]:
    """Measure the proposal; shrink it towards the anchor until it is inside, or revert."""
    region, packed = settings.trust_region, anchor.packed
    search = LineSearch(region)
    proposal: Mapping[str, Tensor] | None = None

    def summary(measured: Measurement) -> DivergenceStatistics:
        return divergence_statistics(
            measured.kl_T,
            measured.reverse_kl_T,
            packed.episode_T,
            packed.turn_T,
            weights_E,
            groups(episodes),
            delta=region.delta,
            quantile=region.quantile,
            unit=region.unit,
        )

    def hopeless(so_far: Measurement) -> bool:
        # With 0 for what is not measured yet the quantile is a lower bound of what it will be.
        return summary(so_far).quantile > search.foregone

    while True:
        measured = learner.measure(anchor, hopeless)
        statistics = summary(measured)
        decision = search.observe(statistics.quantile, whole=measured.whole)
        if decision == "accept":
            return search, measured, statistics
        if decision == "revert":
            learner.restore(before)
            return search, measured, statistics
        if proposal is None:
            proposal = learner.export()
        learner.interpolate(before.weights, proposal, search.scale)


def _gauged(
    learner: Learner,
    agent: str,
    episodes: Sequence[Episode],
    before: Snapshot,
    settings: UpdateSettings,
    per: Per,
) -> dict[str, Any]:
    """What rounding makes of the proposal, on some of the experience; with a ``warning`` where it
    decides. Of a proposal beyond delta that ``share`` is gauged which would lie inside if KL grew
    as s². Raises UserError, the agent as before, where rounding decides too much."""
    some = [e for e in episodes if any(turn.agent == agent for turn in e.turns)]
    packed = own_turns(agent, some[: settings.gauge.episodes])
    region = settings.trust_region

    def figures_now() -> dict[str, float]:
        gauged = learner.gauge(packed, before.weights)
        return figures_of(gauged, packed, settings.objective, region, per)

    figures = figures_now()
    beyond = figures.get("kl_masters", 0.0)
    if region.enabled and region.delta < beyond < math.inf:
        proposal, share = learner.export(), 0.95 * math.sqrt(region.delta / beyond)
        learner.interpolate(before.weights, proposal, share)
        figures = {**figures_now(), "share": share}
        learner.load_weights(proposal)
    said, swamped = findings(figures, region.delta)
    if not said:
        return figures
    warning = f"agent {agent}: rounding decides: {'; '.join(said)}"
    if swamped and settings.gauge.act == "refuse":
        learner.restore(before)
        learner.rest()
        raise UserError(f"{warning}; {MEND}")
    return {**figures, "warning": warning}


def _mismatch(anchor: Anchor) -> dict[str, float]:
    """Written (here: anchor) minus sampled log-probabilities of turns the anchor itself wrote.

    Only meaningful for those; turns of an older version differ by the update, not by the engine.
    """
    if anchor.packed.sampled_T is None:
        return {}
    difference_T = anchor.logprobs_T.double() - anchor.packed.sampled_T.double()
    return {"mean": float(-difference_T.mean()), "max": float(difference_T.abs().max())}
