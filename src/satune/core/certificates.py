"""Evidence that an update raised the reward, and the certificate made of it (THEORY §5).

The unit of independence is the problem: one number D a problem, in a range known beforehand, whose
mean is (fresh, balance) or is at most (pessimistic) J(new) - J(old). **Both sides are drawn for the
certificate alone, on problems that gave no gradient; no episode that made a gradient or chose a
candidate enters.** Learning raises what it sees: with the gradient's own batch as the old side,
updates by pure noise are certified every time.
No episode is dropped: one that is missing (the world ended it) takes the worst value that it could
have had, so that D lies nowhere above what the whole episodes would have given. Without that, a
change that makes its bad episodes fail would look like an improvement.
Shape suffixes: ``P`` problems, ``G`` episodes a problem by the old team, ``H`` by the new one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from decimal import ROUND_FLOOR, Context
from typing import Any, Literal

import torch
from torch import Tensor

from satune.core.confidence import METHODS, lower_bound
from satune.core.settings import Evidence, Method

HeldOut = Literal["fresh", "finite"]


def evidence_range(kind: Evidence, clip: float | None = None) -> tuple[float, float]:
    """The range [low, high] of a problem's D; ``clip`` is the pessimistic evidence's c.

    Raises: ValueError if the kind is unknown, or pessimistic without a finite c >= 1.
    """
    if kind in ("fresh", "balance"):
        return -1.0, 1.0
    if kind != "pessimistic":
        raise ValueError(f"evidence {kind!r}: choose fresh, balance or pessimistic")
    if clip is None or not 1 <= clip < math.inf:
        raise ValueError(f"evidence clip {clip}: give a finite number, at least 1")
    return -1.0, clip - 1.0


Missing = tuple[Tensor, Tensor] | None
"""Which episodes are missing, by the old team [P, G] and by the new [P, H], as booleans; None: all
are there. What stands in place of a missing episode's reward and u is not read."""


def fresh_evidence(old_PG: Tensor, new_PH: Tensor, missing: Missing = None) -> Tensor:
    """E1: D = mean reward of the new team - of the old, in [-1, 1]; needs no log-probabilities.

    A missing episode has reward 0 on the new side and 1 on the old.
    Raises: ValueError if a reward is NaN or outside [0, 1], or the problems differ in number.
    """
    if missing is not None:
        old_PG, new_PH = _filled(old_PG, missing[0], 1.0), _filled(new_PH, missing[1], 0.0)
    old_PG, new_PH = _rewards(old_PG), _rewards(new_PH)
    _same_problems(old_PG, new_PH)
    return new_PH.mean(-1) - old_PG.mean(-1)


def balance_evidence(
    old_rewards_PG: Tensor,
    old_u_PG: Tensor,
    new_rewards_PH: Tensor,
    new_u_PH: Tensor,
    missing: Missing = None,
) -> Tensor:
    """E2: D = mean_old tanh(u/2)(R - 1/2) + mean_new tanh(u/2)(R - 1/2), in [-1, 1].

    ``u`` is log(new/old) of the whole episode, summed over the own tokens of every agent that
    changed, also on the new team's episodes; it may be infinite. tanh(u/2) = (new - old)/(new +
    old), so that the two means add up to J(new) - J(old): unbiased, and bounded without a clip.
    A missing episode adds -1/2 to its side's mean, the least that one can: u = ∞ and R = 0.
    Raises: ValueError if a reward is NaN or outside [0, 1], a u is NaN, or shapes disagree.
    """
    if missing is not None:
        old_rewards_PG = _filled(old_rewards_PG, missing[0], 0.0)
        new_rewards_PH = _filled(new_rewards_PH, missing[1], 0.0)
        old_u_PG = _filled(old_u_PG, missing[0], math.inf)
        new_u_PH = _filled(new_u_PH, missing[1], math.inf)
    old_PG, new_PH = _rewards(old_rewards_PG), _rewards(new_rewards_PH)
    _same_problems(old_PG, new_PH)
    old_share_PG = (_log_ratios(old_u_PG, old_PG) / 2).tanh()
    new_share_PH = (_log_ratios(new_u_PH, new_PH) / 2).tanh()
    return (old_share_PG * (old_PG - 0.5)).mean(-1) + (new_share_PH * (new_PH - 0.5)).mean(-1)


def pessimistic_evidence(
    old_rewards_PG: Tensor, old_u_PG: Tensor, clip: float, missing_PG: Tensor | None = None
) -> Tensor:
    """E3, before deployment: D = mean_old (min(e^u, c) - 1) R, in [-1, c - 1], c = ``clip``.

    Its mean is at most J(new) - J(old), because R >= 0. c is fixed before anything is seen; for
    several agents u is the sum against the team that played. Weighted episodes do not enter.
    A missing episode adds -1, the least that one can: u = -∞ and R = 1.
    Raises: ValueError if a reward is NaN or outside [0, 1], a u is NaN, or shapes disagree.
    """
    low, high = evidence_range("pessimistic", clip)
    if missing_PG is not None:
        old_rewards_PG = _filled(old_rewards_PG, missing_PG, 1.0)
        old_u_PG = _filled(old_u_PG, missing_PG, -math.inf)
    old_PG = _rewards(old_rewards_PG)
    ratio_PG = _log_ratios(old_u_PG, old_PG).exp().clamp(max=clip)
    # A mean of numbers at the end of the range may round past it.
    return ((ratio_PG - 1) * old_PG).mean(-1).clamp(low, high)


@dataclass(frozen=True)
class StatisticalCertificate:
    """A lower bound on J(new) - J(old), wrong with probability at most ``alpha``.

    ``lower`` is the bound by ``method``, chosen beforehand; ``betting``, ``empirical_bernstein``
    and ``hoeffding`` stand beside it and decide nothing. ``mean`` is the evidence's mean over
    ``problems`` values in [low, high], ``standard_error`` its standard error (None for one
    problem). ``samples``: episodes a problem (by the old team, by the new). ``decision`` counts the
    tests of the run, this one included. ``held_out`` says what the claim is about: "fresh", the
    task's distribution, from which the problems were drawn; "finite", the mean over a finite set.
    """

    evidence: Evidence
    method: Method
    mean: float
    lower: float
    alpha: float
    decision: int
    problems: int
    samples: tuple[int, int]
    held_out: HeldOut
    low: float
    high: float
    standard_error: float | None
    betting: float
    empirical_bernstein: float
    hoeffding: float

    @property
    def positive(self) -> bool:
        """Whether an improvement is certified."""
        return self.lower > 0

    @property
    def claim(self) -> str:
        """What the certificate says, in one sentence; the figures are rounded to the safe side."""
        over = (
            "the task's distribution of problems"
            if self.held_out == "fresh"
            else "this finite set of problems, and nothing beyond it"
        )
        error = f"(error probability {self.alpha:.3g})"
        if self.lower > 0:
            return f"The mean reward rises by at least {_down(self.lower)} {error} over {over}."
        if self.lower <= self.low:
            return f"Nothing is shown {error}: the bound is the least possible value, {self.low:g}."
        if self.lower == 0:
            return f"The mean reward does not fall {error} over {over}."
        # Rounding the bound down rounds the possible fall up.
        fall = _down(self.lower).removeprefix("-")
        return f"The mean reward falls by at most {fall} {error} over {over}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name with the claim, without what was not measured."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["samples"] = list(self.samples)
        values |= {"positive": self.positive, "claim": self.claim}
        return {name: value for name, value in values.items() if value is not None}


def certify(
    evidence_P: Tensor,
    kind: Evidence,
    alpha: float,
    method: Method = "betting",
    *,
    samples: tuple[int, int],
    decision: int = 1,
    held_out: HeldOut = "fresh",
    clip: float | None = None,
) -> StatisticalCertificate:
    """The certificate of one decision from the evidence of each problem, in the order drawn.

    ``alpha`` is this decision's share (``confidence.Spending.next``), ``clip`` the pessimistic
    evidence's c. "finite" with the betting bound presumes problems drawn from the set at random
    with replacement; empirical Bernstein and Hoeffding also hold for the whole set in any order.
    Raises: ValueError if a value is NaN or outside the kind's range, or a setting is unknown.
    """
    low, high = evidence_range(kind, clip)
    if held_out not in ("fresh", "finite"):
        raise ValueError(f"held_out {held_out!r}: choose fresh or finite")
    if method not in METHODS:
        raise ValueError(f"certify.method {method!r}: choose {', '.join(METHODS)}")
    evidence_P = evidence_P.detach().to(device="cpu", dtype=torch.float64)
    bounds = {
        name: lower_bound(evidence_P, low, high, alpha, name)
        for name in ("betting", "empirical_bernstein", "hoeffding")
    }
    problems = evidence_P.numel()
    return StatisticalCertificate(
        evidence=kind,
        method=method,
        mean=float(evidence_P.mean()),
        lower=bounds[method],
        alpha=alpha,
        decision=decision,
        problems=problems,
        samples=samples,
        held_out=held_out,
        low=low,
        high=high,
        standard_error=float(evidence_P.std()) / math.sqrt(problems) if problems > 1 else None,
        **bounds,
    )


def _down(value: float) -> str:
    """Three significant digits, rounded towards minus infinity."""
    return f"{Context(prec=3, rounding=ROUND_FLOOR).create_decimal_from_float(value):f}"


def _rewards(rewards_PG: Tensor) -> Tensor:
    rewards_PG = rewards_PG.detach().to(device="cpu", dtype=torch.float64)
    if rewards_PG.dim() != 2 or 0 in rewards_PG.shape:
        raise ValueError("evidence: give rewards [problems, episodes], at least one of each")
    # Asked this way round, NaN is outside.
    if not bool(((rewards_PG >= 0) & (rewards_PG <= 1)).all()):
        raise ValueError("evidence: a reward is NaN or outside [0, 1]; rescale the task's rewards")
    return rewards_PG


def _filled(values_PG: Tensor, missing_PG: Tensor, worst: float) -> Tensor:
    if values_PG.shape != missing_PG.shape:
        raise ValueError("evidence: say of each episode whether it is missing")
    return values_PG.masked_fill(missing_PG.to(values_PG.device), worst)


def _same_problems(old_PG: Tensor, new_PH: Tensor) -> None:
    if old_PG.shape[0] != new_PH.shape[0]:
        raise ValueError(
            f"evidence: {old_PG.shape[0]} problems by the old team, {new_PH.shape[0]} by the new; "
            "give the same problems in the same order"
        )


def _log_ratios(u_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    u_PG = u_PG.detach().to(device="cpu", dtype=torch.float64)
    if u_PG.shape != rewards_PG.shape:
        raise ValueError("evidence: give one log-ratio u an episode")
    if bool(u_PG.isnan().any()):
        raise ValueError("evidence: a log-ratio u is NaN; both policies must score every episode")
    return u_PG
