"""What the training loop is told. The recipe's sections are derived from these classes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from satune.agents.specs import OptimizerSettings
from satune.core.settings import Evidence, Method, ObjectiveSettings
from satune.core.trust_region import TrustRegionSettings
from satune.ranges import (
    Count,
    Fraction,
    MayChange,
    NotNegative,
    Part,
    Positive,
    Range,
    Share,
    Whole,
    check,
)
from satune.training.credit import Credit, GroupCredit
from satune.training.ordering import Order, static
from satune.training.schedules import Hybrid, Schedule
from satune.types import FAILURES, GRADING_SECONDS


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """What is sampled a rollout: ``problems`` × ``samples`` episodes. ``top_p`` and ``top_k`` must
    stay off. With ``dynamic_sampling`` problems whose rewards are all equal are left out, and
    others drawn in their place (DAPO). Beyond the share ``failures`` of failed conversations the
    run stops; a message may take ``grading_seconds`` to be graded. With ``grade_seats`` each seat's
    last message is graded like an answer, for ``credit: seats``. ``ahead`` is how many stages
    before its own a batch begins to be drawn (0: in its own)."""

    problems: Count = 96
    samples: Count = 4
    max_new_tokens: Count = 512
    top_p: Part = 1.0
    top_k: Whole = 0
    dynamic_sampling: bool = False
    failures: Share = FAILURES
    grading_seconds: Positive = GRADING_SECONDS
    grade_seats: bool = False
    ahead: Whole = 0


@dataclass(frozen=True)
class PassSettings:
    """How often a step goes over its experience, and in how many mini-batches each time."""

    epochs: Count = 1
    mini_batches: Count = 4


@dataclass(frozen=True, slots=True)
class GaugeSettings:
    """When rounding is gauged: in the first stage and in each ``every``-th after it (0: never), on
    ``episodes`` of a step's experience. ``act`` says what becomes of a run in which rounding
    decides."""

    every: Whole = 10
    episodes: Count = 8
    act: Literal["refuse", "warn"] = "refuse"

    def __post_init__(self) -> None:
        check(self, "gauge")

    def due(self, stage: int) -> bool:
        return self.every > 0 and (stage - 1) % self.every == 0


@dataclass(frozen=True)
class UpdateSettings(PassSettings):
    """One agent's step: objective, credit, passes over the experience, trust region, and when
    rounding is gauged."""

    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    credit: Credit = field(default_factory=GroupCredit)
    trust_region: TrustRegionSettings = field(default_factory=TrustRegionSettings)
    gauge: GaugeSettings = field(default_factory=GaugeSettings)
    max_new_tokens: int = 512


@dataclass(frozen=True)
class StepSettings(PassSettings, OptimizerSettings):
    """The recipe's ``optimizer``: AdamW, the passes over the experience, and the type in which a
    pass computes (None: that of the weights)."""

    autocast: Literal["bfloat16", "float16"] | None = None


@dataclass(frozen=True, slots=True)
class CertifySettings:
    """Certificates and the gate (THEORY §5). ``problems`` 0: none. ``samples`` episodes a problem
    and side; ``every`` how many steps a certificate covers; ``confidence`` the run's probability of
    a false claim, split over ``decisions`` ("auto": the most the run can come to, "open": without
    end); ``clip`` pessimistic evidence's c. With ``accept`` "certified" a change stays only if its
    lower bound is at least -``tolerance``; else it is shrunk up to ``backtracks`` times, then
    reverted."""

    problems: Whole = 0
    samples: Count = 8
    every: Count = 1
    evidence: Evidence = "fresh"
    method: Method = "betting"
    clip: Annotated[float, Range(gt=1)] = 1.2
    confidence: Fraction = 0.05
    decisions: Count | Literal["auto", "open"] = "auto"
    theory: bool = True
    accept: Literal["trust_region", "certified"] = "trust_region"
    tolerance: NotNegative = 0.02
    backtracks: Whole = 2

    def __post_init__(self) -> None:
        check(self, "certify")

    @property
    def gated(self) -> bool:
        """Whether a change stays only if a certificate says so."""
        return self.problems > 0 and self.accept == "certified"


@dataclass(frozen=True, slots=True)
class EvaluateSettings:
    """When and on how many held-out problems the team is evaluated while it trains. ``every`` 0:
    before and after only."""

    problems: Count = 128
    samples: Count = 1
    every: Whole = 0
    data: str | None = None
    drop_overlap: bool = False
    greedy: bool = True


@dataclass(frozen=True, slots=True)
class CheckpointSettings:
    """How often a run is saved (after every step, every stage, or so many stages and the last) and
    how many checkpoints stay on disk."""

    keep: Annotated[Count, MayChange()] = 2
    every: Annotated[Literal["step", "stage"] | Count, MayChange()] = "step"

    def due(self, stage: int, *, last: bool) -> bool:
        """Whether the end of a stage is saved."""
        return last or not isinstance(self.every, int) or stage % self.every == 0


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """A whole run. ``problems`` × ``samples`` episodes a rollout; ``evaluate_every`` 0 evaluates
    before and after only; ``deltas`` are the agents' own trust regions; ``ahead`` as in
    ``RolloutSettings``."""

    seed: int
    stages: int
    problems: int
    samples: int
    update: UpdateSettings
    dynamic_sampling: bool = False
    ahead: int = 0
    schedule: Schedule = field(default_factory=Hybrid)
    order: Order = static
    certify: CertifySettings = field(default_factory=CertifySettings)
    deltas: dict[str, float] = field(default_factory=dict)
    evaluate_every: int = 0
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    def region(self, agent: str) -> TrustRegionSettings:
        """The trust region that holds the agent's steps."""
        return self.update.trust_region.of(self.deltas.get(agent))

    def update_of(self, agent: str) -> UpdateSettings:
        """The settings of an agent's step, its own trust region among them."""
        return replace(self.update, trust_region=self.region(agent))
