"""One agent's step: a proposal by gradient ascent, then the trust region that measures it.

THEORY §6. The learner is left holding what was accepted: the proposal, the proposal shrunk towards
the anchor, or the anchor itself, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from satune.agents.anchor import Anchor, Measurement, Snapshot
from satune.agents.ports import Learner, NonFinite
from satune.core.divergence import DivergenceStatistics, divergence_statistics, units_of
from satune.core.ratios import effective_sample_size, sum_by
from satune.core.settings import Per
from satune.core.trust_region import LineSearch, TrustRegionSettings, adapt_beta
from satune.training.advantages import groups
from satune.training.ascent import (
    Ascent,
    Heard,
    NothingLearnt,
    advantages_by_token,
    group_lesson,
    own_turns,
    teaching,
)
from satune.training.credit import GaeCredit
from satune.training.gauge import MEND, figures_of, findings
from satune.training.ports import Host, Outcome
from satune.training.settings import UpdateSettings
from satune.types import Episode, Experience, Key, Progress, UserError, no_progress

__all__ = ["Outcome", "advantages_by_token", "groups", "improve", "own_turns"]


def improve(
    learner: Learner | Host,
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

    Episodes that the world ended take no part in anything here; their log r is 0. An agent that
    lives elsewhere takes its step there."""
    if isinstance(learner, Host):
        return learner.improve(experience, beta=beta, cap=cap, key=key)
    started = time.perf_counter()
    passes = settings.epochs * settings.mini_batches

    def tell(done: int) -> None:
        progress(done, passes + 1, f"update of {agent}")

    heard = Heard.of(agent, experience, cap)
    event = _opening(heard, settings, beta)
    if heard.packed.tokens == 0:
        return _untried("the agent wrote nothing", heard, event, beta)
    lesson = group_lesson(heard, settings)
    if lesson is not None and not bool(teaching(heard.packed, lesson, settings).any()):
        # A zero gradient would still move the weights: by old momentum and weight decay.
        return _untried("no group's rewards differ", heard, event, beta)

    learner.wake()
    before = learner.snapshot()
    ascent = Ascent.begin(learner, heard, before, settings)
    try:
        if isinstance(settings.credit, GaeCredit):
            lesson = ascent.ask_critic(settings.credit, key)
            event["critic"] = ascent.critic
        assert lesson is not None
        climbed = ascent.climb(lesson, beta, key, tell)
    except (NonFinite, NothingLearnt) as error:
        learner.drop_gradients()
        learner.restore(before)
        learner.rest()
        if isinstance(error, NonFinite):
            beta = _next_beta(beta, math.inf, settings.trust_region)
        outcome = _untried(str(error), heard, event, beta)
        event["seconds"] = {"update": time.perf_counter() - started}
        return outcome

    tell(passes)
    if settings.gauge.due(key.stage):
        event["rounding"] = _gauged(learner, agent, heard.episodes, before, settings, lesson.per)
    event["mismatch"] = _mismatch(ascent.anchor, settings.trust_region)
    seconds = ascent.seconds
    event["seconds"] = {**seconds, "update": time.perf_counter() - started - sum(seconds.values())}
    event |= climbed
    outcome = _measured(learner, ascent.anchor, before, heard, event, beta, settings)
    tell(passes + 1)
    return outcome


def _opening(heard: Heard, settings: UpdateSettings, beta: float) -> dict[str, Any]:
    """What the event says before anything is tried."""
    event: dict[str, Any] = {
        "episodes": len(heard.episodes),
        "ess": effective_sample_size(heard.log_weights_E),
        "delta": settings.trust_region.delta,
        "beta": beta,
        "tokens": {"own": heard.packed.tokens},
    }
    if heard.masked:
        event["masked"] = heard.masked
    if heard.cap is not None:
        event["capped_mass"] = heard.capped_mass
    return event


def _untried(reason: str, heard: Heard, event: dict[str, Any], beta: float) -> Outcome:
    """The outcome where there is no proposal."""
    event |= {"accepted": False, "scale": 0.0, "reason": reason}
    nothing_E = torch.zeros(len(heard.experience.episodes), dtype=torch.float64)
    return Outcome(False, beta, nothing_E, event)


def _measured(
    learner: Learner,
    anchor: Anchor,
    before: Snapshot,
    heard: Heard,
    event: dict[str, Any],
    beta: float,
    settings: UpdateSettings,
) -> Outcome:
    """What the trust region makes of the proposal that the learner holds."""
    started = time.perf_counter()
    search, measured, statistics = _enforce(
        learner, anchor, before, heard.weights_E, heard.episodes, settings
    )
    learner.rest()
    event["seconds"]["measure"] = time.perf_counter() - started
    accepted, rule = search.decision == "accept", settings.credit
    log_ratio_E = torch.zeros(len(heard.experience.episodes), dtype=torch.float64)
    log_ratio_H = None
    if accepted:
        new_T, old_T = measured.logprobs_T.double(), anchor.logprobs_T.double()
        log_ratio_E = heard.by_episode(new_T, old_T)
        if isinstance(rule, GaeCredit) and rule.traces:
            log_ratio_H = heard.by_turn(new_T, old_T)
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


def _next_beta(beta: float, first_statistic: float, region: TrustRegionSettings) -> float:
    if not region.adapt or region.beta == 0:
        return beta
    return adapt_beta(beta, region.beta, first_statistic, region.delta)


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


def _mismatch(anchor: Anchor, region: TrustRegionSettings) -> dict[str, float]:
    """What the engine said of the agent's own tokens beside the anchor, which wrote them: sampled
    minus anchor log-probabilities, on average and at most; ``kl``, the mean over the region's units
    of KL(sampled‖anchor), estimated from the sampled tokens by r - 1 - log r; and its share of
    delta."""
    packed = anchor.packed
    if packed.sampled_T is None:
        return {}
    gap_T = anchor.logprobs_T.double() - packed.sampled_T.double()
    unit_T, episode_U = units_of(region.unit, packed.episode_T, packed.turn_T, packed.episodes)
    kl = float(sum_by(gap_T.exp() - 1.0 - gap_T, unit_T, len(episode_U)).mean())
    return {
        "mean": float(-gap_T.mean()),
        "max": float(gap_T.abs().max()),
        "kl": kl,
        "of_delta": kl / region.delta,
    }
