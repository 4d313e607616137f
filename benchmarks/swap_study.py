"""A study of swaps: what one costs when it is made, and what training makes of it.

    python benchmarks/swap_study.py --out runs/swap-study [--seeds 5]

Tiny relay teams are trained for a few stages; then one seat, two, or all are given to a larger
model, or one back to a smaller, and training goes on. Beside each: the team that was not swapped on
the same further samples, the newcomer as it is, and a team that had the larger model from the
start. At last a seat passes from one family to another, by coin. What is finished under --out is
read, not repeated; everything runs on one thread, one after the other. Prints Markdown tables.
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
from pathlib import Path
from typing import Any

LARGER, SMALLER, OTHER = "tiny:llama-m", "tiny:llama-s", "tiny:qwen3-s"
BEFORE, AFTER = 4, 2
"""Stages before the swap, and after it."""
SETTINGS = (
    "evaluate={problems: 1000, every: 1, greedy: false}",
    "checkpoint={every: stage, keep: 1}",
)
DRAWN = ("--method", "project", "--otherwise", "handover", "--rounds", "15")
RAMP = ("--tolerance", "0.05", "--problems", "1024", "--samples", "4", "--looks", "3")
# Whatever it is worth: the newcomer as it is, to see what training makes of that.
NAIVE = ("--method", "handover", "--tolerance", "1", "--problems", "8", "--looks", "1")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
RAMPS, RAMP_TOLERANCE, TRUTH = 40, 0.03, 8000
"""Ramps that are played anew, what each may cost, and the problems that show what it does cost."""


def satune(*arguments: str | Path, codes: Sequence[int] = (0,)) -> dict[str, Any]:
    """A command's JSON object. Stops with its last line where it fails."""
    command = [sys.executable, "-m", "satune", *map(str, arguments), "--json"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode not in codes or not done.stdout:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise SystemExit(f"{' '.join(command)}\n{said}")
    return json.loads(done.stdout)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def team(*models: str) -> str:
    names = ("first", "second", "third")
    agents = {n: {"model": m} for n, m in zip(names, models, strict=True)}
    return f"team.agents={json.dumps(agents)}"


def trained(out: Path, seed: int, models: str, stages: int) -> Path:
    if not (out / "summary.json").is_file():
        found = satune(
            "train", "recipes/relay.yaml", f"seed={seed}", f"stages={stages}", models, *SETTINGS,
            "--out", out, *(["--resume"] if out.exists() else []),
        )  # fmt: skip
        note(f"{out.name}: {found['reward_before']:.3f} -> {found['reward_after']:.3f}")
    return out


def swapped(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """The swap's result, kept beside its directory, also where it was refused."""
    kept = out.with_name(out.name + ".json")
    if not kept.is_file():
        shutil.rmtree(out, ignore_errors=True)
        found = satune("swap", source, *options, "--out", out, codes=(0, 2))
        beside = kept.with_suffix(".partial")
        beside.write_text(json.dumps(found))
        beside.rename(kept)
        note(f"{out.name}: {found['verdict']} ({found['reason']})")
    return json.loads(kept.read_text())


def trained_on(run: Path, out: Path) -> Path:
    """A copy of the run, trained for the stages after a swap."""
    if not (out / "summary.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(run, out)
        (out / "summary.json").unlink(missing_ok=True)
        satune("train", out / "recipe.yaml", f"stages={BEFORE + AFTER}", "--out", out, "--resume")
    return out


def evaluations(run: Path) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == "eval"]


def paired(new: Sequence[float], old: Sequence[float]) -> tuple[float, float]:
    """Mean difference and the half-width of its 95% interval."""
    gaps = [a - b for a, b in zip(new, old, strict=True)]
    return statistics.fmean(gaps), 1.96 * statistics.stdev(gaps) / len(gaps) ** 0.5


def give(*seats: str, model: str = LARGER) -> list[str]:
    return [part for seat in seats for part in ("--seat", seat, "--with", model)]


def one_seed(out: Path, seed: int) -> list[dict[str, Any]]:
    """A team, its swaps, and what becomes of each."""
    bases = learned(out, seed)
    start, larger = bases["start"], bases["larger-start"]
    beside = {start: evaluations(bases["stayed"])[-AFTER:]}
    beside[larger] = evaluations(bases["larger-stayed"])[-AFTER:]
    cases: list[tuple[str, Path, list[str]]] = [
        ("one seat, drawn", start, [*give("second"), *DRAWN, *RAMP]),
        ("one seat, as it is", start, [*give("second"), *NAIVE]),
        ("two seats, drawn", start, [*give("first", "second"), "--together", *DRAWN, *RAMP]),
        ("all seats, drawn", start,
         [*give("first", "second", "third"), "--together", *DRAWN, *RAMP]),
        ("downgrade, drawn", larger, [*give("second", model=SMALLER), *DRAWN, *RAMP]),
    ]  # fmt: skip
    rows = []
    for label, source, options in cases:
        name = f"seed-{seed}-{label.replace(', ', '-').replace(' ', '-')}"
        result = swapped(source, out / name, *options)
        row: dict[str, Any] = {"label": label, "seed": seed, "result": result}
        if result["out"] is not None and (out / name / "recipe.yaml").is_file():
            row["on"] = evaluations(trained_on(out / name, out / f"{name}-on"))[-AFTER:]
        row["stayed"] = beside[source]
        rows.append(row)
    rows.append({
        "label": "larger from the start", "seed": seed,
        "on": evaluations(bases["larger-stayed"])[-AFTER:], "stayed": beside[start],
    })  # fmt: skip
    return rows


def learned(out: Path, seed: int) -> dict[str, Path]:
    """The teams that swaps begin with, small and with a larger model, and each trained on."""
    models = {"": team(*[SMALLER] * 3), "larger-": team(SMALLER, LARGER, SMALLER)}
    found = {}
    for kind, agents in models.items():
        start = trained(out / f"seed-{seed}-{kind}start", seed, agents, BEFORE)
        found[f"{kind}start"] = start
        found[f"{kind}stayed"] = trained_on(start, out / f"seed-{seed}-{kind}stayed")
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| swap | seed | verdict | KL | before | newcomer as it is | at the swap (difference, 95%) "
        f"| reward after 1..{AFTER} further stages | not swapped "
        f"| difference to it after {AFTER} (95%) | swap tokens | swap seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(row["label"] for row in rows):
        for row in (r for r in rows if r["label"] == label):
            cells = [label, str(row["seed"])]
            result = row.get("result")
            if result is None:
                cells += [""] * 5
            else:
                record = result["swaps"][0]
                at_swap = "not made"
                if "difference" in record:
                    mean, low, high = record["difference"]
                    at_swap = f"{record['after']:.3f} ({mean:+.3f} [{low:+.3f}, {high:+.3f}])"
                cells += [
                    result["verdict"], farthest(record), f"{record['before']:.3f}",
                    f"{record['naive']:.3f}", at_swap,
                ]  # fmt: skip
            stayed = " ".join(f"{e['reward']:.3f}" for e in row["stayed"])
            if "on" in row:
                on = " ".join(f"{e['reward']:.3f}" for e in row["on"])
                mean, half = paired(row["on"][-1]["per_problem"], row["stayed"][-1]["per_problem"])
                cells += [on, stayed, f"{mean:+.3f} ± {half:.3f}"]
            else:
                cells += ["", stayed, ""]
            cost = ("", "")
            if result is not None:
                cost = (f"{result['tokens']:,}", f"{result['seconds']:.0f}")
            lines.append("| " + " | ".join([*cells, *cost]) + " |")
    return "\n".join(lines)


def farthest(record: dict[str, Any]) -> str:
    """The largest quantile of KL to its incumbent that a drawn newcomer has, on either's states."""
    found = [
        measured["quantile"]
        for seat in record.get("distillation", {}).values()
        for measured in seat.get("kl", {}).values()
    ]
    return f"{max(found):.3f}" if found else ""


def violations(rows: Sequence[dict[str, Any]]) -> str:
    """Viol.%: first stages after a swap in which the held-out reward falls."""
    lines = ["| swap | first stages | reward fell | Viol.% |", "|---|---|---|---|"]
    for label in dict.fromkeys(row["label"] for row in rows):
        first = [
            r["on"][0]["reward"] - r["result"]["swaps"][0]["after"]
            for r in rows
            if r["label"] == label
            and "on" in r
            and "after" in r.get("result", {"swaps": [{}]})["swaps"][0]
        ]
        if first:
            fell = sum(change < 0 for change in first)
            lines.append(f"| {label} | {len(first)} | {fell} | {100 * fell / len(first):.0f} |")
    return "\n".join(lines)


def families(out: Path) -> str:
    """From one family to another by coin: the ramp, and reward against share."""
    start = trained(out / "family-start", 0, team(SMALLER, OTHER, SMALLER), BEFORE)
    ramp = swapped(start, out / "family-swap", *give("second"), *RAMP)
    kept = out / "family-linearity.json"
    if not kept.is_file():
        kept.write_text(json.dumps(linearity(start)))
    points = json.loads(kept.read_text())
    old, new = points[0]["reward"], points[-1]["reward"]
    lines = [
        f"{OTHER} to {LARGER} by hand-over, tolerance {ramp['tolerance']:g}: {ramp['verdict']}. "
        f"{ramp['reason']}",
        "",
        "| share of the newcomer | episodes of the newcomer | reward ± standard error "
        "| straight line between the ends |",
        "|---|---|---|---|",
    ]
    for point in points:
        share = point["share"]
        lines.append(
            f"| {share:g} | {point['coins']} of {point['episodes']} "
            f"| {point['reward']:.4f} ± {point['error']:.4f} "
            f"| {(1 - share) * old + share * new:.4f} |"
        )
    kept = out / "family-ramps.json"
    if not kept.is_file():
        kept.write_text(json.dumps(ramps(start)))
    return "\n".join([*lines, "", ramps_of(json.loads(kept.read_text()))])


def sides(run: Path) -> Any:
    """The team, and the same with the newcomer of the other family in its second seat."""
    from satune.commands.reseat import find_team, load_found, with_newcomer

    old = load_found(find_team(run, None), lambda done, total, what: None)
    return old, with_newcomer(old, "second", LARGER)


def ramps(run: Path) -> dict[str, Any]:
    """Hand-overs of one seat on problems of their own, and the change of reward that they judge."""
    from satune.core.confidence import Spending
    from satune.swap.handover import hand_over_between, play_mixture
    from satune.swap.settings import HandOverSettings
    from satune.tasks.catalog import draw, take
    from satune.types import Key

    old, new = sides(run)
    problems = take(old.cast.task, "eval", TRUTH)
    truth = [
        [episode.reward for episode, _ in play_mixture(
            old.cast.match(), new.cast.match(), problems, 1, Key(1, "swap", draw=98), share
        )]
        for share in (0.0, 1.0)
    ]  # fmt: skip
    mean, half = paired(truth[1], truth[0])
    settings = HandOverSettings(RAMP_TOLERANCE, problems=1024, samples=4, looks=3)
    found = []
    for number in range(RAMPS):
        ramp = hand_over_between(
            old.cast.match(), new.cast.match(),
            lambda count, start: draw(old.cast.task, "certify", count, start),
            settings, Key(1000 + number, "swap"),
            Spending(settings.confidence, settings.looks), offset=number * 100_000,
        )  # fmt: skip
        shares = [look["allowed"] for look in ramp.looks]
        found.append({"verdict": ramp.verdict, "shares": shares})
        note(f"ramp {number}: {ramp.verdict}, {shares[-1]:.2f}")
    return {"change": mean, "half": half, "confidence": settings.confidence, "ramps": found}


def ramps_of(found: dict[str, Any]) -> str:
    """How the ramps ended, and how many allowed a share that costs more than the tolerance."""
    verdicts = [ramp["verdict"] for ramp in found["ramps"]]
    broken = sum(max(r["shares"]) * found["change"] < -RAMP_TOLERANCE for r in found["ramps"])
    ends = ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts)))
    return (
        f"{len(verdicts)} ramps on problems of their own, tolerance {RAMP_TOLERANCE:g} at "
        f"confidence {found['confidence']:g}, where the newcomer changes the reward by "
        f"{found['change']:+.4f} ± {found['half']:.4f} ({TRUTH:,} problems): {ends}; "
        f"{broken} allowed a share that costs more than the tolerance."
    )


def linearity(run: Path) -> list[dict[str, Any]]:
    from satune.swap.handover import play_mixture
    from satune.tasks.catalog import take
    from satune.types import Key

    old, new = sides(run)
    problems = take(old.cast.task, "eval", 1000)
    points = []
    for share in SHARES:
        # Coins and uniforms of one key: the shares differ in who played and in nothing else.
        mixed = play_mixture(
            old.cast.match(), new.cast.match(), problems, 2, Key(0, "swap", draw=99), share
        )
        rewards = [
            (a.reward + b.reward) / 2
            for (a, _), (b, _) in zip(mixed[::2], mixed[1::2], strict=True)
        ]
        points.append({
            "share": share,
            "coins": sum(coin for _, coin in mixed),
            "episodes": len(mixed),
            "reward": statistics.fmean(rewards),
            "error": statistics.stdev(rewards) / len(rewards) ** 0.5,
        })  # fmt: skip
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/swap-study"))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [row for seed in range(arguments.seeds) for row in one_seed(arguments.out, seed)]
    print(table(rows), violations(rows), families(arguments.out), sep="\n\n")


if __name__ == "__main__":
    main()
