"""What a swap measures on states that a team visited: how far incumbent, newcomer, their mixture
and a distilled newcomer are from each other, and whether the newcomer leans the right way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from satune.agents.learner import NonFinite
from satune.agents.mixture import MixturePolicy
from satune.agents.packing import MicroBatch, PackedTurns, micro_batches, padded_budget
from satune.agents.policy import Policy
from satune.agents.prefixes import states_of
from satune.core.divergence import DivergenceStatistics, divergence_statistics, weighted_quantile
from satune.core.logprobs import CHUNK_BYTES, exact_kl
from satune.core.projection import (
    Alignment,
    Projection,
    alignment_score,
    alignment_terms,
    mixture_logprobs,
    project,
)
from satune.core.ratios import sum_by
from satune.core.trust_region import Unit
from satune.training.update import groups, own_turns
from satune.types import Episode

TOKENS = 16384
"""Padded tokens of one forward, where the caller does not choose."""


@dataclass(frozen=True, slots=True)
class Examination:
    """The projection at every own token of the incumbent's episodes, KL(newcomer‖incumbent) there,
    and the alignment score (None where a problem has one episode only)."""

    projection: Projection
    newcomer_kl_T: Tensor
    alignment: Alignment | None
    packed: PackedTurns

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: what a dry run shows. Quantiles are over token states."""
        found = self.projection
        states = found.lambda_N.numel()
        reverse_E = sum_by(found.reverse_kl_N, self.packed.episode_T, self.packed.episodes)
        result: dict[str, Any] = {
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


@dataclass(frozen=True, slots=True)
class Distances:
    """KL [T] of a student θ at own tokens, float64: to and from the incumbent, to the mixture and
    to the newcomer as it came."""

    to_incumbent_T: Tensor
    from_incumbent_T: Tensor
    to_mixture_T: Tensor
    to_newcomer_T: Tensor


def examine(
    mixture: MixturePolicy, agent: str, episodes: Sequence[Episode], *, tokens: int = TOKENS
) -> Examination:
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
    for batch, hidden_TH in _states(mixture, packed, tokens):
        for at_N, hidden_NH in _chunks(batch, hidden_TH, mixture):
            p_NV, q_NV = _logits(mixture, hidden_NH)
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
    return Examination(ordered, newcomer_T, alignment, packed)


@torch.no_grad()
def measure(
    student: Policy, mixture: MixturePolicy, packed: PackedTurns, *, tokens: int = TOKENS
) -> Distances:
    """Exact full-vocabulary KL of the student at own tokens of any episodes.

    Raises NonFinite where logits are not finite.
    """
    columns = [torch.zeros(packed.tokens, dtype=torch.float64) for _ in range(4)]
    for batch, mixture_TH in _states(mixture, packed, tokens):
        own_TH = states_of(student, batch.to(student.device), share_prompts=True)
        chunks = zip(
            _chunks(batch, mixture_TH, mixture), _chunks(batch, own_TH, mixture), strict=True
        )
        for (at_N, hidden_NH), (_, own_NH) in chunks:
            p_NV, q_NV = _logits(mixture, hidden_NH)
            own_NV = student_logits(student, own_NH, p_NV.shape[-1])
            mixed_NV = mixture_logprobs(p_NV, q_NV, project(p_NV, q_NV, mixture.delta).lambda_N)
            pairs = ((own_NV, p_NV), (p_NV, own_NV), (own_NV, mixed_NV), (own_NV, q_NV))
            for column_T, pair in zip(columns, pairs, strict=True):
                column_T[at_N] = exact_kl(*pair).cpu().double()
    return Distances(*columns)


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


def student_logits(student: Policy, hidden_NH: Tensor, width: int) -> Tensor:
    """Logits [N, V] after the student's temperature, on the first ``width`` ids."""
    return _finite(student.project(hidden_NH)[..., :width] / student.temperature, "student")


def teach(mixture: MixturePolicy, hidden_TH: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """log π_λ [N, V] at consecutive slices of the states [T, H], a chunk at a time."""
    rows = _chunk_rows(mixture)
    for start in range(0, hidden_TH.shape[0], rows):
        here = slice(start, start + rows)
        p_NV, q_NV = _logits(mixture, hidden_TH[here])
        yield here, mixture_logprobs(p_NV, q_NV, project(p_NV, q_NV, mixture.delta).lambda_N)


def _states(
    policy: Policy, packed: PackedTurns, tokens: int
) -> Iterator[tuple[MicroBatch, Tensor]]:
    budget = padded_budget(tokens, policy.device)
    for batch in micro_batches(packed, budget, whole_episodes=False):
        with torch.no_grad():
            yield batch, states_of(policy, batch.to(policy.device), share_prompts=True)


def _chunks(
    batch: MicroBatch, hidden_TH: Tensor, mixture: MixturePolicy
) -> Iterator[tuple[Tensor, Tensor]]:
    rows = _chunk_rows(mixture)
    return zip(batch.tokens_T.split(rows), hidden_TH.split(rows), strict=True)


def _chunk_rows(mixture: MixturePolicy) -> int:
    return max(1, CHUNK_BYTES // (4 * mixture.vocabulary))


def _logits(mixture: MixturePolicy, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
    p_NV, q_NV = mixture.logits_of_both(hidden_NH)
    return _finite(p_NV, "incumbent"), _finite(q_NV, "newcomer")


def _finite(logits_NV: Tensor, whose: str) -> Tensor:
    # The largest alone shows NaN and +inf, and lets the -inf of a mask be.
    if not bool(logits_NV.detach().amax(-1).isfinite().all()):
        raise NonFinite(f"the {whose}'s logits are not finite")
    return logits_NV


def _each(found: Projection, change: Callable[[Tensor], Tensor]) -> Projection:
    return Projection(*(change(getattr(found, field.name)) for field in fields(Projection)))


def _spread(values_T: Tensor) -> dict[str, float]:
    ones_T = torch.ones_like(values_T)
    at = {name: weighted_quantile(values_T, ones_T, q) for name, q in _QUANTILES.items()}
    return {"mean": float(values_T.mean()), **{n: v for n, v in at.items() if not math.isnan(v)}}


_QUANTILES = {"low": 0.05, "median": 0.5, "high": 0.99}
