"""``satune launch``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from satune.cli.common import (
    AllowAddress,
    BreakLock,
    Overrides,
    RecipeFile,
    TrustCode,
    own_run,
    say,
    shipped_recipe,
    show_result,
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
    hosts: Annotated[
        int | None,
        typer.Option(
            help="processes that the agents are dealt over, a machine each with --slurm",
            show_default="none: one process has all agents",
        ),
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
    srun: Annotated[
        bool,
        typer.Option(
            "--srun",
            help="inside a job: start each of --hosts on a machine of its own",
            rich_help_panel=SLURM,
        ),
    ] = False,
    break_lock: BreakLock = False,
    trust: TrustCode = False,
    allow_address: AllowAddress = None,
) -> None:
    """Train in several processes: here, or by a script for Slurm. Goes on where it stopped."""
    from satune.commands.launch import Job, Launch, usual_processes

    if slurm is None:
        for value, name in ((minutes, "minutes"), (sbatch, "sbatch")):
            if value:
                raise UserError(f"launch: --{name} is for --slurm FILE; name the file")
        if nodes > 1:
            raise UserError("launch: this machine is one node; --slurm FILE writes for several")
    if srun and (hosts is None or slurm is not None):
        raise UserError("launch: --srun is for --hosts N inside a job; give both, and no --slurm")
    path = shipped_recipe(recipe)
    directory = out or own_run(path) or Path("runs") / path.stem
    given = _Given(recipe, path, overrides or [], directory, break_lock, trust, allow_address or [])
    # What is wrong with the recipe is said here, and not once by each process or after the queue.
    loaded = given.load()
    # Slurm opens it before the script begins, seen from where sbatch is called; it makes no folder.
    place = directory.absolute()
    job = Job(path.stem, place.with_name(f"{place.name}-%j.log"), minutes, sbatch or [])
    if hosts is not None:
        for number, name in ((processes, "processes"), (nodes, "nodes")):
            if number not in (None, 1):
                raise UserError(
                    f"launch: --{name} cuts each agent over processes, --hosts deals whole agents"
                    " out; give one of the two"
                )
        options = ["--hosts", str(hosts), *(["--srun"] if slurm or srun else [])]
        if slurm is None:
            # A lock is broken once, and not whenever the run goes on.
            words = replace(given, break_lock=False).words(options)
            again = shlex.join(["satune", "launch", *words])
            return _train_over_hosts(given, loaded, hosts, again, srun=srun)
        _load_hosted(given, loaded, hosts)
        words = given.words(options)
        start = shlex.join([sys.executable, "-m", "satune", "launch", *words])
        _write(slurm, job.log, job.script(hosts, "B:INT", [f"exec {start}"]))
        return
    count = processes
    if count is None:
        apart = any(agent.device is not None for agent in loaded.team.agents.values())
        count = 1 if apart else usual_processes()
    sharded = ["sharding={}"] if count * nodes > 1 and loaded.sharding is None else []
    given.load(sharded)
    made = Launch(given.words(["--resume"], sharded), count, nodes)
    if slurm is None:
        command = made.command()
        os.execvpe(command[0], command, made.environment(os.environ))
    _write(slurm, job.log, made.script(job))


@dataclass(frozen=True)
class _Given:
    """What the command line says of the run."""

    recipe: str
    path: Path
    overrides: list[str]
    out: Path
    break_lock: bool
    trust: bool
    addresses: list[str]

    def load(self, more: Sequence[str] = ()) -> Any:
        from satune.commands.trust import given_recipe

        overrides = [*self.overrides, *more]
        return given_recipe(self.path, overrides, trust_of(self.trust, overrides, self.addresses))

    @property
    def options(self) -> list[str]:
        allowed = [part for url in self.addresses for part in ("--allow-address", url)]
        flags = (("--break-lock", self.break_lock), ("--trust", self.trust))
        return [*(name for name, value in flags if value), *allowed]

    def words(self, options: Sequence[str], overrides: Sequence[str] = ()) -> list[str]:
        """Those of a command of the run, with ``options`` and further ``overrides``."""
        out = ["--out", str(self.out)]
        return [self.recipe, *self.overrides, *overrides, *out, *options, *self.options]


def _load_hosted(given: _Given, recipe: Any, count: int) -> Any:
    """The recipe as the run has it before it is known where the hosts listen; what they refuse, and
    a run that was started otherwise, is told before any of them begins."""
    from satune.commands.own_hosts import run_overrides, shares
    from satune.commands.train import check_recipe_unchanged
    from satune.training.run_directory import RunDirectory

    agents = (name for share in shares(recipe, count) for name in share)
    hosted = given.load(run_overrides(recipe, dict.fromkeys(agents, "http://127.0.0.1")))
    run = RunDirectory(given.out)
    run.check_place(resume=True)
    if run.holds_run:
        check_recipe_unchanged(run, hosted)
    return hosted


def _train_over_hosts(given: _Given, recipe: Any, count: int, command: str, *, srun: bool) -> None:
    from satune.cli.train import run_training, show_summary
    from satune.commands.gather import gather
    from satune.commands.own_hosts import (
        OwnHosts,
        devices_of,
        places_here,
        places_of_job,
        run_overrides,
        shares,
    )
    from satune.files.interrupts import ended_by_term, uninterrupted
    from satune.training.run_directory import RunDirectory

    loaded, run = _load_hosted(given, recipe, count), RunDirectory(given.out)
    dealt = shares(recipe, count)
    devices = devices_of(recipe, (name for share in dealt for name in share))
    here = places_of_job(count, os.environ) if srun else places_here(count, devices)
    hosts = OwnHosts(given.recipe, given.overrides, given.options, dealt, here, run.hosts)
    summary = run.read_summary() if run.unfinished() is None else None
    with ExitStack() as stack:
        stack.enter_context(ended_by_term())
        if summary is None or summary["stages"] < recipe.stages:
            addresses = stack.enter_context(hosts.running(say))
            loaded = given.load(run_overrides(recipe, addresses))
        summary = run_training(
            loaded,
            given.out,
            resume=True,
            checkpoint=None,
            command=command,
            break_lock=given.break_lock,
        )
        with run.held(break_lock=given.break_lock), uninterrupted():
            gather(run, recipe)
    show_result(summary, False, show_summary)


def _write(script: Path, log: Path, text: str) -> None:
    from satune.files.writing import disk_errors

    if script.exists():
        raise UserError(f"{script}: it is there already; give another name or remove it")
    with disk_errors(script):
        script.parent.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text, encoding="utf-8")
    typer.echo(f"sbatch {script}")
