"""The trust region as a state machine: accept a proposal, shrink it, or revert it (THEORY §6).

It sees one number a candidate, the measured statistic of KL(proposal‖anchor), and says at which
scale s of theta_anchor + s (theta_proposal - theta_anchor) to measure next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from satune.ranges import NotNegative, Part, Positive, Whole, check

Unit = Literal["token", "turn", "trajectory"]
Decision = Literal["accept", "shrink", "revert"]

BETA_RANGE = 64.0
_SMALLEST_SHRINK = 0.25
_INSIDE = 0.95


@dataclass(frozen=True)
class TrustRegionSettings:
    """``delta`` (nats) bounds the ``quantile`` of KL(proposal‖anchor) over an agent's ``unit``.

    ``beta`` is the first weight of the KL penalty, ``adapt`` lets it follow the statistic,
    ``backtracks`` how often a proposal may shrink before it is reverted. Not ``enabled``: any
    finite statistic is accepted.
    Raises: ValueError if a value lies outside its range.
    """

    enabled: bool = True
    delta: Positive = 0.05
    quantile: Part = 0.99
    unit: Unit = "token"
    beta: NotNegative = 0.001
    adapt: bool = True
    backtracks: Whole = 5

    def __post_init__(self) -> None:
        check(self, "trust_region")

    def of(self, delta: float | None) -> TrustRegionSettings:
        """The region of an agent: its own ``delta`` if it has one, else the common one."""
        return self if delta is None else replace(self, delta=delta)


class LineSearch:
    """Backtracking of one proposal. Measure at ``scale``, ``observe``, repeat while it shrinks.

    ``scale`` is 1 first and 0 after a revert. ``measured`` holds (scale, statistic) of every
    candidate in order, ``at_least`` the scales whose statistic is a lower bound only, ``reason``
    one phrase on the last decision, ``decision`` the decision.
    """

    def __init__(self, settings: TrustRegionSettings) -> None:
        self.settings = settings
        self.scale = 1.0
        self.reason = "not measured yet"
        self.decision: Decision | None = None
        self.measured: list[tuple[float, float]] = []
        self.at_least: list[float] = []

    @property
    def foregone(self) -> float:
        """Above this it does not matter how large the statistic is: the next scale is a quarter,
        and beta doubles, all the same. inf where it always matters: the figures of the last
        candidate are the step's."""
        if not self.settings.enabled or len(self.measured) >= self.settings.backtracks:
            return math.inf
        return self.settings.delta * (_INSIDE / _SMALLEST_SHRINK) ** 2

    @property
    def first_statistic(self) -> float | None:
        """The statistic of the whole proposal, which beta follows; None before it is measured."""
        return self.measured[0][1] if self.measured else None

    def observe(self, statistic: float, *, whole: bool = True) -> Decision:
        """Judge the candidate at ``scale``; after "shrink", ``scale`` is the next to measure.

        KL grows like s^2, so the next scale is max(s/4, 0.95 s sqrt(delta/statistic)), and s/4
        after a statistic that is not finite. Not ``whole``: it is a lower bound, above
        ``foregone``.
        """
        assert self.decision in (None, "shrink"), "this line search has ended"
        if not whole:
            assert statistic > self.foregone, "what is not yet certain has to be measured wholly"
            self.at_least.append(self.scale)
        self.measured.append((self.scale, statistic))
        self.decision = self._judge(statistic)
        return self.decision

    def _judge(self, statistic: float) -> Decision:
        delta, finite = self.settings.delta, math.isfinite(statistic)
        if finite and not self.settings.enabled:
            self.reason = "trust region off"
            return "accept"
        if finite and statistic <= delta:
            self.reason = f"KL {statistic:.4g} within delta {delta:g} at scale {self.scale:.4g}"
            return "accept"
        cause = f"KL {statistic:.4g} above delta {delta:g}" if finite else "KL not finite"
        if not self.settings.enabled or len(self.measured) > self.settings.backtracks:
            shrinks = len(self.measured) - 1
            self.reason = f"{cause} after {shrinks} backtrack{'' if shrinks == 1 else 's'}"
            self.scale = 0.0
            return "revert"
        guess = _INSIDE * math.sqrt(delta / statistic) if finite else 0.0
        self.reason = f"{cause} at scale {self.scale:.4g}"
        self.scale *= max(_SMALLEST_SHRINK, guess)
        return "shrink"


def adapt_beta(beta: float, beta0: float, first_statistic: float, delta: float) -> float:
    """The next update's KL weight: doubled if the proposal overshot, halved if it fell short.

    ``first_statistic`` is the statistic at scale 1, before any backtracking: doubled above
    1.5 delta or if not finite, halved below delta/1.5, kept within [beta0/64, 64 beta0]
    (THEORY §6).
    """
    if not math.isfinite(first_statistic) or first_statistic > 1.5 * delta:
        beta = 2 * beta
    elif first_statistic < delta / 1.5:
        beta = beta / 2
    return min(max(beta, beta0 / BETA_RANGE), beta0 * BETA_RANGE)
