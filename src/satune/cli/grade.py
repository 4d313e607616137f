"""``satune grade``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from satune.cli.common import AsJson, UnsafeChecks, open_console, say, show_result
from satune.files.printing import printable


def grade(
    name: Annotated[str, typer.Argument(help="a task by name, or path/to/file.py:Task")],
    responses: Annotated[Path, typer.Argument(help='JSONL rows {"id", "response" or "responses"}')],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="options of the task; thinking=open: the prompt ended inside a thought",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="the problems: a file or a hub id")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="grading processes (default: one a core, at most 8)")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="limit for grading one response")] = 30.0,
    seed: Annotated[int, typer.Option(min=0, help="of generated problems")] = 0,
    out: Annotated[Path | None, typer.Option(help="also write the grades here, a row each")] = None,
    unsafe_checks: UnsafeChecks = False,
    as_json: AsJson = False,
) -> None:
    """Grade responses that were written elsewhere."""
    from satune.cli.progress import Display
    from satune.commands.grade import grade_file
    from satune.tasks.pool import processes

    given = _options(options or [])
    thinking = given.pop("thinking", None)
    with Display(open_console(stderr=True)) as display:
        result = grade_file(
            name,
            responses,
            data,
            seed=seed,
            options=given,
            thinking=thinking,
            workers=workers or processes(),
            seconds=seconds,
            progress=display.progress,
        )
    if out is not None:
        _write(out, result["per_row"])
    if result["missing"]:
        say(
            f"note: {result['missing']} problems of the data have no response; the score is over "
            f"the {result['rows']} that have one (with 0 for the others: "
            f"{result['score_with_missing']:.4f})"
        )
    if result["failed"]:
        say(f"note: {result['failed']} responses could not be graded and count 0; see their detail")
    show_result(result, as_json, show_grades)


def show_grades(result: dict[str, Any]) -> None:
    console = open_console()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    head = (printable(result["benchmark"]), f"{result['score']:.4f}")
    table.add_row(*(Text(part, style="bold") for part in head))
    interval = result["interval"]
    if interval:
        table.add_row("95% interval, by problem", f"{interval[0]:.4f} to {interval[1]:.4f}")
    else:
        table.add_row("95% interval, by problem", "none (too few problems or all alike)")
    table.add_row("problems", f"{result['rows']:,}")
    if result["responses"] != result["rows"]:
        table.add_row("responses", f"{result['responses']:,}")
    for k, value in result.get("pass_at", {}).items():
        table.add_row(f"pass@{k}", f"{value:.4f}")
    if "majority" in result:
        table.add_row("majority", f"{result['majority']:.4f}")
    for name, value in result["components"].items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)


def _options(given: list[str]) -> dict[str, Any]:
    import yaml

    from satune.config import yaml12
    from satune.types import UserError

    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"command line: {text!r} is not an option; write it as key=value")
        try:
            options[key] = yaml12.parse(value)
        except yaml.YAMLError:
            raise UserError(f"command line: {key}: {value!r} is not YAML; quote it") from None
    return options


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    from satune.files.writing import strict_json
    from satune.types import UserError

    try:
        path.write_text("".join(f"{strict_json(row)}\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another") from error
