"""Certificates, swaps, and what went wrong: from events to tables and charts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from satune.files.events import (
    EvalEvent,
    Failures,
    RolloutEvent,
    RunEvent,
    StageEvent,
    SwapEvent,
    UpdateEvent,
)
from satune.report.charts import Chart, Number, Rule, Series, Table, number
from satune.report.source import Source
from satune.report.training import SWEEPS, Axis, outcome_of

LONGEST = 60
"""Rows of a table that has one a step; older ones are left out, and counted."""


def _tested(source: Source) -> list[UpdateEvent]:
    return [event for event in source.of(UpdateEvent) if "certificate" in event]


def certificate_chart(source: Source) -> Chart:
    """The estimate of every test with its lower bound, against 0 and the gate's tolerance."""
    axis, series = Axis(source), []
    for colour, agent in enumerate(source.agents):
        own = [event for event in _tested(source) if event["agent"] == agent]
        found = [event["certificate"]["statistical"] for event in own]  # type: ignore[typeddict-item]
        if own:
            series.append(
                Series(
                    agent,
                    [axis.after(event["stage"], event["step"]) for event in own],
                    [number(one.get("mean")) for one in found],
                    colour,
                    line="none",
                    marker=colour,
                    low=[number(one.get("lower")) for one in found],
                    high=[number(one.get("mean")) for one in found],
                    outcomes=[outcome_of(event) for event in own],
                    tips=[str(one.get("claim", "")) for one in found],
                )
            )
    told = {number(event["gate"].get("tolerance")) for event in _tested(source) if "gate" in event}
    tolerances = sorted(tolerance for tolerance in told if tolerance is not None)
    return Chart(
        "certificates",
        "What each step can claim",
        SWEEPS,
        "change of the mean reward",
        series,
        rules=[Rule(0.0, "no change"), *(Rule(-t, f"tolerance {t:g}") for t in tolerances)]
        if series
        else [],
        floor=None,
        note="The point is the estimate, which claims nothing; the foot of its whisker is the "
        "lower bound, which is the claim. Decide by that.",
        absent=_no_certificates(source),
    )


def _no_certificates(source: Source) -> str:
    asked = source.recipe.get("certify.problems", "0")
    if asked in ("0", ""):
        return "The recipe asks for no certificates (certify.problems is 0): nothing is claimed."
    return "No certificate has been made yet."


def certificate_table(source: Source) -> Table:
    """Theory beside statistics, a row a bound; a vacuous one is marked as such."""
    rows: list[list[str | Number]] = []
    marks: dict[int, str] = {}
    tested = _tested(source)
    for event in tested[-LONGEST:]:
        step = f"{event['stage']}.{event['step']} {event['agent']}"
        certificate = event.get("certificate") or {"statistical": {}}
        one = certificate["statistical"]
        gate = event["gate"]["verdict"] if "gate" in event else ""
        # Ratios and divergences of an agent that lives elsewhere are its owner's word.
        reported = "; as reported" if "host" in event else ""
        says = "" if one.get("evidence") == "fresh" else reported
        lower = number(one.get("lower"))
        if lower is not None and lower > 0:
            marks[len(rows)] = "good"
        rows.append(
            [step, f"statistical, {one.get('method', '?')}", number(one.get("mean")), None, lower,
             f"α {number(one.get('alpha')) or 0:.3g}; {one.get('problems', '?')} problems{says}",
             gate]
        )  # fmt: skip
        for bound in certificate.get("theory", []):
            status = str(bound.get("status", "?"))
            if status == "vacuous":
                marks[len(rows)] = "weak"
            rows.append(
                [step, f"theory, {bound.get('name', '?')}", number(bound.get("gain")),
                 number(bound.get("penalty")), number(bound.get("lower")), status + reported, ""]
            )  # fmt: skip
    cut = f" The last {LONGEST} of {len(tested)} tests." if len(tested) > LONGEST else ""
    return Table(
        "Theory beside statistics",
        ["step", "bound", "estimate", "penalty", "lower", "status", "gate"],
        rows,
        note="A vacuous bound has a penalty above all that a step of this size could gain or lose: "
        "it says nothing. A plug-in bound is made of estimates and proves nothing." + cut,
        marks=marks,
    )


def swap_tables(source: Source) -> list[Table]:
    rows: list[list[str | Number]] = []
    marks: dict[int, str] = {}
    for event in source.of(SwapEvent):
        for record in event["swaps"]:
            verdict = record["verdict"]
            marks[len(rows)] = "good" if verdict in ("accepted", "mixture") else "bad"
            mean, low, high = (number(v) for v in record.get("difference", (None, None, None)))
            between = f" [{low:+.3f}, {high:+.3f}]" if low is not None and high is not None else ""
            rows.append(
                [
                    f"after {event['stage']}",
                    ", ".join(record["seats"]),
                    ", ".join(dict.fromkeys(record["models"].values())),
                    record["method"],
                    verdict,
                    number(record["before"]),
                    number(record["naive"]),
                    number(record.get("after")),
                    "" if mean is None else f"{mean:+.3f}{between}",
                    record["reason"],
                ]
            )
    if not rows:
        return []
    columns = [
        "stage", "seats", "model", "method", "verdict", "before", "as it is", "after", "change",
        "why",
    ]  # fmt: skip
    note = "“As it is”: the newcomer put in without being drawn near. Change: paired, 95%."
    return [Table("Swaps", columns, rows, note, marks)]


def _failures(source: Source) -> Iterator[tuple[str, Failures]]:
    for event in source.of(RolloutEvent):
        yield f"stage {event['stage']}, rollout before step {event['step']}", event["failures"]
    for event in source.of(EvalEvent):
        how = "greedy" if event["greedy"] else "sampled"
        yield f"evaluation after stage {event['stage']}, {how}", event["failures"]


def failure_table(source: Source) -> Table | None:
    """Failed conversations by whose failure it was and its kind, over rollouts and evaluations."""
    sums: dict[tuple[str, str], list[Any]] = {}
    for where, failures in _failures(source):
        for whose, kinds in failures.items():
            for kind, count in kinds.items():
                row = sums.setdefault((whose, kind), [0, where])
                row[0] += count
    if not sums:
        return None
    says = {"policy": "the policy's own: reward 0, learnt from", "world": "the world's: masked"}
    return Table(
        "Failed conversations",
        ["whose", "kind", "count", "first in"],
        [[says.get(whose, whose), kind, *row] for (whose, kind), row in sums.items()],
    )


def trouble_table(source: Source) -> Table | None:
    """Steps that left nothing, or less than they proposed, behind, with the reason."""
    rows: list[list[str | Number]] = []
    marks: dict[int, str] = {}
    for event in source.of(UpdateEvent):
        outcome = outcome_of(event)
        if outcome in ("reverted", "refused", "idle"):
            gate = event["gate"].get("reason", "") if outcome == "refused" else ""  # type: ignore[typeddict-item]
            marks[len(rows)] = "weak" if outcome == "idle" else "bad"
            rows.append(
                [f"{event['stage']}.{event['step']}", event["agent"], outcome,
                 gate or event["reason"]]
            )  # fmt: skip
    if not rows:
        return None
    more = len(rows) - LONGEST
    note = f"And {more} more." if more > 0 else ""
    columns = ["step", "agent", "outcome", "reason"]
    return Table("Steps that changed nothing", columns, rows[:LONGEST], note, marks)


def complaint_table(source: Source) -> Table | None:
    if not source.complaints:
        return None
    rows = [[line] for line in source.complaints[:LONGEST]]
    marks = dict.fromkeys(range(len(rows)), "bad")
    return Table("What this report could not read", ["line"], rows, marks=marks)


def self_check_table(source: Source) -> Table | None:
    found = [event["self_check"] for event in source.of(RunEvent)]
    if not found or not found[0]:
        return None
    names = list(dict.fromkeys(name for of in found[0].values() for name in of))
    rows = [[agent, *(number(of.get(name)) for name in names)] for agent, of in found[0].items()]
    return Table(
        "Engine against learner, before the first step",
        ["agent", *(name.replace("_", " ") for name in names)],
        rows,
        note="Ratio and KL of the policy to itself, and by how much the log-probabilities differ "
        "with which tokens were sampled and scored.",
    )


def warnings(source: Source) -> list[str]:
    """Lines for the head of a report: what a reader should know before the figures."""
    said = []
    updates = source.of(UpdateEvent)
    lost = [event for event in updates if outcome_of(event) in ("reverted", "refused")]
    if lost:
        said.append(f"{len(lost)} of {len(updates)} steps were taken back")
    broken = [event for event in lost if "kl" not in event]
    if broken:
        said.append(f"{len(broken)} of them because a number was not finite")
    said += [
        str(event.get("rounding", {})["warning"])
        for event in updates
        if "warning" in event.get("rounding", {})
    ][-1:]
    failed = sum(
        count for _, of in _failures(source) for kinds in of.values() for count in kinds.values()
    )
    if failed:
        said.append(f"{failed:,} conversations failed")
    stages = source.of(StageEvent)
    if stages and stages[-1].get("uncertified"):
        named = ", ".join(stages[-1].get("uncertified", []))
        said.append(f"no certificate covers the last changes of {named}")
    planned = next((event["stages"] for event in source.of(RunEvent)), None)
    if planned is not None and len(stages) < planned and not source.summary:
        said.append(f"{len(stages)} of {planned} stages are done: the run is not finished")
    if source.complaints:
        said.append(f"{len(source.complaints)} things could not be read")
    return said


def versions(source: Source) -> Sequence[tuple[str, str]]:
    """Facts about the run's making: seed, torch, Python, device, threads."""
    runs = source.of(RunEvent)
    if not runs:
        return []
    host: Mapping[str, Any] = runs[0]["host"]
    return [("seed", str(runs[0]["seed"])), *((k, str(v)) for k, v in host.items())]
