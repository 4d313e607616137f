"""What a swap costs at once and what it is worth later: the rows of a table of swaps in miniature.

    python benchmarks/swap_study.py --out runs/swaps [--seeds 5] [--arms one-seat-project ...]

A relay team of three tiny agents is trained for BEFORE stages; seats are then given to a larger (or
smaller) model of the same family, and training goes on for AFTER stages on the same problems and
uniforms as the team that was not swapped. Everything is done by `satune` commands with one thread;
what is finished under --out is read, not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEFORE, AFTER = 6, 4
SMALL, LARGE = "tiny:llama-s", "tiny:llama-m"
SEATS = ("first", "second", "third")
WATCHED = ("evaluate={problems: 1000, every: 1, greedy: false}",)
PROJECT = ("--method", "project", "--delta", "1")
AS_IT_IS = ("--method", "handover", "--tolerance", "0.15", "--samples", "4")


@dataclass(frozen=True)
class Arm:
    """One row: the team it starts from, the seats that change, their new model, and how."""

    name: str
    source: str
    seats: tuple[str, ...] = ()
    model: str = ""
    how: tuple[str, ...] = ()


ARMS = (
    Arm("not swapped", "small"),
    Arm("one seat, projected", "small", ("second",), LARGE, PROJECT),
    Arm("one seat, as it is", "small", ("second",), LARGE, AS_IT_IS),
    Arm("larger from the start", "mixed"),
    Arm("two seats, projected", "small", ("first", "second"), LARGE, PROJECT),
    Arm("all seats, projected", "small", SEATS, LARGE, PROJECT),
    Arm("downgrade, projected", "mixed", ("second",), SMALL, PROJECT),
)


def satune(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "satune", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def must(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        raise SystemExit(f"{' '.join(done.args)}\n{done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def overrides(source: str, seed: int) -> list[str]:
    models = {seat: LARGE if source == "mixed" and seat == "second" else SMALL for seat in SEATS}
    agents = json.dumps({seat: {"model": model} for seat, model in models.items()})
    return [f"seed={seed}", f"team.agents={agents}", *WATCHED]


def trained(out: Path, source: str, seed: int) -> Path:
    """The team before any swap."""
    run = out / f"{source}-seed-{seed}"
    if not (run / "summary.json").is_file():
        resume = ["--resume"] * run.exists()
        must(satune("train", "relay", *overrides(source, seed), f"stages={BEFORE}",
                    "--out", str(run), *resume))  # fmt: skip
    return run


def perform(out: Path, arm: Arm, seed: int) -> dict[str, Any]:
    """What came of an arm: its swap (None without one) and its held-out rewards afterwards."""
    base = trained(out, arm.source, seed)
    run = out / f"{arm.name.replace(',', '').replace(' ', '-')}-seed-{seed}"
    said = out / f"{run.name}.json"
    swapped: dict[str, Any] | None = None
    if arm.seats:
        if not said.is_file():
            named = [word for seat in arm.seats for word in ("--seat", seat, "--with", arm.model)]
            shutil.rmtree(run, ignore_errors=True)
            done = satune("swap", str(base), *named, *arm.how, "--out", str(run), "--json")
            if not done.stdout:
                must(done)
            said.write_text(done.stdout)
        swapped = json.loads(said.read_text())
        if swapped["out"] is None:
            return {"swap": swapped, "evals": []}
    elif not run.exists():
        shutil.copytree(base, run)
    if finished(run) < BEFORE + AFTER:
        must(satune("train", str(run / "recipe.yaml"), f"stages={BEFORE + AFTER}",
                    "--out", str(run), "--resume"))  # fmt: skip
    lines = (run / "events.jsonl").read_text().splitlines()
    evals = [e for e in map(json.loads, lines) if e["event"] == "eval" and not e["greedy"]]
    return {"swap": swapped, "evals": [e for e in evals if e["stage"] > BEFORE]}


def finished(run: Path) -> int:
    summary = run / "summary.json"
    return json.loads(summary.read_text())["stages"] if summary.is_file() else 0


def paired(new: Sequence[float], old: Sequence[float]) -> str:
    """Mean difference by problem with its 95% interval."""
    changes = [a - b for a, b in zip(new, old, strict=True)]
    mean = statistics.fmean(changes)
    half = 1.96 * statistics.stdev(changes) / len(changes) ** 0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def moment(swap: dict[str, Any]) -> tuple[float, float, str]:
    """Reward before and after all seats were given, and the change with its interval."""
    last = swap["swaps"][-1]
    taken = "difference" in last
    mean, low, high = last["difference"] if taken else last["naive_difference"]
    after = last["after"] if taken else last["naive"]
    return last["before"], after, f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| row | seed | verdict | reward before → at the swap | change at the swap "
        f"| after {AFTER} more stages | against not swapped | first stage fell |",
        "|---|---|---|---|---|---|---|---|",
    ]
    summary = [
        "| row | at the swap | after | against not swapped | Viol. |", "|---|---|---|---|---|",
    ]  # fmt: skip
    plain = found["not swapped"]
    for name, rows in found.items():
        at, ends, gains, falls = [], [], [], []
        for seed, row in enumerate(rows):
            swap, evals = row["swap"], row["evals"]
            start, verdict, shown, change = None, "", "", ""
            if swap is not None:
                before, start, change = moment(swap)
                verdict, shown = swap["verdict"], f"{before:.3f} → {start:.3f}"
                at.append(start - before)
            end = against = fell = ""
            if evals:
                end = f"{evals[-1]['reward']:.3f}"
                ends.append(evals[-1]["reward"])
                if plain[seed]["evals"]:
                    against = paired(
                        evals[-1]["per_problem"], plain[seed]["evals"][-1]["per_problem"]
                    )
                    gains.append(evals[-1]["reward"] - plain[seed]["evals"][-1]["reward"])
                if start is not None:
                    falls.append(evals[0]["reward"] < start)
                    fell = "yes" if falls[-1] else "no"
            lines.append(
                f"| {name} | {seed} | {verdict} | {shown} | {change} | {end} | {against} | {fell} |"
            )
        means = [f"{statistics.fmean(v):+.3f}" if v else "" for v in (at, gains)]
        end = f"{statistics.fmean(ends):.3f}" if ends else ""
        share = f"{100 * statistics.fmean(falls):.0f}%" if falls else ""
        summary.append(f"| {name} | {means[0]} | {end} | {means[1]} | {share} |")
    return "\n".join(summary) + "\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/swaps"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="*", help="rows by name; all if left out")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arms = [arm for arm in ARMS if not arguments.arms or arm.name in arguments.arms]
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        found[arm.name] = []
        for seed in range(arguments.seeds):
            found[arm.name].append(perform(arguments.out, arm, seed))
            print(f"{arm.name}, seed {seed}: done", file=sys.stderr, flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
