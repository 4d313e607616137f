"""``satune launch``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from satune.cli.common import (
    AllowAddress,
    Overrides,
    RecipeFile,
    TrustCode,
    own_run,
    shipped_recipe,
    trust_of,
)
from satune.types import UserError

SLURM = "Slurm"


def launch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="the run's directory", show_default="runs/NAME of the recipe, or the run resumed"
        ),
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
    trust: TrustCode = False,
    allow_address: AllowAddress = None,
) -> None:
    """Train in several processes: here, or by a script for Slurm. Goes on where it stopped."""
    from satune.commands.launch import Launch, usual_processes
    from satune.commands.trust import given_recipe
    from satune.files.writing import disk_errors

    path = shipped_recipe(recipe)
    # What is wrong with the recipe is said here, and not once by each process or after the queue.
    loaded = given_recipe(path, overrides or [], trust_of(trust, overrides, allow_address))
    directory = out or own_run(path) or Path("runs") / path.stem
    count = usual_processes() if processes is None else processes
    given = list(overrides or [])
    if count * nodes > 1 and loaded.sharding is None:
        given.append("sharding={}")
    words = [recipe, *given, "--out", str(directory), "--resume"]
    words += ["--trust"] if trust else []
    words += [part for url in allow_address or [] for part in ("--allow-address", url)]
    made = Launch(words, count, nodes)
    if slurm is None:
        for value, name in ((minutes, "minutes"), (sbatch, "sbatch")):
            if value:
                raise UserError(f"launch: --{name} is for --slurm FILE; name the file")
        if nodes > 1:
            raise UserError("launch: this machine is one node; --slurm FILE writes for several")
        command = made.command()
        os.execvpe(command[0], command, made.environment(os.environ))
    # Slurm opens it before the script begins, seen from where sbatch is called; it makes no folder.
    place = directory.absolute()
    log = place.with_name(f"{place.name}-%j.log")
    text = made.script(path.stem, log, minutes, sbatch or [])
    if slurm.exists():
        raise UserError(f"{slurm}: it is there already; give another name or remove it")
    with disk_errors(slurm):
        slurm.parent.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        slurm.write_text(text, encoding="utf-8")
    typer.echo(f"sbatch {slurm}")
