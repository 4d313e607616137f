"""``satune launch``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from satune.cli.common import Overrides, RecipeFile, shipped_recipe
from satune.types import UserError

SLURM = "Slurm"


def launch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="the run's directory", show_default="runs/NAME")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="of the run on each machine", show_default="one a GPU here, or 1"),
    ] = None,
    slurm: Annotated[
        Path | None,
        typer.Option(help="write a script for sbatch here, start nothing", rich_help_panel=SLURM),
    ] = None,
    nodes: Annotated[int, typer.Option(help="machines", rich_help_panel=SLURM)] = 1,
    minutes: Annotated[
        int | None, typer.Option(min=3, help="time limit", rich_help_panel=SLURM)
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="a further option of sbatch, --NAME=VALUE", rich_help_panel=SLURM),
    ] = None,
) -> None:
    """Train in several processes: here, or by a script for Slurm. Goes on where it stopped."""
    from satune.commands.launch import Launch, usual_processes
    from satune.config.load import load_recipe

    path = shipped_recipe(recipe)
    # What is wrong with the recipe is said here, and not once by each process or after the queue.
    loaded = load_recipe(path, overrides or [])
    directory = out or Path("runs") / path.stem
    count = usual_processes() if processes is None else processes
    given = list(overrides or [])
    if count * nodes > 1 and loaded.sharding is None:
        given.append("sharding={}")
    made = Launch([recipe, *given, "--out", str(directory), "--resume"], count, nodes)
    if slurm is None:
        for value, name in ((minutes, "minutes"), (sbatch, "sbatch")):
            if value:
                raise UserError(f"launch: --{name} is for --slurm FILE; name the file")
        if nodes > 1:
            raise UserError("launch: this machine is one node; --slurm FILE writes for several")
        command = made.command()
        os.execvpe(command[0], command, made.environment(os.environ))
    log = directory.with_name(f"{directory.name}-%j.log")
    text = made.script(path.stem, log, minutes, sbatch or [])
    if slurm.exists():
        raise UserError(f"{slurm}: it is there already; give another name or remove it")
    slurm.parent.mkdir(parents=True, exist_ok=True)
    slurm.write_text(text, encoding="utf-8")
    typer.echo(f"sbatch {slurm}")
