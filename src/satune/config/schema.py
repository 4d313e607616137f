"""The keys of a recipe. docs/recipe.md explains each.

Types, defaults and ranges of most sections are those of the settings of the room that uses them
(``config.derive``); here stand the sections that are the recipe's own. Every section is frozen and
refuses keys it does not know. What must hold between keys of different sections stands in
``checks``; reading files and wording errors in ``load``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from satune.agents.messages import TemplateSettings
from satune.agents.specs import CriticSettings, LoraSpec, Rate, ShardingSettings
from satune.config.derive import Choice, Derived, Named, OpenSection, Section, Written
from satune.core.settings import OBJECTIVES, ObjectiveSettings
from satune.core.trust_region import TrustRegionSettings
from satune.engines.base import ENGINES
from satune.engines.settings import ServerSettings
from satune.hosts.settings import HostSettings
from satune.loading import HOST_VARIABLE, model_in
from satune.ranges import MayChange, Range, Text, Whole
from satune.report.settings import LogSettings
from satune.tiny.settings import TinySettings
from satune.training.credit import CREDIT
from satune.training.ordering import ORDERS
from satune.training.schedules import SCHEDULES
from satune.training.settings import (
    CertifySettings,
    CheckpointSettings,
    EvaluateSettings,
    GaugeSettings,
    RolloutSettings,
    StepSettings,
)
from satune.types import ServedModel

# Names become directory names and parts of dotted overrides, hence neither dots nor slashes.
Name = Annotated[str, Range(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


Variable = Annotated[str, Range(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def served_elsewhere(before: str | ServedModel, after: str | ServedModel) -> bool:
    """Whether two models are one by its name, at two addresses of servers."""
    if not isinstance(before, ServedModel) or not isinstance(after, ServedModel):
        return False
    return before.name == after.name


def still_hosted(before: str | None, after: str | None) -> bool:
    """Whether an agent lives with its owner before and after, wherever its host is."""
    return before is not None and after is not None


class AgentSection(Section):
    """One agent: a model path, a GGUF file, a hub id, ``tiny:<family>-<size>`` or, where it is
    frozen, ``http://ADDRESS/v1#MODEL``; and what is its own."""

    model: Annotated[str | ServedModel, Written(model_in), MayChange(served_elsewhere)]
    temperature: float = 1.0
    template: Annotated[TemplateSettings, Derived()] = TemplateSettings()
    lora: Annotated[LoraSpec, Derived()] | None = None
    delta: float | None = None
    learning_rate: Rate | None = None
    frozen: bool = False
    trust_remote_code: bool = False
    attention: Literal["sdpa", "eager"] | None = None
    device: Annotated[Text | None, MayChange()] = None
    server: Annotated[Annotated[ServerSettings, Derived()] | None, MayChange()] = None
    host: Annotated[Text | None, MayChange(still_hosted)] = None
    host_token_env: Annotated[Variable, MayChange()] = HOST_VARIABLE


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
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    device: Annotated[Text, MayChange()] = "auto"
    cache: Annotated[str | None, MayChange()] = None

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
                or isinstance(agent.model, ServedModel)
                or Path(agent.model, "adapter_config.json").is_file()
                else agent.model_copy(update={"lora": LoraSpec()})
                for name, agent in self.agents.items()
            }
            return ResolvedTeam(agents, seats)
        return ResolvedTeam(dict(self.agents), seats)


class TaskSection(OpenSection):
    """The task by name or ``path.py:Name``, where its data lie, and its own options."""

    name: Text
    data: str | None = None


class ProtocolSection(OpenSection):
    """The protocol by name or ``path.py:function``, and the function's options."""

    name: Text


EngineChoice = Annotated[Named, Choice(ENGINES, "local")]
TERMS = Choice(OBJECTIVES, "sat", 0, ObjectiveSettings, ("reference_kl", "entropy"))


class Recipe(Section):
    """Everything a training run is made from."""

    seed: Whole = 0
    team: TeamSection
    task: Annotated[TaskSection, BeforeValidator(_named)]
    protocol: Annotated[ProtocolSection, BeforeValidator(_named)]
    rollout: Annotated[RolloutSettings, Derived()] = RolloutSettings()
    schedule: Annotated[Named, Choice(SCHEDULES, "hybrid")] = Field("hybrid", validate_default=True)
    order: Annotated[Named, Choice(ORDERS, "static", 1)] = Field("static", validate_default=True)
    objective: Annotated[ObjectiveSettings, TERMS] = Field("sat", validate_default=True)
    credit: Annotated[Named, Choice(CREDIT, "group", 3)] = Field("group", validate_default=True)
    critic: Annotated[CriticSettings, Derived()] = CriticSettings()
    trust_region: Annotated[TrustRegionSettings, Derived()] = TrustRegionSettings()
    gauge: Annotated[GaugeSettings, Derived()] = GaugeSettings()
    optimizer: Annotated[StepSettings, Derived()] = StepSettings()
    stages: Annotated[Whole, MayChange()] = 20
    evaluate: Annotated[EvaluateSettings, Derived()] = EvaluateSettings()
    certify: Annotated[CertifySettings, Derived()] = CertifySettings()
    engine: EngineChoice = Field("local", validate_default=True)  # type: ignore[assignment]
    hosts: Annotated[HostSettings, Derived()] = HostSettings()
    checkpoint: Annotated[CheckpointSettings, Derived()] = CheckpointSettings()
    sharding: Annotated[Annotated[ShardingSettings, Derived()] | None, MayChange()] = None
    log: Annotated[LogSettings, Derived()] = LogSettings()
    tiny: Annotated[TinySettings, Derived()] = TinySettings()
