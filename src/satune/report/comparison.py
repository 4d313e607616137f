"""Several runs beside one another: their curves, what differs in recipe and result, and how often a
trust region was passed against its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from satune.files.events import EvalEvent, RolloutEvent, UpdateEvent
from satune.report.charts import Chart, Number, Rule, Series, Table, number
from satune.report.source import Source
from satune.report.timeline import sampled_tokens, total_seconds
from satune.report.training import SWEEPS, interval_of, outcome_counts


def reward_comparison(sources: Sequence[Source]) -> Chart:
    """Held-out reward by sweep, a line a run; one that was evaluated once is a level."""
    series, rules = [], []
    for at, source in enumerate(sources):
        own = [event for event in source.of(EvalEvent) if not event["greedy"]]
        own = own or source.of(EvalEvent)
        if len({event["stage"] for event in own}) == 1:
            # A baseline that is not trained has one reward for all sweeps.
            reward = number(own[-1]["reward"])
            if reward is not None:
                rules.append(Rule(reward, source.name))
        elif own:
            intervals = [interval_of(event) for event in own]
            series.append(
                Series(
                    source.name,
                    [float(event["stage"]) for event in own],
                    [number(event["reward"]) for event in own],
                    at,
                    marker=at,
                    low=[low for low, _ in intervals],
                    high=[high for _, high in intervals],
                )
            )
    return Chart(
        "comparison",
        "Held-out reward",
        SWEEPS,
        "reward",
        series,
        rules=rules,
        ceiling=1.0,
        note="Sampled evaluations; whiskers: 95% by problem. A run without training is a level. "
        "Runs compare only where their task and held-out problems are the same.",
        absent="No run was evaluated twice." if rules else "No run has an evaluation.",
    )


def training_comparison(sources: Sequence[Source]) -> Chart:
    series = []
    for at, source in enumerate(sources):
        own = [event for event in source.of(RolloutEvent) if event["step"] == 1]
        if own:
            series.append(
                Series(
                    source.name,
                    [float(event["stage"] - 1) for event in own],
                    [number(event["reward"]) for event in own],
                    at,
                    marker=at,
                )
            )
    return Chart(
        "comparison-training",
        "Reward of the training problems",
        SWEEPS,
        "reward",
        series,
        ceiling=1.0,
        absent="No run has a rollout.",
    )


def violations_by_delta(sources: Sequence[Source]) -> Chart:
    """The paper's Figure 1 (c): violation rate against δ, with its upper bound and a √δ line.

    A point is the mean over a run's steps of one δ. The line c√δ goes through the points by least
    squares, c = Σ v √δ / Σ δ.
    """
    points = sorted(
        (
            delta,
            fmean(found),
            None if None in uppers else fmean(u for u in uppers if u is not None),
            f"{source.name}, {len(found)} steps",
        )
        for source in sources
        for delta, found, uppers in _rates(source)
    )
    fitted = ""
    series = []
    if len({delta for delta, *_ in points}) > 1:
        slope = sum(v * math.sqrt(d) for d, v, *_ in points) / sum(d for d, *_ in points)
        ends = [points[0][0], points[-1][0]]
        xs = [ends[0] * (ends[1] / ends[0]) ** (at / 40) for at in range(41)]
        series.append(Series("c√δ", xs, [slope * math.sqrt(x) for x in xs], "faint", "dashed"))
        fitted = f" The dashed line is {slope:.3g}·√δ, fitted."
    series.append(
        Series(
            "mean over steps",
            [delta for delta, *_ in points],
            [rate for _, rate, _, _ in points],
            0,
            line="none",
            marker=0,
            low=[rate for _, rate, _, _ in points],
            high=[upper for _, _, upper, _ in points],
            tips=[tip for *_, tip in points],
        )
    )
    return Chart(
        "violations-by-delta",
        "Violation rate against δ",
        "δ, nats",
        "share of problems with a state beyond δ",
        series,
        log_x=True,
        note="Whiskers reach the mean of the steps' upper confidence bounds." + fitted,
        absent="No step has been measured.",
    )


def _rates(source: Source) -> list[tuple[float, list[float], list[Number]]]:
    """By δ: the violation rates of the steps measured, and their upper bounds."""
    of: dict[float, tuple[list[float], list[Number]]] = {}
    for event in source.of(UpdateEvent):
        rate = number(event["kl"]["violation_rate"]) if "kl" in event else None
        delta = number(event["delta"])
        if rate is not None and delta is not None and delta > 0 and "kl" in event:
            found, uppers = of.setdefault(delta, ([], []))
            found.append(rate)
            uppers.append(number(event["kl"]["violation_ucb"]))
    return [(delta, *rates) for delta, rates in of.items()]


def recipe_differences(sources: Sequence[Source]) -> Table:
    """Every key of the recipes that is not the same in all runs."""
    keys = dict.fromkeys(key for source in sources for key in source.recipe)
    rows = []
    for key in keys:
        values = [source.recipe.get(key, "") for source in sources]
        if len(set(values)) > 1:
            rows.append([key, *values])
    note = "" if rows else "The recipes are the same."
    return Table("What differs in the recipe", ["key", *(s.name for s in sources)], rows, note)


def result_table(sources: Sequence[Source]) -> Table:
    rows: list[list[str | Number]] = []
    for source in sources:
        sampled = [event for event in source.of(EvalEvent) if not event["greedy"]]
        greedy = [event for event in source.of(EvalEvent) if event["greedy"]]
        first, last = (sampled[0], sampled[-1]) if sampled else (None, None)
        low, high = interval_of(last) if last else (None, None)
        gain = last.get("difference") if last else None
        rows.append(
            [
                source.name,
                number(first["reward"]) if first else None,
                number(last["reward"]) if last else None,
                "" if low is None or high is None else f"[{low:.3f}, {high:.3f}]",
                f"{float(gain[0]):+.3f} [{float(gain[1]):+.3f}, {float(gain[2]):+.3f}]"
                if gain and len(gain) == 3
                else "",
                number(greedy[-1]["reward"]) if greedy else None,
                ", ".join(
                    f"{count} {outcome}" for outcome, count in outcome_counts(source).items()
                ),
                sampled_tokens(source),
                total_seconds(source),
            ]
        )
    columns = [
        "run", "first", "last", "95%", "paired change", "greedy", "steps", "sampled tokens",
        "seconds",
    ]  # fmt: skip
    return Table("What came out", columns, rows)
