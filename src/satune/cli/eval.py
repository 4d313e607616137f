"""``satune eval``."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from satune.cli.common import (
    SERVERS,
    AllowAddress,
    AsJson,
    BreakLock,
    Interrupted,
    Overrides,
    TrustCode,
    UnsafeChecks,
    find_recipe,
    open_console,
    quiet_libraries,
    show_result,
    trust_of,
)
from satune.engines.settings import ServerSettings
from satune.files.printing import printable
from satune.loading import KEY_VARIABLE
from satune.types import UserError

if TYPE_CHECKING:  # their libraries take seconds to load
    from satune.commands.contestant import Contestant


SAMPLING, ROLES = "Sampling", "Roles that are not players"
"""Panels of the help."""
ENVIRONMENT_KEY = "ENVIRONMENT_API_KEY"
"""The environment variable that holds the key of an environment's server beside --base-url."""

_ASKED = ServerSettings()


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
    )
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = out or Path("runs") / f"eval-{Path(benchmark or 'own').stem}-{stamp}"
    command = ["satune", *sys.argv[1:], *([] if out else ["--out", str(directory)])]

    keys = {"--api-key-env": api_key_env, "--environment-key-env": environment_key_env}
    for option, variable in keys.items():
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
    said = [benchmark, protocol, options, environment_url]
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
                team, find_recipe(team), seats, overrides or [], display.progress, servers, spoken
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


def show_report(report: dict[str, Any]) -> None:
    from rich.table import Table

    console = open_console()
    k = report["k"]
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("")
    rows = [("team", report["team"], report["budget"]["team"])]
    for name, row in report["seats"].items():
        rows.append((f"seat {name}", row, report["budget"]["seats"][name]))
    if len(rows) == 2 and rows[1][1] == rows[0][1]:
        # The one seat of a team is the team, the best seat, and all the messages.
        del rows[0]
    elif "pooled" in report:
        rows.append(("all messages", report["pooled"], report["budget"]["pooled"]))
        rows.append(("oracle", report["oracle"], report["budget"]["oracle"]))
    columns: list[str] = list(dict.fromkeys(name for _, row, _ in rows for name in row))
    for column in (*(_HEADINGS.get(name, name) for name in columns), "answers", "read + written"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, row, budget in rows:
        table.add_row(
            label,
            *(_figure(row.get(name)) for name in columns),
            str(budget["answers"]),
            f"{_count(budget['prompt_tokens'])} + {_count(budget['completion_tokens'])}",
        )
    console.print(table)
    notes = "A seat's answer is its last message, the oracle takes the best seat's. "
    notes = notes if len(rows) > 1 else ""
    console.print(
        f"{report['benchmark']}: {report['problems']} problems, {k} conversations each "
        f"({report['protocol']['name']}). {notes}Answers are counted a problem, tokens in all.",
        highlight=False,
        soft_wrap=True,
    )
    for name, row in report.get("groups", {}).items():
        console.print(
            f"{printable(name)}: {row['avg_at_k']:.3f}, {row['problems']} problems",
            highlight=False,
            soft_wrap=True,
        )
    failed = {name: sum(kinds.values()) for name, kinds in report["failures"].items()}
    if any(failed.values()):
        kinds = [f"{n} {kind}" for of in report["failures"].values() for kind, n in of.items()]
        again = "; the same command plays those of the world again" if failed["world"] else ""
        console.print(
            f"{sum(failed.values())} conversations failed and score 0 ({', '.join(kinds)}){again}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"everything lies in {report['out']}", highlight=False, soft_wrap=True)


_HEADINGS = {"avg_at_k": "avg", "pass_at_k": "pass", "interval": "95%"}
"""How a figure is headed in the table; any other by its own name."""


def _figure(value: Any) -> str:
    match value:
        case None:
            return ""
        case int():
            return str(value)
        case [low, high]:
            return f"{low:.3f}-{high:.3f}"
        case _:
            return f"{value:.3f}"


def _count(tokens: int | None) -> str:
    if tokens is None:
        return "unknown"
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= limit:
            return f"{tokens / limit:.1f}{suffix}"
    return str(tokens)
