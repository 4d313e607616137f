"""From a recipe to the things it names: task, protocol, team, engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from satune.agents.policy import Policy
from satune.agents.pretrained import AgentSpec, Precision
from satune.commands.recipe_digest import facts_of
from satune.config.schema import AgentSection, Recipe
from satune.engines.base import EngineSettings, LocalSettings, engine_settings, keeps_weights
from satune.engines.hosted import Decoder, HostedEngine
from satune.engines.roles import with_roles
from satune.engines.servers import Servers, with_served
from satune.files.writing import tensor_errors
from satune.hosts.agent import HostedAgent
from satune.hosts.client import Client, token_in
from satune.hosts.visit import VisitedAgent
from satune.play.evaluation import Evaluation, evaluate
from satune.play.match import Match
from satune.protocols.named import load_protocol
from satune.task_parts import is_fresh, role_player_of
from satune.tasks.catalog import load_task, take
from satune.tasks.contamination import Without, note, training_overlaps
from satune.team import Team, build_team
from satune.tiny.demonstrations import demonstrate
from satune.tiny.tokenizers import MAX_LENGTH
from satune.tiny.zoo import is_tiny, tiny_directory
from satune.types import (
    Engine,
    Key,
    Problem,
    Progress,
    ServedModel,
    Task,
    TeamProtocol,
    UserError,
    no_progress,
)

GATE_PROBLEMS = 128
"""Problems on which a tiny base must reach its greedy success."""


@dataclass(slots=True)
class Cast:
    """A recipe brought to life: everything that rollouts need. ``copies`` are the models that the
    engine draws with of agents whose learners do not share theirs with it."""

    recipe: Recipe
    task: Task
    held_out: tuple[Task, str]
    protocol: TeamProtocol
    team: Team
    engine: Engine
    progress: Progress = no_progress
    servers: Servers = field(default_factory=Servers)
    hosts: Mapping[str, HostedAgent] = field(default_factory=dict)
    visited: Mapping[str, VisitedAgent] = field(default_factory=dict)
    copies: Mapping[str, Policy] = field(default_factory=dict)

    def train_problems(self, count: int, offset: int) -> list[Problem]:
        return take(self.task, "train", count, offset)

    def held_out_problems(self, count: int) -> list[Problem]:
        task, split = self.held_out
        if not is_fresh(task):
            count = min(count, len(list(task.problems(split))))
        return take(task, split, count, 0)

    def match(self) -> Match:
        """What the team is rolled out with, on the task that it learns from."""
        rollout = self.recipe.rollout
        return Match(
            self.team.seats_for(rollout.max_new_tokens),
            self.protocol,
            self.engine,
            self.task,
            progress=self.progress,
            failures=rollout.failures,
            grading_seconds=rollout.grading_seconds,
            grade_seats=rollout.grade_seats,
        )

    def evaluate(self, *, greedy: bool, key: Key) -> Evaluation:
        """The team on the recipe's held-out problems, the same ones each time."""
        settings = self.recipe.evaluate
        match = replace(self.match(), task=self.held_out[0])
        problems = self.held_out_problems(settings.problems)
        if greedy:
            return evaluate(match.greedy(), problems, 1, key)
        return evaluate(match, problems, settings.samples, key)


def load_tasks(recipe: Recipe) -> tuple[Task, tuple[Task, str]]:
    """The training task, and the task and split that evaluations use."""
    section = recipe.task
    task = load_task(section.name, section.data, recipe.seed, None, **section.options)
    if recipe.evaluate.data is None:
        return task, (task, "eval")
    held_out = load_task(section.name, recipe.evaluate.data, recipe.seed, None, **section.options)
    if recipe.evaluate.drop_overlap:
        task = cast(Task, Without(task, training_overlaps(task, held_out)))
    return task, (held_out, "all")


def overlap_note(task: Task, held_out: tuple[Task, str]) -> str:
    """One line if problems that are trained on are also evaluated on, or were left out for it."""
    if isinstance(task, Without):
        return note(task.left_out, dropped=True)
    return "" if held_out[0] is task else note(training_overlaps(task, held_out[0]), dropped=False)


def assemble(
    recipe: Recipe,
    progress: Progress = no_progress,
    servers: Servers | None = None,
    *,
    roles: bool = True,
    visiting: Mapping[str, str] | None = None,
    apart: bool = False,
) -> Cast:
    """Load or build everything a recipe names; without ``roles`` the engine is the team's alone,
    for a caller who attaches them. With ``visiting`` the agents that live with their owners are
    asked and no run begins there: it has the digests of their weights, as far as these are known.
    With ``apart`` the engine draws with copies of the agents that learn, unless it keeps weights of
    its own. Raises UserError for whatever cannot be had."""
    servers = servers or Servers()
    resolved = recipe.team.resolved()
    task, held_out = load_tasks(recipe)
    protocol = load_protocol(
        recipe.protocol.name, list(resolved.seats), None, **recipe.protocol.options
    )
    team = load_agents(recipe, resolved.agents, resolved.seats, protocol, progress)
    hosts: dict[str, HostedAgent] = {}
    visited: dict[str, VisitedAgent] = {}
    if visiting is None:
        hosts = open_hosts(recipe)
    else:
        visited = visit_hosts(team, visiting, recipe.hosts.timeout)
    settings = engine_of(recipe)
    apart = apart and not keeps_weights(settings)
    copies = copies_of(team, resolved.agents) if apart else {}
    engine = with_roles(
        team_engine(team, settings, servers, hosts or visited, copies),
        role_player_of(task) if roles else None,
        precision=Precision.of(recipe.team.dtype, recipe.optimizer.autocast),
        device=recipe.team.device,
        open_server=servers.model,
    )
    return Cast(
        recipe, task, held_out, protocol, team, engine, progress, servers, hosts, visited, copies
    )


def copies_of(team: Team, agents: Mapping[str, AgentSection]) -> dict[str, Policy]:
    """Copies of the agents that learn, and of those that share a model with one, over models that
    no learner has; a base that they share is copied once."""
    copies: dict[int, Any] = {}
    learnt = {id(p.model) for name, p in team.policies.items() if not agents[name].frozen}
    return {
        name: policy.copied(name, copies)
        for name, policy in team.policies.items()
        if id(policy.model) in learnt
    }


def load_agents(
    recipe: Recipe,
    agents: Mapping[str, AgentSection],
    seats: Mapping[str, str],
    protocol: TeamProtocol,
    progress: Progress = no_progress,
    *,
    all_seats: Mapping[str, str] | None = None,
) -> Team:
    """The team of these agents, who fill ``seats`` of the recipe's ``all_seats`` (None: they fill
    all). Raises UserError for a model that cannot be had."""

    def model(agent: AgentSection) -> str | ServedModel:
        if agent.host is not None:
            return agent.model  # which is its owner's to load
        return model_path(agent, recipe, protocol, all_seats or seats, progress)

    return build_team(
        [agent_spec(name, agent, model(agent)) for name, agent in agents.items()],
        seats,
        sharing=recipe.team.sharing,
        dtype=recipe.team.dtype,
        autocast=recipe.optimizer.autocast,
        device=recipe.team.device,
        seed=recipe.seed,
        protocol=recipe.protocol.model_dump(),
        task=recipe.task.model_dump(),
        max_new_tokens=recipe.rollout.max_new_tokens,
    )


def open_hosts(recipe: Recipe) -> dict[str, HostedAgent]:
    """The agents of the recipe that live with their owners, whose hosts are asked who they are.
    Raises UserError for a token that is missing, a host that cannot be reached, and one that does
    not fit."""
    facts = facts_of(recipe)
    return {
        name: HostedAgent(
            name,
            Client(name, agent.host, token_in(agent.host_token_env, name), recipe.hosts.timeout),
            facts,
        )
        for name, agent in recipe.team.resolved().agents.items()
        if agent.host is not None
    }


def visit_hosts(team: Team, digests: Mapping[str, str], timeout: float) -> dict[str, VisitedAgent]:
    """The agents of the team that live with their owners, as they are asked and not trained; an
    answer may take ``timeout`` seconds. ``digests`` are those of the weights that the team was
    saved with. Raises UserError for a token that is missing, and as ``VisitedAgent``."""
    return {
        name: VisitedAgent(
            name,
            Client(name, spec.host, token_in(spec.host_token_env, name), timeout),
            team.seats_of(name),
            version("satune"),
            asdict(spec.template),
            digests.get(name),
        )
        for name, spec in team.specs.items()
        if spec.host is not None
    }


def team_engine(
    team: Team,
    settings: EngineSettings,
    servers: Servers,
    hosts: Mapping[str, Decoder] | None = None,
    copies: Mapping[str, Policy] | None = None,
) -> Engine:
    """What draws a team's completions: its own models here, or ``copies`` of them, those of served
    agents there, those that live with their owners at their ``hosts``. Raises UserError for an
    engine that serves none of those."""
    team.leave_room(getattr(settings, "context", None))
    if hosts:
        if not isinstance(settings, LocalSettings):
            raise UserError(
                f"engine: serves no agent that lives elsewhere ({', '.join(hosts)}); take local"
            )
        options = {k: v for k, v in asdict(settings).items() if v is not None}
        local: Engine = HostedEngine(team.policies, team.seats, hosts, **options)
    else:
        local = settings.make({**team.policies, **(copies or {})}, team.seats)
    return with_served(local, team.served, team.seats, servers)


def engine_of(recipe: Recipe) -> EngineSettings:
    """The settings of the recipe's engine."""
    return engine_settings(recipe.engine.name, recipe.engine.options)


def agent_spec(name: str, section: AgentSection, model: str | ServedModel) -> AgentSpec:
    """A recipe's agent as the team is built of it, from ``model``."""
    return AgentSpec(
        name=name,
        model=model,
        temperature=section.temperature,
        template=section.template,
        lora=section.lora,
        delta=section.delta,
        trust_remote_code=section.trust_remote_code,
        attention=section.attention,
        device=section.device,
        server=asdict(section.server) if section.server else {},
        host=section.host,
        host_token_env=section.host_token_env,
    )


def check_room(model: str, context: int | None, recipe: Recipe) -> None:
    """Raise UserError where a message may fill the model's context, None where that is unknown, so
    that no prompt would fit."""
    longest = recipe.rollout.max_new_tokens
    if context is not None and longest >= context:
        raise UserError(
            f"rollout.max_new_tokens: {longest} leave no room for a prompt in the context of "
            f"{model}, {context} tokens; give fewer, or take a model with a longer context"
        )


def model_path(
    agent: AgentSection,
    recipe: Recipe,
    protocol: TeamProtocol,
    seats: Mapping[str, str],
    progress: Progress,
) -> str | ServedModel:
    """The agent's model; a tiny one is taught first, by this recipe's task and protocol.

    Its problems follow ``tiny.seed``, not the run's seed, and its gate never looks at
    ``evaluate.data``: a base depends on nothing that its fingerprint leaves out.
    """
    model = agent.model
    if isinstance(model, ServedModel) or not is_tiny(model):
        return model
    check_room(model, MAX_LENGTH, recipe)
    template, settings = agent.template, recipe.tiny
    section = recipe.task
    task = load_task(section.name, section.data, settings.seed, None, **section.options)
    held_out = (task, "eval" if recipe.evaluate.data is None else "train")
    evaluation = replace(recipe.evaluate, problems=GATE_PROBLEMS)
    taught = recipe.model_copy(update={"evaluate": evaluation})
    cache = Path(recipe.team.cache) if recipe.team.cache else None

    def greedy_success(model: Any, tokenizer: Any) -> float:
        policy = Policy("base", model, tokenizer, 1.0)
        alone = Team(
            {"base": policy}, {"base": AgentSpec("base", "", template=template)},
            dict.fromkeys(seats, "base"),
        )  # fmt: skip
        engine = engine_of(recipe).make({"base": policy}, alone.seats)
        cast = Cast(taught, task, held_out, protocol, alone, engine)
        return cast.evaluate(greedy=True, key=Key(recipe.tiny.seed, "demonstrate")).avg_at_k

    with tensor_errors(cache or Path.home() / ".cache"):
        directory = tiny_directory(
            model,
            settings,
            json.dumps(
                {
                    "task": {**section.model_dump(), "data": _identity(section.data)},
                    "gate": held_out[1],
                    "protocol": recipe.protocol.model_dump(),
                    "seats": len(seats),
                    "max_new_tokens": recipe.rollout.max_new_tokens,
                },
                sort_keys=True,
            ),
            lambda count, seed: demonstrate(
                task,
                protocol,
                list(seats),
                lambda problems: take(task, "train", problems, 0),
                count,
                settings.error,
                seed,
            ),
            template=template,
            held_out_success=greedy_success,
            cache=cache,
            progress=lambda done, total, what: progress(done, total, f"{model}: {what}"),
        )
    return str(directory)


def _identity(data: str | None) -> str | None:
    """A file by its content, wherever it lies; anything else by its name."""
    if data is None or not Path(data).is_file():
        return data
    return hashlib.blake2b(Path(data).read_bytes(), digest_size=16).hexdigest()
