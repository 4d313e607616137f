"""From logits to tokens with keyed randomness: one uniform a token, inverted through the CDF."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from satune.types import Sampling

_BLOCK = 128
"""Tokens whose probabilities are summed before the running sum: it divides most vocabularies."""


def sample_tokens(
    logits_RV: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Tokens [R] and their log-probabilities [R] at each row's temperature.

    ``uniforms`` are in [0, 1). Inverting the CDF makes a token depend on its row alone: another
    batching changes it only where the uniform falls within rounding of a boundary.
    Log-probabilities are of the policy before any top-k or top-p filter; a greedy row's are those
    at temperature 1.
    """
    temperature_R = torch.tensor([s.temperature for s in settings], dtype=logits_RV.dtype)
    greedy_R = temperature_R == 0
    scale_R = torch.where(greedy_R, torch.ones_like(temperature_R), temperature_R)
    logprobs_RV = torch.log_softmax(logits_RV / scale_R.to(logits_RV.device)[:, None], dim=-1)
    kept_RV = logprobs_RV
    if any(s.top_k > 0 or s.top_p < 1.0 for s in settings):
        kept_RV = _filtered(logprobs_RV, settings)
    u_R1 = torch.tensor(uniforms, dtype=torch.float64, device=logits_RV.device)[:, None]
    tokens_R = _inverted(kept_RV.exp(), u_R1)
    if bool(greedy_R.any()):
        tokens_R = torch.where(greedy_R.to(tokens_R.device), logprobs_RV.argmax(-1), tokens_R)
    return tokens_R, logprobs_RV.gather(-1, tokens_R[:, None]).squeeze(-1)


def _inverted(weights_RV: Tensor, u_R1: Tensor) -> Tensor:
    """Tokens [R] at which the running sum of the weights goes past the share u of all.

    The sum runs over blocks of the vocabulary, and then through the block in which the token lies:
    in double precision, since over a large vocabulary it would lose whole tokens in float32.
    """
    rows, size = weights_RV.shape
    if size % _BLOCK:
        weights_RV = torch.nn.functional.pad(weights_RV, (0, -size % _BLOCK))
    weights_RBW = weights_RV.view(rows, -1, _BLOCK)
    sums_RB = weights_RBW.sum(-1, dtype=torch.float64).cumsum(-1)
    reached_R1 = u_R1 * sums_RB[:, -1:]
    block_R1 = torch.searchsorted(sums_RB, reached_R1, right=True).clamp(max=sums_RB.shape[1] - 1)
    before_R1 = torch.where(block_R1 > 0, sums_RB.gather(1, (block_R1 - 1).clamp(min=0)), 0.0)
    row_R = torch.arange(rows, device=weights_RV.device)
    inner_RW = before_R1 + weights_RBW[row_R, block_R1[:, 0]].cumsum(-1, dtype=torch.float64)
    # The block's own sum may be the larger by rounding, and its last tokens may weigh nothing.
    reached_R1 = torch.minimum(reached_R1, inner_RW[:, -1:].nextafter(reached_R1.new_zeros(())))
    within_R1 = torch.searchsorted(inner_RW, reached_R1, right=True)
    return (block_R1 * _BLOCK + within_R1).squeeze(-1).clamp(max=size - 1)


def _filtered(logprobs_RV: Tensor, settings: Sequence[Sampling]) -> Tensor:
    ordered_RV, index_RV = logprobs_RV.sort(dim=-1, descending=True)
    before_RV = ordered_RV.exp().cumsum(-1) - ordered_RV.exp()
    top_p_R1 = torch.tensor([s.top_p for s in settings]).to(logprobs_RV)[:, None]
    top_k_R1 = torch.tensor([s.top_k or logprobs_RV.shape[-1] for s in settings])[:, None]
    rank_V = torch.arange(logprobs_RV.shape[-1], device=logprobs_RV.device)
    drop_RV = (before_RV >= top_p_R1) | (rank_V >= top_k_R1.to(rank_V.device))
    drop_RV[:, 0] = False
    ordered_RV = ordered_RV.masked_fill(drop_RV, float("-inf"))
    return torch.empty_like(logprobs_RV).scatter_(-1, index_RV, ordered_RV)
