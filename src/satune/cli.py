"""The commands. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from satune.types import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train teams of language models, one agent at a time, inside measured trust regions.",
)

RecipeFile = Annotated[str, typer.Argument(help="a recipe file, or the name of one that ships")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted.key=value")
]
Out = Annotated[Path | None, typer.Option(help="the run's directory")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]


class Interrupted(Exception):
    """Ctrl-C, with the command that goes on."""


def main() -> None:
    """Run a command; bad input ends with one line and exit code 2, ctrl-C with 130."""
    try:
        app()
    except UserError as error:
        _say(f"error: {error}")
        sys.exit(2)
    except Interrupted as interrupted:
        _say(f"interrupted; go on with: {interrupted}" if str(interrupted) else "interrupted")
        sys.exit(130)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # Nobody reads any more; writing the rest at exit would only raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _say(line: str) -> None:
    print(" ".join(line.split("\n")), file=sys.stderr)


@app.command()
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
    _result(summary, as_json, show_summary)


@app.command()
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
    _result(summary, as_json, show_summary)


@app.command()
def describe(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The resolved recipe, and what each agent needs, before anything is loaded."""
    from satune.config.load import load_recipe
    from satune.description import describe_recipe, show_description

    loaded = load_recipe(shipped_recipe(recipe), overrides or [])
    _result(describe_recipe(loaded), as_json, show_description)


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(help="step or sampling; both if left out")] = None,
    as_json: AsJson = False,
) -> None:
    """Speed against the peers, as ratios from one run (from a checkout of the repository)."""
    folder = Path(__file__).parents[2] / "benchmarks"
    scripts = {n: folder / f"{n}.py" for n in ("step", "sampling")}
    if name is not None and name not in scripts:
        raise UserError(f"bench: no benchmark {name!r}; there are: {', '.join(scripts)}")
    chosen = {n: scripts[n] for n in ([name] if name else scripts)}
    results: dict[str, Any] = {}
    for each, script in chosen.items():
        if not script.is_file():
            raise UserError(f"bench: {script} is not there; run it from a clone of the repository")
        command = [sys.executable, str(script), *(["--json"] if as_json else [])]
        ended = subprocess.run(command, stdout=subprocess.PIPE if as_json else None, text=True)
        if ended.returncode:
            raise typer.Exit(ended.returncode)
        if as_json:
            results[each] = json.loads(ended.stdout)
    if as_json:
        print(json.dumps(results[name] if name else results))


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
            _say(f"{out}: the run is finished; its summary follows")
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


def shipped_recipe(given: str) -> Path:
    """A recipe file, or one that ships by its name (``relay``)."""
    path = Path(given)
    if path.suffix or path.exists():
        return path
    roots = (
        Path(__file__).parents[2] / "recipes",
        Path(sysconfig.get_path("data")) / "share" / "satune" / "recipes",
    )
    for root in roots:
        if (root / f"{given}.yaml").is_file():
            return root / f"{given}.yaml"
    return path


def quiet_libraries() -> None:
    """Progress is shown by satune; the libraries' own bars and warnings would cut through it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("peft").setLevel(logging.ERROR)


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


def _result(value: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    if as_json:
        from satune.training.run_directory import strict_json

        print(strict_json(value))
    else:
        show(value)
