"""The training objectives as pure functions from one bundle of tensors to a loss and its metrics.

An objective is ``f(batch: ObjectiveBatch, **options) -> (loss, metrics)``; the ranges and defaults
of its options stand in ``core.settings``, those of the user's own in its signature. Every term is
divided by totals of the whole mini-batch that the caller passes in, so that the losses of
micro-batches add up to the loss of one large batch. The per-token values of a batch may be leaves
of their own: nothing but autograd on them is needed for the loss's derivative by each value.
An advantage and a weight belong to a unit: an episode, or with a critic a turn or a token.
Shape suffixes: ``T`` own tokens, ``U`` units of the micro-batch, ``E`` its episodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from satune.core.ratios import sequence_log_ratio, sum_by, token_log_ratio
from satune.core.settings import OBJECTIVES, ObjectiveSettings

LINEAR_ABOVE = 20.0
"""Log-ratio above which e^u goes on as its tangent, so that neither it nor its gradient overflows.
The clip hides it for positive advantages; a ratio of e^20 with a negative one is far outside any
trust region, and there the loss stays finite and still pulls the policy back."""


@dataclass(frozen=True)
class ObjectiveBatch:
    """One agent's micro-batch: its own tokens, and what they belong to.

    ``logprobs_T`` carry the gradient; ``anchor_logprobs_T`` are those of the policy before the
    step. ``episode_T`` (long) counts from 0 to E-1 inside the micro-batch, ``turn_T`` (long) tells
    the messages apart, ``unit_T`` (long, from 0 to U-1) the units that an advantage is of.
    ``advantages_U`` and ``weights_U`` (w of THEORY §6) are constants. ``episode_total`` and
    ``token_total`` count the WHOLE mini-batch. ``kl_T`` is KL(proposal‖anchor), ``reference_kl_T``
    KL(proposal‖reference), ``entropy_T`` the entropy.

    A unit of weight 0 contributes exactly 0 to loss and gradient, whatever its advantage,
    log-probabilities or KL are, NaN included.
    """

    logprobs_T: Tensor
    anchor_logprobs_T: Tensor
    episode_T: Tensor
    turn_T: Tensor
    unit_T: Tensor
    advantages_U: Tensor
    weights_U: Tensor
    episode_total: float
    token_total: float
    kl_T: Tensor | None = None
    reference_kl_T: Tensor | None = None
    entropy_T: Tensor | None = None

    @property
    def units(self) -> int:
        return self.advantages_U.numel()

    @property
    def advantages_T(self) -> Tensor:
        """The advantage of each token's unit."""
        return self.advantages_U[self.unit_T]

    @property
    def weights_T(self) -> Tensor:
        """The weight of each token's unit."""
        return self.weights_U[self.unit_T]


Metrics = dict[str, Tensor]
Objective = Callable[..., tuple[Tensor, Metrics]]
"""``f(batch, **options)`` -> the policy loss of the batch (scalar, with its gradient) and metrics,
which are sums that add up over micro-batches. The batch's units of weight 0 hold zeros only.
"""


def policy_loss(batch: ObjectiveBatch, settings: ObjectiveSettings) -> tuple[Tensor, Metrics]:
    """The objective itself, without the terms beside it. Raises ValueError for an objective of the
    user's own that gives no single number."""
    if settings.loss is not None:
        loss, metrics = settings.loss(batch, **settings.options)
    else:
        options = OBJECTIVES[settings.name](**settings.options)
        loss, metrics = LOSSES[settings.name](batch, **asdict(options))
    if loss.dim() != 0:
        raise ValueError(
            f"objective {settings.name}: its loss has the shape {tuple(loss.shape)}; "
            "return one number for the whole batch"
        )
    return loss, metrics


def objective_loss(batch: ObjectiveBatch, settings: ObjectiveSettings) -> tuple[Tensor, Metrics]:
    """The loss (the negated objective, scalar) and metrics without gradient (THEORY §6).

    loss = policy loss + beta KL + reference_kl KL(‖reference) - entropy H, the last three as
    weighted means over tokens: sum of w times the value, divided by ``token_total``.
    Metrics are sums, to be added over micro-batches: ``clipped`` of ``clippable`` ratios were held
    by the clip, ``policy_loss`` adds up to the mini-batch's. An objective of the user's own may
    give others, or none.
    Raises: ValueError if a term with a coefficient was not given, or a total is not positive.
    """
    _check_batch(batch)
    batch, weights_T = _without_weightless(batch)
    loss, metrics = policy_loss(batch, settings)
    metrics = {**metrics, "policy_loss": loss}
    for name, coefficient, values_T in (
        ("kl", settings.beta, batch.kl_T),
        ("reference_kl", settings.reference_kl, batch.reference_kl_T),
        ("entropy", -settings.entropy, batch.entropy_T),
    ):
        if coefficient == 0:
            continue
        if values_T is None:
            raise ValueError(
                f"objective: {name} has the coefficient {coefficient:g} but was not scored; "
                f"give {name}_T or set the coefficient to 0"
            )
        loss = loss + coefficient * (weights_T * values_T).sum() / batch.token_total
    return loss, {name: value.detach() for name, value in metrics.items()}


def sat(batch: ObjectiveBatch, *, clip: float | None) -> tuple[Tensor, Metrics]:
    """Clipped ratio of each unit's summed log-ratio, summed over an episode's units: E3 of THEORY
    §4 (b) when the unit is the episode and A = R - b."""
    return _clipped_units(_unit_log_ratio(batch), batch, clip)


def gspo(batch: ObjectiveBatch, *, clip: float | None) -> tuple[Tensor, Metrics]:
    """As sat with the log-ratio averaged over the unit's own tokens."""
    tokens_U = sum_by(torch.ones_like(batch.logprobs_T), batch.unit_T, batch.units)
    # 1 where there is none: its sum is 0 in any case.
    return _clipped_units(_unit_log_ratio(batch) / tokens_U.clamp(min=1), batch, clip)


def _unit_log_ratio(batch: ObjectiveBatch) -> Tensor:
    return sequence_log_ratio(batch.logprobs_T, batch.anchor_logprobs_T, batch.unit_T, batch.units)


def _clipped_units(
    u_U: Tensor, batch: ObjectiveBatch, clip: float | None
) -> tuple[Tensor, Metrics]:
    gain_U, clipped_U = _clipped_gain(u_U, batch.advantages_U, clip, clip)
    loss = -(batch.weights_U * gain_U).sum() / batch.episode_total
    return loss, _clip_metrics(clipped_U, batch.weights_U != 0)


def grpo(batch: ObjectiveBatch, *, clip: float | None) -> tuple[Tensor, Metrics]:
    """Clipped token ratios, averaged over each episode's own tokens, then over episodes."""
    gain_T, metrics = _clipped_tokens(batch, clip, clip)
    tokens_T = torch.bincount(batch.episode_T)[batch.episode_T].to(gain_T.dtype)
    # Of a unit's episode; 1 where the unit has no tokens: its sum is 0 in any case.
    tokens_U = torch.ones_like(batch.weights_U).scatter(0, batch.unit_T, tokens_T)
    gain_U = sum_by(gain_T, batch.unit_T, batch.units) / tokens_U
    return -(batch.weights_U * gain_U).sum() / batch.episode_total, metrics


def dapo(
    batch: ObjectiveBatch, *, clip_low: float | None, clip_high: float | None
) -> tuple[Tensor, Metrics]:
    """Clipped token ratios, averaged over all tokens: every token of a long episode counts."""
    gain_T, metrics = _clipped_tokens(batch, clip_low, clip_high)
    gain_T = batch.weights_T * gain_T
    return -gain_T.sum() / batch.token_total, metrics


def ppo(batch: ObjectiveBatch, *, clip: float | None) -> tuple[Tensor, Metrics]:
    """Clipped token ratios with one clip, averaged over all tokens. The loss of the values is the
    critic's own, and the entropy bonus a term beside every objective.

    Source: Schulman et al., Proximal Policy Optimization (arXiv 1707.06347), equation 7.
    """
    return dapo(batch, clip_low=clip, clip_high=clip)


def m2po(batch: ObjectiveBatch, *, second_moment: float) -> tuple[Tensor, Metrics]:
    """Token ratios without a clip, averaged over all tokens. The tokens with the largest squared
    log-ratio are left out, as few as bring the mean square of the others below ``second_moment``.

    Source: Zheng et al., Prosperity before Collapse (arXiv 2510.01161). The mean is over the whole
    mini-batch's tokens, which have to be there.
    """
    u_T = token_log_ratio(batch.logprobs_T, batch.anchor_logprobs_T)
    weights_T = batch.weights_T
    kept_T = _within_second_moment(u_T.detach(), weights_T != 0, second_moment)
    free_T, _ = _clipped_gain(u_T, batch.advantages_T, None, None)
    gain_T = torch.where(kept_T, weights_T * free_T, torch.zeros_like(free_T))
    return -gain_T.sum() / batch.token_total, _clip_metrics(~kept_T, weights_T != 0)


def _within_second_moment(u_T: Tensor, counts_T: Tensor, limit: float) -> Tensor:
    """True [T] but at the fewest tokens without which the mean of u² is below ``limit``."""
    square_N = u_T[counts_T] ** 2
    order_N = square_N.argsort(stable=True)
    # The mean of the k + 1 smallest, for every k; it never falls as k rises.
    mean_N = square_N[order_N].cumsum(0) / torch.arange(1, len(order_N) + 1, device=u_T.device)
    inside_N = torch.zeros_like(square_N, dtype=torch.bool)
    inside_N[order_N] = ~(mean_N >= limit)  # a ratio that is NaN has to be seen
    kept_T = torch.ones_like(counts_T)
    kept_T[counts_T] = inside_N
    return kept_T


def cispo(
    batch: ObjectiveBatch, *, clip_low: float | None, clip_high: float | None
) -> tuple[Tensor, Metrics]:
    """log π times the clipped token ratio, which is a constant: no token loses its gradient to the
    clip, the clip only bounds how much it counts. Averaged over all tokens.

    Source: MiniMax-M1 (arXiv 2506.13585), equations 4 and 5; it runs without a lower clip.
    """
    u_T = token_log_ratio(batch.logprobs_T, batch.anchor_logprobs_T)
    low, high = _log_range(clip_low, clip_high)
    held_T = u_T.detach().clamp(low, min(high, LINEAR_ABOVE))
    weights_T = batch.weights_T
    gain_T = weights_T * held_T.exp() * batch.advantages_T * batch.logprobs_T
    return -gain_T.sum() / batch.token_total, _clip_metrics(held_T != u_T, weights_T != 0)


def reinforce(batch: ObjectiveBatch) -> tuple[Tensor, Metrics]:
    """The score function: at the anchor its gradient is the policy gradient for A = R - b."""
    logprobs_U = sum_by(batch.logprobs_T, batch.unit_T, batch.units)
    u_U = logprobs_U - sum_by(batch.anchor_logprobs_T, batch.unit_T, batch.units)
    loss = -(batch.weights_U * batch.advantages_U * logprobs_U).sum() / batch.episode_total
    return loss, _clip_metrics(torch.zeros_like(u_U), batch.weights_U != 0)


LOSSES: dict[str, Objective] = {
    "sat": sat,
    "gspo": gspo,
    "grpo": grpo,
    "dapo": dapo,
    "ppo": ppo,
    "cispo": cispo,
    "m2po": m2po,
    "reinforce": reinforce,
}


def _clipped_tokens(
    batch: ObjectiveBatch, clip_low: float | None, clip_high: float | None
) -> tuple[Tensor, Metrics]:
    u_T = token_log_ratio(batch.logprobs_T, batch.anchor_logprobs_T)
    gain_T, clipped_T = _clipped_gain(u_T, batch.advantages_T, clip_low, clip_high)
    return gain_T, _clip_metrics(clipped_T, batch.weights_T != 0)


def _log_range(clip_low: float | None, clip_high: float | None) -> tuple[float, float]:
    """Least and largest log-ratio inside [1 - clip_low, 1 + clip_high]; None: no such end."""
    low = -math.inf if clip_low is None else math.log1p(-clip_low)
    return low, math.inf if clip_high is None else math.log1p(clip_high)


def _clipped_gain(
    log_ratio: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None
) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A), and where the clip decided."""
    low, high = _log_range(clip_low, clip_high)
    excess = torch.relu(log_ratio - LINEAR_ABOVE)
    free = log_ratio.clamp(max=LINEAR_ABOVE).exp() * (1 + excess) * advantages
    if math.isinf(low) and math.isinf(high):
        return free, torch.zeros_like(free, dtype=torch.bool)
    if math.isinf(high):
        # Below the lower end the clip is a constant, above it the ratio itself.
        held = torch.where(log_ratio < low, math.exp(low) * advantages, free)
    else:
        held = log_ratio.clamp(low, high).exp() * advantages
    return torch.minimum(free, held), held < free


def _clip_metrics(clipped: Tensor, counts: Tensor) -> Metrics:
    return {"clipped": (clipped * counts).sum(), "clippable": counts.sum()}


def _without_weightless(batch: ObjectiveBatch) -> tuple[ObjectiveBatch, Tensor]:
    """Replace every value of a unit of weight 0 by 0, and give w of each token's unit.

    0 x NaN is NaN, so multiplying by the weight would not do. A NaN weight stays: it must be seen.
    """
    weights_U = batch.weights_U.detach().to(batch.logprobs_T.dtype)
    counts_U = weights_U != 0
    counts_T = counts_U[batch.unit_T]

    def kept(values: Tensor, counts: Tensor) -> Tensor:
        return torch.where(counts, values, torch.zeros_like(values))

    def kept_or_none(values_T: Tensor | None) -> Tensor | None:
        return None if values_T is None else kept(values_T, counts_T)

    advantages_U = batch.advantages_U.detach().to(batch.logprobs_T.dtype)
    clean = replace(
        batch,
        logprobs_T=kept(batch.logprobs_T, counts_T),
        anchor_logprobs_T=kept(batch.anchor_logprobs_T.detach(), counts_T),
        advantages_U=kept(advantages_U, counts_U),
        weights_U=weights_U,
        kl_T=kept_or_none(batch.kl_T),
        reference_kl_T=kept_or_none(batch.reference_kl_T),
        entropy_T=kept_or_none(batch.entropy_T),
    )
    return clean, clean.weights_T


def _check_batch(batch: ObjectiveBatch) -> None:
    tokens = batch.logprobs_T.shape
    optional = (batch.kl_T, batch.reference_kl_T, batch.entropy_T)
    given = (batch.anchor_logprobs_T, batch.episode_T, batch.turn_T, batch.unit_T, *optional)
    if any(values_T is not None and values_T.shape != tokens for values_T in given):
        raise ValueError("objective: every token tensor must have the length of logprobs_T")
    if batch.weights_U.shape != batch.advantages_U.shape:
        raise ValueError("objective: give one weight and one advantage a unit")
    if not (batch.episode_total > 0 and batch.token_total > 0):
        raise ValueError(
            f"objective: totals of {batch.episode_total:g} episodes and {batch.token_total:g} "
            "tokens; pass the counts of the whole mini-batch"
        )
