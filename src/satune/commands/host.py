"""An agent that lives here and trains in a team that is driven elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from satune.commands.assemble import engine_of, load_agents
from satune.commands.recipe_digest import facts_of
from satune.commands.train import learner_of, make_critics, training_settings
from satune.commands.trust import remember
from satune.config.checks import no_such
from satune.config.schema import Recipe
from satune.engines.local import LocalEngine
from satune.files.writing import written_beside
from satune.hosts.owner import Owner
from satune.hosts.vault import Vault
from satune.hosts.visits import Visits
from satune.protocols.named import load_protocol
from satune.types import Progress, UserError, no_progress


def own_agent(recipe: Recipe, agent: str) -> Recipe:
    """The recipe as the owner of ``agent`` has it: that one lives here, and δ may be its own.

    Raises UserError for an agent that the team does not have, or whose model cannot be trained.
    """
    agents = recipe.team.resolved().agents
    if agent not in agents:
        raise UserError(f"--agent: {no_such('agent', agent, agents)}")
    if not isinstance(agents[agent].model, str):
        raise UserError(
            f"team.agents.{agent}.model: a served model has no owner here; name the model"
        )
    here = recipe.team.agents[agent].model_copy(update={"host": None})
    team = recipe.team.model_copy(update={"agents": {**recipe.team.agents, agent: here}})
    return recipe.model_copy(update={"team": team})


def assemble_owner(
    recipe: Recipe, agent: str, out: Path, progress: Progress = no_progress
) -> Owner:
    """The agent of a recipe with its learner and engine, and the checkpoints in ``out``. Raises
    UserError for a model that cannot be had."""
    facts = asdict(facts_of(recipe))
    recipe = own_agent(recipe, agent)
    resolved = recipe.team.resolved()
    seats = {seat: filled for seat, filled in resolved.seats.items() if filled == agent}
    options = recipe.protocol.options
    protocol = load_protocol(recipe.protocol.name, list(resolved.seats), None, **options)
    team = load_agents(
        recipe, {agent: resolved.agents[agent]}, seats, protocol, progress, all_seats=resolved.seats
    )

    def make_engine(seats: Mapping[str, str]) -> LocalEngine:
        engine = engine_of(recipe).make(team.policies, seats)
        if not isinstance(engine, LocalEngine):
            raise UserError(f"engine: '{recipe.engine.name}' cannot be a host's; take local")
        return engine

    engine, renderer = make_engine(team.seats), team.renderers[agent]
    scratch = out / "optimizers"
    critics = make_critics(recipe, team, protocol, scratch, progress)
    remember(recipe.model_dump(mode="json"))

    def save() -> None:
        with written_beside(out / "agent") as beside:
            team.save_agent(agent, beside, out / "agent", {})

    return Owner(
        agent,
        learner_of(recipe, team.policies[agent], agent, scratch, critics.get(agent)),
        engine,
        renderer,
        training_settings(recipe).update_of(agent),
        Vault(out / "checkpoints"),
        facts,
        Visits(
            agent,
            make_engine,
            renderer,
            recipe.rollout.max_new_tokens,
            {"template": asdict(team.specs[agent].template)},
        ),
        save,
    )
