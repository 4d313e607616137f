"""What took how long: a timeline of every agent's steps, and sums by phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from satune.files.events import EvalEvent, RolloutEvent, StageEvent, SwapEvent, UpdateEvent
from satune.report.charts import Bar, Chart, Colour, Series, Table, Timeline, number
from satune.report.source import Source

PHASES: dict[str, Colour] = {
    "rollout": 0, "grading": 3, "score": 5, "update": 1, "measure": 2, "certify": 4,
    "publish": "ink", "evaluate": "faint", "other": "faint",
}  # fmt: skip
"""The parts of a step in the order in which they are drawn, then what the team does beside; phases
that are not known here follow by name."""
TEAM = "team"


def _seconds(told: Mapping[str, float]) -> Iterable[tuple[str, float]]:
    known = {name: number(value) or 0.0 for name, value in told.items()}
    order = [*(p for p in PHASES if p in known), *sorted(set(known) - set(PHASES))]
    return [(name, known[name]) for name in order if known[name] > 0]


def timeline(source: Source) -> Timeline:
    """Each step's phases one after the other on its agent's lane, evaluations and what a stage
    spent beside its steps on the team's. Seconds count work alone: no gap for a time in which
    nobody trained. Grading goes on beside the rollout and is drawn from its beginning."""
    lanes = [*source.agents, TEAM]
    bars: list[Bar] = []
    stages: list[tuple[int, float]] = []
    now = spent = 0.0
    for event in source.events:
        if event["event"] == "update":
            if not stages or stages[-1][0] != event["stage"]:
                stages.append((event["stage"], now))
                spent = 0.0
            lane, began = lanes.index(event["agent"]), now
            for phase, seconds in _seconds(event["seconds"]):
                start = began if phase == "grading" else now
                tip = f"{event['agent']}, stage {event['stage']}"
                bars.append(Bar(lane, start, start + seconds, phase, tip))
                now = max(now, start + seconds)
            spent += now - began
        elif event["event"] == "stage":
            rest = (number(event["seconds"]) or 0.0) - spent
            if rest > 0:
                told = f"saving and the rest of stage {event['stage']}"
                bars.append(Bar(len(lanes) - 1, now, now + rest, "other", told))
                now += rest
            spent = 0.0
        elif event["event"] == "eval":
            seconds = number(event["seconds"]) or 0.0
            how = "greedy" if event["greedy"] else "sampled"
            told = f"evaluation after stage {event['stage']}, {how}"
            bars.append(Bar(len(lanes) - 1, now, now + seconds, "evaluate", told))
            now += seconds
    used = [bar.phase for bar in bars]
    phases = [p for p in PHASES if p in used] + sorted(set(used) - set(PHASES))
    return Timeline(
        "timeline",
        "Where the time went",
        lanes,
        phases,
        [PHASES.get(phase, 3) for phase in phases],
        bars,
        stages,
        note="Seconds of work, phase by phase. Scoring and updating take turns by mini-batch and "
        "are drawn one after the other.",
        absent="No step has ended yet.",
    )


def time_table(source: Source) -> Table:
    """Seconds by phase and agent; the team's row has the evaluations and what else there was."""
    drawn = timeline(source)
    sums: dict[str, dict[str, float]] = {lane: {} for lane in drawn.lanes}
    for bar in drawn.bars:
        of = sums[drawn.lanes[bar.lane]]
        of[bar.phase] = of.get(bar.phase, 0.0) + bar.end - bar.start
    rows = [
        [lane, *(of.get(phase) for phase in drawn.phases), sum(of.values())]
        for lane, of in sums.items()
    ]
    return Table("Seconds by phase", ["agent", *drawn.phases, "sum"], rows)


def token_chart(source: Source) -> Chart:
    """Tokens read and written in the rollouts of each stage, and for its certificates."""
    sums: dict[str, dict[int, float]] = {}
    for event in source.of(RolloutEvent):
        for name in ("prompt", "sampled", "environment"):
            of = sums.setdefault(name, {})
            of[event["stage"]] = of.get(event["stage"], 0) + event["tokens"].get(name, 0)
    for event in source.of(UpdateEvent):
        if "certify" in event["tokens"]:
            of = sums.setdefault("sampled for certificates", {})
            of[event["stage"]] = of.get(event["stage"], 0) + event["tokens"]["certify"]
    shown = [(name, of) for name, of in sums.items() if any(of.values())]
    return Chart(
        "tokens",
        "Tokens of a stage",
        "stage",
        "tokens",
        [
            Series(name, [float(s) for s in of], list(of.values()), at, marker=at)
            for at, (name, of) in enumerate(shown)
        ],
        absent="There is no rollout yet.",
    )


def memory_chart(source: Source) -> Chart:
    stages = [event for event in source.of(StageEvent) if "peak" in event["memory"]]
    return Chart(
        "memory",
        "Largest memory held so far",
        "stage",
        "GiB",
        [
            Series(
                "peak",
                [float(event["stage"]) for event in stages],
                [event["memory"]["peak"] / 2**30 for event in stages],
                marker=0,
                colour=0,
            )
        ],
        note="Of the accelerator where there is one, else of the process.",
        absent="No stage has ended yet.",
    )


def total_seconds(source: Source) -> float:
    """Seconds of all stages, evaluations and swaps."""
    stages = [e["seconds"] for kind in (StageEvent, EvalEvent, SwapEvent) for e in source.of(kind)]
    return sum(number(seconds) or 0.0 for seconds in stages)


def sampled_tokens(source: Source) -> int:
    """Tokens that the seats wrote in rollouts, certificates and evaluations."""
    played = sum(event["tokens"].get("sampled", 0) for event in source.of(RolloutEvent))
    certified = sum(event["tokens"].get("certify", 0) for event in source.of(UpdateEvent))
    evaluated = sum(event["tokens"] for event in source.of(EvalEvent))
    return played + certified + evaluated
