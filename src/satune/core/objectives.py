"""The training objectives as pure functions from one bundle of tensors to a loss and its metrics.

Every term is divided by totals of the whole mini-batch that the caller passes in, so that the
losses of micro-batches add up to the loss of one large batch. Shape suffixes: ``T`` own tokens,
``E`` episodes of the micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from satune.core.ratios import sequence_log_ratio, sum_by, token_log_ratio

ObjectiveName = Literal["sat", "gspo", "grpo", "dapo", "reinforce"]

LINEAR_ABOVE = 20.0
"""Log-ratio above which e^u goes on as its tangent, so that neither it nor its gradient overflows.
The clip hides it for positive advantages; a ratio of e^20 with a negative one is far outside any
trust region, and there the loss stays finite and still pulls the policy back."""


@dataclass(frozen=True)
class ObjectiveBatch:
    """One agent's micro-batch: its own tokens, and the episodes they belong to.

    ``logprobs_T`` carry the gradient; ``anchor_logprobs_T`` are those of the policy before the
    step. ``episode_T`` (long) counts from 0 to E-1 inside the micro-batch, ``turn_T`` (long) tells
    the messages apart. ``advantages_E`` and ``weights_E`` (w of THEORY §6) are constants.
    ``episode_total`` and ``token_total`` count the WHOLE mini-batch. ``kl_T`` is
    KL(proposal‖anchor), ``reference_kl_T`` KL(proposal‖reference), ``entropy_T`` the entropy.

    An episode of weight 0 contributes exactly 0 to loss and gradient, whatever its advantage,
    log-probabilities or KL are, NaN included.
    """

    logprobs_T: Tensor
    anchor_logprobs_T: Tensor
    episode_T: Tensor
    turn_T: Tensor
    advantages_E: Tensor
    weights_E: Tensor
    episode_total: float
    token_total: float
    kl_T: Tensor | None = None
    reference_kl_T: Tensor | None = None
    entropy_T: Tensor | None = None

    @property
    def episodes(self) -> int:
        return self.advantages_E.numel()


@dataclass(frozen=True)
class ObjectiveSettings:
    """Which objective, its clip range [1 - clip_low, 1 + clip_high] of the ratio, and the weights
    of the terms beside it: ``beta`` of ``kl_T``, ``reference_kl`` and ``entropy``.

    Raises: ValueError on an unknown name or a value outside its range.
    """

    name: ObjectiveName
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    reference_kl: float = 0.0
    entropy: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(f"objective.name {self.name!r}: choose one of {', '.join(OBJECTIVES)}")
        if not 0 <= self.clip_low < 1:
            raise ValueError(f"objective.clip_low {self.clip_low}: give a value in [0, 1)")
        if not 0 <= self.clip_high < math.inf:
            raise ValueError(f"objective.clip_high {self.clip_high}: give a number, at least 0")


Metrics = dict[str, Tensor]
Objective = Callable[[ObjectiveBatch, ObjectiveSettings], tuple[Tensor, Metrics]]


def objective_loss(batch: ObjectiveBatch, settings: ObjectiveSettings) -> tuple[Tensor, Metrics]:
    """The loss (the negated objective, scalar) and metrics without gradient (THEORY §6).

    loss = policy loss + beta KL + reference_kl KL(‖reference) - entropy H, the last three as
    weighted means over tokens: sum of w times the value, divided by ``token_total``.
    Metrics are sums, to be added over micro-batches: ``clipped`` of ``clippable`` ratios were held
    by the clip, ``log_ratio`` and ``log_ratio_square`` sum over the same ratios, ``kl``,
    ``reference_kl`` and ``entropy`` are weighted token sums to be divided by ``token_weight``;
    ``loss`` and ``policy_loss`` add up to the mini-batch's.
    Raises: ValueError if a term with a coefficient was not given, or a total is not positive.
    """
    _check_batch(batch)
    batch, weights_T = _without_weightless(batch)
    policy_loss, metrics = OBJECTIVES[settings.name](batch, settings)
    loss = policy_loss
    for name, coefficient, values_T in (
        ("kl", settings.beta, batch.kl_T),
        ("reference_kl", settings.reference_kl, batch.reference_kl_T),
        ("entropy", -settings.entropy, batch.entropy_T),
    ):
        if values_T is None:
            if coefficient != 0:
                raise ValueError(
                    f"objective: {name} has the coefficient {coefficient:g} but was not scored; "
                    f"give {name}_T or set the coefficient to 0"
                )
            continue
        total = (weights_T * values_T).sum()
        if coefficient != 0:
            loss = loss + coefficient * total / batch.token_total
        metrics[name] = total
    metrics |= {"policy_loss": policy_loss, "loss": loss, "token_weight": weights_T.sum()}
    return loss, {name: value.detach() for name, value in metrics.items()}


def _sat(batch: ObjectiveBatch, settings: ObjectiveSettings) -> tuple[Tensor, Metrics]:
    """Clipped sequence ratio of the summed log-ratio: E3 of THEORY §4 (b) when A = R - b."""
    u_E = sequence_log_ratio(
        batch.logprobs_T, batch.anchor_logprobs_T, batch.episode_T, batch.episodes
    )
    return _clipped_episodes(u_E, batch, settings)


def _gspo(batch: ObjectiveBatch, settings: ObjectiveSettings) -> tuple[Tensor, Metrics]:
    """As sat with the log-ratio averaged over the episode's own tokens."""
    u_E = sequence_log_ratio(
        batch.logprobs_T, batch.anchor_logprobs_T, batch.episode_T, batch.episodes
    )
    return _clipped_episodes(u_E / _own_tokens(batch), batch, settings)


def _clipped_episodes(
    u_E: Tensor, batch: ObjectiveBatch, settings: ObjectiveSettings
) -> tuple[Tensor, Metrics]:
    gain_E, clipped_E = _clipped_gain(u_E, batch.advantages_E, settings)
    loss = -(batch.weights_E * gain_E).sum() / batch.episode_total
    return loss, _ratio_metrics(u_E, clipped_E, batch.weights_E != 0)


def _grpo(batch: ObjectiveBatch, settings: ObjectiveSettings) -> tuple[Tensor, Metrics]:
    """Clipped token ratios, averaged over each episode's own tokens, then over episodes."""
    gain_T, metrics = _clipped_tokens(batch, settings)
    gain_E = sum_by(gain_T, batch.episode_T, batch.episodes) / _own_tokens(batch)
    return -(batch.weights_E * gain_E).sum() / batch.episode_total, metrics


def _dapo(batch: ObjectiveBatch, settings: ObjectiveSettings) -> tuple[Tensor, Metrics]:
    """Clipped token ratios, averaged over all tokens: every token of a long episode counts."""
    gain_T, metrics = _clipped_tokens(batch, settings)
    gain_T = batch.weights_E[batch.episode_T] * gain_T
    return -gain_T.sum() / batch.token_total, metrics


def _clipped_tokens(batch: ObjectiveBatch, settings: ObjectiveSettings) -> tuple[Tensor, Metrics]:
    u_T = token_log_ratio(batch.logprobs_T, batch.anchor_logprobs_T)
    gain_T, clipped_T = _clipped_gain(u_T, batch.advantages_E[batch.episode_T], settings)
    return gain_T, _ratio_metrics(u_T, clipped_T, (batch.weights_E != 0)[batch.episode_T])


def _reinforce(batch: ObjectiveBatch, settings: ObjectiveSettings) -> tuple[Tensor, Metrics]:
    """The score function: at the anchor its gradient is the policy gradient for A = R - b."""
    logprobs_E = sum_by(batch.logprobs_T, batch.episode_T, batch.episodes)
    u_E = logprobs_E - sum_by(batch.anchor_logprobs_T, batch.episode_T, batch.episodes)
    loss = -(batch.weights_E * batch.advantages_E * logprobs_E).sum() / batch.episode_total
    return loss, _ratio_metrics(u_E, torch.zeros_like(u_E), batch.weights_E != 0)


OBJECTIVES: dict[str, Objective] = {
    "sat": _sat,
    "gspo": _gspo,
    "grpo": _grpo,
    "dapo": _dapo,
    "reinforce": _reinforce,
}


def _clipped_gain(
    log_ratio: Tensor, advantages: Tensor, settings: ObjectiveSettings
) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A), and where the clip decided."""
    low, high = math.log1p(-settings.clip_low), math.log1p(settings.clip_high)
    excess = torch.relu(log_ratio - LINEAR_ABOVE)
    free = log_ratio.clamp(max=LINEAR_ABOVE).exp() * (1 + excess) * advantages
    held = log_ratio.clamp(low, high).exp() * advantages
    return torch.minimum(free, held), held < free


def _own_tokens(batch: ObjectiveBatch) -> Tensor:
    """Own tokens of each episode [E], 1 where there is none: its sum is 0 in any case."""
    return sum_by(torch.ones_like(batch.logprobs_T), batch.episode_T, batch.episodes).clamp(min=1)


def _ratio_metrics(log_ratio: Tensor, clipped: Tensor, counts: Tensor) -> Metrics:
    return {
        "clipped": (clipped * counts).sum(),
        "clippable": counts.sum(),
        "log_ratio": (log_ratio * counts).sum(),
        "log_ratio_square": (log_ratio**2 * counts).sum(),
    }


def _without_weightless(batch: ObjectiveBatch) -> tuple[ObjectiveBatch, Tensor]:
    """Replace every value of an episode of weight 0 by 0, and give w of each token's episode.

    0 x NaN is NaN, so multiplying by the weight would not do. A NaN weight stays: it must be seen.
    """
    weights_E = batch.weights_E.detach().to(batch.logprobs_T.dtype)
    counts_E = weights_E != 0
    counts_T = counts_E[batch.episode_T]

    def kept(values: Tensor, counts: Tensor) -> Tensor:
        return torch.where(counts, values, torch.zeros_like(values))

    def kept_or_none(values_T: Tensor | None) -> Tensor | None:
        return None if values_T is None else kept(values_T, counts_T)

    advantages_E = batch.advantages_E.detach().to(batch.logprobs_T.dtype)
    clean = replace(
        batch,
        logprobs_T=kept(batch.logprobs_T, counts_T),
        anchor_logprobs_T=kept(batch.anchor_logprobs_T.detach(), counts_T),
        advantages_E=kept(advantages_E, counts_E),
        weights_E=weights_E,
        kl_T=kept_or_none(batch.kl_T),
        reference_kl_T=kept_or_none(batch.reference_kl_T),
        entropy_T=kept_or_none(batch.entropy_T),
    )
    return clean, weights_E[batch.episode_T]


def _check_batch(batch: ObjectiveBatch) -> None:
    tokens = batch.logprobs_T.shape
    optional = (batch.kl_T, batch.reference_kl_T, batch.entropy_T)
    given = (batch.anchor_logprobs_T, batch.episode_T, batch.turn_T, *optional)
    if any(values_T is not None and values_T.shape != tokens for values_T in given):
        raise ValueError("objective: every token tensor must have the length of logprobs_T")
    if batch.weights_E.shape != batch.advantages_E.shape:
        raise ValueError("objective: give one weight and one advantage an episode")
    if not (batch.episode_total > 0 and batch.token_total > 0):
        raise ValueError(
            f"objective: totals of {batch.episode_total:g} episodes and {batch.token_total:g} "
            "tokens; pass the counts of the whole mini-batch"
        )
