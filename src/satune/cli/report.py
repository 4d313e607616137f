"""``satune report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from satune.cli.common import AsJson, say, show_result


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="directories that satune train, swap or eval has written; of several, the figures "
            "beside the page are the first one's",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="the page to write", show_default="report.html in the first run"),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="serve the page to this machine and follow the runs")
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="of --watch", show_default="a free one")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """One page of a run: figures, certificates, costs, conversations; of several, what differs.

    The page needs no network and opens from the disk. Beside it lies a directory of its name with
    every figure as PNG and SVG and, where there are many, the conversations.
    """
    from satune.report.drawing import can_draw
    from satune.report.write import write_report

    if watch:
        _watch(runs, port)
        return
    written = write_report(runs, out)
    for line in written.complaints:
        say(f"note: {line}")
    if not can_draw():
        say("figures as files skipped: pip install 'satune[plots]'")
    summary = {
        "page": str(written.page),
        "figures": [str(path) for path in written.figures],
        "conversations": written.conversations,
        "complaints": written.complaints,
    }
    show_result(summary, as_json, _show)


def _watch(runs: list[Path], port: int) -> None:
    from satune.report.watch import watching

    with watching(runs, port) as (address, server):
        print(f"{address}\nfollows the run until ctrl-C", flush=True)
        server.serve_forever()


def _show(summary: dict[str, Any]) -> None:
    beside = f", {len(summary['figures'])} figures beside it" if summary["figures"] else ""
    print(f"{summary['page']}: {summary['conversations']:,} conversations{beside}")
