"""``satune export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from satune.cli.common import AsJson, say, show_result
from satune.types import UserError


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="what satune train, swap or eval has written")
    ],
    inspect: Annotated[
        bool, typer.Option("--inspect", help="evaluations as logs for Inspect's viewer")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="where to", show_default="inspect in the run's directory")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A run's conversations in the form of another tool.

    `inspect view --log-dir RUN/inspect` opens what --inspect writes.
    """
    if not inspect:
        raise UserError("export: nothing is asked for; add --inspect")
    from satune.report.inspect import export_inspect

    done = export_inspect(run, out or run / "inspect")
    for line in done.complaints:
        say(f"note: {line}")
    summary = {
        "logs": [str(path) for path in done.logs],
        "samples": done.samples,
        "complaints": done.complaints,
    }
    show_result(summary, as_json, lambda told: _show(told, out or run / "inspect"))


def _show(summary: dict[str, Any], out: Path) -> None:
    print(
        f"{out}: {len(summary['logs'])} logs, {summary['samples']:,} conversations; "
        f"inspect view --log-dir {out}"
    )
