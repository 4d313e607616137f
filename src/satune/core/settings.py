"""What the mathematics of a run is told: names, ranges and defaults. Reading a recipe needs these
and nothing that computes, so nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from satune.ranges import Fraction, NotNegative, Positive, check, check_call

Evidence = Literal["fresh", "balance", "pessimistic"]
Method = Literal["betting", "empirical_bernstein", "hoeffding"]
Baseline = Literal["mean", "leave_one_out", "max"]
Per = Literal["episode", "turn", "token"]
"""What an advantage is of."""


@dataclass(frozen=True)
class ClipOptions:
    """The ratio counts as far as [1 - clip, 1 + clip]; None: without bounds."""

    clip: Fraction | None = 0.2


@dataclass(frozen=True)
class DapoOptions:
    """The ratio counts as far as [1 - clip_low, 1 + clip_high]; None: no such bound."""

    clip_low: Fraction | None = 0.2
    clip_high: Positive | None = 0.28


@dataclass(frozen=True)
class CispoOptions:
    """As of dapo; MiniMax-M1 runs without a lower clip."""

    clip_low: Fraction | None = None
    clip_high: Positive | None = 4.0


@dataclass(frozen=True)
class M2poOptions:
    """The mean square of the log-ratios that count stays below ``second_moment``."""

    second_moment: Positive = 0.04


@dataclass(frozen=True)
class NoOptions:
    pass


OBJECTIVES: dict[str, type] = {
    "sat": ClipOptions,
    "gspo": ClipOptions,
    "grpo": ClipOptions,
    "dapo": DapoOptions,
    "ppo": ClipOptions,
    "cispo": CispoOptions,
    "m2po": M2poOptions,
    "reinforce": NoOptions,
}
"""The options of each objective, which are the keyword parameters of its function in
``core.objectives.LOSSES``."""
WHOLE = frozenset({"m2po"})
"""The objectives in which a token's part depends on the other tokens of its mini-batch."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """Which objective with which ``options``, and the weights of the terms beside it: ``beta`` of
    ``kl_T``, ``reference_kl`` and ``entropy``.

    ``name`` is one of OBJECTIVES, or names ``loss``, the user's own function of the same form.
    Raises: ValueError on an unknown name, or a value outside its range.
    """

    name: str = "sat"
    options: Mapping[str, Any] = field(default_factory=dict)
    beta: NotNegative = 0.0
    reference_kl: NotNegative = 0.0
    entropy: NotNegative = 0.0
    loss: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        check(self, "objective")
        if self.loss is None and ":" not in self.name:
            if self.name not in OBJECTIVES:
                known = ", ".join(OBJECTIVES)
                raise ValueError(f"objective.name {self.name!r}: choose one of {known}")
            check_call(OBJECTIVES[self.name], self.options, "objective")

    @property
    def whole(self) -> bool:
        """Whether the loss of a mini-batch's tokens is not the sum of those of its parts: it then
        has to be given all of them at once."""
        return self.loss is None and self.name in WHOLE
