"""What drawing ahead costs and buys on SmolLM2: runs that differ in rollout.ahead alone.

    python benchmarks/ahead.py --models models --out runs/ahead [--ahead 0 1 2] [--seeds 0]
                               [--stages 8] [--threads 2] [KEY=VALUE ...]

Seconds are medians over the stages from the third on, in which something was drawn ahead for every
batch: of a stage, of what the stage waited for its batch, of scoring that batch under who wrote it
and under the anchor. ESS/N is that of a batch when its stage begins; a batch of which no step
learns was rolled out anew at once. Runs that are finished under --out are read, not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study import SMOLLM2, smollm2
from study_runs import Run, change, perform

SETTLED = 3
"""The first stage that is counted."""
# What dynamic sampling draws cannot be known ahead; a problem then gives a signal or none.
ALIKE = ("rollout.dynamic_sampling=false", "rollout.problems=16", "evaluate.problems=128")


def runs(arguments: argparse.Namespace) -> list[Run]:
    """A run for each number of stages ahead and seed, all numbers of a seed before the next's."""
    common = (*ALIKE, smollm2(arguments.models), f"stages={arguments.stages}")
    return [
        Run(
            f"ahead {ahead}",
            seed,
            SMOLLM2,
            (*common, *arguments.overrides, f"rollout.ahead={ahead}"),
        )
        for seed in arguments.seeds
        for ahead in arguments.ahead
    ]


def figures(events: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """What a run's events say of its settled stages; None where nothing was drawn ahead."""

    def of(kind: str) -> list[dict[str, Any]]:
        return [e for e in events if e["event"] == kind and e["stage"] >= SETTLED]

    opening = [e for e in of("rollout") if "ahead" in e]
    rolled: dict[int, float] = {}
    for event in of("rollout"):  # also for a batch of which no step learnt
        rolled[event["stage"]] = rolled.get(event["stage"], 0.0) + event["seconds"]["rollout"]
    learnt = [e["seconds"]["update"] + e["seconds"]["measure"] for e in of("update")]
    stages = of("stage")
    shares = [e["ahead"]["ess"] / e["episodes"] for e in opening]
    return {
        "stage": statistics.median(e["seconds"] for e in stages),
        "waited": statistics.median(rolled.values()),
        "scored": statistics.median(e["seconds"]["score"] for e in opening) if opening else None,
        "updates": sum(learnt) / len(stages),
        "ess": statistics.median(shares) if shares else None,
        "anew": sum(e["step"] == 0 for e in opening) / len(opening) if opening else None,
    }


def table(done: Sequence[tuple[Run, dict[str, Any], dict[str, float | None]]]) -> str:
    """A Markdown table, a row a run."""
    lines = [
        "| run | seed | held-out reward | s a stage | of it waited for its batch "
        "| scoring it | updates | ESS/N | rolled out anew |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run, summary, found in done:
        shown = [
            "-" if found[name] is None else f"{found[name]:.{digits}f}"
            for name, digits in (
                ("stage", 1), ("waited", 1), ("scored", 1), ("updates", 1), ("ess", 3), ("anew", 2),
            )
        ]  # fmt: skip
        lines.append(f"| {run.label} | {run.seed} | {change(summary)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("models"), help="of `make models`")
    parser.add_argument("--out", type=Path, default=Path("runs/ahead"))
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", default=[], help="of the recipe, for every run")
    arguments = parser.parse_args()
    if arguments.stages < SETTLED:
        parser.error(f"--stages: give at least {SETTLED}")
    done = []
    for run in runs(arguments):
        summary = perform(run, arguments.out, arguments.threads)
        text = (run.directory(arguments.out) / "events.jsonl").read_text(encoding="utf-8")
        done.append((run, summary, figures([json.loads(line) for line in text.splitlines()])))
    print(table(done))


if __name__ == "__main__":
    main()
