"""``satune train``."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from satune.cli.common import (
    AllowAddress,
    AsJson,
    BreakLock,
    Interrupted,
    Overrides,
    RecipeFile,
    TrustCode,
    UnsafeChecks,
    open_console,
    own_run,
    quiet_libraries,
    say,
    shipped_recipe,
    show_result,
    trust_of,
)
from satune.files.events import Event, Note
from satune.files.interrupts import Lost
from satune.types import UserError


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="the run's directory", show_default="runs/NAME of the recipe, or the run resumed"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="go on from the last checkpoint")] = False,
    resume_from: Annotated[str | None, typer.Option(help="go on from this checkpoint")] = None,
    break_lock: BreakLock = False,
    unsafe_checks: UnsafeChecks = False,
    trust: TrustCode = False,
    allow_address: AllowAddress = None,
    as_json: AsJson = False,
) -> None:
    """Train the team of a recipe."""
    from satune.commands.trust import given_recipe

    path = shipped_recipe(recipe)
    spoken = trust_of(trust, overrides, allow_address)
    loaded = given_recipe(path, overrides or [], spoken)
    resume = resume or resume_from is not None
    directory = out or (resume and own_run(path)) or Path("runs") / path.stem
    command = [*_started(), "train", recipe, *(overrides or []), "--out", str(directory)]
    command += ["--resume"]
    command += ["--unsafe-checks"] if unsafe_checks else []
    command += ["--trust"] if trust else []
    command += [part for url in allow_address or [] for part in ("--allow-address", url)]
    run = partial(
        run_training,
        loaded,
        directory,
        resume=resume,
        checkpoint=resume_from,
        command=shlex.join(command),
        break_lock=break_lock,
    )
    alone = loaded.sharding is None and _started() == ["satune"]
    summary = run() if alone else _together(loaded, run, shlex.join(command))
    if summary is not None:
        show_result(summary, as_json, show_summary)


def _started() -> list[str]:
    """How this process was started, up to the words for satune itself."""
    everywhere, here = (int(os.environ.get(n, "1")) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if everywhere == 1 or "RANK" not in os.environ:
        return ["satune"]
    nodes = ["--nnodes", str(everywhere // here)] if everywhere > here else []
    return ["torchrun", *nodes, "--nproc-per-node", str(here), "-m", "satune"]


def _together(
    recipe: Any, run: Callable[..., dict[str, Any]], command: str
) -> dict[str, Any] | None:
    """Train with the other processes of the run: the summary in the first one, which drives, None
    in the others. Raises UserError with the command to go on where one of them is lost."""
    from satune.commands.sharded import follow, processes_of, sharded_parts

    try:
        with processes_of(recipe) as processes:
            if processes.drives:
                return run(parts=sharded_parts(processes))
            quiet_libraries()
            # Ctrl-C is the first process's to answer: it may have something to save.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            follow(processes, recipe)
            return None
    except Lost as lost:
        raise UserError(f"{lost}; go on with: {command}") from None


def run_training(
    recipe: Any,
    out: Path,
    *,
    resume: bool,
    checkpoint: str | None,
    command: str,
    break_lock: bool = False,
    parts: Any = None,
) -> dict[str, Any]:
    """Train into ``out`` and return the summary; ``parts`` makes learners and world (None: in this
    process). Raises Interrupted with the command to go on."""
    from satune.cli.progress import Display
    from satune.training.run_directory import RunDirectory

    directory = RunDirectory(out)
    directory.check_place(resume=resume)
    try:
        with (
            directory.held(break_lock=break_lock),
            Display(open_console(stderr=True)) as display,
        ):
            return _train(
                recipe,
                directory,
                display,
                resume=resume,
                checkpoint=checkpoint,
                command=command,
                parts=parts,
            )
    except Lost:
        raise
    except KeyboardInterrupt:
        raise Interrupted(command if directory.holds_run else "") from None


def _train(
    recipe: Any,
    directory: Any,
    display: Any,
    *,
    resume: bool,
    checkpoint: str | None,
    command: str,
    parts: Any,
) -> dict[str, Any]:
    quiet_libraries()
    import torch

    from satune.commands.assemble import assemble, overlap_note
    from satune.commands.hosted import train_with_hosts
    from satune.commands.train import local_parts, start_training, tolerance_of
    from satune.files.writing import tensor_errors
    from satune.report.tracking import tracking
    from satune.tiny.zoo import is_tiny

    name: str | None = None
    if resume:
        name = _checkpoint(recipe, directory, display, checkpoint)
        lacking = directory.unfinished()
        if lacking is None and checkpoint is None:
            summary = directory.read_summary()
            assert summary is not None
            if summary["stages"] >= recipe.stages:
                say(f"{directory.path}: the run is finished; its summary follows")
                return summary
        if lacking:
            display.note(f"{lacking}; it is written anew")
    # Where there is no run, what stands there is as much in the way as it is without --resume.
    held = directory.holds_run
    directory.start(resume=resume and held)
    if resume and name is None:
        if held:
            directory.begin_anew()
        what = "no checkpoint of the run; it begins anew" if held else "no run; a new one begins"
        display.note(f"{directory.path}: nothing to resume: {what}")
    agents = recipe.team.agents.values()
    local = [a.model for a in agents if isinstance(a.model, str) and a.host is None]
    if all(map(is_tiny, local)):
        # Their matrices are too small to share: two threads were slower than one.
        torch.set_num_threads(1)
    with ExitStack() as stack:
        cast = assemble(recipe, display.progress, apart=recipe.rollout.ahead > 0)
        overlap = overlap_note(cast.task, cast.held_out)
        if overlap:
            display.note(overlap)
        # Whatever is written from here on lies in the run's directory.
        stack.enter_context(tensor_errors(directory.path))
        values = recipe.model_dump(mode="json")
        track = stack.enter_context(tracking(recipe.log, directory.path, values, display.note))

        def watch(event: Event | Note) -> None:
            display.watch(event)
            track(event)
            if event["event"] == "stage":
                display.stages(event["stage"], recipe.stages, event["reward"])

        training = start_training(cast, directory, watch, parts or local_parts)
        summary = train_with_hosts(
            training,
            cast.hosts.values(),
            recipe.hosts.wait,
            tolerance=tolerance_of(recipe),
            checkpoint=name,
            command=command,
            tell=display.note,
        )
    _draw(directory, display)
    return summary


def _checkpoint(recipe: Any, directory: Any, display: Any, asked_for: str | None) -> str | None:
    """The checkpoint that a resume goes on from: the one asked for, else the one that a resume was
    going back to when it was cut off, else the newest undamaged one. None where there is none.

    Raises UserError for a recipe under which the run cannot go on.
    """
    from satune.commands.train import check_recipe_unchanged
    from satune.training.checkpoint import Checkpoints

    store = Checkpoints(directory.checkpoints, recipe.checkpoint.keep)
    found = store.latest(asked_for or directory.intended)
    name, passed = found or (None, [])
    for line in passed:
        display.note(f"{line}; going on from {name}")
    if directory.holds_run:
        check_recipe_unchanged(directory, recipe, None if name is None else store.recipe(name))
        if not directory.recipe.exists():
            display.note(f"{directory.recipe}: is missing; it is written anew")
    return name


def _draw(directory: Any, display: Any) -> None:
    """The run's figures. What is in the way of them costs nothing else."""
    from satune.report.plots import plot_training

    try:
        figure = plot_training(directory.path, directory.path / "training.png")
    except UserError as error:
        display.note(f"figures skipped: {error}")
        return
    if figure is None:
        display.note("figures skipped: pip install 'satune[plots]'")


def show_summary(summary: dict[str, Any]) -> None:
    console = open_console()
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
        soft_wrap=True,
    )
    console.print(f"the team: {summary['team']}", highlight=False, soft_wrap=True)
