"""The training runs of a study: each a `satune train` command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from satune.files.writing import write_atomically


@dataclass(frozen=True)
class Run:
    """One training run: a row's label, its seed, the recipe and its overrides."""

    label: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]

    def directory(self, out: Path) -> Path:
        return out / f"{self.label.replace(' ', '-')}-seed-{self.seed}"

    def command(self, out: Path) -> list[str]:
        where = ("--out", str(self.directory(out)))
        return ["train", self.recipe, f"seed={self.seed}", *self.overrides, *where, "--json"]


def perform(run: Run, out: Path, threads: int = 1) -> dict[str, Any]:
    """Run it unless it is finished; its summary. Stops with the command's own line on failure."""
    summary = run.directory(out) / "summary.json"
    if not summary.is_file():
        started = run.directory(out).exists()
        command = [sys.executable, "-m", "satune", *run.command(out)]
        done = subprocess.run(
            command + ["--resume"] * started,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr.strip().splitlines()[-1]}")
    found = json.loads(summary.read_text())
    print(f"{run.label}, seed {run.seed}: {change(found)}", file=sys.stderr)
    return found


def perform_all(
    runs: Sequence[Run], out: Path, jobs: int, threads: int = 1
) -> list[dict[str, Any]]:
    """The runs' summaries, ``jobs`` runs at a time. Stops with the line of one that fails: those
    under way come to their end, and those that wait are not begun."""
    failed = threading.Event()

    def perform_unless_failed(run: Run) -> dict[str, Any]:
        if failed.is_set():
            return {}
        try:
            return perform(run, out, threads)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(perform_unless_failed, runs))


def draw_majority(run: Run, out: Path, answers: int, threads: int) -> None:
    """Have the run's only agent answer its held-out problems so many times, at its own temperature,
    unless it has. Stops with the command's own line on failure."""
    found = run.directory(out) / "majority.json"
    recipe = yaml.safe_load((run.directory(out) / "recipe.yaml").read_text(encoding="utf-8"))
    problems = recipe["evaluate"]["problems"]
    if found.is_file():
        return
    where = str(run.directory(out) / "majority")
    command = [sys.executable, "-m", "satune", "eval", str(run.directory(out))]
    done = subprocess.run(
        [*command, "-k", str(answers), "--limit", str(problems), "--out", where, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr.strip().splitlines()[-1]}")
    write_atomically(found, done.stdout)


def change(summary: dict[str, Any]) -> str:
    mean, low, high = summary["difference"]
    return (
        f"{summary['reward_before']:.3f} → {summary['reward_after']:.3f} "
        f"({mean:+.3f} [{low:+.3f}, {high:+.3f}])"
    )
