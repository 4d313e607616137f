"""``satune eval``."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from satune.cli.common import (
    AsJson,
    Interrupted,
    Overrides,
    find_recipe,
    quiet_libraries,
    show_result,
)
from satune.types import UserError


def evaluate(
    team: Annotated[
        str,
        typer.Argument(help="a team or run directory, a recipe, a model; models with --base-url"),
    ],
    overrides: Overrides = None,
    benchmark: Annotated[str | None, typer.Option(help="a task's name or file.py:Task")] = None,
    data: Annotated[str | None, typer.Option(help="the benchmark's rows")] = None,
    k: Annotated[int | None, typer.Option("-k", help="conversations a problem")] = None,
    protocol: Annotated[str | None, typer.Option(help="a name, or file.py:function")] = None,
    protocol_option: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE")] = None,
    limit: Annotated[int | None, typer.Option(help="so many problems only")] = None,
    base_url: Annotated[str | None, typer.Option(help="of an OpenAI-compatible server")] = None,
    out: Annotated[Path | None, typer.Option(help="where everything is written")] = None,
    seats: Annotated[int, typer.Option(help="so many seats for one model")] = 1,
    seat: Annotated[str | None, typer.Option(help="this seat alone, without its team")] = None,
    temperature: Annotated[float | None, typer.Option(help="in place of each agent's own")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="temperature 0")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="a message")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of everything random")] = None,
    concurrency: Annotated[int | None, typer.Option(help="conversations at a time")] = None,
    rpm: Annotated[float | None, typer.Option(help="requests a minute")] = None,
    tpm: Annotated[float | None, typer.Option(help="tokens a minute")] = None,
    timeout: Annotated[float | None, typer.Option(help="seconds a request")] = None,
    retries: Annotated[int | None, typer.Option(help="of a request that failed")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="answers piece by piece")] = False,
    server_seed: Annotated[bool, typer.Option(help="send a seed with each request")] = True,
    api_key_env: Annotated[
        str, typer.Option(help="the environment variable that holds the server's key")
    ] = "OPENAI_API_KEY",
    environment_model: Annotated[
        str | None, typer.Option(help="plays roles that are not players")
    ] = None,
    environment_url: Annotated[str | None, typer.Option(help="where that model is served")] = None,
    as_json: AsJson = False,
) -> None:
    """A team on a benchmark: the team, each seat and the majority at a matched sample budget."""
    from satune.candidates import ENVIRONMENT, local_candidate, served_candidate
    from satune.config.load import override
    from satune.examination import Wanted, examine, start
    from satune.progress import Display

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

    given = {"concurrency": concurrency, "retries": retries, "timeout": timeout}
    given |= {"requests_per_minute": rpm, "tokens_per_minute": tpm}
    server = {name: value for name, value in given.items() if value is not None}
    server |= {"stream": stream, "seed": server_seed}

    opened: list[Any] = []

    def engine_at(url: str, models: dict[str, str]) -> Any:
        opened.append(_server_engine(url, models, server, api_key_env, directory))
        return opened[-1]

    def candidate_of(display: Display) -> Any:
        if base_url is not None:
            if overrides:
                raise UserError(f"{overrides[0]}: a served model has no keys; use the options")
            engine = engine_at(base_url, {})
            candidate = served_candidate(team, seats, engine)
            host = environment_model or candidate.seats[0].agent
            engine.models[ENVIRONMENT] = host
            candidate.host = f"{environment_url or base_url}#{host}"
        else:
            quiet_libraries()
            candidate = local_candidate(
                team, find_recipe(team), seats, overrides or [], display.progress
            )
            if environment_url is not None:
                if environment_model is None:
                    raise UserError("--environment-url: name the model by --environment-model")
                candidate.host = f"{environment_url}#{environment_model}"
            elif environment_model is not None:
                raise UserError("--environment-model: say where it is served, --environment-url")
        candidate.open_server = lambda url, model: engine_at(url, {ENVIRONMENT: model})
        if seat is not None:
            candidate.only(seat)
        return candidate

    from rich.console import Console

    async def play(candidate: Any, display: Display) -> dict[str, Any]:
        try:
            return await examine(candidate, wanted, directory, display.progress)
        finally:
            for engine in opened:
                await engine.close()

    start(directory)
    with Display(Console(stderr=True)) as display:
        try:
            candidate = candidate_of(display)
            report = asyncio.run(play(candidate, display))
        except KeyboardInterrupt:
            raise Interrupted(shlex.join(command) if directory.is_dir() else "") from None
        requests, repeated, reused = (
            sum(getattr(engine, name) for engine in opened)
            for name in ("requests", "repeated", "reused")
        )
        if repeated or reused:
            display.note(
                f"{requests} requests, {repeated} of them repetitions; "
                f"{reused} answers were on file"
            )
    show_result({**report, "out": str(directory)}, as_json, show_report)


def _server_engine(
    url: str, models: dict[str, str], server: dict[str, Any], variable: str, directory: Path
) -> Any:
    try:
        from satune.engines.openai import OpenAIEngine, ServerSettings
    except ModuleNotFoundError as error:
        raise UserError(f"--base-url: needs {error.name}; pip install 'satune[openai]'") from None
    if variable != "OPENAI_API_KEY" and not os.environ.get(variable):
        raise UserError(f"--api-key-env: ${variable} is not set; export it")
    settings = ServerSettings(**server)
    return OpenAIEngine(
        url, models, settings, key_variable=variable, answers=directory / "answers.jsonl"
    )


def show_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    k = report["k"]
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("")
    for column in ("avg", "95%", "pass", "majority", "answers", "read + written"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = [("team", report["team"], report["budget"]["team"])]
    rows += [
        (f"seat {name}", row, report["budget"]["seats"][name])
        for name, row in report["seats"].items()
    ]
    if "pooled" in report:
        rows.append(("all messages", report["pooled"], report["budget"]["pooled"]))
        rows.append(("oracle", report["oracle"], report["budget"]["oracle"]))
    for label, row, budget in rows:
        interval = row["interval"]
        table.add_row(
            label,
            f"{row['avg_at_k']:.3f}",
            f"{interval[0]:.3f}-{interval[1]:.3f}" if interval else "",
            f"{row['pass_at_k']:.3f}",
            f"{row['majority']:.3f}" if "majority" in row else "",
            str(budget["answers"]),
            f"{_count(budget['prompt_tokens'])} + {_count(budget['completion_tokens'])}",
        )
    console.print(table)
    console.print(
        f"{report['benchmark']}: {report['problems']} problems, {k} conversations each "
        f"({report['protocol']['name']}). A seat's answer is its last message, the oracle takes "
        "the best seat's; answers are counted a problem, tokens in all.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"everything lies in {report['out']}", highlight=False, soft_wrap=True)


def _count(tokens: int | None) -> str:
    if tokens is None:
        return "unknown"
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= limit:
            return f"{tokens / limit:.1f}{suffix}"
    return str(tokens)
