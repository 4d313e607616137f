"""A trained team as a run or a team directory holds it, and the same team with newcomers in some
seats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from safetensors.torch import load_file

from satune.agents.entries import PRIVATE, model_of
from satune.agents.mixture import tokenizer_difference
from satune.agents.policy import Policy
from satune.agents.pretrained import Precision, load_policies
from satune.agents.weights import Weights
from satune.commands.assemble import (
    Cast,
    agent_spec,
    assemble,
    engine_of,
    model_path,
    team_engine,
    visit_hosts,
)
from satune.commands.trust import NOTHING, Trust
from satune.config.derive import Named
from satune.config.load import load_recipe
from satune.config.schema import AgentSection, Recipe, TeamSection
from satune.engines.base import LocalSettings
from satune.engines.roles import WithRoles
from satune.engines.servers import Servers
from satune.engines.settings import ServerSettings
from satune.files.names import refuse_links
from satune.loading import HOST_VARIABLE, HostAddress, nearest_hint
from satune.swap.directory import Model
from satune.team import Team, add_mixtures, digests_of, manifest_of, moved_hosts
from satune.training.checkpoint import Checkpoints
from satune.training.ledger import Ledger
from satune.training.run_directory import RunDirectory
from satune.training.state_file import read_state
from satune.types import Progress, ServedModel, UserError


@dataclass(slots=True)
class Found:
    """A trained team and where it was found: a run's checkpoint, or a team directory.

    A team directory has neither ``run`` nor ``checkpoint``; its recipe is made from its manifest,
    and from a file of the user's where one is given. ``room_said`` tells whether the manifest or
    that file says how long a message may be, ``digests`` are those of the weights of its agents
    that live with their owners. ``state`` holds what the checkpoint's state.json has,
    ``passed`` a line for each newer checkpoint that was damaged and so not used.
    """

    path: Path
    recipe: Recipe
    run: RunDirectory | None = None
    checkpoint: str | None = None
    state: dict[str, Any] = field(default_factory=dict)
    passed: Sequence[str] = ()
    room_said: bool = False
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def seats(self) -> Mapping[str, str]:
        return self.recipe.team.resolved().seats

    @property
    def stage(self) -> int:
        """Stages finished, or begun and not to be gone on with."""
        held = self.state.get("state", {"stage": 0, "step": 0})
        return held["stage"] + (held["step"] > 0)

    @property
    def certify_offset(self) -> int:
        """Problems for certificates that training has used up."""
        if self.run is None or not self.state:
            return 0
        # A run that went back has drawn problems that its checkpoint knows nothing of.
        return max(self.state["state"]["certify"]["offset"], Ledger(self.run.certify).end)

    @property
    def train_offset(self) -> int:
        return self.state["offset"] if self.state else 0


def find_team(
    path: Path,
    recipe: Path | None,
    trust: Trust = NOTHING,
    hosts: Mapping[str, str] | None = None,
) -> Found:
    """The team in a run's newest undamaged checkpoint, or in a team directory; loads no model.

    ``recipe``, which is the user's own, gives a team directory what its manifest does not hold;
    ``hosts`` has the addresses of agents that live with their owners and have moved.
    Raises UserError where there is no team, or nothing complete of one, and for what ``trust`` does
    not admit.
    """
    if (path / "manifest.json").is_file():
        manifest = moved_hosts(manifest_of(path), hosts or {})
        used = ("agents",) if recipe else ("agents", "task", "protocol")
        trust.admit({part: manifest[part] for part in used}, path / "manifest.json")
        said = recipe is not None or manifest.get("max_new_tokens") is not None
        found = _recipe_of_team(path, manifest, recipe)
        return Found(path, found, room_said=said, digests=digests_of(manifest))
    run = RunDirectory(path)
    if not run.recipe.is_file():
        what = "holds neither a run nor a team" if path.is_dir() else "no such directory"
        raise UserError(f"{path}: {what}; give a run's directory, or the team/ in it")
    if recipe is not None:
        raise UserError(f"{path}: a run has its own recipe; drop --recipe {recipe}")
    refuse_links(path)
    loaded = load_recipe(run.recipe, alone=True)
    trust.admit(loaded.model_dump(mode="json"), run.recipe)
    for agent, section in loaded.team.agents.items():
        if section.host is not None:
            raise UserError(
                f"{path}: agent {agent} lives with its owner ({section.host}), and no training "
                f"could go on from such a swap; give {path / 'team'}, of which a team comes"
            )
    found = Checkpoints(run.checkpoints, loaded.checkpoint.keep).latest(run.intended)
    if found is None:
        raise UserError(f"{path}: the run has no complete checkpoint yet; let it train on")
    name, passed = found
    state = read_state(run.checkpoints / name)
    return Found(path, loaded, run, name, state, passed)


def _recipe_of_team(path: Path, manifest: Mapping[str, Any], recipe: Path | None) -> Recipe:
    agents: dict[str, AgentSection] = {}
    sharing = "separate"
    for name, entry in manifest["agents"].items():
        sharing = entry["sharing"]
        lora = entry.get("lora")
        if lora is not None:
            lora = {**lora, "targets": lora["targets"] or ["all-linear"]}
        agents[name] = AgentSection.model_validate(
            {
                "model": model_of(entry, path),
                "frozen": "served" in entry,
                "server": entry.get("server"),
                "temperature": entry["temperature"],
                "template": entry["template"],
                "delta": entry["delta"],
                "lora": lora,
                **{key: entry[key] for key in ("host", "host_token_env") if key in entry},
            }
        )
    seats: dict[str, str] = manifest["seats"]
    if recipe is not None:
        given = load_recipe(recipe)
        team = given.team.model_copy(update={"sharing": sharing, "agents": agents, "seats": seats})
        return given.model_copy(update={"team": team})
    for part in ("task", "protocol"):
        if "name" not in manifest[part]:
            raise UserError(f"{path}: its manifest names no {part}; give the recipe by --recipe")
    section = TeamSection(sharing=sharing, agents=agents, seats=seats)  # type: ignore[arg-type]
    limit = manifest.get("max_new_tokens")
    return Recipe.model_validate(
        {
            "team": section,
            "task": manifest["task"],
            "protocol": manifest["protocol"],
            "rollout": {} if limit is None else {"max_new_tokens": limit},
        }
    )


def check_seat(found: Found, seat: str) -> None:
    if seat not in found.seats:
        raise UserError(
            f"--seat {seat}: the team has no such seat{nearest_hint(seat, found.seats)}"
        )


def load_found(found: Found, progress: Progress, servers: Servers | None = None) -> Reseated:
    """The team as it is in the checkpoint, ready to play, with no newcomer in it."""
    if found.recipe.engine.name == "vllm":
        # Teams with and without a newcomer play in turn: a server each would be too many.
        local = found.recipe.model_copy(update={"engine": Named("local", asdict(LocalSettings()))})
        found = replace(found, recipe=local)
    cast = assemble(found.recipe, progress, servers, visiting=found.digests)
    if found.run is None:
        dtype = found.recipe.team.dtype
        add_mixtures(cast.team, found.path, manifest_of(found.path), dtype=dtype)
        numbers = Numbers()
        return Reseated(with_team(cast, _fitting(found, cast.team), cast.team, numbers), numbers)
    assert found.checkpoint is not None
    path, state = found.run.checkpoints / found.checkpoint, found.state["state"]
    numbers = Numbers(dict(state["issued"]))
    for name, policy in cast.team.policies.items():
        weights_of_file = path / f"{name}.weights.safetensors"
        if not weights_of_file.is_file():
            raise UserError(f"{path}: holds no weights of agent {name}; is it of another recipe?")
        weights = load_file(weights_of_file)
        policy.load_weights(weights)
        numbers.give(name, policy, state["versions"][name])
        cast.engine.publish(name, numbers.of(name, policy), weights)
    return Reseated(cast, numbers)


def _fitting(found: Found, team: Team) -> Recipe:
    """The recipe, with messages that leave room in every context where nobody has said how long
    they may be."""
    rollout = found.recipe.rollout
    limits = [policy.context_limit // 4 for policy in team.policies.values()]
    room = min(limits, default=rollout.max_new_tokens)
    if found.room_said or rollout.max_new_tokens <= room:
        return found.recipe
    shorter = replace(rollout, max_new_tokens=max(1, room))
    return found.recipe.model_copy(update={"rollout": shorter})


# -- the team with a newcomer ---------------------------------------------------------------------


def reseated(team: TeamSection, seat: str, newcomer: AgentSection) -> tuple[TeamSection, str]:
    """The team with a newcomer in ``seat``, and the newcomer's name: that of the agent which filled
    this seat alone, else one of its own, behind the agent that keeps its other seats."""
    resolved = team.resolved()
    shared = team.sharing == "shared"
    old, seats = dict(resolved.agents if shared else team.agents), dict(resolved.seats)
    incumbent = seats[seat]
    name = incumbent
    if list(seats.values()).count(incumbent) > 1:
        name = next(n for n in _names(seat) if n not in old)
    agents: dict[str, AgentSection] = {}
    for each, section in old.items():
        if each != name:
            agents[each] = section
        if each == incumbent:
            agents[name] = newcomer
    seats[seat] = name
    changed: dict[str, Any] = {"agents": agents, "seats": seats}
    return team.model_copy(update=changed | ({"sharing": "separate"} if shared else {})), name


def _names(seat: str):
    yield seat
    number = 2
    while True:
        yield f"{seat}-{number}"
        number += 1


@dataclass(slots=True)
class Numbers:
    """Which version number each set of weights has that a swap plays with.

    A number names one set of an agent's weights for ever, in the run that is swapped in, in all
    engines of the swap and in the run that comes of it. ``issued`` has the highest number that any
    weights of an agent ever had; what is not numbered yet takes the next one.
    """

    issued: dict[str, int] = field(default_factory=dict)
    _given: WeakKeyDictionary[Policy, dict[str, int]] = field(default_factory=WeakKeyDictionary)

    def of(self, agent: str, policy: Policy) -> int:
        """The number of the policy's weights where it plays as ``agent``."""
        if agent not in self._given.get(policy, {}):
            self.give(agent, policy, self.issued.get(agent, -1) + 1)
        return self._given[policy][agent]

    def give(self, agent: str, policy: Policy, version: int) -> None:
        """Note the number that the policy's weights have as ``agent``."""
        self._given.setdefault(policy, {})[agent] = version
        self.issued[agent] = max(self.issued.get(agent, -1), version)


@dataclass(slots=True)
class Reseated:
    """A team in which newcomers fill some seats. ``newcomers``: agent to the model it was made
    from; every other agent is the old team's own. ``numbers`` are those of all teams of a swap."""

    cast: Cast
    numbers: Numbers
    newcomers: dict[str, Model] = field(default_factory=dict)

    def agent_of(self, seat: str) -> str:
        return self.cast.team.seats[seat]


def with_newcomer(
    base: Reseated,
    seat: str,
    model: Model,
    *,
    loaded: Policy | None = None,
    tiny: Mapping[str, Any] | None = None,
    server: Mapping[str, Any] | None = None,
) -> Reseated:
    """``base`` with ``model`` in ``seat``. A tiny model is taught first, as in training but for the
    settings in ``tiny``, and lies where the incumbent did; one that is served is asked as
    ``server`` says, and from then on frozen.
    A host is asked for the agent that fills the seat, by its name, as it is there now. ``loaded``
    is the policy where there is one already. Raises UserError where the model does not load."""
    cast = base.cast
    recipe, team = cast.recipe, cast.team
    incumbent = team.seats[seat]
    # A text that was written for the incumbent's template says nothing to another tokenizer.
    had = recipe.team.resolved().agents[incumbent]
    at_server = isinstance(model, ServedModel)
    there = isinstance(model, HostAddress)
    named = model
    section = had.model_copy(
        update={
            "model": PRIVATE if there else model,
            "host": model.address if there else None,
            "host_token_env": model.variable if there else HOST_VARIABLE,
            "trust_remote_code": False,
            "attention": None,
            "device": None if at_server or there else had.device,
            "lora": None if at_server or there else had.lora,
            "frozen": at_server or (had.frozen and incumbent in team.policies),
            "server": _server_of(recipe.team, model.address, server or {}) if at_server else None,
        }
    )
    if loaded is None and not isinstance(model, HostAddress):
        taught = recipe.model_copy(update={"tiny": replace(recipe.tiny, **(tiny or {}))})
        named = model_path(section, taught, cast.protocol, team.seats, cast.progress)
        section = section.model_copy(update={"model": named})
    sections, name = reseated(recipe.team, seat, section)
    section = sections.resolved().agents[name]
    policy = loaded if loaded or at_server or there else _load(recipe, sections, name, section)
    same = there or _same_tokenizer(team.policies.get(incumbent), policy)
    if section.template.chat is not None and not same:
        plain = replace(section.template, chat=None)
        section = section.model_copy(update={"template": plain})
        sections = sections.model_copy(update={"agents": {**sections.agents, name: section}})
    resolved = sections.resolved()
    playing = {**team.policies, name: policy}
    policies = {n: p for n in resolved.agents if (p := playing.get(n)) is not None}
    spec = agent_spec(name, section, section.model)
    specs = {n: spec if n == name else team.specs[n] for n in resolved.agents}
    new_team = replace(
        team, policies=policies, specs=specs, seats=dict(resolved.seats), sharing=sections.sharing
    )
    new_recipe = recipe.model_copy(update={"team": sections})
    kept = {n: m for n, m in base.newcomers.items() if n in resolved.agents}
    known = {agent: host for agent, host in cast.visited.items() if agent != name}
    new_cast = with_team(replace(cast, visited=known), new_recipe, new_team, base.numbers)
    return Reseated(new_cast, base.numbers, kept | {name: named})


def _server_of(team: TeamSection, address: str, given: Mapping[str, Any]) -> ServerSettings:
    """How a newcomer's server is asked: as the team asks it already, but for what is given."""
    for agent in team.resolved().agents.values():
        there = agent.model.address if isinstance(agent.model, ServedModel) else None
        if there == address and agent.server is not None:
            return replace(agent.server, **given)
    return ServerSettings(**given)


def _same_tokenizer(incumbent: Policy | None, newcomer: Policy | None) -> bool:
    if incumbent is None or newcomer is None:
        return False
    return tokenizer_difference(incumbent.tokenizer, newcomer.tokenizer) is None


def with_policy(base: Reseated, name: str, policy: Policy) -> Reseated:
    """The team with the agent ``name`` played by another policy."""
    team = base.cast.team
    changed = replace(team, policies={**team.policies, name: policy})
    cast = with_team(base.cast, base.cast.recipe, changed, base.numbers)
    return Reseated(cast, base.numbers, dict(base.newcomers))


def with_team(cast: Cast, recipe: Recipe, team: Team, numbers: Numbers) -> Cast:
    """The cast with another team, and an engine that serves it and has its weights. Each cast
    visits the hosts of its agents on its own, and means the weights that were there before."""
    digests = {name: host.digest for name, host in cast.visited.items()}
    visited = visit_hosts(team, digests, recipe.hosts.timeout)
    engine = team_engine(team, engine_of(recipe), cast.servers, visited)
    if isinstance(cast.engine, WithRoles):
        engine = WithRoles(engine, cast.engine.roles)
    for name, policy in team.policies.items():
        engine.publish(name, numbers.of(name, policy), Weights(policy.export))
    return replace(cast, recipe=recipe, team=team, engine=engine, visited=visited)


def _load(recipe: Recipe, team: TeamSection, name: str, section: AgentSection) -> Policy:
    return load_policies(
        [agent_spec(name, section, section.model)],
        shared_base=team.sharing == "lora",
        precision=Precision.of(team.dtype, recipe.optimizer.autocast),
        device=team.device,
        seed=recipe.seed,
    )[name]
