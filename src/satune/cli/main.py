"""``satune``: the commands by name, and how they end."""

from __future__ import annotations

import os
import sys

import typer

from satune.cli.bench import bench
from satune.cli.common import Interrupted, say
from satune.cli.describe import describe
from satune.cli.eval import evaluate
from satune.cli.grade import grade
from satune.cli.lab import lab
from satune.cli.quickstart import quickstart
from satune.cli.swap import swap
from satune.cli.train import train
from satune.types import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train teams of language models, one agent at a time, inside measured trust regions.",
)
for command in (quickstart, train, swap, describe, grade, lab, bench):
    app.command()(command)
app.command(name="eval")(evaluate)


def main() -> None:
    """Run a command; bad input ends with one line and exit code 2, ctrl-C with 130."""
    try:
        app()
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    except Interrupted as interrupted:
        say(f"interrupted; go on with: {interrupted}" if str(interrupted) else "interrupted")
        sys.exit(130)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # Nobody reads any more; writing the rest at exit would only raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
