"""What the training loop is told, apart from any file format."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from satune.core.certificates import Evidence
from satune.core.confidence import Method
from satune.core.objectives import ObjectiveSettings
from satune.core.trust_region import TrustRegionSettings

ScheduleName = Literal["fresh", "reuse", "hybrid", "stale", "simultaneous"]
OrderName = Literal["static", "random", "greedy"]


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """Where a step's experience comes from (THEORY §6). ``ess`` is hybrid's limit of ESS/N, ``cap``
    an upper bound on training weights w."""

    name: ScheduleName = "hybrid"
    ess: float = 0.5
    cap: float | None = None


@dataclass(frozen=True, slots=True)
class AdvantageSettings:
    """Group-relative advantages (THEORY §6) and DAPO's shaping of them."""

    baseline: Literal["mean", "leave_one_out", "max"] = "mean"
    normalise: bool = True
    clip: float = 5.0
    dynamic_sampling: bool = False
    overlong_buffer: int = 0


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """One agent's step: objective, passes over the experience, trust region."""

    objective: ObjectiveSettings = field(default_factory=lambda: ObjectiveSettings("sat"))
    advantage: AdvantageSettings = field(default_factory=AdvantageSettings)
    trust_region: TrustRegionSettings = field(default_factory=TrustRegionSettings)
    epochs: int = 1
    mini_batches: int = 4
    max_new_tokens: int = 512


@dataclass(frozen=True, slots=True)
class CertifySettings:
    """Certificates and the gate (THEORY §5). ``problems`` 0: none. ``samples`` episodes a problem
    and side; ``every`` how many steps a certificate covers; ``confidence`` the run's probability of
    a false claim, split over ``decisions`` (None: an open sequence); ``clip`` pessimistic
    evidence's c. With ``accept`` "certified" a change stays only if its lower bound is at least
    -``tolerance``; else it is shrunk up to ``backtracks`` times, then reverted."""

    problems: int = 0
    samples: int = 8
    every: int = 1
    evidence: Evidence = "fresh"
    method: Method = "betting"
    clip: float = 1.2
    confidence: float = 0.05
    decisions: int | None = None
    theory: bool = True
    accept: Literal["trust_region", "certified"] = "trust_region"
    tolerance: float = 0.02
    backtracks: int = 2


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """A whole run. ``problems`` × ``samples`` episodes a rollout; ``evaluate_every`` 0 evaluates
    before and after only; ``deltas`` are the agents' own trust regions."""

    seed: int
    stages: int
    problems: int
    samples: int
    update: UpdateSettings
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    order: OrderName = "static"
    certify: CertifySettings = field(default_factory=CertifySettings)
    deltas: dict[str, float] = field(default_factory=dict)
    evaluate_every: int = 0
    checkpoint_steps: bool = True
    keep_checkpoints: int = 2
    tensorboard: bool = False

    def region(self, agent: str) -> TrustRegionSettings:
        """The trust region of an agent: the common one, with the agent's own delta."""
        common = self.update.trust_region
        return replace(common, delta=self.deltas.get(agent, common.delta))

    def update_of(self, agent: str) -> UpdateSettings:
        """The settings of an agent's step, its own trust region among them."""
        return replace(self.update, trust_region=self.region(agent))
