"""``satune train`` and ``satune quickstart``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from satune.cli.common import (
    AsJson,
    Interrupted,
    Out,
    Overrides,
    RecipeFile,
    quiet_libraries,
    say,
    shipped_recipe,
    show_result,
)


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option(help="go on from the last checkpoint")] = False,
    resume_from: Annotated[str | None, typer.Option(help="go on from this checkpoint")] = None,
    as_json: AsJson = False,
) -> None:
    """Train the team of a recipe."""
    from satune.config.load import load_recipe

    path = shipped_recipe(recipe)
    loaded = load_recipe(path, overrides or [])
    directory = out or Path("runs") / path.stem
    command = ["satune", "train", recipe, *(overrides or []), "--out", str(directory), "--resume"]
    summary = run_training(
        loaded,
        directory,
        resume=resume or resume_from is not None,
        checkpoint=resume_from,
        command=shlex.join(command),
    )
    show_result(summary, as_json, show_summary)


def quickstart(
    out: Out = None,
    seed: Annotated[int, typer.Option(min=0, help="of everything random")] = 0,
    as_json: AsJson = False,
) -> None:
    """Build tiny agents, train a team of three, show what came out."""
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
    summary = _with_swap(summary, directory, loaded)
    show_result(summary, as_json, show_summary)


# A seventh of what its teaching would take: what a swap does shows best where a newcomer is worse.
SWAP_TEACHING = {"steps": 110, "max_steps": 110, "examples": 7040, "greedy_target": 0.0}
ROUNDS = 4
SWAP_SHOWN = (
    "seats", "models", "method", "verdict", "reason", "before", "naive", "naive_difference",
    "after", "difference", "kl",
)  # fmt: skip


def _with_swap(summary: dict[str, Any], directory: Path, recipe: Any) -> dict[str, Any]:
    """Give one seat of the trained team to a larger model; what came of it joins the summary."""
    from satune.cli.swap import run_swap
    from satune.swapping import SwapRequest
    from satune.training.run_directory import RunDirectory

    seat = list(recipe.team.given_seats())[1]
    teaching = dict(SWAP_TEACHING)
    for key in ("steps", "max_steps", "examples"):
        teaching[key] = min(teaching[key], getattr(recipe.tiny, key))
    request = SwapRequest(
        directory, [seat], ["tiny:llama-m"], method="project", otherwise="mixture",
        rounds=ROUNDS, tiny=teaching, out=directory / "swapped",
    )  # fmt: skip
    result = run_swap(request)
    record = result["swaps"][0]
    shown = {name: record[name] for name in SWAP_SHOWN if name in record}
    for name in ("delta", "tokens", "seconds", "out"):
        shown[name] = result[name]
    summary = summary | {"swap": shown}
    RunDirectory(directory).write_summary(summary)
    return summary


def run_training(
    recipe: Any, out: Path, *, resume: bool, checkpoint: str | None, command: str
) -> dict[str, Any]:
    """Train into ``out`` and return the summary. Raises Interrupted with the command to go on."""
    from satune.progress import Display
    from satune.training.run_directory import RunDirectory

    directory = RunDirectory(out)
    if resume and directory.finished and checkpoint is None:
        from satune.assembly import check_recipe_unchanged

        check_recipe_unchanged(directory, recipe)
        summary = json.loads(directory.summary.read_text())
        if summary["stages"] >= recipe.stages:
            say(f"{out}: the run is finished; its summary follows")
            return summary
    console = Console(stderr=True)
    try:
        with Display(console) as display:
            return _train(recipe, directory, display, resume=resume, checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise Interrupted(command if directory.holds_run else "") from None


def _train(
    recipe: Any, directory: Any, display: Any, *, resume: bool, checkpoint: str | None
) -> dict[str, Any]:
    quiet_libraries()
    import torch

    from satune.agents.zoo import is_tiny
    from satune.assembly import assemble, check_recipe_unchanged, start_training, tolerance_of
    from satune.report.plots import plot_training
    from satune.scalars import scalar_writer
    from satune.training.checkpoint import Checkpoints, tensor_errors
    from satune.training.trainer import train as run

    name: str | None = None
    if resume:
        check_recipe_unchanged(directory, recipe)
        found = Checkpoints(directory.checkpoints, recipe.checkpoint.keep).latest(checkpoint)
        name, passed = found or (None, [])
        for line in passed:
            display.note(f"{line}; going on from {name}")
    directory.start(resume=resume)
    if all(is_tiny(agent.model) for agent in recipe.team.agents.values()):
        # Their matrices are too small to share: two threads were slower than one.
        torch.set_num_threads(1)
    with ExitStack() as stack:
        cast = assemble(recipe, display.progress)
        # Whatever is written from here on lies in the run's directory.
        stack.enter_context(tensor_errors(directory.path))
        if resume and name is None:
            # What a run left that ended before its first checkpoint would stand there twice.
            directory.truncate({"events": 0, "episodes": {}})
        watchers: list[Callable[..., None]] = [display.watch]
        if recipe.log.tensorboard:
            watchers.append(stack.enter_context(scalar_writer(directory.path / "tensorboard")))

        def watch(kind: str, fields: Any) -> None:
            for watcher in watchers:
                watcher(kind, fields)
            if kind == "stage":
                display.stages(fields["stage"], recipe.stages)

        training = start_training(cast, directory, watch)
        summary = run(training, tolerance=tolerance_of(recipe), checkpoint=name)
        figure = plot_training(directory.path, directory.path / "training.png")
    if figure is None:
        display.note("figures skipped: pip install 'satune\\[plots]'")
    return summary


def show_summary(summary: dict[str, Any]) -> None:
    console = Console()
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [("team reward, sampled", "reward_before", "reward_after")]
    if "greedy_before" in summary:
        rows.append(("team reward, greedy", "greedy_before", "greedy_after"))
    for label, before, after in rows:
        change = summary[after] - summary[before]
        table.add_row(label, f"{summary[before]:.3f}", f"{summary[after]:.3f}", f"{change:+.3f}")
    console.print(table)
    console.print(
        f"{summary['problems']} held-out problems; {summary['stages']} stages, "
        f"{summary['episodes']:,} episodes, {summary['tokens']:,} sampled tokens, "
        f"{summary['seconds']:.0f} s of training",
        highlight=False,
    )
    console.print(f"the team: {summary['team']}", highlight=False, soft_wrap=True)
    if "swap" in summary:
        found = summary["swap"]
        console.print(
            f"{', '.join(found['seats'])} given to {', '.join(found['models'].values())}: reward "
            f"{found['before']:.3f}, {found['naive']:.3f} with the newcomer as it is, "
            f"{found['after']:.3f} within {found['delta']:g} nats of the old agent "
            f"({found['verdict']}, {found['seconds']:.0f} s): {found['out']}",
            highlight=False,
            soft_wrap=True,
        )
