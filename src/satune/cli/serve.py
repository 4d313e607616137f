"""``satune serve``."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import typer

from satune.cli.common import AgentHost, AllowAddress, Overrides, TrustCode, say
from satune.cli.served import (
    MaxNewTokens,
    Protocol,
    ProtocolOption,
    Seed,
    TeamGiven,
    Temperature,
    load_served,
)
from satune.serve.settings import LOOPBACK, ServeSettings
from satune.types import UserError

LIMITS, REACH = "Limits", "Who may ask"
"""Panels of the help."""
_USUAL = ServeSettings()
_MIB = 2**20


def serve(
    team: TeamGiven,
    overrides: Overrides = None,
    host: Annotated[
        str, typer.Option(help="the address to listen at", rich_help_panel=REACH)
    ] = LOOPBACK,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="0: a free one", rich_help_panel=REACH)
    ] = 8000,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            help="the environment variable that holds the key which clients have to send",
            show_default="none, any key is accepted",
            rich_help_panel=REACH,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="a name that clients may ask this server by",
            show_default="localhost and --host",
            rich_help_panel=REACH,
        ),
    ] = None,
    protocol: Protocol = None,
    protocol_option: ProtocolOption = None,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="conversations at a time",
            show_default="twice engine.max_rows",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    waiting: Annotated[
        int,
        typer.Option(
            min=0, help="conversations that may wait for their turn", rich_help_panel=LIMITS
        ),
    ] = _USUAL.waiting,
    max_body: Annotated[
        int, typer.Option(min=1, help="MiB of a request", rich_help_panel=LIMITS)
    ] = _USUAL.body // _MIB,
    trust: TrustCode = False,
    allow_address: AllowAddress = None,
    agent_host: AgentHost = None,
) -> None:
    """A team behind an OpenAI-compatible endpoint, until ctrl-C."""
    key = None if api_key_env is None else os.environ.get(api_key_env)
    if api_key_env is not None and not key:
        raise UserError(f"--api-key-env: ${api_key_env} is not set; export it")
    try:
        from satune.serve.app import endpoint
        from satune.serve.server import address_of, listening, serve_until_told
    except ModuleNotFoundError as error:
        raise UserError(f"serve: needs {error.name}; pip install 'satune[serve]'") from None

    limits = {"waiting": waiting, "body": max_body * _MIB}
    limits |= {} if concurrency is None else {"concurrency": concurrency}
    wanted = {
        "protocol": protocol,
        "protocol_options": protocol_option,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
    }
    # A port that is taken is told before a model is loaded.
    with listening(host, port) as place:
        served = load_served(team, overrides, wanted, limits, trust, allow_address, agent_host)
        everywhere = host in ("0.0.0.0", "::", "")
        names = [*(allow_host or []), host]
        app = endpoint(served, seed=seed, key=key, hosts=names, numbers=everywhere)
        with served.running():
            print(address_of(place))
            print(f"serves {', '.join(served.models)} until ctrl-C", flush=True)
            if host not in (LOOPBACK, "localhost", "::1") and key is None:
                say(f"note: whoever reaches {host} may ask; --api-key-env sets a key")
            asyncio.run(serve_until_told(app, place, _draining))


def _draining() -> None:
    say("what was asked is answered first; ctrl-C once more ends at once")
