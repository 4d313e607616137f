"""Log-probabilities, entropy and exact full-vocabulary KL of a language model's token states.

Everything starts from hidden states, so that the logits of only one chunk of tokens exist at a
time. Shape suffixes: ``T`` tokens, ``N`` rows, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Project = Callable[[Tensor], Tensor]
"""Hidden states [n, H] to logits [n, V], any floating dtype; must be deterministic."""

CHUNK_BYTES = 64 * 2**20
"""What one chunk's float32 logits may take when the caller does not choose."""

_LARGEST_EXPONENT = 60.0
# Numbers worked on at once inside exact_kl: on a CPU what stays in its cache.
_BLOCK_ON_CPU = 2**15
_BLOCK_ON_DEVICE = 2**25


@dataclass(frozen=True)
class Reference:
    """A second policy at the same states: its own hidden states and output projection."""

    hidden_TH: Tensor
    project: Project


@dataclass
class TokenScores:
    """One number a token, in nats; None where it was not asked for.

    ``kl_T`` is KL(this‖anchor), ``reverse_kl_T`` KL(anchor‖this), ``reference_kl_T``
    KL(this‖reference), all over the full vocabulary at the policy's temperature.
    """

    logprobs_T: Tensor
    entropy_T: Tensor | None = None
    kl_T: Tensor | None = None
    reverse_kl_T: Tensor | None = None
    reference_kl_T: Tensor | None = None


def score_tokens(
    hidden_TH: Tensor,
    targets_T: Tensor,
    project: Project,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    entropy: bool = False,
    anchor: Reference | None = None,
    reverse: bool = False,
    reference: Reference | None = None,
) -> TokenScores:
    """Score each target token at the state whose hidden vector stands in the same row.

    ``hidden_TH`` [T, H] predict ``targets_T`` [T] (long). Logits are divided by ``temperature``,
    which is part of the policy (THEORY §1), in float32 (float64 stays). Memory grows with
    chunk x vocabulary, not T x vocabulary: with gradients and more than one chunk, each chunk's
    logits are computed again in the backward pass. ``chunk_tokens`` None keeps one chunk's
    logits near 64 MB. Gradients flow into ``hidden_TH`` and ``project``, never into the anchor or
    the reference.

    Returns: one float32 (float64) value a token for each thing asked for. T may be 0.
    Raises: ValueError if shapes disagree, the temperature is not positive, ``chunk_tokens`` < 1,
    or ``reverse`` is asked for without an anchor.
    """
    _check_arguments(hidden_TH, targets_T, temperature, chunk_tokens, anchor, reverse, reference)
    tokens = hidden_TH.shape[0]
    wanted = _wanted(entropy, anchor, reverse, reference)
    if tokens == 0:
        nothing_T = _full_precision(hidden_TH).sum(-1)
        return TokenScores(**dict.fromkeys(wanted, nothing_T))
    chunk = chunk_tokens or chunk_for(hidden_TH, project)
    others = [other for other in (anchor, reference) if other is not None]

    def score(hidden_NH: Tensor, targets_N: Tensor, *other_NH: Tensor) -> tuple[Tensor, ...]:
        logits_NV = policy_logits(hidden_NH, project, temperature)
        scores = [_log_probability(logits_NV, targets_N)]
        if entropy:
            scores.append(_entropy(logits_NV))
        with torch.no_grad():
            other_NV = [
                policy_logits(rows_NH, other.project, temperature)
                for other, rows_NH in zip(others, other_NH, strict=True)
            ]
        if anchor is not None:
            scores.append(exact_kl(logits_NV, other_NV[0]))
            if reverse:
                scores.append(exact_kl(other_NV[0], logits_NV))
        if reference is not None:
            scores.append(exact_kl(logits_NV, other_NV[-1]))
        return tuple(scores)

    # split, not slicing: its backward concatenates once instead of padding every chunk to T rows.
    sources = (hidden_TH, targets_T, *(other.hidden_TH for other in others))
    chunks = list(zip(*(source.split(chunk) for source in sources), strict=True))
    if len(chunks) > 1 and torch.is_grad_enabled():
        scored = [
            checkpoint(score, *rows, use_reentrant=False, preserve_rng_state=False)
            for rows in chunks
        ]
    else:
        scored = [score(*rows) for rows in chunks]
    columns = [torch.cat(column) for column in zip(*scored, strict=True)]
    return TokenScores(**dict(zip(wanted, columns, strict=True)))


def exact_kl(logits_p_NV: Tensor, logits_q_NV: Tensor) -> Tensor:
    """KL(p‖q) [N] in nats of two rows of logits [N, V], without cancellation (THEORY §6).

    With d = logit_q - logit_p and y = d - E_p d, KL = log1p(sum k) where k = p (e^y - 1 - y) is
    evaluated by a series for small y, so that a KL of 1e-10 is exact to float32 rounding.
    Tokens to which p gives no mass (logit -inf, or underflow) add q's mass there to the sum.

    +inf where q gives -inf to a token with p > 0; never finite if a logit is NaN or +inf, or if p
    has no support. Once differentiable in both arguments, with the closed forms
    dKL/dlogit_p = -p y and dKL/dlogit_q = q - p; the gradient of an infinite row is NaN, unless
    nothing is propagated into it: then it is exactly 0.
    Raises: ValueError if the shapes differ or there is no vocabulary.
    """
    if logits_p_NV.shape != logits_q_NV.shape or not sum(logits_p_NV.shape[-1:]):
        raise ValueError(
            f"exact_kl: logits of shapes {tuple(logits_p_NV.shape)} and "
            f"{tuple(logits_q_NV.shape)}; give the same [N, V] for both"
        )
    if logits_p_NV.numel() == 0:
        return _full_precision(logits_p_NV + logits_q_NV).sum(-1)
    result: Tensor = _ExactKL.apply(  # pyright: ignore[reportAssignmentType]
        _full_precision(logits_p_NV), _full_precision(logits_q_NV)
    )
    return result


class _ExactKL(torch.autograd.Function):
    """Makes the derivatives with the value, beside which their closed forms cost little."""

    @staticmethod
    def forward(ctx: Any, logits_p_NV: Tensor, logits_q_NV: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad
        shape = logits_p_NV.shape
        vocabulary = shape[-1]
        limit = _BLOCK_ON_CPU if logits_p_NV.device.type == "cpu" else _BLOCK_ON_DEVICE
        rows = max(1, limit // max(1, vocabulary))
        blocks = [
            _kl_rows(p_NV, q_NV, wanted[0], wanted[1])
            for p_NV, q_NV in zip(
                logits_p_NV.reshape(-1, vocabulary).split(rows),
                logits_q_NV.reshape(-1, vocabulary).split(rows),
                strict=True,
            )
        ]
        kl_N, to_p_NV, to_q_NV = (
            torch.cat([part for part in parts if part is not None])
            if parts[0] is not None
            else None
            for parts in zip(*blocks, strict=True)
        )
        ctx.save_for_backward(to_p_NV, to_q_NV)
        assert kl_N is not None
        return kl_N.reshape(shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_N1 = grad_outputs[0].reshape(-1, 1)
        silent_N = grad_N1.squeeze(-1) == 0

        def chained(derivative_NV: Tensor | None) -> Tensor | None:
            if derivative_NV is None:
                return None
            gradient_NV = grad_N1 * derivative_NV
            # A row that counts for nothing must stay silent even if its KL is not finite.
            gradient_NV[silent_N] = 0.0
            return gradient_NV.reshape(*grad_outputs[0].shape, -1)

        return tuple(chained(derivative_NV) for derivative_NV in ctx.saved_tensors)


def _kl_rows(
    logits_p_NV: Tensor, logits_q_NV: Tensor, to_p: bool, to_q: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """KL(p‖q) [N] and, where wanted, its derivatives by both logits [N, V]."""
    top_N1 = logits_p_NV.amax(-1, keepdim=True)
    p_NV = (logits_p_NV - top_N1).exp_()
    mass_N1 = p_NV.sum(-1, keepdim=True)
    p_NV /= mass_N1
    y_NV = logits_q_NV - logits_p_NV
    mean_N1 = (p_NV * y_NV).sum(-1, keepdim=True)
    y_NV -= mean_N1
    # A logit that is infinite in either row makes this NaN or +inf.
    if bool(y_NV.amax() <= 1):
        k_NV = p_NV * _expm1_minus(y_NV)
        total_N1 = k_NV.sum(-1, keepdim=True)
        kl_N1 = total_N1.log1p()
        pull_NV = p_NV * y_NV if to_p or to_q else p_NV
        to_q_NV = (k_NV + pull_NV - p_NV * total_N1) / (1 + total_N1) if to_q else None
        return kl_N1.squeeze(-1), -pull_NV if to_p else None, to_q_NV
    return _kl_difficult_rows(logits_p_NV, logits_q_NV, p_NV, top_N1 + mass_N1.log(), to_p, to_q)


def _kl_difficult_rows(
    logits_p_NV: Tensor,
    logits_q_NV: Tensor,
    p_NV: Tensor,
    log_mass_p_N1: Tensor,
    to_p: bool,
    to_q: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As _kl_rows, where some logit is infinite, or q far above p somewhere."""
    support_NV = p_NV > 0
    missing_NV = support_NV & (logits_q_NV == -torch.inf)
    d_NV = torch.where(support_NV, logits_q_NV - logits_p_NV, 0.0)
    mean_N1 = (p_NV * d_NV).sum(-1, keepdim=True)
    y_NV = torch.where(support_NV, d_NV - mean_N1, 0.0)
    # log p + y, which also says how much mass q has where p has none.
    exponent_NV = logits_q_NV - (log_mass_p_N1 + mean_N1)
    far_NV = ~support_NV | (y_NV > 1)
    k_NV = torch.where(
        far_NV,
        exponent_NV.clamp(max=_LARGEST_EXPONENT).exp() - p_NV * (1 + y_NV),
        p_NV * _expm1_minus(y_NV.clamp(max=1)),
    )
    total_N1 = k_NV.sum(-1, keepdim=True)
    # Where e^KL does not fit, KL is large and the plain form loses nothing.
    overflows_N1 = (exponent_NV > _LARGEST_EXPONENT).any(-1, keepdim=True)
    plain_N1 = logits_q_NV.logsumexp(-1, keepdim=True) - log_mass_p_N1 - mean_N1
    infinite_N1 = missing_NV.any(-1, keepdim=True)
    kl_N1 = torch.where(overflows_N1, plain_N1, total_N1.log1p())
    kl_N1 = kl_N1.masked_fill(infinite_N1, torch.inf)
    pull_NV = p_NV * y_NV
    to_p_NV = -pull_NV.masked_fill(infinite_N1, torch.nan) if to_p else None
    to_q_NV = None
    if to_q:
        near_NV = (k_NV + pull_NV - p_NV * total_N1) / (1 + total_N1)
        plain_NV = torch.softmax(logits_q_NV, dim=-1) - p_NV
        to_q_NV = torch.where(overflows_N1, plain_NV, near_NV)
        to_q_NV = to_q_NV.masked_fill(infinite_N1, torch.nan)
    return kl_N1.squeeze(-1), to_p_NV, to_q_NV


def _expm1_minus(y_NV: Tensor) -> Tensor:
    """e^y - 1 - y for y <= 1, by its series where the difference would cancel."""
    # There the series' truncation y^5/2520 meets the difference's rounding eps/y.
    limit = 0.01 if y_NV.dtype == torch.float64 else 0.05
    series_NV = y_NV / 720
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2):
        series_NV.add_(coefficient).mul_(y_NV)
    series_NV *= y_NV
    small_NV = y_NV.abs() < limit
    if bool(small_NV.all()):
        return series_NV
    return torch.where(small_NV, series_NV, torch.expm1(y_NV) - y_NV)


def _full_precision(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def policy_logits(hidden_NH: Tensor, project: Project, temperature: float) -> Tensor:
    """Logits [N, V] of the policy at these states, float32 or float64."""
    logits_NV = _full_precision(project(hidden_NH))
    return logits_NV if temperature == 1.0 else logits_NV / temperature


def _log_probability(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    chosen_N = logits_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
    return chosen_N - logits_NV.logsumexp(-1)


def _entropy(logits_NV: Tensor) -> Tensor:
    log_p_NV = torch.log_softmax(logits_NV, dim=-1)
    p_NV = log_p_NV.exp()
    # 0 log 0 = 0, in the gradient too.
    return -(p_NV * log_p_NV.masked_fill(p_NV == 0, 0.0)).sum(-1)


def chunk_for(hidden_TH: Tensor, project: Project) -> int:
    """How many states' logits are made at a time where nothing else is said."""
    with torch.no_grad():
        vocabulary = project(hidden_TH[:1]).shape[-1]
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def _wanted(
    entropy: bool, anchor: Reference | None, reverse: bool, reference: Reference | None
) -> list[str]:
    """The fields of TokenScores that will be filled, in their order."""
    asked = (True, entropy, anchor is not None, reverse, reference is not None)
    return [field.name for field, ask in zip(fields(TokenScores), asked, strict=True) if ask]


def _check_arguments(
    hidden_TH: Tensor,
    targets_T: Tensor,
    temperature: float,
    chunk_tokens: int | None,
    anchor: Reference | None,
    reverse: bool,
    reference: Reference | None,
) -> None:
    if hidden_TH.dim() != 2 or targets_T.shape != hidden_TH.shape[:1]:
        raise ValueError(
            f"score_tokens: hidden {tuple(hidden_TH.shape)} and targets "
            f"{tuple(targets_T.shape)} do not match; give [T, H] and [T]"
        )
    for name, other in (("anchor", anchor), ("reference", reference)):
        if other is not None and other.hidden_TH.shape[0] != hidden_TH.shape[0]:
            raise ValueError(
                f"score_tokens: {name} has {other.hidden_TH.shape[0]} rows for "
                f"{hidden_TH.shape[0]} tokens; score both at the same states"
            )
    if not temperature > 0:
        raise ValueError(
            f"score_tokens: temperature {temperature} is no distribution; give a value above 0"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"score_tokens: chunk_tokens {chunk_tokens}; give at least 1")
    if reverse and anchor is None:
        raise ValueError("score_tokens: reverse KL needs an anchor; give anchor=Reference(...)")
