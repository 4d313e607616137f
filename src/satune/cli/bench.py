"""``satune bench``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from satune.cli.common import AsJson, say
from satune.types import UserError


def bench(
    name: Annotated[str | None, typer.Argument(help="one of them; all if left out")] = None,
    as_json: AsJson = False,
) -> None:
    """Speed against the peers, as ratios from one run (from a checkout of the repository).

    One that ends badly keeps no other from running; the command ends as the first such one did.
    """
    folder = Path(__file__).parents[3] / "benchmarks"
    names = ("step", "sampling", "grading", "planning", "projection")
    scripts = {n: folder / f"{n}.py" for n in names}
    if name is not None and name not in scripts:
        raise UserError(f"bench: no benchmark {name!r}; there are: {', '.join(scripts)}")
    chosen = {n: scripts[n] for n in ([name] if name else scripts)}
    results: dict[str, Any] = {}
    failed = 0
    for each, script in chosen.items():
        if not script.is_file():
            raise UserError(f"bench: {script} is not there; run it from a clone of the repository")
        command = [sys.executable, str(script), *(["--json"] if as_json else [])]
        ended = subprocess.run(command, stdout=subprocess.PIPE if as_json else None, text=True)
        if ended.returncode:
            say(f"bench: {each} ended with {ended.returncode}")
            failed = failed or ended.returncode
        elif as_json:
            results[each] = json.loads(ended.stdout)
    if as_json and (name is None or name in results):
        print(json.dumps(results[name] if name else results))
    if failed:
        raise typer.Exit(failed)
