"""Log-ratios of two policies at three granularities, and the weights made of them (THEORY §4, §6).

Shape suffixes: ``T`` own tokens, ``E`` episodes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sum_by(values_T: Tensor, index_T: Tensor, size: int) -> Tensor:
    """Sum ``values_T`` [T] into [size] by ``index_T`` (long, 0..size-1); empty bins are 0."""
    return values_T.new_zeros(size).index_add(0, index_T, values_T)


def token_log_ratio(logprobs_T: Tensor, anchor_T: Tensor) -> Tensor:
    """log(new/old) of each own token [T]; no gradient reaches ``anchor_T``."""
    return logprobs_T - anchor_T.detach()


def sequence_log_ratio(
    logprobs_T: Tensor, anchor_T: Tensor, episode_T: Tensor, episodes: int
) -> Tensor:
    """u of THEORY §4 [episodes]: the sum over all own tokens of an episode, never averaged."""
    return sum_by(token_log_ratio(logprobs_T, anchor_T), episode_T, episodes)


def effective_sample_size(log_weights_E: Tensor) -> float:
    """(sum w)^2 / sum w^2 from log w, without forming w; between 1 and E.

    0.0 if there is no episode or every weight is 0. NaN if a log weight is NaN or +inf, so a caller
    compares with ``not size / count >= threshold``.
    """
    log_weights = log_weights_E.detach().double()
    if log_weights.numel() == 0 or bool((log_weights == -torch.inf).all()):
        return 0.0
    shifted = (log_weights - log_weights.max()).exp()
    return float(shifted.sum() ** 2 / (shifted**2).sum())


def capped_weights(log_weights_E: Tensor, cap: float | None) -> tuple[Tensor, float]:
    """Weights min(w, cap) [E] without gradient, and the share of the total weight cut away.

    A positive share means that the weighted mean is biased: capped weights are for training, never
    for a certificate (THEORY §6). ``cap`` None: uncapped, share 0.
    Raises: ValueError if the cap is not positive.
    """
    log_weights_E = log_weights_E.detach()
    if cap is None:
        return log_weights_E.exp(), 0.0
    if not cap > 0:
        raise ValueError(f"weight cap {cap}: give a positive number, or none for no cap")
    kept_E = log_weights_E.clamp(max=math.log(cap))
    if log_weights_E.numel() == 0 or bool((log_weights_E == -torch.inf).all()):
        return kept_E.exp(), 0.0
    log_share = kept_E.double().logsumexp(0) - log_weights_E.double().logsumexp(0)
    return kept_E.exp(), float(-torch.expm1(log_share))
