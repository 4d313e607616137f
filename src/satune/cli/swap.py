"""``satune swap``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from satune.cli.common import AsJson, Out, quiet_libraries, show_result


def swap(
    source: Annotated[Path, typer.Argument(help="a run's directory, or a team directory")],
    seat: Annotated[list[str], typer.Option(help="the seat to be given; may be repeated")],
    model: Annotated[
        list[str],
        typer.Option("--with", help="its new model: a directory, a hub id, tiny:<family>-<size>"),
    ],
    method: Annotated[str, typer.Option(help="auto, project or handover")] = "auto",
    delta: Annotated[float | None, typer.Option(help="trust region of a projection, nats")] = None,
    tolerance: Annotated[float, typer.Option(help="what the reward may fall by")] = 0.02,
    confidence: Annotated[float, typer.Option(help="probability that it falls by more")] = 0.05,
    problems: Annotated[int, typer.Option(help="that hold both, at the last look")] = 2048,
    samples: Annotated[int, typer.Option(help="coins a problem")] = 8,
    looks: Annotated[int, typer.Option(help="at the evidence")] = 5,
    together: Annotated[bool, typer.Option(help="all seats under one coin")] = False,
    otherwise: Annotated[
        Literal["mixture", "handover", "refuse"],
        typer.Option(help="for a projection outside delta"),
    ] = "refuse",
    rounds: Annotated[int, typer.Option(help="of distillation, at most; 0: mix at once")] = 30,
    dry_run: Annotated[bool, typer.Option(help="measure only")] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="rollout settings and task for a team directory")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Give seats of a trained team to other models."""
    from satune.swap.handover import HandOverSettings
    from satune.swapping import SwapRequest

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
        recipe=recipe,
        out=out,
        hand_over=settings,
    )
    result = run_swap(request)
    show_result(result, as_json, show_swap)
    if result["out"] is None and not dry_run:
        raise typer.Exit(2)


def run_swap(request: Any) -> dict[str, Any]:
    """The swap with its progress on the terminal."""
    from satune.progress import Display

    quiet_libraries()
    import torch

    from satune.agents.zoo import is_tiny
    from satune.swapping import swap as perform

    if all(is_tiny(each) for each in request.models):
        torch.set_num_threads(1)
    with Display(Console(stderr=True)) as display:
        return perform(request, display.progress, display.watch)


def show_swap(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    for column in ("seat", "model", "method", "before", "newcomer", "change", "verdict"):
        table.add_column(column, justify="right" if column in ("before", "newcomer") else "left")
    for record in result["swaps"]:
        mean, low, high = record["naive_difference"]
        interval = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
        table.add_row(
            ", ".join(record["seats"]),
            ", ".join(dict.fromkeys(record["models"].values())),
            record["method"],
            f"{record['before']:.3f}",
            f"{record['naive']:.3f}",
            f"{mean:+.3f}{interval}",
            record["verdict"],
        )
    console.print(table)
    for record in result["swaps"]:
        for line in (record.get("reason"), record.get("claim")):
            if line:
                console.print(f"{', '.join(record['seats'])}: {line}", highlight=False)
    cost = f"{result['tokens']:,} sampled tokens, {result['seconds']:.0f} s"
    where = result["out"] or ("nothing was written" if result["dry_run"] else "the team stays")
    console.print(f"{cost}; {where}", highlight=False, soft_wrap=True)
