"""``satune eval``."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from datetime import datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from satune.cli.common import (
    SERVERS,
    AgentHost,
    AllowAddress,
    AsJson,
    BreakLock,
    Interrupted,
    Overrides,
    TrustCode,
    UnsafeChecks,
    agent_hosts,
    find_recipe,
    open_console,
    quiet_libraries,
    said_of_hosts,
    show_result,
    trust_of,
)
from satune.cli.standings import show_report
from satune.engines.settings import ServerSettings
from satune.loading import KEY_VARIABLE
from satune.types import UserError

if TYPE_CHECKING:  # their libraries take seconds to load
    from satune.commands.contestant import Contestant


SAMPLING, ROLES = "Sampling", "Roles that are not players"
"""Panels of the help."""
ENVIRONMENT_KEY = "ENVIRONMENT_API_KEY"
"""The environment variable that holds the key of an environment's server beside --base-url."""

_ASKED = ServerSettings()


class Keys(StrEnum):
    ID, TEXT = "id", "text"


def evaluate(
    team: Annotated[
        str,
        typer.Argument(help="a team or run directory, a recipe, a model; models with --base-url"),
    ],
    overrides: Overrides = None,
    benchmark: Annotated[
        str | None,
        typer.Option(help="a task's name or file.py:Task", show_default="the team's own task"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="the benchmark's rows",
            show_default="held out of the team's own task, else the task's published ones",
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            "-k",
            help="conversations a problem",
            show_default="the paper's for the benchmark, 8 where it names none; 1 when greedy",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="so many problems only",
            show_default="all; 128 of a task that generates without end",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="a name, or file.py:function",
            show_default="the team's own, else solo for one seat and vote for several",
        ),
    ] = None,
    protocol_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="an option of it", show_default="the protocol's own"
        ),
    ] = None,
    seats: Annotated[int, typer.Option(help="so many seats for one model")] = 1,
    seat: Annotated[
        str | None,
        typer.Option(help="this seat alone, without its team", show_default="the whole team"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="where everything is written", show_default="runs/eval-BENCHMARK-DATE-TIME"
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="in place of each agent's own",
            show_default="each agent's; the paper's 0.8 for a model that was not trained here",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="temperature 0", rich_help_panel=SAMPLING)
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="a message",
            show_default="the recipe's, else the paper's 32768 or half the context of a model here",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="of everything random",
            show_default="the recipe's, else 0",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    keys: Annotated[
        Keys,
        typer.Option(
            help="what draws depend on beside the seed: the problem's id, or its text as in serve",
            rich_help_panel=SAMPLING,
        ),
    ] = Keys.ID,
    concurrency: Annotated[
        int | None,
        typer.Option(
            help="conversations at a time",
            show_default=f"{_ASKED.concurrency} at a server, twice engine.max_rows here",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="of an OpenAI-compatible server",
            show_default="none, models load here",
            rich_help_panel=SERVERS,
        ),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            help="the environment variable that holds the key of --base-url",
            show_default=KEY_VARIABLE,
            rich_help_panel=SERVERS,
        ),
    ] = None,
    rpm: Annotated[
        float | None,
        typer.Option(
            help="requests a minute and server", show_default="no limit", rich_help_panel=SERVERS
        ),
    ] = None,
    tpm: Annotated[
        float | None,
        typer.Option(
            help="tokens a minute and server", show_default="no limit", rich_help_panel=SERVERS
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="seconds a request", show_default=f"{_ASKED.timeout:g}", rich_help_panel=SERVERS
        ),
    ] = None,
    retries: Annotated[
        int | None,
        typer.Option(
            help="of a request that failed",
            show_default=str(_ASKED.retries),
            rich_help_panel=SERVERS,
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="answers piece by piece", rich_help_panel=SERVERS)
    ] = False,
    server_seed: Annotated[
        bool, typer.Option(help="send a seed with each request", rich_help_panel=SERVERS)
    ] = True,
    environment_model: Annotated[
        str | None,
        typer.Option(
            help="plays roles that are not players",
            show_default="the task's host; with --base-url its first model",
            rich_help_panel=ROLES,
        ),
    ] = None,
    environment_url: Annotated[
        str | None,
        typer.Option(
            help="where that model is served",
            show_default="the address of --base-url",
            rich_help_panel=ROLES,
        ),
    ] = None,
    environment_key_env: Annotated[
        str | None,
        typer.Option(
            help="the environment variable that holds the key of that model's server",
            show_default=f"{ENVIRONMENT_KEY} beside --base-url, {KEY_VARIABLE} without it",
            rich_help_panel=ROLES,
        ),
    ] = None,
    unsafe_checks: UnsafeChecks = False,
    trust: TrustCode = False,
    allow_address: AllowAddress = None,
    agent_host: AgentHost = None,
    break_lock: BreakLock = False,
    as_json: AsJson = False,
) -> None:
    """A team on a benchmark: the team, each seat and the majority at a matched sample budget."""
    from satune.cli.progress import Display
    from satune.commands.evaluate import Wanted, examine, place
    from satune.config.load import override
    from satune.engines.servers import Servers

    if greedy and temperature is not None:
        raise UserError("--greedy: is temperature 0; drop it or --temperature")
    if seats < 1:
        raise UserError(f"--seats: is {seats}; give at least 1")
    options: dict[str, Any] = {}
    for text in protocol_option or []:
        override(options, text)
    wanted = Wanted(
        benchmark=benchmark,
        data=data,
        samples=k,
        protocol=protocol,
        protocol_options=options,
        limit=limit,
        temperature=0.0 if greedy else temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        concurrency=concurrency,
        keys=keys.value,
    )
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = out or Path("runs") / f"eval-{Path(benchmark or 'own').stem}-{stamp}"
    command = ["satune", *sys.argv[1:], *([] if out else ["--out", str(directory)])]

    variables = {"--api-key-env": api_key_env, "--environment-key-env": environment_key_env}
    for option, variable in variables.items():
        if variable is not None and not os.environ.get(variable):
            raise UserError(f"{option}: ${variable} is not set; export it")
    if base_url is None and api_key_env is not None:
        raise UserError(
            "--api-key-env: is for --base-url; the key of an environment's server is named by "
            "--environment-key-env"
        )
    given = {"concurrency": concurrency, "retries": retries, "timeout": timeout}
    given |= {"requests_per_minute": rpm, "tokens_per_minute": tpm}
    server = {name: value for name, value in given.items() if value is not None}
    server |= ({"stream": True} if stream else {}) | ({} if server_seed else {"seed": False})
    usual = KEY_VARIABLE if base_url is None else ENVIRONMENT_KEY
    servers = Servers(server, usual, directory / "answers.jsonl")
    hosts = agent_hosts(agent_host)
    if hosts and base_url is not None:
        raise UserError("--agent-host: is for a team's agents; drop it or --base-url")
    said = [benchmark, protocol, options, environment_url, said_of_hosts(hosts)]
    spoken = trust_of(trust, overrides, allow_address, said)

    def contestant_of(display: Display) -> Contestant:
        from satune.commands.contestant import local_contestant, served_contestant

        if base_url is not None:
            engine = servers.at(base_url, api_key_env or KEY_VARIABLE)
            contestant = served_contestant(team, seats, overrides or [], engine)
            host = environment_model or contestant.seats[0].agent
            contestant.host = f"{environment_url or base_url}#{host}"
        else:
            quiet_libraries()
            contestant = local_contestant(
                team,
                find_recipe(team),
                seats,
                overrides or [],
                display.progress,
                servers,
                spoken,
                hosts=hosts,
            )
            if environment_url is not None:
                if environment_model is None:
                    raise UserError("--environment-url: name the model by --environment-model")
                contestant.host = f"{environment_url}#{environment_model}"
            elif environment_model is not None:
                raise UserError("--environment-model: say where it is served, --environment-url")
        if "host" in contestant.asked_task and (environment_model or environment_url):
            raise UserError("task.host: who plays it is also said by --environment-*; drop one")
        contestant.open_server = partial(servers.model, key_variable=environment_key_env)
        if seat is not None:
            contestant.only(seat)
        return contestant

    async def play(contestant: Contestant, display: Display) -> dict[str, Any]:
        try:
            return await examine(contestant, wanted, directory, display.progress)
        finally:
            await contestant.engine.close()
            await servers.close()

    try:
        with place(directory, break_lock=break_lock), Display(open_console(stderr=True)) as display:
            contestant = contestant_of(display)
            report = asyncio.run(play(contestant, display))
            requests, repeated, reused = (
                sum(getattr(engine, name) for engine in servers.engines)
                for name in ("requests", "repeated", "reused")
            )
            silent = sum(engine.silent for engine in servers.engines)
            if repeated or reused:
                display.note(
                    f"{requests} requests, {repeated} of them repetitions; "
                    f"{reused} answers were on file"
                )
            if silent:
                display.note(
                    f"{silent} replies held reasoning and no content, and count as empty; see the "
                    "server's reasoning parser, or raise max_new_tokens"
                )
    except KeyboardInterrupt:
        raise Interrupted(shlex.join(command) if directory.is_dir() else "") from None
    show_result({**report, "out": str(directory)}, as_json, show_report)
