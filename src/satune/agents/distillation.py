"""What distillation computes on a student: its distances from the models of a mixture at states
that a team visited, and the gradient that draws it to the mixture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from satune.agents.mixture import Distances, MixturePolicy
from satune.agents.packing import MicroBatch, PackedTurns, micro_batches
from satune.agents.policy import Policy
from satune.agents.ports import NonFinite
from satune.agents.prefixes import states_of
from satune.core.logprobs import CHUNK_BYTES, exact_kl
from satune.core.projection import mixture_logprobs, project


@torch.no_grad()
def measure_distances(
    student: Policy, mixture: MixturePolicy, packed: PackedTurns, budget: int
) -> Distances:
    """Exact full-vocabulary KL of the student at own tokens of any episodes, in micro-batches of at
    most ``budget`` padded tokens. Raises NonFinite where logits are not finite."""
    columns = [torch.zeros(packed.tokens, dtype=torch.float64) for _ in range(4)]
    for batch, mixture_TH in mixture_states(mixture, packed, budget):
        own_TH = states_of(student, batch.to(student.device), share_prompts=True)
        rows = chunk_rows(mixture)
        parts = (batch.tokens_T.split(rows), mixture_TH.split(rows), own_TH.split(rows))
        for at_N, hidden_NH, own_NH in zip(*parts, strict=True):
            p_NV, q_NV = logits_of_both(mixture, hidden_NH)
            own_NV = _student_logits(student, own_NH, p_NV.shape[-1])
            mixed_NV = mixture_logprobs(p_NV, q_NV, project(p_NV, q_NV, mixture.delta).lambda_N)
            pairs = ((own_NV, p_NV), (p_NV, own_NV), (own_NV, mixed_NV), (own_NV, q_NV))
            for column_T, pair in zip(columns, pairs, strict=True):
                column_T[at_N] = exact_kl(*pair).cpu().double()
    return Distances(*columns)


def add_gradient(
    student: Policy,
    mixture: MixturePolicy,
    packed: PackedTurns,
    episodes: Sequence[int],
    budget: int,
    *,
    share_prompts: bool,
    scale: float = 1.0,
) -> float:
    """Add ``scale`` times the gradient of the mean of KL(student‖mixture) over the own tokens of
    ``episodes`` to the student's parameters; returns that mean in nats, 0 where there are no such
    tokens. Raises NonFinite."""
    chosen = torch.zeros(packed.episodes, dtype=torch.bool)
    chosen[list(episodes)] = True
    total = int(chosen[packed.episode_T].sum())
    mean = 0.0
    if total == 0:
        return mean
    for batch in micro_batches(packed, budget, episodes, whole_episodes=False):
        here = batch.to(student.device)
        with torch.no_grad():
            mixture_TH = states_of(mixture, here, share_prompts=True)
        hidden_TH = states_of(student, here, share_prompts=share_prompts)
        # Chunk by chunk through the head, then once through the layers below.
        leaf_TH = hidden_TH.detach().requires_grad_()
        rows = chunk_rows(mixture)
        for own_NH, both_NH in zip(leaf_TH.split(rows), mixture_TH.split(rows), strict=True):
            p_NV, q_NV = logits_of_both(mixture, both_NH)
            mixed_NV = mixture_logprobs(p_NV, q_NV, project(p_NV, q_NV, mixture.delta).lambda_N)
            own_NV = _student_logits(student, own_NH, mixed_NV.shape[-1])
            loss = exact_kl(own_NV, mixed_NV).sum() / total
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFinite("KL to the mixture is not finite")
            mean += value
            (scale * loss).backward()
        hidden_TH.backward(leaf_TH.grad)
    return mean


def mixture_states(
    mixture: MixturePolicy, packed: PackedTurns, budget: int
) -> Iterator[tuple[MicroBatch, Tensor]]:
    """The mixture's hidden states [T, H] at the own tokens, micro-batch by micro-batch."""
    for batch in micro_batches(packed, budget, whole_episodes=False):
        with torch.no_grad():
            yield batch, states_of(mixture, batch.to(mixture.device), share_prompts=True)


def chunk_rows(mixture: MixturePolicy) -> int:
    """How many states' logits are held at a time."""
    return max(1, CHUNK_BYTES // (4 * mixture.vocabulary))


def logits_of_both(mixture: MixturePolicy, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
    """As the mixture's own. Raises NonFinite where one of them is not finite."""
    p_NV, q_NV = mixture.logits_of_both(hidden_NH)
    return _finite(p_NV, "incumbent"), _finite(q_NV, "newcomer")


def _student_logits(student: Policy, hidden_NH: Tensor, width: int) -> Tensor:
    """Logits [N, V] after the student's temperature, on the first ``width`` ids."""
    return _finite(student.project(hidden_NH)[..., :width] / student.temperature, "student")


def _finite(logits_NV: Tensor, whose: str) -> Tensor:
    # The largest alone shows NaN and +inf, and lets the -inf of a mask be.
    if not bool(logits_NV.detach().amax(-1).isfinite().all()):
        raise NonFinite(f"the {whose}'s logits are not finite")
    return logits_NV
