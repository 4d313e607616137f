"""``satune quickstart``: train a tiny team, then give one of its seats to a larger model."""

from __future__ import annotations

import shlex
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from satune.cli.common import AsJson, Out, open_console, shipped_recipe, show_result
from satune.cli.train import run_training, show_summary

NEWCOMER = "tiny:llama-m"
# A seventh of what its teaching would take: what a swap does shows best where a newcomer is worse.
TEACHING = {"steps": 110, "max_steps": 110, "examples": 7040}
ROUNDS = 2
SHOWN = (
    "seats", "models", "method", "verdict", "reason", "before", "naive", "naive_difference",
    "after", "difference", "kl",
)  # fmt: skip


def quickstart(
    out: Out = None,
    seed: Annotated[int, typer.Option(min=0, help="of everything random")] = 0,
    as_json: AsJson = False,
) -> None:
    """Build tiny agents, train a team of three, swap one, show what came out."""
    from satune.config.load import load_recipe
    from satune.report.write import write_report
    from satune.training.run_directory import RunDirectory

    path = shipped_recipe("relay")
    loaded = load_recipe(path, [f"seed={seed}", f"tiny.seed={seed}"])
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = out or Path("runs") / f"quickstart-{stamp}"
    overrides = [f"seed={seed}", f"tiny.seed={seed}"]
    command = ["satune", "train", str(path), *overrides, "--out", str(directory), "--resume"]
    summary = run_training(
        loaded, directory, resume=False, checkpoint=None, command=shlex.join(command)
    )
    summary["swap"] = _swap(directory, loaded)
    # Without the figures as files, which take several times as long as the page.
    summary["report"] = str(write_report([directory], figures=False).page)
    RunDirectory(directory).write_summary(summary)
    show_result(summary, as_json, show_all)


def _swap(directory: Path, recipe: Any) -> dict[str, Any]:
    """One seat to a larger model of the same tokenizer: drawn near, else mixed within delta."""
    from satune.cli.swap import run_swap
    from satune.commands.swap_request import SwapRequest

    seat = list(recipe.team.given_seats())[1]
    teaching = {k: min(v, getattr(recipe.tiny, k)) for k, v in TEACHING.items()}
    request = SwapRequest(
        directory, [seat], [NEWCOMER], method="project", otherwise="mixture", rounds=ROUNDS,
        tiny=teaching | {"greedy_target": 0.0}, out=directory / "swapped",
    )  # fmt: skip
    result: dict[str, Any] = {**run_swap(request)}
    record: dict[str, Any] = {**result["swaps"][0]}
    shown = {name: record[name] for name in SHOWN if name in record}
    return shown | {name: result[name] for name in ("delta", "tokens", "seconds", "out")}


def show_all(summary: dict[str, Any]) -> None:
    """The training's summary, and what the swap did."""
    show_summary(summary)
    swap = summary["swap"]
    if "after" not in swap:
        what = f"refused: {swap['reason']}"
    else:
        mean, low, high = swap["difference"]
        how = "mixed with its incumbent" if swap["verdict"] == "mixture" else "drawn"
        what = (
            f"{how} within {swap['delta']:g} nats a token: reward {swap['before']:.3f} to "
            f"{swap['after']:.3f}, {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
    open_console().print(
        f"swap: seat {', '.join(swap['seats'])} to {NEWCOMER}, {what}; the newcomer as it is would "
        f"have changed it by {swap['naive_difference'][0]:+.3f}. The swapped team: {swap['out']}",
        highlight=False,
        soft_wrap=True,
    )
    run = Path(summary["team"]).parent
    open_console().print(
        f"the report: {summary['report']}, for a browser; satune report {run} draws its figures "
        "as files too",
        highlight=False,
        soft_wrap=True,
    )
    open_console().print(
        f"next: satune eval {run}, or satune train {run / 'recipe.yaml'} "
        f"stages={summary['stages'] + 8} --resume",
        highlight=False,
        soft_wrap=True,
    )
