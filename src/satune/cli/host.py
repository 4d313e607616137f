"""``satune host``."""

from __future__ import annotations

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
    agent: Annotated[str, typer.Option(help="the agent of the recipe that lives here")] = ...,  # type: ignore[assignment]
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8470,
    address: Annotated[str, typer.Option(help="where to listen")] = "127.0.0.1",
    out: Annotated[
        Path | None,
        typer.Option(help="the agent's checkpoints", show_default="hosts/NAME of the agent"),
    ] = None,
    break_lock: BreakLock = False,
    trust: TrustCode = False,
    allow_address: AllowAddress = None,
) -> None:
    """Keep an agent here and train it in a team that is driven elsewhere."""
    from satune.commands.trust import given_recipe

    loaded = given_recipe(
        shipped_recipe(recipe), overrides or [], trust_of(trust, overrides, allow_address)
    )
    _serve(loaded, agent, (address, port), out or Path("hosts") / agent, break_lock=break_lock)


def _serve(
    recipe: object, agent: str, address: tuple[str, int], out: Path, *, break_lock: bool
) -> None:
    quiet_libraries()
    import torch

    from satune.cli.progress import Display
    from satune.commands.host import assemble_owner, own_agent
    from satune.config.schema import Recipe
    from satune.files.lock import LOCK, locked
    from satune.files.writing import disk_errors
    from satune.hosts.client import token_in
    from satune.hosts.server import HostServer
    from satune.tiny.zoo import is_tiny

    assert isinstance(recipe, Recipe)
    section = own_agent(recipe, agent).team.resolved().agents[agent]
    token = token_in(section.host_token_env, agent)
    if is_tiny(str(section.model)):
        # As in a run of tiny models alone.
        torch.set_num_threads(1)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK, str(out), break_lock=break_lock):
        with Display(open_console(stderr=True)) as display:
            owner = assemble_owner(recipe, agent, out, display.progress)
        with HostServer(address, owner, token, say) as server:
            name, port = server.server_address[:2]
            say(f"agent {agent}: http://{name}:{port}, checkpoints in {out}; ctrl-C ends it")
            server.serve_forever()
