"""How often each method leaves the trust region when it moves as far: PPO, GRPO, DAPO, M2PO, SAT.

    python benchmarks/violations.py --out runs/violations              # goes on where it stopped
    python benchmarks/violations.py --methods grpo sat --seeds 0 --stages 2

Every method trains the tiny relay team (recipes/figure1/tiny_*.yaml) at several learning rates and
seeds. An update's distance is its mean trajectory KL(proposal‖anchor); its violations are the share
of token states with a KL above delta .05. Methods are compared at equal distance: the violations of
each are read off, by a line in the logarithm of the distance, at the distances that SAT reached.
A method that never came that near or went that far has no figure there.

Runs that are finished under --out with the same --stages and --problems are read, not repeated.
violations.json has every figure, and violations.txt the table that is printed; both say which runs
are missing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from scipy.stats import t
from study import SEEDS
from study_runs import Run, perform_all

METHODS = ("ppo", "grpo", "dapo", "m2po", "sat")
RATES = ("1e-4", "3e-4", "1e-3", "3e-3")
DELTAS = ("0.005", "0.01", "0.02", "0.1")
"""Of SAT's trust region at the default rate, beside its .05."""


def runs_of(methods: Sequence[str], seeds: Sequence[int], stages: int, problems: int) -> list[Run]:
    """One seed after the other, so that what is there when it stops can be compared."""
    common = (f"stages={stages}", f"rollout.problems={problems}", "evaluate={problems: 64}")
    found = []
    for seed in seeds:
        for rate in RATES:
            for method in methods:
                recipe = f"recipes/figure1/tiny_{method}.yaml"
                overrides = (*common, f"optimizer.lr={rate}")
                found.append(Run(f"{method} lr {rate}", seed, recipe, overrides))
        if "sat" in methods:
            for delta in DELTAS:
                overrides = (*common, f"trust_region.delta={delta}")
                recipe = "recipes/figure1/tiny_sat.yaml"
                found.append(Run(f"sat delta {delta}", seed, recipe, overrides))
    return found


def figures(run: Run, out: Path) -> dict[str, float] | None:
    """Means over a run's updates that were measured, the reverted ones with what was measured last;
    None where none was."""
    lines = (run.directory(out) / "events.jsonl").read_text().splitlines()
    updates = [e for e in map(json.loads, lines) if e["event"] == "update" and "kl" in e]
    if not updates:
        return None
    kl = [update["kl"] for update in updates]
    summary = json.loads((run.directory(out) / "summary.json").read_text())
    return {
        "updates": len(updates),
        "trajectory_kl": statistics.fmean(each["trajectory"]["forward"] for each in kl),
        "violation_share": statistics.fmean(each["violation_share"] for each in kl),
        "problems_violated": statistics.fmean(each["violation_rate"] for each in kl),
        "quantile": statistics.fmean(each["quantile"] for each in kl),
        "shrunk": sum(0 < update["scale"] < 1 for update in updates),
        "gain": summary["difference"][0],
    }


def read(runs: Sequence[Run], out: Path) -> tuple[dict[str, list[dict[str, float]]], list[str]]:
    """The figures of all finished runs by label, and the names of the runs that have none."""
    rows: dict[str, list[dict[str, float]]] = {}
    missing = []
    for run in runs:
        name = f"{run.label} seed {run.seed}"
        if not (run.directory(out) / "summary.json").is_file():
            missing.append(name)
        elif (found := figures(run, out)) is None:
            missing.append(f"{name} (no update was measured)")
        else:
            rows.setdefault(run.label, []).append(found)
    return rows, missing


def at_distance(points: Sequence[tuple[float, float]], distance: float) -> float | None:
    """The violations at a distance by a line in its logarithm between the two neighbours among
    ``points`` (distance, violations); None outside of them."""
    for (near, low), (far, high) in pairwise(sorted(points)):
        if near <= distance <= far:
            share = math.log(distance / near) / math.log(far / near) if far > near else 0.0
            return low + share * (high - low)
    return None


def excess(rows: Mapping[str, list[dict[str, float]]], method: str, rate: str) -> str:
    """How much larger a method's violations are than SAT's at the same seed and at the distance of
    SAT at a learning rate: mean and interval over seeds; empty where not all of them have both."""
    sat = rows.get(f"sat lr {rate}", [])
    swept = [rows.get(f"{method} lr {each}", []) for each in RATES]
    if len(sat) < 2 or any(len(each) != len(sat) for each in swept):
        return ""
    found = []
    for seed, own in enumerate(sat):
        points = [(each[seed]["trajectory_kl"], each[seed]["violation_share"]) for each in swept]
        share = at_distance(points, own["trajectory_kl"])
        if share is None:
            return ""
        found.append(share - own["violation_share"])
    mean, error = statistics.fmean(found), statistics.stdev(found) / math.sqrt(len(found))
    half = float(t.ppf(0.975, len(found) - 1)) * error
    return f"{mean:+.2%} [{mean - half:+.2%}, {mean + half:+.2%}]"


def table(rows: dict[str, list[dict[str, float]]], missing: Sequence[str]) -> tuple[str, Any]:
    """A table of what was run, and one of the methods at SAT's distances; the latter as data."""
    head = (
        f"{'run':<18} {'seeds':>5} {'trajectory KL':>14} {'states > delta':>14} "
        f"{'problems':>9} {'.99 quantile':>13} {'shrunk':>7} {'gain':>7}"
    )
    lines = [head]
    means: dict[str, dict[str, float]] = {}
    for label, seeds in rows.items():
        mean = {key: statistics.fmean(each[key] for each in seeds) for key in seeds[0]}
        means[label] = mean
        lines.append(
            f"{label:<18} {len(seeds):>5} {mean['trajectory_kl']:>14.5f} "
            f"{mean['violation_share']:>14.4%} {mean['problems_violated']:>9.1%} "
            f"{mean['quantile']:>13.5f} {mean['shrunk']:>7.1f} {mean['gain']:>+7.3f}"
        )
    matched = {}
    swept = {
        method: [
            (mean["trajectory_kl"], mean["violation_share"])
            for label, mean in means.items()
            if label.startswith(f"{method} lr ")
        ]
        for method in METHODS
    }
    lines += ["", "states beyond delta at the distance of SAT:"]
    for distance, share in sorted(swept["sat"]):
        found = {m: at_distance(swept[m], distance) for m in METHODS if m != "sat"}
        matched[f"{distance:.5f}"] = {"sat": share, **found}
        shown = ", ".join(f"{m} {'-' if v is None else f'{v:.4%}'}" for m, v in found.items())
        lines.append(f"trajectory KL {distance:.5f}: sat {share:.4%}, {shown}")
    lines += ["", "more of them than SAT, seed by seed (mean and 95% interval by Student's t):"]
    for rate in RATES:
        told = [f"{m} {e}" for m in METHODS if m != "sat" and (e := excess(rows, m, rate))]
        if told:
            lines.append(f"at the distance of SAT's learning rate {rate}: {', '.join(told)}")
    if missing:
        lines += ["", f"without figures ({len(missing)}): {', '.join(missing)}"]
    return "\n".join(lines) + "\n", matched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/violations"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--stages", type=int, default=5)
    parser.add_argument("--problems", type=int, default=96, help="a rollout")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only-read", action="store_true", help="run nothing, read what is there")
    arguments = parser.parse_args()
    runs = runs_of(arguments.methods, arguments.seeds, arguments.stages, arguments.problems)
    where = arguments.out / f"stages-{arguments.stages}-problems-{arguments.problems}"
    if not arguments.only_read:
        perform_all(runs, where, arguments.jobs)
    rows, missing = read(runs, where)
    text, matched = table(rows, missing)
    print(text, end="")
    settings = {"stages": arguments.stages, "problems": arguments.problems}
    found = {**settings, "rows": rows, "matched": matched, "missing": missing}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "violations.json").write_text(json.dumps(found, indent=2) + "\n")
    (arguments.out / "violations.txt").write_text(text)


if __name__ == "__main__":
    main()
