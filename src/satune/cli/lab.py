"""``satune lab``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from satune.cli.common import AsJson, open_console, say, show_result


def lab(
    seeds: Annotated[int, typer.Option(min=1, help="seeds 0, 1, ...")] = 3,
    instances: Annotated[int, typer.Option(min=36, help="instances a seed")] = 2000,
    out: Annotated[Path, typer.Option(help="where lab.json and the figures go")] = Path("lab"),
    as_json: AsJson = False,
) -> None:
    """Hold every bound of the theory against exact values in small worlds."""
    import torch

    from satune.cli.progress import Display
    from satune.files.writing import disk_errors, strict_json, write_atomically
    from satune.lab.run import run_lab
    from satune.report.lab_plots import plot_lab

    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    # The matrices are too small to share between threads.
    torch.set_num_threads(1)
    console = open_console(stderr=True)
    with Display(console) as display:
        found = run_lab(seeds, instances, lambda done, total: display.progress(done, total, "lab"))
    write_atomically(out / "lab.json", strict_json(found) + "\n")
    with disk_errors(out):
        if plot_lab(out / "lab.json", out) is None:
            say("figures skipped: pip install 'satune[plots]'")
    shown = {key: found[key] for key in ("seeds", "instances", "bounds", "exponents", "violations")}
    show_result(shown, as_json, show_lab)
    if not as_json:
        print(f"figures and lab.json: {out}")
    for line in found["violations"][:20]:
        say(f"violated: {line}")
    if found["violations"]:
        raise typer.Exit(1)


def show_lab(found: dict[str, Any]) -> None:
    """The table of bounds and the fitted exponents."""
    console = open_console()
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in ("bound", "held", "checked", "median tightness", "positive", "then decreased"):
        table.add_column(column, justify="left" if column == "bound" else "right")
    for name, bound in found["bounds"].items():
        tightness, kept = bound["median_tightness"], bound["held"] == bound["checked"]
        table.add_row(
            name.replace("_", " "),
            Text(f"{bound['held']:,}", style="" if kept else "red"),
            f"{bound['checked']:,}",
            "exact" if tightness is None else f"{tightness:.3g}",
            f"{bound['positive']:,}" if bound["positive"] else "",
            f"{bound['decreased']:,}" if bound["positive"] else "",
        )
    console.print(table)
    half = found["bounds"]["paper"]["positive_gamma_half"]
    fitted = ", ".join(
        f"{name.replace('_', ' ')} n^{value:.2f}"
        for name, value in found["exponents"].items()
        if value is not None
    )
    console.print(
        f"{found['instances']:,} instances. The paper's form was positive {half} times for "
        f"γ ≥ ½. Growth with the team: {fitted}.",
        highlight=False,
    )
