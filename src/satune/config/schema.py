"""The keys of a recipe, their types, defaults and ranges. docs/recipe.md explains each.

Every section is frozen and refuses keys it does not know. What must hold between keys of
different sections stands in ``checks``; reading files and wording errors in ``load``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from satune.loading import KEY_VARIABLE, served
from satune.play.match import FAILURES, GRADING_SECONDS

# Names become directory names and parts of dotted overrides, hence neither dots nor slashes.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# What AdamW is asked to do with float32 weights has to be a float32 number.
Rate = Annotated[float, Field(gt=0, le=1e30)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of the recipe: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class OpenSection(Section):
    """A section whose further keys are options of what ``name`` names."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside the section's own, to be passed on as keyword arguments."""
        return dict(self.model_extra or {})


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _objective(value: Any) -> Any:
    # Without a name the keys are those of the default, as in every other section.
    named = _named(value)
    return {"name": "sat", **named} if isinstance(named, dict) else named


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if type(value) is list else value


class TemplateSection(Section):
    """How an agent's conversation is rendered. ``chat`` is a Jinja text (or a file of one)."""

    enable_thinking: bool | None = None
    chat: str | None = None
    show_thoughts: bool = False
    names: bool = True


class LoraSection(Section):
    """A low-rank adapter. Dropout must be 0: scoring has to repeat what sampling did."""

    rank: Count = 16
    alpha: Positive = 32.0
    dropout: NotNegative = 0.0
    targets: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = (
        "all-linear",
    )

    @property
    def target_modules(self) -> str | list[str]:
        """``targets`` in the form PEFT takes."""
        return "all-linear" if self.targets == ("all-linear",) else list(self.targets)


class ServerSection(Section):
    """How the server of a model at ``http://ADDRESS/v1#MODEL`` is asked."""

    api_key_env: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = (
        KEY_VARIABLE
    )
    concurrency: Count = 32
    retries: Whole = 8
    timeout: Positive = 1200.0
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    stream: bool = False
    seed: bool = True


class AgentSection(Section):
    """One agent: a model path, a GGUF file, a hub id, ``tiny:<family>-<size>`` or, where it is
    frozen, ``http://ADDRESS/v1#MODEL``; and what is its own."""

    model: Annotated[str, Field(min_length=1)]
    temperature: float = 1.0
    template: TemplateSection = TemplateSection()
    lora: LoraSection | None = None
    delta: float | None = None
    learning_rate: Rate | None = None
    frozen: bool = False
    trust_remote_code: bool = False
    attention: Literal["sdpa", "eager"] | None = None
    server: ServerSection | None = None


@dataclass(frozen=True)
class ResolvedTeam:
    """Agents and seats once sharing has been applied. ``seats`` maps a seat to its agent."""

    agents: Mapping[str, AgentSection]
    seats: Mapping[str, str]


class TeamSection(Section):
    """Who is in the team, who sits where, and which weights they share."""

    sharing: Literal["separate", "lora", "shared"] = "separate"
    agents: Annotated[dict[Name, AgentSection], Field(min_length=1)]
    seats: Annotated[dict[Name, Name], Field(min_length=1)] | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    device: Annotated[str, Field(min_length=1)] = "auto"
    cache: str | None = None

    def given_seats(self) -> dict[str, str]:
        """The seats as the recipe names them: by default one an agent, with the agent's name."""
        return dict(self.seats) if self.seats is not None else {name: name for name in self.agents}

    def resolved(self) -> ResolvedTeam:
        """The team that is built.

        ``sharing: shared`` leaves one agent, the first, which fills every seat (``checks`` has
        refused agents that differ). ``sharing: lora`` gives every agent an adapter.
        """
        seats = self.given_seats()
        if self.sharing == "shared":
            first = next(iter(self.agents))
            return ResolvedTeam({first: self.agents[first]}, dict.fromkeys(seats, first))
        if self.sharing == "lora":
            # A saved adapter keeps the rank and targets it was saved with.
            agents = {
                name: agent
                if agent.lora
                or served(agent.model) is not None
                or Path(agent.model, "adapter_config.json").is_file()
                else agent.model_copy(update={"lora": LoraSection()})
                for name, agent in self.agents.items()
            }
            return ResolvedTeam(agents, seats)
        return ResolvedTeam(dict(self.agents), seats)


class TaskSection(OpenSection):
    """The task by name or ``path.py:Name``, where its data lie, and its own options."""

    name: Annotated[str, Field(min_length=1)]
    data: str | None = None


class ProtocolSection(OpenSection):
    """The protocol by name or ``path.py:function``, and the function's options."""

    name: Annotated[str, Field(min_length=1)]


class RolloutSection(Section):
    """How much is sampled a rollout. ``top_p`` and ``top_k`` must stay off."""

    problems: Count = 96
    samples: Count = 4
    max_new_tokens: Count = 512
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Whole = 0
    failures: Annotated[float, Field(ge=0, le=1)] = FAILURES
    grading_seconds: Positive = GRADING_SECONDS


class ScheduleSection(Section):
    """Where a step's experience comes from (THEORY §6)."""

    name: Literal["fresh", "reuse", "hybrid", "stale", "simultaneous"] = "hybrid"
    ess: Annotated[float, Field(gt=0, le=1)] = 0.5
    cap: Positive | None = None


class ObjectiveSection(Section):
    """What every objective has: the group-relative advantage and the two regularisers."""

    baseline: Literal["mean", "leave_one_out", "max"] = "mean"
    normalise: bool = True
    advantage_clip: Positive = 5.0
    reference_kl: NotNegative = 0.0
    entropy: NotNegative = 0.0

    @property
    def clips(self) -> tuple[float, float] | None:
        """How far below and above 1 the ratio may move before it is clipped; None: not at all."""
        return None


class ClippedSection(ObjectiveSection):
    """An objective with one clip for both sides."""

    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2

    @property
    def clips(self) -> tuple[float, float] | None:
        return (self.clip, self.clip)


class SatSection(ClippedSection):
    """The sum of the log-ratios over an agent's own tokens, clipped."""

    name: Literal["sat"] = "sat"


class GspoSection(ClippedSection):
    """The length-normalised sequence ratio, clipped."""

    name: Literal["gspo"] = "gspo"


class GrpoSection(ClippedSection):
    """Token ratios, clipped; the mean over tokens, then over episodes."""

    name: Literal["grpo"] = "grpo"


class DapoSection(ObjectiveSection):
    """Token ratios with two clips, one mean over all tokens, informative groups only."""

    name: Literal["dapo"] = "dapo"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Positive = 0.28
    dynamic_sampling: bool = True
    overlong_buffer: Whole = 0

    @property
    def clips(self) -> tuple[float, float] | None:
        return (self.clip_low, self.clip_high)


class ReinforceSection(ObjectiveSection):
    """The policy gradient itself, without ratios."""

    name: Literal["reinforce"] = "reinforce"


Objective = Annotated[
    SatSection | GspoSection | GrpoSection | DapoSection | ReinforceSection,
    Field(discriminator="name"),
]


class TrustRegionSection(Section):
    """How far one step may move an agent, and how that is measured."""

    enabled: bool = True
    delta: float = 0.05
    quantile: Annotated[float, Field(gt=0, le=1)] = 0.99
    unit: Literal["token", "turn", "trajectory"] = "token"
    beta: NotNegative = 0.001
    adapt: bool = True
    backtracks: Whole = 5


class OptimizerSection(Section):
    """AdamW and how a step's experience is cut into batches."""

    lr: Rate = 1e-5
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.01
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(_listed)] = (0.9, 0.999)
    eps: Annotated[float, Field(ge=1e-30, le=1e30)] = 1e-8
    warmup_steps: Whole = 0
    max_grad_norm: Positive = 1.0
    epochs: Count = 1
    mini_batches: Count = 4
    micro_batch_tokens: Count = 16384
    gradient_checkpointing: bool = False
    autocast: Literal["bfloat16"] | None = None
    offload: Literal["cpu", "disk", "none"] = "cpu"


class EvaluateSection(Section):
    """When and on how many held-out problems the team is evaluated while it trains."""

    problems: Count = 128
    samples: Count = 1
    every: Whole = 0
    data: str | None = None
    drop_overlap: bool = False
    greedy: bool = True


class CertifySection(Section):
    """What a change of the team can claim, and whether the team keeps it (THEORY §5)."""

    problems: Whole = 0
    samples: Count = 8
    every: Count = 1
    evidence: Literal["fresh", "balance", "pessimistic"] = "fresh"
    method: Literal["betting", "empirical_bernstein", "hoeffding"] = "betting"
    clip: Annotated[float, Field(gt=1)] = 1.2
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.05
    decisions: Count | Literal["auto", "open"] = "auto"
    theory: bool = True
    accept: Literal["trust_region", "certified"] = "trust_region"
    tolerance: NotNegative = 0.02
    backtracks: Whole = 2


class EngineSection(Section):
    """What draws the completions. Null leaves the bound, or the order, to the engine."""

    name: Literal["local"] = "local"
    max_rows: Count = 256
    cache_tokens: Count | None = None
    order: Literal["exact", "throughput"] | None = None


class CheckpointSection(Section):
    """How often a run is saved and how many checkpoints stay on disk."""

    keep: Count = 2
    every: Literal["step", "stage"] = "step"


class LogSection(Section):
    """What is written beside the events."""

    tensorboard: bool = False


class TinySection(Section):
    """How the base models behind ``tiny:<family>-<size>`` are built at their first use."""

    error: Annotated[float, Field(ge=0, lt=1)] = 0.3
    steps: Count = 1000
    max_steps: Count = 2000
    batch: Count = 64
    lr: Positive = 3e-3
    greedy_target: Share = 0.98
    examples: Count = 24000
    seed: Whole = 0


class Recipe(Section):
    """Everything a training run is made from."""

    seed: Whole = 0
    team: TeamSection
    task: Annotated[TaskSection, BeforeValidator(_named)]
    protocol: Annotated[ProtocolSection, BeforeValidator(_named)]
    rollout: RolloutSection = RolloutSection()
    schedule: Annotated[ScheduleSection, BeforeValidator(_named)] = ScheduleSection()
    order: Literal["static", "random", "greedy"] = "static"
    objective: Annotated[Objective, BeforeValidator(_objective)] = SatSection()
    trust_region: TrustRegionSection = TrustRegionSection()
    optimizer: OptimizerSection = OptimizerSection()
    stages: Whole = 20
    evaluate: EvaluateSection = EvaluateSection()
    certify: CertifySection = CertifySection()
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    tiny: TinySection = TinySection()
