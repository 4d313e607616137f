"""``satune quickstart``: train a tiny team, then give one of its seats to a larger model."""

from __future__ import annotations

import shlex
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from satune.cli.common import AsJson, Out, shipped_recipe, show_result
from satune.cli.train import run_training, show_summary

SEAT, NEWCOMER = "second", "tiny:llama-m"
LESSONS = 200
"""Training steps of the newcomer: about half a minute on one core. It need not be good: the seat
is mixed of both within the trust region."""


def quickstart(
    out: Out = None,
    seed: Annotated[int, typer.Option(min=0, help="of everything random")] = 0,
    as_json: AsJson = False,
) -> None:
    """Build tiny agents, train a team of three, swap one, show what came out."""
    from satune.config.load import load_recipe

    path = shipped_recipe("relay")
    loaded = load_recipe(path, [f"seed={seed}", f"tiny.seed={seed}"])
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = out or Path("runs") / f"quickstart-{stamp}"
    overrides = [f"seed={seed}", f"tiny.seed={seed}"]
    command = ["satune", "train", str(path), *overrides, "--out", str(directory), "--resume"]
    summary = run_training(
        loaded, directory, resume=False, checkpoint=None, command=shlex.join(command)
    )
    summary["swap"] = _swap(loaded, directory)
    show_result(summary, as_json, show_all)


def _swap(recipe: Any, directory: Path) -> dict[str, Any]:
    """One seat to a larger model of the same tokenizer, mixed at decode time within delta."""
    from satune.assembly import model_path
    from satune.progress import Display
    from satune.protocols.catalog import load_protocol
    from satune.swapping import SwapRequest, swap

    seats = recipe.team.resolved().seats
    newcomer = recipe.team.agents[SEAT].model_copy(update={"model": NEWCOMER})
    lessons = {"steps": LESSONS, "max_steps": LESSONS, "greedy_target": 0.0}
    taught = recipe.model_copy(update={"tiny": recipe.tiny.model_copy(update=lessons)})
    protocol = load_protocol(recipe.protocol.name, list(seats), None, **recipe.protocol.options)
    with Display(Console(stderr=True)) as display:
        model = model_path(newcomer, taught, protocol, seats, display.progress)
        request = SwapRequest(
            directory, [SEAT], [model], "project", rounds=0, otherwise="mixture",
            out=directory.with_name(directory.name + "-swapped"),
        )  # fmt: skip
        found = swap(request, display.progress, display.watch)
    record = found["swaps"][0]
    examined = record["examination"][SEAT]
    return {
        "seat": SEAT,
        "model": NEWCOMER,
        "method": "mixture at decode time",
        "verdict": record["verdict"],
        "delta": found["delta"],
        "before": record["before"],
        "as_it_is": record["naive"],
        "as_it_is_difference": record["naive_difference"],
        "after": record["after"],
        "difference": record["difference"],
        "examination": examined,
        "tokens": found["tokens"],
        "seconds": found["seconds"],
        "team": found["out"],
    }


def show_all(summary: dict[str, Any]) -> None:
    """The training's summary, and what the swap did."""
    show_summary(summary)
    swap = summary["swap"]
    mean, low, high = swap["difference"]
    worse = swap["as_it_is_difference"][0]
    Console().print(
        f"swap: seat {swap['seat']} given to {swap['model']}, mixed with its incumbent within "
        f"{swap['delta']:g} nats a token: reward {swap['before']:.3f} to {swap['after']:.3f}, "
        f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]; the newcomer as it is would have changed it by "
        f"{worse:+.3f}. The swapped team: {swap['team']}",
        highlight=False,
        soft_wrap=True,
    )
