"""The newcomer projected into the incumbent's trust region, state by state (THEORY §7).

Of all policies within KL(.‖p) <= delta the geometric mixture pi_lambda, proportional to
p e^(lambda z) with z = log q - log p, is the one nearest the newcomer q. Logits come after each
policy's own temperature, which is part of the policy. Nothing here has a gradient. Shape suffixes:
``N`` states, ``V`` vocabulary, ``T`` own tokens, ``E`` episodes, ``P`` problems.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from satune.core.advantages import group_advantages
from satune.core.ratios import sum_by

ITERATIONS = 100
"""After so many the lower end of the bracket is returned. Related models take 2 to 7."""

# delta' = delta (1 - _MARGIN) is aimed at, and met within _TOLERANCE of it: KL <= delta always.
_MARGIN = 1e-8
_TOLERANCE = 5e-9
# Logits below are a mask; their differences would swallow all others.
_MASKED = -1e30
# Below, rounding of e^(lambda y) - 1 would show in KL; expm1 takes five times as long.
_SMALL_DELTA = 1e-6
_LARGEST_EXPONENT = 600.0
# Numbers worked on at once: on a CPU what stays in its cache.
_BLOCK_ON_CPU = 2**18
_BLOCK_ON_DEVICE = 2**25


@dataclass(frozen=True)
class Projection:
    """What the projection is at each of N states; float64, nats.

    ``lambda_N`` in [0, 1]; ``kl_N`` KL(pi_lambda‖p) <= delta; ``reverse_kl_N`` KL(p‖pi_lambda),
    +inf where the newcomer misses some of p's mass; ``iterations_N`` (long) evaluations of the
    solver; ``inside_N`` (bool) the newcomer lay inside already, lambda = 1; ``infeasible_N`` (bool)
    it misses so much of p's mass that no lambda > 0 stays inside, lambda = 0: p itself.
    """

    lambda_N: Tensor
    kl_N: Tensor
    reverse_kl_N: Tensor
    iterations_N: Tensor
    inside_N: Tensor
    infeasible_N: Tensor

    @staticmethod
    def joined(parts: list[Projection]) -> Projection:
        """One projection of all the states of ``parts``, in their order."""
        names = [field.name for field in fields(Projection)]
        return Projection(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@torch.no_grad()
def project(logits_p_NV: Tensor, logits_q_NV: Tensor, delta: float) -> Projection:
    """Solve KL(pi_lambda‖p) = delta at each state [N], in float64 (THEORY §7).

    Tokens without mass under p (logit -inf, or a mask below -1e30) are left out: q counts as
    renormalised without them. Tokens that only q lacks have no mass under any pi_lambda with
    lambda > 0, which costs -log p(rest) of delta before lambda moves. Lies on the logits' device;
    memory beyond the result does not grow with N.
    Raises: ValueError if shapes differ, delta is not positive, a logit is NaN or +inf, or a row of
    either has no finite logit.
    """
    _check(logits_p_NV, logits_q_NV, delta)
    blocks = [
        _solve(*_prepared(p_NV, q_NV), delta) for p_NV, q_NV in _blocks(logits_p_NV, logits_q_NV)
    ]
    if not blocks:
        none_N = logits_p_NV.new_zeros(0, dtype=torch.float64)
        blocks = [Projection(none_N, none_N, none_N, none_N.long(), none_N.bool(), none_N.bool())]
    return Projection.joined(blocks)


@torch.no_grad()
def mixture_logprobs(logits_p_NV: Tensor, logits_q_NV: Tensor, lambda_N: Tensor) -> Tensor:
    """log pi_lambda [N, V] at given lambda_N, -inf where it has no mass; worked out in float64 and
    returned in the logits' own precision (at least float32). lambda = 0 gives log p.

    Raises: ValueError as ``project``, or if there is not one lambda a state.
    """
    _check(logits_p_NV, logits_q_NV)
    if lambda_N.shape != logits_p_NV.shape[:1]:
        raise ValueError("mixture_logprobs: give one lambda a state")
    dtype = torch.promote_types(logits_p_NV.dtype, torch.float32)
    mixed_NV = torch.empty_like(logits_p_NV, dtype=dtype)
    start = 0
    for p_NV, q_NV in _blocks(logits_p_NV, logits_q_NV):
        end = start + p_NV.shape[0]
        lambda_N1 = lambda_N[start:end, None].double()
        log_p_NV, y_NV, _ = _prepared(p_NV, q_NV)
        mixed = torch.log_softmax(torch.addcmul(log_p_NV, lambda_N1, y_NV), dim=-1)
        at_p_N = lambda_N1.squeeze(-1) == 0
        if bool(at_p_N.any()):  # also where q misses some of p's mass
            mixed[at_p_N] = torch.log_softmax(p_NV[at_p_N].double(), dim=-1)
        mixed_NV[start:end] = mixed
        start = end
    return mixed_NV


@torch.no_grad()
def alignment_terms(
    logits_p_NV: Tensor, logits_q_NV: Tensor, targets_N: Tensor, delta: float
) -> Tensor:
    """lambda_0(s) (z_t - E_p z) [N] of the token t taken at each state, float64 (THEORY §7).

    lambda_0 = sqrt(2 delta / Var_p z) is the projection's first step; where q equals p the term is
    0. Where q lacks tokens of p, z is -inf on them and the term is its limit, in which all that
    matters is whether t is one of them. ``targets_N`` (long) must have mass under p.
    Raises: ValueError as ``project``, or if there is not one target a state.
    """
    _check(logits_p_NV, logits_q_NV, delta)
    if targets_N.shape != logits_p_NV.shape[:1]:
        raise ValueError("alignment_terms: give one target a state")
    terms: list[Tensor] = []
    rows = 0
    for p_NV, q_NV in _blocks(logits_p_NV, logits_q_NV):
        count = p_NV.shape[0]
        targets_N1 = targets_N[rows : rows + count, None]
        rows += count
        missing_NV = (p_NV > _MASKED) & (q_NV <= _MASKED)
        lacking_N1 = missing_NV.any(-1, keepdim=True)
        # All the rest of a row that lacks tokens is the same beside their -inf.
        q_NV = torch.where(lacking_N1, torch.where(missing_NV, p_NV - 1.0, p_NV), q_NV)
        log_p_NV, y_NV, _ = _prepared(p_NV, q_NV)
        deviation_N = torch.linalg.vecdot(log_p_NV.exp_(), y_NV * y_NV).sqrt()
        chosen_N = y_NV.gather(-1, targets_N1).squeeze(-1)
        term_N = math.sqrt(2 * delta) * chosen_N / deviation_N
        terms.append(torch.where(deviation_N > 0, term_N, 0.0))
    return torch.cat(terms) if terms else logits_p_NV.new_zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class Alignment:
    """The alignment score S and its standard error by problem (None with a single problem)."""

    score: float
    standard_error: float | None
    problems: int


def alignment_score(
    terms_T: Tensor, episode_T: Tensor, rewards_E: Tensor, problem_E: Tensor
) -> Alignment:
    """S = E_old[sum_t lambda_0(s_t) (z_t - E_p z) (R - b)] of THEORY §7, from ``alignment_terms``.

    To first order what the projected newcomer changes J by; a diagnostic, no promise.
    ``episode_T`` (long) points into ``rewards_E``, ``problem_E`` (long) labels the problem. b is
    the mean of the problem's other rewards; problems count alike, and the error is theirs.
    Raises: ValueError if a problem has one episode only, or there is no episode.
    """
    if rewards_E.numel() == 0:
        raise ValueError("alignment_score: there is no episode; give at least two of a problem")
    gain_E = group_advantages(
        rewards_E.double(), problem_E, baseline="leave_one_out", normalise=False, clip=None
    )
    sums_E = sum_by(terms_T.double(), episode_T, rewards_E.numel())
    _, index_E, count_P = torch.unique(problem_E, return_inverse=True, return_counts=True)
    mean_P = sum_by(sums_E * gain_E, index_E, count_P.numel()) / count_P
    problems = count_P.numel()
    error = float(mean_P.std() / math.sqrt(problems)) if problems > 1 else None
    return Alignment(float(mean_P.mean()), error, problems)


# -- one block of states --------------------------------------------------------------------------


def _blocks(logits_p_NV: Tensor, logits_q_NV: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    limit = _BLOCK_ON_CPU if logits_p_NV.device.type == "cpu" else _BLOCK_ON_DEVICE
    rows = max(1, limit // logits_p_NV.shape[-1])
    if not logits_p_NV.shape[0]:
        return iter(())
    return zip(logits_p_NV.split(rows), logits_q_NV.split(rows), strict=True)


def _prepared(p_NV: Tensor, q_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p [N, V] on the tokens that both have (-inf elsewhere), normalised there; y [N, V], z up
    to the constant that makes E_p y = 0; and -log of p's mass there [N]. Rows of which nothing is
    left are NaN, their third value +inf."""
    for name, logits_NV in (("p", p_NV), ("q", q_NV)):
        top_N = logits_NV.amax(-1)
        if not bool((top_N.isfinite() & (top_N > _MASKED)).all()):
            raise ValueError(f"projection: a state's logits of {name} are NaN, +inf or all masked")
    log_p_NV = p_NV.to(torch.float64, copy=True)
    y_NV = q_NV.to(torch.float64, copy=True).sub_(log_p_NV)
    masked = torch.minimum(p_NV.amin(), q_NV.amin()) <= _MASKED
    lost_N = torch.zeros(p_NV.shape[0], dtype=torch.float64, device=p_NV.device)
    if bool(masked):
        both_NV = (p_NV > _MASKED) & (q_NV > _MASKED)
        all_N = log_p_NV.masked_fill(p_NV <= _MASKED, -torch.inf).logsumexp(-1)
        log_p_NV = log_p_NV.masked_fill_(~both_NV, -torch.inf)
        y_NV = y_NV.masked_fill_(~both_NV, 0.0)
        missing_N = ((p_NV > _MASKED) & ~both_NV).any(-1)
        lost_N = torch.where(missing_N, all_N - log_p_NV.logsumexp(-1), 0.0)
        # A difference of two logarithms; below zero it is rounding, and the mass is lost all the
        # same.
        lost_N = torch.where(missing_N, lost_N.clamp(min=torch.finfo(torch.float64).tiny), lost_N)
    log_p_NV -= log_p_NV.amax(-1, keepdim=True)
    p_NV = log_p_NV.exp()
    mass_N1 = p_NV.sum(-1, keepdim=True)
    y_NV -= torch.linalg.vecdot(p_NV, y_NV)[:, None] / mass_N1
    log_p_NV -= mass_N1.log()
    return log_p_NV, y_NV, lost_N


class _Tilted:
    """Moments of y under pi_lambda, proportional to p e^(lambda y), at one lambda a state."""

    def __init__(self, log_p_NV: Tensor, y_NV: Tensor, delta: float) -> None:
        self.log_p_NV = log_p_NV
        self.powers_N2V = y_NV.new_empty(y_NV.shape[0], 2, y_NV.shape[1])
        self.powers_N2V[:, 0] = y_NV
        torch.mul(y_NV, y_NV, out=self.powers_N2V[:, 1])
        p_NV = log_p_NV.exp()
        self.p_NV = p_NV if delta < _SMALL_DELTA else None
        # Where the rounding of log p makes it more or less than 1, it does so in every moment.
        self.mass_N = p_NV.sum(-1)
        self.first_N, self.second_N = self._dot(p_NV)
        self.variance_N = self.second_N / self.mass_N
        # log sum p e^(lambda y) grows from 0 to this, KL(p‖q), as lambda goes from 0 to 1.
        self.deep = not bool((log_p_NV + y_NV).amax() < _LARGEST_EXPONENT)

    @property
    def y_NV(self) -> Tensor:
        return self.powers_N2V[:, 0]

    def keep(self, rows_N: Tensor) -> None:
        """Go on with these rows only."""
        for name in ("log_p_NV", "powers_N2V", "mass_N", "first_N", "second_N"):
            setattr(self, name, getattr(self, name)[rows_N])
        self.p_NV = None if self.p_NV is None else self.p_NV[rows_N]

    def _dot(self, weights_NV: Tensor) -> tuple[Tensor, Tensor]:
        moments_N2 = torch.bmm(self.powers_N2V, weights_NV[:, :, None]).squeeze(-1)
        return moments_N2[:, 0], moments_N2[:, 1]

    def at(self, lambda_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """psi = log E_p e^(lambda y), E_pi y and Var_pi y [N]."""
        lambda_N1 = lambda_N[:, None]
        if self.p_NV is not None and not self.deep:
            weights_NV = torch.expm1(lambda_N1 * self.y_NV).mul_(self.p_NV)
            gained_N = weights_NV.sum(-1)
            first_N, second_N = self._dot(weights_NV)
            total_N = self.mass_N + gained_N
            psi_N = (gained_N / self.mass_N).log1p()
            mean_N = (first_N + self.first_N) / total_N
            return psi_N, mean_N, (second_N + self.second_N) / total_N - mean_N * mean_N
        weights_NV = torch.addcmul(self.log_p_NV, lambda_N1, self.y_NV)
        shift_N = torch.zeros_like(lambda_N)
        if self.deep:
            shift_N = weights_NV.amax(-1)
            weights_NV -= shift_N[:, None]
        weights_NV.exp_()
        total_N = weights_NV.sum(-1)
        first_N, second_N = self._dot(weights_NV)
        mean_N = first_N / total_N
        psi_N = (total_N / self.mass_N).log() + shift_N
        return psi_N, mean_N, second_N / total_N - mean_N * mean_N


def _solve(log_p_NV: Tensor, y_NV: Tensor, lost_N: Tensor, delta: float) -> Projection:
    tilted = _Tilted(log_p_NV, y_NV, delta)
    states = lost_N.numel()
    ones_N, zeros_N = torch.ones_like(lost_N), torch.zeros_like(lost_N)
    aim = delta * (1 - _MARGIN)
    # All but the mass that q lacks: KL(pi_lambda‖p) = KL(pi_lambda‖p on what both have) + lost.
    target_N = aim - lost_N
    psi_N, mean_N, _ = tilted.at(ones_N)
    kl_N = (mean_N - psi_N).clamp(min=0.0)
    inside_N = kl_N + lost_N <= delta
    infeasible_N = ~inside_N & ~(target_N > 0)

    # What is returned; the lower end of the bracket until something better is found.
    lambda_N = torch.where(inside_N, 1.0, zeros_N)
    best_kl_N = torch.where(inside_N, kl_N, zeros_N)
    best_reverse_N = torch.where(inside_N, psi_N - tilted.first_N / tilted.mass_N, zeros_N)
    iterations_N = torch.zeros(states, dtype=torch.long, device=lost_N.device)

    # From here on the rows still sought, their places in the block in ``place_N``.
    place_N = (~inside_N & ~infeasible_N).nonzero().squeeze(-1)
    if place_N.numel() < states:
        tilted.keep(place_N)
    target_N = target_N[place_N]
    root_N = (2 * target_N).sqrt()
    at_N = (2 * target_N / tilted.second_N * tilted.mass_N).sqrt()
    low_N, high_N = torch.zeros_like(at_N), torch.ones_like(at_N)
    at_N = torch.where((at_N > 0) & (at_N < 1), at_N, 0.5)
    error_N = earlier_N = torch.full_like(at_N, torch.inf)
    for _ in range(ITERATIONS):
        if place_N.numel() == 0:
            break
        psi_N, mean_N, variance_N = tilted.at(at_N)
        kl_N = (at_N * mean_N - psi_N).clamp(min=0.0)
        iterations_N[place_N] += 1
        settled_N = (kl_N - target_N).abs() <= _TOLERANCE * aim
        below_N = settled_N | (kl_N < target_N)
        better = place_N[below_N]
        lambda_N[better], best_kl_N[better] = at_N[below_N], kl_N[below_N]
        reverse_N = psi_N - at_N * tilted.first_N / tilted.mass_N
        best_reverse_N[better] = reverse_N[below_N]
        low_N = torch.where(below_N, at_N, low_N)
        high_N = torch.where(below_N, high_N, at_N)
        # Newton on h = sqrt(2 KL), nearly linear in lambda; dh/dlambda = lambda Var / h.
        h_N = (2 * kl_N).sqrt()
        next_N = at_N + (root_N - h_N) * h_N / (at_N * variance_N)
        error_N, previous_N, earlier_N = (root_N - h_N).abs(), error_N, earlier_N
        astray_N = ~((next_N > low_N) & (next_N < high_N)) | (error_N > earlier_N / 2)
        at_N = torch.where(astray_N, (low_N + high_N) / 2, next_N)
        earlier_N = previous_N
        if bool(settled_N.any()):
            left_N = (~settled_N).nonzero().squeeze(-1)
            tilted.keep(left_N)
            place_N, target_N, root_N = place_N[left_N], target_N[left_N], root_N[left_N]
            at_N, low_N, high_N = at_N[left_N], low_N[left_N], high_N[left_N]
            error_N, earlier_N = error_N[left_N], earlier_N[left_N]
    moved_N = lambda_N > 0
    return Projection(
        lambda_N=lambda_N,
        kl_N=torch.where(moved_N, best_kl_N + lost_N, 0.0),
        reverse_kl_N=torch.where(moved_N & (lost_N > 0), torch.inf, best_reverse_N.clamp(min=0.0)),
        iterations_N=iterations_N,
        inside_N=inside_N,
        infeasible_N=infeasible_N,
    )


def _check(logits_p_NV: Tensor, logits_q_NV: Tensor, delta: float = 1.0) -> None:
    if logits_p_NV.shape != logits_q_NV.shape or logits_p_NV.dim() != 2:
        raise ValueError(
            f"projection: logits of shapes {tuple(logits_p_NV.shape)} and "
            f"{tuple(logits_q_NV.shape)}; give the same [N, V] for both"
        )
    if not logits_p_NV.shape[1]:
        raise ValueError("projection: there is no vocabulary")
    if not 0 < delta < math.inf:
        raise ValueError(f"projection: delta {delta}; give a positive number of nats")
