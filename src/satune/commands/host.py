"""Agents that live here and train in a team that is driven elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from satune.commands.assemble import engine_of, load_agents
from satune.commands.recipe_digest import facts_of
from satune.commands.train import learner_of, make_critics, training_settings
from satune.commands.trust import remember
from satune.config.checks import no_such
from satune.config.schema import Recipe
from satune.engines.base import LocalSettings
from satune.engines.local import LocalEngine
from satune.files.writing import written_beside
from satune.hosts.agent import Facts
from satune.hosts.owner import Owner
from satune.hosts.vault import Vault
from satune.hosts.visits import Visits
from satune.protocols.named import load_protocol
from satune.team import Team, critic_file, save_critic
from satune.types import Progress, TeamProtocol, UserError, no_progress


def own_agents(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe as the owner of these agents has it: they live here, and δ may be its own.

    Raises UserError for an agent that the team does not have, or whose model cannot be trained, and
    for one that is named twice.
    """
    agents = recipe.team.resolved().agents
    here = dict(recipe.team.agents)
    for name in names:
        if name not in agents:
            raise UserError(f"--agent: {no_such('agent', name, agents)}")
        if list(names).count(name) > 1:
            raise UserError(f"--agent {name}: is named twice; name each agent once")
        if not isinstance(agents[name].model, str):
            raise UserError(
                f"team.agents.{name}.model: a served model has no owner here; name the model"
            )
        here[name] = recipe.team.agents[name].model_copy(update={"host": None})
    team = recipe.team.model_copy(update={"agents": here})
    return recipe.model_copy(update={"team": team})


def assemble_owners(
    recipe: Recipe, places: Mapping[str, Path], progress: Progress = no_progress
) -> dict[str, Owner]:
    """Agents of a recipe, each with its learner and engine and the checkpoints in its place. Where
    the recipe has them share a base they share it here. Raises UserError for a model that cannot be
    had."""
    facts = facts_of(recipe)
    recipe = own_agents(recipe, list(places))
    resolved = recipe.team.resolved()
    seats = {seat: agent for seat, agent in resolved.seats.items() if agent in places}
    options = recipe.protocol.options
    protocol = load_protocol(recipe.protocol.name, list(resolved.seats), None, **options)
    team = load_agents(
        recipe,
        {name: resolved.agents[name] for name in places},
        seats,
        protocol,
        progress,
        all_seats=resolved.seats,
    )
    lock = threading.Lock()
    owners = {
        agent: _owner(recipe, team, agent, place, protocol, facts, lock, progress)
        for agent, place in places.items()
    }
    remember(recipe.model_dump(mode="json"))
    return owners


def _owner(
    recipe: Recipe,
    team: Team,
    agent: str,
    place: Path,
    protocol: TeamProtocol,
    facts: Facts,
    lock: threading.Lock,
    progress: Progress,
) -> Owner:
    """One agent of the team that lives here. It has an engine of its own; those of the agents on
    one device have the engine's memory together."""
    policies, renderer = {agent: team.policies[agent]}, team.renderers[agent]
    devices = [policy.device for policy in team.policies.values()]
    settings = engine_of(recipe)
    if isinstance(settings, LocalSettings):
        settings = settings.divided(devices.count(team.policies[agent].device))

    def make_engine(seats: Mapping[str, str]) -> LocalEngine:
        engine = settings.make(policies, seats)
        if not isinstance(engine, LocalEngine):
            raise UserError(f"engine: '{recipe.engine.name}' cannot be a host's; take local")
        return engine

    def save() -> None:
        with written_beside(place / "agent") as beside:
            team.save_agent(agent, beside, place / "agent", {})
            if agent in critics:
                save_critic(critics[agent].weights(), critic_file(beside, agent))

    scratch = place / "optimizers"
    critics = make_critics(recipe, replace(team, policies=policies), protocol, scratch, progress)
    return Owner(
        agent,
        learner_of(recipe, team.policies[agent], agent, scratch, critics.get(agent)),
        make_engine(dict.fromkeys(team.seats_of(agent), agent)),
        renderer,
        training_settings(recipe).update_of(agent),
        Vault(place / "checkpoints"),
        asdict(facts),
        Visits(
            agent,
            make_engine,
            renderer,
            recipe.rollout.max_new_tokens,
            {"template": asdict(team.specs[agent].template)},
        ),
        save,
        lock,
    )
