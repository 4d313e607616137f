"""``satune host``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from satune.cli.common import (
    AllowAddress,
    BreakLock,
    Overrides,
    RecipeFile,
    TrustCode,
    open_console,
    quiet_libraries,
    say,
    shipped_recipe,
    trust_of,
)


def host(
    recipe: RecipeFile,
    overrides: Overrides = None,
    agent: Annotated[
        list[str], typer.Option(help="an agent of the recipe that lives here; may be repeated")
    ] = ...,  # type: ignore[assignment]
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8470,
    address: Annotated[str, typer.Option(help="where to listen")] = "127.0.0.1",
    out: Annotated[
        Path | None,
        typer.Option(
            help="the agent's checkpoints; of several agents a folder each in it",
            show_default="hosts, a folder an agent",
        ),
    ] = None,
    break_lock: BreakLock = False,
    trust: TrustCode = False,
    allow_address: AllowAddress = None,
) -> None:
    """Keep agents here and train them in a team that is driven elsewhere."""
    from satune.commands.trust import given_recipe

    loaded = given_recipe(
        shipped_recipe(recipe), overrides or [], trust_of(trust, overrides, allow_address)
    )
    places = {name: (out or Path("hosts")) / name for name in agent}
    if out is not None and len(agent) == 1:
        places = {agent[0]: out}
    _serve(loaded, agent, (address, port), places, break_lock=break_lock)


def _serve(
    recipe: object,
    agents: list[str],
    address: tuple[str, int],
    places: dict[str, Path],
    *,
    break_lock: bool,
) -> None:
    quiet_libraries()
    import torch

    from satune.cli.progress import Display
    from satune.commands.host import assemble_owners, own_agents
    from satune.config.schema import Recipe
    from satune.files.interrupts import ended_by_term
    from satune.files.lock import LOCK, locked
    from satune.files.writing import disk_errors
    from satune.hosts.client import token_in
    from satune.hosts.server import HostServer, Kept
    from satune.tiny.zoo import is_tiny

    assert isinstance(recipe, Recipe)
    sections = own_agents(recipe, agents).team.resolved().agents
    tokens = {agent: token_in(sections[agent].host_token_env, agent) for agent in agents}
    if all(is_tiny(str(sections[agent].model)) for agent in agents):
        # As in a run of tiny models alone.
        torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.enter_context(ended_by_term())
        for place in places.values():
            with disk_errors(place):
                place.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(place / LOCK, str(place), break_lock=break_lock))
        with Display(open_console(stderr=True)) as display:
            owners = assemble_owners(recipe, places, display.progress)
        kept = {agent: Kept(owner, tokens[agent]) for agent, owner in owners.items()}
        with HostServer(address, kept, say) as server:
            name, port = server.server_address[:2]
            for agent, place in places.items():
                say(f"agent {agent}: http://{name}:{port}, checkpoints in {place}")
            say("ctrl-C ends it")
            server.serve_forever()
