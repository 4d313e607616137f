"""What a swap measures on states that a team visited: what the projection of a newcomer would be
there, whether it leans the right way, and how far a distilled one is from its incumbent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from satune.agents.distillation import chunk_rows, logits_of_both, mixture_states
from satune.agents.mixture import Distances, MixturePolicy
from satune.agents.packing import PackedTurns, padded_budget
from satune.core.divergence import DivergenceStatistics, divergence_statistics, weighted_quantile
from satune.core.logprobs import exact_kl
from satune.core.projection import (
    Alignment,
    Projection,
    alignment_score,
    alignment_terms,
    project,
)
from satune.core.ratios import sum_by
from satune.core.trust_region import Unit
from satune.files import events
from satune.training.advantages import groups
from satune.training.update import own_turns
from satune.types import Episode

TOKENS = 16384
"""Padded tokens of one forward, where the caller does not choose."""


@dataclass(frozen=True, slots=True)
class ProjectionMeasured:
    """The projection at every own token of the incumbent's episodes, KL(newcomer‖incumbent) there,
    and the alignment score (None where a problem has one episode only)."""

    projection: Projection
    newcomer_kl_T: Tensor
    alignment: Alignment | None
    packed: PackedTurns

    def to_dict(self) -> events.Projection:
        """Plain numbers: what a dry run shows. Quantiles are over token states."""
        found = self.projection
        states = found.lambda_N.numel()
        reverse_E = sum_by(found.reverse_kl_N, self.packed.episode_T, self.packed.episodes)
        result: events.Projection = {
            "states": states,
            "inside": float(found.inside_N.double().mean()),
            "infeasible": float(found.infeasible_N.double().mean()),
            "lambda": _spread(found.lambda_N),
            "kl": _spread(found.kl_N),
            "newcomer_kl": _spread(self.newcomer_kl_T),
            "trajectory": {"reverse": float(reverse_E.mean())},
        }
        if self.alignment is not None:
            result["alignment"] = {
                "score": self.alignment.score,
                "standard_error": self.alignment.standard_error,
                "problems": self.alignment.problems,
            }
        return result


def measure_projection(
    mixture: MixturePolicy, agent: str, episodes: Sequence[Episode], *, tokens: int = TOKENS
) -> ProjectionMeasured:
    """Project at the states where ``agent``, the incumbent, spoke in ``episodes``.

    The episodes are the old team's, so the score is S of THEORY §7 and the trajectory KL is that
    of KL(incumbent‖mixture). Raises ValueError where the agent wrote nothing.
    """
    packed = own_turns(agent, episodes)
    if packed.tokens == 0:
        raise ValueError(f"agent {agent} wrote nothing in these episodes; give others")
    parts: list[Projection] = []
    order: list[Tensor] = []
    terms_T, newcomer_T = (torch.zeros(packed.tokens, dtype=torch.float64) for _ in range(2))
    rows = chunk_rows(mixture)
    for batch, hidden_TH in mixture_states(mixture, packed, padded_budget(tokens, mixture.device)):
        chunks = zip(batch.tokens_T.split(rows), hidden_TH.split(rows), strict=True)
        for at_N, hidden_NH in chunks:
            p_NV, q_NV = logits_of_both(mixture, hidden_NH)
            found = project(p_NV, q_NV, mixture.delta)
            parts.append(_each(found, Tensor.cpu))
            order.append(at_N)
            newcomer_T[at_N] = exact_kl(q_NV, p_NV).cpu().double()
            # A padding id, should the incumbent have sampled one, says nothing about the newcomer.
            targets_N = packed.targets_T[at_N]
            real_N = targets_N < p_NV.shape[-1]
            each_N = alignment_terms(
                p_NV, q_NV, targets_N.where(real_N, 0).to(p_NV.device), mixture.delta
            )
            terms_T[at_N] = each_N.cpu().where(real_N, 0.0)
    problem_E = groups(episodes)
    alignment = None
    if int(torch.bincount(problem_E).min()) > 1:
        rewards_E = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
        alignment = alignment_score(terms_T, packed.episode_T, rewards_E, problem_E)
    back_T = torch.cat(order).argsort()
    ordered = _each(Projection.joined(parts), lambda values_N: values_N[back_T])
    return ProjectionMeasured(ordered, newcomer_T, alignment, packed)


def statistics_of(
    distances: Distances,
    packed: PackedTurns,
    episodes: Sequence[Episode],
    *,
    delta: float,
    quantile: float,
    unit: Unit,
    confidence: float,
) -> DivergenceStatistics:
    """Statistics of KL(student‖incumbent) over the states of ``episodes``, all of weight 1."""
    return divergence_statistics(
        distances.to_incumbent_T,
        distances.from_incumbent_T,
        packed.episode_T,
        packed.turn_T,
        torch.ones(packed.episodes, dtype=torch.float64),
        groups(episodes),
        delta=delta,
        quantile=quantile,
        unit=unit,
        confidence=confidence,
    )


def _each(found: Projection, change: Callable[[Tensor], Tensor]) -> Projection:
    return Projection(*(change(getattr(found, field.name)) for field in fields(Projection)))


def _spread(values_T: Tensor) -> events.Spread:
    ones_T = torch.ones_like(values_T)
    spread: events.Spread = {"mean": float(values_T.mean())}
    for name, level in _QUANTILES:
        value = weighted_quantile(values_T, ones_T, level)
        if not math.isnan(value):
            spread[name] = value
    return spread


_QUANTILES: tuple[tuple[Literal["low", "median", "high"], float], ...] = (
    ("low", 0.05), ("median", 0.5), ("high", 0.99),
)  # fmt: skip
