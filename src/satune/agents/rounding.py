"""What the type that an agent computes in makes of its log-probabilities and of a step (THEORY §6,
low precision).

Two things go wrong, and neither is seen from inside. Activations are rounded: the same weights give
a message another log-probability in another cut of the batch. Weights are rounded: masters move by
less than the type can show, or all cross a tie at once. The gauge computes the same messages again
in float32, once with the masters and once with what the masters are rounded to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from satune.agents.packing import PackedTurns
from satune.agents.policy import Policy
from satune.agents.scoring import Scorer
from satune.core.logprobs import Reference, score_tokens


@dataclass(frozen=True, slots=True)
class Gauged:
    """One number a token [T], nats; the present weights against an anchor's.

    ``cut_T`` is what another cut of the batch makes of log π, ``floor_T`` the KL between the two
    cuts: what is measured where nothing moved. ``kl_T`` is KL(present‖anchor) in the type that the
    agent computes in. Where that is not the masters' own, ``rounded_kl_T`` is the same of the
    rounded weights in the masters' type, ``masters_kl_T`` that of the masters, and ``error_T`` what
    rounding of activations makes of log(present/anchor); else they are None.
    """

    cut_T: Tensor
    floor_T: Tensor
    kl_T: Tensor
    rounded_kl_T: Tensor | None = None
    masters_kl_T: Tensor | None = None
    error_T: Tensor | None = None


@torch.no_grad()
def gauge(policy: Policy, packed: PackedTurns, anchor: Mapping[str, Tensor], budget: int) -> Gauged:
    """Gauge the present weights of ``policy`` against those of an ``anchor`` (names as in
    ``Policy.export``) on some own messages, in batches of ``budget`` padded tokens."""
    present = policy.export()
    new = _view(policy, packed, budget, present)
    logprobs_T, kl_T = _compared(policy, packed, new, _view(policy, packed, budget, anchor))
    alone = _view(policy, packed, 1, present)
    alone_T, floor_T = _compared(policy, packed, alone, new)
    if policy.autocast is None:
        return Gauged(alone_T[0] - logprobs_T[0], floor_T, kl_T)
    found = []
    for dtype in (policy.autocast, None):
        twins = [_twin(policy, weights, dtype) for weights in (present, anchor)]
        views = [_view(twin, packed, budget, twin.export()) for twin in twins]
        found.append(_compared(policy, packed, *views))
        del twins, views  # each pair is a second and third copy of the model
    (exact_T, rounded_T), (_, masters_T) = found
    return Gauged(
        cut_T=alone_T[0] - logprobs_T[0],
        floor_T=floor_T,
        kl_T=kl_T,
        rounded_kl_T=rounded_T,
        masters_kl_T=masters_T,
        error_T=(logprobs_T[0] - logprobs_T[1]) - (exact_T[0] - exact_T[1]),
    )


def _view(
    policy: Policy, packed: PackedTurns, budget: int, weights: Mapping[str, Tensor]
) -> Reference:
    """The states of all own tokens, and the head, under ``weights``."""
    scorer = Scorer(policy, budget, share_prompts=False)
    with policy.holding(weights):
        batches = [(batch.tokens_T, scorer.states(batch)) for batch in scorer.batches(packed)]
    order_T = torch.cat([tokens_T for tokens_T, _ in batches]).argsort()
    hidden_TH = torch.cat([hidden_TH for _, hidden_TH in batches])
    return Reference(hidden_TH[order_T.to(hidden_TH.device)], policy.projection_with(weights))


def _compared(
    policy: Policy, packed: PackedTurns, new: Reference, old: Reference
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Log-probabilities [T] of both, and KL(new‖old) [T], on the CPU in float64."""
    targets_T = packed.targets_T.to(new.hidden_TH.device)
    temperature = policy.temperature
    scores = score_tokens(
        new.hidden_TH, targets_T, new.project, temperature=temperature, anchor=old
    )
    others = score_tokens(old.hidden_TH, targets_T, old.project, temperature=temperature)
    assert scores.kl_T is not None
    return (
        (scores.logprobs_T.cpu().double(), others.logprobs_T.cpu().double()),
        scores.kl_T.cpu().double(),
    )


def _twin(policy: Policy, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> Policy:
    """A copy that computes in the masters' type, with ``weights``; where ``dtype`` is given, what
    autocast would round of them to it is rounded."""
    twin = policy.copied(policy.name)
    twin.autocast = None
    twin.load_weights(weights)
    twin.model.to(next(iter(weights.values())).dtype)
    if dtype is not None:
        for module in twin.model.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                for name, weight in list(module.named_parameters(recurse=False)):
                    # A new parameter: a tied embedding is looked up, which autocast leaves alone.
                    setattr(module, name, nn.Parameter(weight.to(dtype).to(weight.dtype)))
    return twin
