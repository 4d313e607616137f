"""``satune``: the commands by name, and how they end."""

from __future__ import annotations

import os
import sys
from typing import NoReturn, cast

import typer

from satune.cli.allocator import keep_freed_memory
from satune.cli.bench import bench
from satune.cli.chat import chat
from satune.cli.common import Interrupted, say
from satune.cli.describe import describe
from satune.cli.eval import evaluate
from satune.cli.export import export
from satune.cli.grade import grade
from satune.cli.host import host
from satune.cli.lab import lab
from satune.cli.launch import launch
from satune.cli.push import push
from satune.cli.quickstart import quickstart
from satune.cli.report import report
from satune.cli.serve import serve
from satune.cli.swap import swap
from satune.cli.train import train
from satune.types import UserError

# Of the click that typer works with, which is one of its own in some versions.
_UsageError = cast(type[Exception], typer.BadParameter.__bases__[0])

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train teams of language models, one agent at a time, inside measured trust regions.",
)
for command in (
    quickstart, train, launch, host, swap, report, serve, chat, push, export, describe, grade, lab,
    bench,
):  # fmt: skip
    app.command()(command)
app.command(name="eval")(evaluate)


def main() -> None:
    """Run a command; bad input ends with one line and exit code 2, ctrl-C with 130."""
    try:
        _refuse_other_encodings()
        keep_freed_memory()
        # Without any word typer shows the help; with some, what is wrong with them is told here.
        ended = app(prog_name="satune", standalone_mode=len(sys.argv) == 1)
        if ended == 130:  # how typer reports a ctrl-C that a command did not catch
            _leave("interrupted")
        sys.exit(ended or 0)
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    except Interrupted as interrupted:
        _leave(f"interrupted; go on with: {interrupted}" if str(interrupted) else "interrupted")
    except KeyboardInterrupt:
        _leave("interrupted")
    except _UsageError as error:
        where = getattr(error, "ctx", None)
        command = where.command_path if where else "satune"
        message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        say(f"error: {message}; see {command} --help")
        sys.exit(2)
    except BrokenPipeError:
        # Nobody reads any more; writing the rest at exit would only raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _refuse_other_encodings() -> None:
    """Raise UserError for a word of the command line that is not UTF-8: recipes, manifests and
    events are, and so are the names that tokenizers and weights are opened by."""
    for word in [*sys.argv[1:], os.getcwd()]:
        if word != word.encode(errors="ignore").decode():
            raise UserError(f"{word!a} is not UTF-8; rename the file or directory")


def _leave(line: str) -> NoReturn:
    """End after ctrl-C. Where it came while Python compiled a string (a dataclass does that as its
    module loads), Python notes it as not caught and dies of the signal whatever the exit code;
    running another string takes the note away."""
    say(line)
    exec("")
    sys.exit(130)
