"""Every plotted number, worked out anew from the lines of events.jsonl and episodes/ alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from report_runs import AGENTS, write_run
from satune.report import claims, comparison, precision, timeline, training
from satune.report.charts import Chart, Series, Table
from satune.report.source import Source, read_source

Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("numbers") / "run")


@pytest.fixture(scope="module")
def source(run: Path) -> Source:
    return read_source(run)


@pytest.fixture(scope="module")
def events(run: Path) -> Events:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def of(events: Events, kind: str) -> Events:
    return [event for event in events if event["event"] == kind]


def after(event: dict[str, Any]) -> float:
    """Three agents: step k of stage s ends at s - 1 + k/3."""
    return event["stage"] - 1 + event["step"] / 3


def by_name(chart: Chart) -> dict[str, Series]:
    return {series.name: series for series in chart.series}


def test_the_reward_of_rollouts_and_evaluations(source: Source, events: Events) -> None:
    drawn = by_name(training.reward_chart(source, training.Rewards()))
    rollouts = of(events, "rollout")
    line = drawn["training problems"]
    assert list(line.y) == [event["reward"] for event in rollouts]
    assert list(line.x) == pytest.approx([e["stage"] - 1 + (e["step"] - 1) / 3 for e in rollouts])
    assert len(rollouts) == 8  # one a stage, and stages 3 and 6 rolled out anew before step 3
    for name, greedy in (("held-out, sampled", False), ("held-out, greedy", True)):
        evals = [event for event in of(events, "eval") if event["greedy"] is greedy]
        assert list(drawn[name].x) == [event["stage"] for event in evals]
        assert list(drawn[name].y) == [event["reward"] for event in evals]
        assert list(drawn[name].low) == [event["interval"][0] for event in evals]
        assert list(drawn[name].high) == [event["interval"][1] for event in evals]


def test_the_band_of_training_rewards(run: Path, source: Source) -> None:
    """95% by problem: the means of a rollout's problems, which what the world ended is not in."""
    rewards = training.Rewards()
    for row in source.episodes():
        rewards.add(row)
    line = by_name(training.reward_chart(source, rewards))["training problems"]
    rows = [
        json.loads(text)
        for path in sorted((run / "episodes").glob("stage-*.jsonl"))
        for text in path.read_text().splitlines()
    ]
    places = sorted({(row["stage"], row["step"]) for row in rows})
    masked = 0
    for at, place in enumerate(places):
        by_problem: dict[str, list[float]] = {}
        for row in rows:
            if (row["stage"], row["step"]) != place:
                continue
            if row["failure"] and not row["failure"]["policy"]:
                masked += 1
                continue
            by_problem.setdefault(row["problem"]["id"], []).append(row["grade"]["score"])
        means = [sum(values) / len(values) for values in by_problem.values()]
        half = 1.96 * math.sqrt(statistics.variance(means) / len(means))
        middle = sum(means) / len(means)
        assert line.low[at] == pytest.approx(max(0.0, middle - half))
        assert line.high[at] == pytest.approx(min(1.0, middle + half))
    assert masked == len(places)


def test_places_in_a_stage_that_is_not_over(source: Source, tmp_path: Path) -> None:
    """Two of three steps of stage 1 are done, and then of stage 3."""
    for stage, place in ((1, 2 / 3), (3, 2 + 2 / 3)):
        upto = [e for e in source.events if e.get("stage", 0) < stage or e["event"] == "run"]
        steps = [e for e in source.events if e["event"] == "update" and e["stage"] == stage]
        half = Source(tmp_path, "half", events=[*upto, *steps[:2]])
        chart = training.penalty_chart(half)
        lasts = [series.x[-1] for series in chart.series]
        assert lasts[:2] == pytest.approx([place - 1 / 3, place])


def test_what_became_of_each_step(source: Source, events: Events) -> None:
    lanes = {lane.name: lane for lane in training.outcome_lanes(source)}
    assert list(lanes) == list(AGENTS)
    found = {
        (name, x): outcome
        for name, lane in lanes.items()
        for x, outcome in zip(lane.x, lane.outcomes, strict=True)
    }
    assert len(found) == len(of(events, "update")) == 18
    # How report_runs wrote them: (stage, step, outcome); every other step was accepted.
    told = {(1, 2): "shrunk", (2, 3): "reverted", (3, 1): "refused", (4, 2): "idle",
            (4, 3): "reverted", (5, 1): "shrunk"}  # fmt: skip
    for event in of(events, "update"):
        expected = told.get((event["stage"], event["step"]), "accepted")
        assert found[event["agent"], after(event)] == expected
    counts = {"accepted": 12, "shrunk": 2, "reverted": 2, "refused": 1, "idle": 1}
    assert training.outcome_counts(source) == counts


STEPS: dict[str, tuple[Callable[[Source], Chart], Callable[[dict[str, Any]], Any]]] = {
    "divergence": (training.divergence_chart, lambda e: e["kl"]["quantile"] if "kl" in e else None),
    "violation": (
        training.violation_chart,
        lambda e: e["kl"]["violation_rate"] if "kl" in e else None,
    ),
    "beta": (training.penalty_chart, lambda e: e["beta"]),
    "scale": (training.scale_chart, lambda e: e["scale"]),
    "experience": (training.experience_chart, lambda e: e["ess"] / e["episodes"]),
    "mismatch": (precision.mismatch_chart, lambda e: e["mismatch"]["max"] if "kl" in e else None),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_point_a_step(source: Source, events: Events, name: str) -> None:
    chart, value = STEPS[name]
    drawn = by_name(chart(source))
    for agent in AGENTS:
        own = [event for event in of(events, "update") if event["agent"] == agent]
        assert list(drawn[agent].x) == pytest.approx([after(event) for event in own])
        assert list(drawn[agent].y) == [value(event) for event in own]


def test_levels_and_whiskers_of_the_trust_region(source: Source, events: Events) -> None:
    assert [rule.y for rule in training.divergence_chart(source).rules] == [0.05]
    drawn = by_name(training.violation_chart(source))
    for agent in AGENTS:
        own = [event for event in of(events, "update") if event["agent"] == agent]
        uppers = [event["kl"]["violation_ucb"] if "kl" in event else None for event in own]
        assert list(drawn[agent].high) == uppers
        assert list(drawn[agent].low) == list(drawn[agent].y)


def test_the_noise_of_rounding(source: Source, events: Events) -> None:
    gauged = [event for event in of(events, "update") if "rounding" in event]
    assert len(gauged) == 3
    drawn = by_name(precision.rounding_chart(source))
    for event in gauged:
        assert list(drawn[event["agent"]].x) == [pytest.approx(after(event))]
        assert list(drawn[event["agent"]].y) == [event["rounding"]["episode"]]
    # A clip of .2 is passed by ratios whose logarithm is beyond log 1.2.
    assert [rule.y for rule in precision.rounding_chart(source).rules] == [
        pytest.approx(math.log(1.2))
    ]
    table = precision.rounding_table(source)
    names = ("token", "episode", "clipped", "floor", "kl")
    assert [row[1:6] for row in cells(table)] == [[e["rounding"][n] for n in names] for e in gauged]
    assert table is not None and table.marks == {2: "bad"}


def test_where_hybrid_rolled_out_anew(source: Source, events: Events) -> None:
    chart = training.experience_chart(source)
    assert [rule.y for rule in chart.rules] == [0.5]
    anew = [event for event in of(events, "rollout") if event["step"] > 1]
    assert list(by_name(chart)["rolled out anew before this step"].x) == pytest.approx(
        [after(event) for event in anew]
    )
    assert [event["stage"] for event in anew] == [3, 6]


def test_certificates(source: Source, events: Events) -> None:
    tested = [event for event in of(events, "update") if "certificate" in event]
    chart = claims.certificate_chart(source)
    drawn = by_name(chart)
    for agent in AGENTS:
        own = [e["certificate"]["statistical"] for e in tested if e["agent"] == agent]
        assert list(drawn[agent].y) == [found["mean"] for found in own]
        assert list(drawn[agent].low) == [found["lower"] for found in own]
    assert [rule.y for rule in chart.rules] == [0.0, -0.02]
    table = claims.certificate_table(source)
    expected: list[list[Any]] = []
    for event in tested:
        found = event["certificate"]["statistical"]
        expected.append([found["mean"], None, found["lower"]])
        expected += [[b["gain"], b["penalty"], b["lower"]] for b in event["certificate"]["theory"]]
    assert [list(row[2:5]) for row in table.rows] == expected
    vacuous = [at for at, row in enumerate(table.rows) if row[5] == "vacuous"]
    assert len(vacuous) == len(tested)
    assert [at for at, mark in table.marks.items() if mark == "weak"] == vacuous


@pytest.mark.parametrize("evidence", ["fresh", "balance"])
def test_what_an_owner_reports_is_marked(source: Source, evidence: str) -> None:
    """Bounds of theory always, statistics but for fresh evidence, which looks at texts alone."""
    changed: list[Any] = [json.loads(json.dumps(event)) for event in source.events]
    for event in changed:
        if "certificate" in event:
            event["certificate"]["statistical"]["evidence"] = evidence
            event["host"] = {"as_reported": [event["agent"]]}
    plain = claims.certificate_table(source).rows
    told = claims.certificate_table(Source(source.path, "run", events=changed)).rows
    for before, after_ in zip(plain, told, strict=True):
        fresh = str(before[1]).startswith("statistical") and evidence == "fresh"
        assert after_[5] == f"{before[5]}{'' if fresh else '; as reported'}"


def test_tokens_memory_and_time(source: Source, events: Events) -> None:
    drawn = by_name(timeline.token_chart(source))
    for name in ("prompt", "sampled"):
        sums = [
            sum(e["tokens"][name] for e in of(events, "rollout") if e["stage"] == stage)
            for stage in range(1, 7)
        ]
        assert list(drawn[name].y) == sums
    certified = [
        sum(e["tokens"].get("certify", 0) for e in of(events, "update") if e["stage"] == stage)
        for stage in range(1, 7)
    ]
    assert list(drawn["sampled for certificates"].y) == certified
    assert "environment" not in drawn  # nothing was spent on it
    peaks = [event["memory"]["peak"] / 1024**3 for event in of(events, "stage")]
    assert list(timeline.memory_chart(source).series[0].y) == peaks
    total = sum(drawn["sampled"].y) + sum(certified) + sum(e["tokens"] for e in of(events, "eval"))
    assert timeline.sampled_tokens(source) == total
    seconds = sum(e["seconds"] for kind in ("stage", "eval", "swap") for e in of(events, kind))
    assert timeline.total_seconds(source) == pytest.approx(seconds)


def test_the_timeline(source: Source, events: Events) -> None:
    chart = timeline.timeline(source)
    assert list(chart.lanes) == [*AGENTS, "team"]
    sums: dict[tuple[str, str], float] = {}
    for bar in chart.bars:
        place = (chart.lanes[bar.lane], bar.phase)
        sums[place] = sums.get(place, 0.0) + bar.end - bar.start
    for agent in AGENTS:
        own = [event["seconds"] for event in of(events, "update") if event["agent"] == agent]
        for phase in ("rollout", "score", "update", "measure", "certify"):
            spent = sum(seconds.get(phase, 0.0) for seconds in own)
            assert sums.get((agent, phase), 0.0) == pytest.approx(spent)
    assert sums["team", "evaluate"] == pytest.approx(sum(e["seconds"] for e in of(events, "eval")))
    rest = 0.0
    for stage in of(events, "stage"):
        steps = [e["seconds"] for e in of(events, "update") if e["stage"] == stage["stage"]]
        rest += max(0.0, stage["seconds"] - sum(sum(seconds.values()) for seconds in steps))
    assert sums.get(("team", "other"), 0.0) == pytest.approx(rest)
    # Nothing overlaps, nothing is left out between: it is one after the other.
    ends = [0.0, *(bar.end for bar in chart.bars)]
    assert [bar.start for bar in chart.bars] == pytest.approx(ends[:-1])
    firsts = {}
    for bar in chart.bars:
        if "stage" in bar.tip and bar.phase != "evaluate":
            firsts.setdefault(bar.tip.rsplit(" ", 1)[1], bar.start)
    assert [start for _, start in chart.stages] == pytest.approx(list(firsts.values()))
    table = timeline.time_table(source)
    row = next(row for row in table.rows if row[0] == "ada")
    assert row[-1] == pytest.approx(sum(v for (agent, _), v in sums.items() if agent == "ada"))


def test_grading_goes_on_beside_the_rollout(source: Source) -> None:
    beside = Source(source.path, "run", events=[dict(event) for event in source.events])  # type: ignore[arg-type]
    first = next(event for event in beside.events if event["event"] == "update")
    first["seconds"] = {"rollout": 3.0, "grading": 2.0, "update": 1.0}
    bars = timeline.timeline(beside).bars
    spans = {bar.phase: (bar.start, bar.end) for bar in bars[2:5]}  # behind two evaluations
    assert spans["grading"] == (spans["rollout"][0], spans["rollout"][0] + 2.0)
    assert spans["update"] == (spans["rollout"][1], spans["rollout"][1] + 1.0)


def cells(table: Table | None) -> list[list[Any]]:
    assert table is not None
    return [list(row) for row in table.rows]


def test_failures_and_swaps(source: Source, events: Events) -> None:
    counts: dict[str, int] = {}
    for event in [*of(events, "rollout"), *of(events, "eval")]:
        for kinds in event["failures"].values():
            for kind, count in kinds.items():
                counts[kind] = counts.get(kind, 0) + count
    assert {row[1]: row[2] for row in cells(claims.failure_table(source))} == counts
    assert counts == {"overflow": 9, "connection": 8}  # eight rollouts, one evaluation
    lost = [(row[0], row[2]) for row in cells(claims.trouble_table(source))]
    assert lost == [("2.3", "reverted"), ("3.1", "refused"), ("4.2", "idle"), ("4.3", "reverted")]
    (swap,) = cells(claims.swap_tables(source)[0])
    record = of(events, "swap")[0]["swaps"][0]
    assert swap[5:8] == [record["before"], record["naive"], record["after"]]
    assert swap[8] == "+0.010 [-0.020, +0.040]"


def test_several_runs(tmp_path: Path, source: Source, events: Events) -> None:
    other = write_run(tmp_path / "wide", delta=0.2, seed=3, stages=3)
    sources = [source, read_source(other)]
    others = [json.loads(line) for line in (other / "events.jsonl").read_text().splitlines()]
    drawn = by_name(comparison.reward_comparison(sources))
    for name, found in (("run", events), ("wide", others)):
        sampled = [event for event in of(found, "eval") if not event["greedy"]]
        assert list(drawn[name].x) == [event["stage"] for event in sampled]
        assert list(drawn[name].y) == [event["reward"] for event in sampled]
    drawn = by_name(comparison.training_comparison(sources))
    assert list(drawn["wide"].y) == [e["reward"] for e in of(others, "rollout") if e["step"] == 1]

    means, uppers = [], []
    for found in (events, others):
        measured = [event["kl"] for event in of(found, "update") if "kl" in event]
        means.append(sum(kl["violation_rate"] for kl in measured) / len(measured))
        uppers.append(sum(kl["violation_ucb"] for kl in measured) / len(measured))
    drawn = by_name(comparison.violations_by_delta(sources))
    assert list(drawn["mean over steps"].x) == [0.05, 0.2]
    assert list(drawn["mean over steps"].y) == pytest.approx(means)
    assert list(drawn["mean over steps"].high) == pytest.approx(uppers)
    # Least squares of v = c √δ through two points: c = (v₁√δ₁ + v₂√δ₂) / (δ₁ + δ₂).
    slope = (means[0] * 0.05**0.5 + means[1] * 0.2**0.5) / 0.25
    line = drawn["c√δ"]
    assert list(line.y) == pytest.approx([slope * x**0.5 for x in line.x])

    different = {row[0]: row[1:] for row in cells(comparison.recipe_differences(sources))}
    assert different == {"seed": ["0", "3"], "stages": ["6", "3"],
                         "trust_region.delta": ["0.05", "0.2"]}  # fmt: skip
    results = {row[0]: row for row in cells(comparison.result_table(sources))}
    sampled = [event["reward"] for event in of(others, "eval") if not event["greedy"]]
    assert results["wide"][1:3] == [sampled[0], sampled[-1]]


def test_numbers_that_are_not_finite_are_gaps(source: Source) -> None:
    broken = Source(source.path, "run", events=[dict(event) for event in source.events])  # type: ignore[arg-type]
    first = next(event for event in broken.events if event["event"] == "update")
    first["kl"] = {**first["kl"], "quantile": "inf", "violation_ucb": "nan"}  # type: ignore[typeddict-item]
    first["ess"] = "nan"  # type: ignore[typeddict-item]
    assert training.divergence_chart(broken).series[0].y[0] is None
    assert training.violation_chart(broken).series[0].high[0] is None
    assert training.experience_chart(broken).series[0].y[0] is None
