"""What numbers are off by: engine against learner, and what rounding makes of a step."""

from __future__ import annotations

import math

from satune.files.events import UpdateEvent
from satune.report.charts import Chart, Rule, Series, Table, number
from satune.report.source import Source
from satune.report.training import SWEEPS, Axis, by_agent


def mismatch_chart(source: Source) -> Chart:
    return Chart(
        "mismatch",
        "Engine against learner",
        SWEEPS,
        "largest |Δ log p| of a token, nats",
        by_agent(source, lambda e: e.get("mismatch", {}).get("max")),
        log_y=True,
        floor=None,
        note="How far the log-probabilities with which tokens were sampled lie from the learner's; "
        "for turns of an older version the update is part of it.",
        absent="The engine gave no log-probabilities, or there is no step yet.",
    )


def rounding_chart(source: Source) -> Chart:
    """The noise that rounding alone puts into u, the log-ratio of an episode, where it was gauged.

    The clip's edge is log(1 + clip): noise near it decides by itself what is clipped.
    """
    axis, series = Axis(source), []
    for colour, agent in enumerate(source.agents):
        own = [e for e in _gauged(source) if e["agent"] == agent]
        if own:
            series.append(
                Series(
                    agent,
                    [axis.after(event["stage"], event["step"]) for event in own],
                    [number(event.get("rounding", {}).get("episode")) for event in own],
                    colour,
                    marker=colour,
                    tips=[str(event.get("rounding", {}).get("warning", "")) for event in own],
                )
            )
    clip = number(source.recipe.get("objective.clip"))
    edge = [] if clip is None or clip <= 0 or not series else [Rule(math.log1p(clip), "the clip")]
    return Chart(
        "rounding",
        "Noise of u by rounding",
        SWEEPS,
        "standard deviation of u, nats",
        series,
        rules=edge,
        floor=None,
        log_y=True,
        note="u is log(new/old) of an episode. Gauged in the first stage and where the recipe asks "
        "for it (gauge.every).",
        absent="No step's rounding was gauged.",
    )


def rounding_table(source: Source) -> Table | None:
    """All that was gauged, a row a step; None where nothing was."""
    names = ("token", "episode", "clipped", "floor", "kl", "kl_rounded", "kl_masters")
    rows, marks = [], dict[int, str]()
    for event in _gauged(source):
        found = event.get("rounding", {})
        if "warning" in found:
            marks[len(rows)] = "bad"
        step = f"{event['stage']}.{event['step']} {event['agent']}"
        rows.append([step, *(number(found.get(name)) for name in names)])
    columns = [
        "step", "noise of a token", "of u", "clipped by it", "KL where nothing moved", "KL",
        "KL of rounded weights", "KL of masters",
    ]  # fmt: skip
    return Table("What rounding makes of a step", columns, rows, marks=marks) if rows else None


def _gauged(source: Source) -> list[UpdateEvent]:
    return [event for event in source.of(UpdateEvent) if "rounding" in event]
