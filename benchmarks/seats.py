"""What a run's held-out evaluations say of its seats, where ``rollout.grade_seats`` graded them:
the team beside each seat's own message, its lead over the best of them, and the reward by wording.

    python benchmarks/seats.py RUN
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from satune.play.statistics import mean_estimate


def evaluations(run: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What each evaluation is called, and its conversations."""
    for file in sorted((run / "episodes").glob("evaluation-*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for greedy in (True, False):
            stage = int(file.stem.rpartition("-")[2])
            found = [row for row in rows if row["greedy"] is greedy]
            if found:
                yield f"after {stage} stages, {'greedy' if greedy else 'sampled'}", found


def tell(name: str, rows: list[dict[str, Any]]) -> None:
    team = [row["grade"]["score"] for row in rows]
    print(f"{name}: team {fmean(team):.3f} of {len(team)} problems")
    seats: dict[str, list[float]] = defaultdict(list)
    wordings: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for seat, score in (row["grade"]["seats"] or {}).items():
            seats[seat].append(score)
        wordings[row["problem"]["metadata"].get("wording", "")].append(row["grade"]["score"])
    for seat, scores in seats.items():
        print(f"  seat {seat}: {fmean(scores):.3f}")
    if seats:
        best = max(seats, key=lambda seat: fmean(seats[seat]))
        lead = mean_estimate([t - s for t, s in zip(team, seats[best], strict=True)], -1.0, 1.0)
        print(f"  team minus {best}: {lead.mean:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]")
    for wording, scores in sorted(wordings.items()):
        print(f"  {wording or 'all'}: {fmean(scores):.2f} ({len(scores)})")


def main() -> None:
    parser = argparse.ArgumentParser(description="a run's team beside its seats")
    parser.add_argument("run", type=Path)
    for name, rows in evaluations(parser.parse_args().run):
        tell(name, rows)


if __name__ == "__main__":
    main()
