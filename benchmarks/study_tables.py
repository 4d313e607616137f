"""What the runs of a study came to, as Markdown tables: docs/results.md holds them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from study_runs import Run, change

from satune.play.statistics import mean_estimate


def table(runs: Sequence[Run], summaries: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a row a label, the seeds' figures side by side, means of the costs."""
    lines = [
        "| run | sampled, before → after (paired difference, 95%) by seed | greedy by seed "
        "| mean gain | episodes | tokens | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(run.label for run in runs):
        rows = [s for r, s in zip(runs, summaries, strict=True) if r.label == label]
        gain = statistics.fmean(s["difference"][0] for s in rows)
        greedy = "<br>".join(f"{s['greedy_before']:.2f} → {s['greedy_after']:.2f}" for s in rows)
        costs = [statistics.fmean(s[k] for s in rows) for k in ("episodes", "tokens", "seconds")]
        figures = "<br>".join(change(s) for s in rows)
        lines.append(
            f"| {label} | {figures} | {greedy} | {gain:+.3f} | {costs[0]:,.0f} | {costs[1]:,.0f} "
            f"| {costs[2]:.0f} |"
        )
    return "\n".join(lines)


def against_the_first(runs: Sequence[Run], out: Path) -> str:
    """A Markdown table: each row's last held-out rewards minus those of the study's first row on
    the same problems, over all seeds that both have, with 95% intervals. A single agent's also by
    the majority of as many answers as the first row's team gives, where these were drawn."""
    first, *others = dict.fromkeys(run.label for run in runs)
    lines = [
        f"| minus {first} | problems | sampled | greedy | majority of as many answers |",
        "|---|---|---|---|---|",
    ]
    for label in others:
        paired = [
            (run, base)
            for run in runs
            for base in runs
            if run.label == label and base.label == first and run.seed == base.seed
        ]
        figures: list[str] = []
        problems = 0
        for ours, theirs in ((_sampled, _sampled), (_greedy, _greedy), (_majority, _sampled)):
            pairs = [(ours(run, out), theirs(base, out)) for run, base in paired]
            # A figure is of all seeds or is not there.
            whole = all(mine and len(mine) == len(other) for mine, other in pairs)
            differences = (
                [a - b for each in pairs for a, b in zip(*each, strict=True)] if whole else []
            )
            problems = max(problems, len(differences))
            if len(differences) < 2:
                figures.append("")
                continue
            found = mean_estimate(differences, -1.0, 1.0)
            figures.append(f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
        if problems:
            lines.append(f"| {label} | {problems} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _sampled(run: Run, out: Path) -> list[float]:
    return _last(run, out, False)


def _greedy(run: Run, out: Path) -> list[float]:
    return _last(run, out, True)


def _last(run: Run, out: Path, greedy: bool) -> list[float]:
    """A run's last held-out rewards, a number a problem; none where it never evaluated so."""
    lines = (run.directory(out) / "events.jsonl").read_text().splitlines()
    found: list[float] = []
    for event in map(json.loads, lines):
        if event["event"] == "eval" and event["greedy"] is greedy:
            found = event["per_problem"]
    return found


def _majority(run: Run, out: Path) -> list[float]:
    """What the majority of a single agent's answers earned, a number a problem; none if not
    drawn."""
    found = run.directory(out) / "majority.json"
    if not found.is_file():
        return []
    return [problem["majority"] for problem in json.loads(found.read_text())["per_problem"]]


def gate_table(runs: Sequence[Run], out: Path) -> str:
    """A Markdown table: a row a run, its held-out reward stage by stage and what the gate did."""
    lines = [
        "| run | seed | held-out reward after 0, 1, ... stages | worst stage "
        "| kept, shrunk, reverted | certified gains | episodes: training, certificates "
        "| seconds: training, certificates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        lines_read = (run.directory(out) / "events.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines_read]
        rewards = [e["reward"] for e in events if e["event"] == "eval"]
        updates = [e for e in events if e["event"] == "update"]
        verdicts = [e["gate"]["verdict"] for e in updates if "gate" in e]
        bounds = [e["certificate"]["statistical"] for e in updates if "certificate" in e]
        counts = [verdicts.count(v) for v in ("kept", "shrunk", "reverted")] if verdicts else []
        summary = json.loads((run.directory(out) / "summary.json").read_text())
        costs = summary.get("certificates", {"episodes": 0, "seconds": 0.0})
        worst = min(after - before for before, after in pairwise(rewards))
        lines.append(
            f"| {run.label} | {run.seed} | {' '.join(f'{r:.3f}' for r in rewards)} | {worst:+.3f} "
            f"| {', '.join(map(str, counts)) or '-'} | {sum(b['positive'] for b in bounds)} "
            f"| {summary['episodes']:,}, {costs['episodes']:,} "
            f"| {summary['seconds'] - costs['seconds']:.0f}, {costs['seconds']:.0f} |"
        )
    return "\n".join(lines)
