"""``satune swap``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from satune.cli.common import (
    SERVERS,
    AgentHost,
    AllowAddress,
    AsJson,
    BreakLock,
    Out,
    TrustCode,
    UnsafeChecks,
    agent_hosts,
    open_console,
    quiet_libraries,
    said_of_hosts,
    show_result,
    trust_of,
)
from satune.swap.settings import DELTA, DELTA_OF_ALL, DistillSettings, HandOverSettings

if TYPE_CHECKING:  # a command's options are shown before its libraries are loaded
    from satune.commands.swap import SwapResult
    from satune.commands.swap_request import SwapRequest
    from satune.files.events import Difference


PROJECTION, HAND_OVER = "Projection", "Hand-over"
"""Panels of the help."""
_USUAL = HandOverSettings()


def swap(
    source: Annotated[Path, typer.Argument(help="a run's directory, or a team directory")],
    seat: Annotated[list[str], typer.Option(help="the seat to be given; may be repeated")],
    model: Annotated[
        list[str],
        typer.Option(
            "--with",
            help="a directory, hub id, tiny:<family>-<size>, http://ADDRESS/v1#MODEL or "
            "host:ADDRESS[=VARIABLE]",
        ),
    ],
    method: Annotated[str, typer.Option(help="auto, project or handover")] = "auto",
    together: Annotated[bool, typer.Option("--together", help="all seats under one coin")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="measure only")] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="rollout settings and task for a team directory")
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            help="trust region, nats",
            show_default=f"{DELTA:g}; {DELTA_OF_ALL:g} for all seats",
            rich_help_panel=PROJECTION,
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(help="of distillation, at most; 0: mix at once", rich_help_panel=PROJECTION),
    ] = DistillSettings().rounds,
    otherwise: Annotated[
        Literal["mixture", "handover", "refuse"] | None,
        typer.Option(
            help="for a projection outside delta",
            show_default="refuse with --method project, else handover",
            rich_help_panel=PROJECTION,
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="what the reward may fall by", rich_help_panel=HAND_OVER)
    ] = _USUAL.tolerance,
    confidence: Annotated[
        float, typer.Option(help="probability that it falls by more", rich_help_panel=HAND_OVER)
    ] = _USUAL.confidence,
    problems: Annotated[
        int, typer.Option(help="that hold both, at the last look", rich_help_panel=HAND_OVER)
    ] = _USUAL.problems,
    samples: Annotated[
        int, typer.Option(help="coins a problem", rich_help_panel=HAND_OVER)
    ] = _USUAL.samples,
    looks: Annotated[
        int, typer.Option(help="at the evidence", rich_help_panel=HAND_OVER)
    ] = _USUAL.looks,
    server_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="how a server is asked, as team.agents.*.server of a recipe",
            show_default="as the team asks it already, else the recipe's defaults",
            rich_help_panel=SERVERS,
        ),
    ] = None,
    out: Out = None,
    break_lock: BreakLock = False,
    unsafe_checks: UnsafeChecks = False,
    trust: TrustCode = False,
    allow_address: AllowAddress = None,
    agent_host: AgentHost = None,
    as_json: AsJson = False,
) -> None:
    """Give seats of a trained team to other models."""
    from satune.commands.swap_request import SwapRequest
    from satune.config.load import override

    server: dict[str, Any] = {}
    for text in server_option or []:
        override(server, text)
    hosts = agent_hosts(agent_host)
    # What is asked at a host is the user's word already, and no name of code.
    named = [{"model": m, "server": server} for m in model if not m.startswith("host:")]
    settings = HandOverSettings(tolerance, confidence, problems, samples, looks)
    request = SwapRequest(
        source=source,
        seats=seat,
        models=model,
        method=method,  # type: ignore[arg-type]
        delta=delta,
        together=together,
        dry_run=dry_run,
        otherwise=otherwise,
        rounds=rounds,
        server=server,
        hosts=hosts,
        recipe=recipe,
        trust=trust_of(trust, None, allow_address, [named, said_of_hosts(hosts)]),
        out=out,
        break_lock=break_lock,
        hand_over=settings,
    )
    result = run_swap(request)
    show_result(result, as_json, show_swap)
    if result["out"] is None and not dry_run:
        raise typer.Exit(2)


def run_swap(request: SwapRequest) -> SwapResult:
    """The swap with its progress on the terminal."""
    from satune.cli.progress import Display

    quiet_libraries()
    import torch

    from satune.commands.swap import swap as perform
    from satune.tiny.zoo import is_tiny

    if all(is_tiny(each) for each in request.models):
        torch.set_num_threads(1)
    with Display(open_console(stderr=True)) as display:
        return perform(request, display.progress, display.watch)


def show_swap(result: SwapResult) -> None:
    console = open_console()
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    for column in ("seat", "model", "method", "before", "newcomer as it is", "after", "verdict"):
        table.add_column(column, no_wrap=column not in ("seat", "model"))
    for record in result["swaps"]:
        after = ""
        if "after" in record and "difference" in record:
            after = _reward(record["after"], record["difference"])
        table.add_row(
            ", ".join(record["seats"]),
            ", ".join(dict.fromkeys(record["models"].values())),
            record["method"],
            f"{record['before']:.3f}",
            _reward(record["naive"], record["naive_difference"]),
            after,
            record["verdict"],
        )
    console.print(table)
    for record in result["swaps"]:
        for line in (record["reason"], record.get("claim")):
            if line:
                console.print(
                    f"{', '.join(record['seats'])}: {line}", highlight=False, soft_wrap=True
                )
    cost = f"{result['tokens']:,} sampled tokens, {result['seconds']:.0f} s"
    where = result["out"] or ("nothing was written" if result["dry_run"] else "the team stays")
    console.print(f"{cost}; {where}", highlight=False, soft_wrap=True)


def _reward(value: float, difference: Difference) -> str:
    mean, low, high = difference
    interval = "" if low is None or high is None else f" [{low:+.3f}, {high:+.3f}]"
    return f"{value:.3f}, {mean:+.3f}{interval}"
