"""From a run's events to the numbers of its charts: reward, trust region, experience."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Literal

from satune.files.events import EvalEvent, RolloutEvent, RunEvent, StageEvent, UpdateEvent
from satune.report.charts import OUTCOMES, Chart, Lane, Number, Outcome, Rule, Series, number
from satune.report.source import EpisodeRow, Source

Place = tuple[int, int]
"""(stage, step)."""
SWEEPS = "sweeps over the team"
_NORMAL = 1.96


@dataclass(slots=True)
class Rewards:
    """The rewards of training episodes by rollout and problem, gathered as episodes are read."""

    of: dict[Place, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, row: EpisodeRow) -> None:
        """Take in one conversation; what the world ended counts nowhere."""
        failure = row["failure"]
        reward = number(row["grade"]["score"])
        if "step" in row and reward is not None and (failure is None or failure["policy"]):
            rollout = self.of.setdefault((row.get("stage", 0), row["step"]), {})
            rollout.setdefault(row["problem"]["id"], []).append(reward)

    def interval(self, place: Place) -> tuple[Number, Number]:
        """Mean over problems ± 1.96 standard errors, cut to [0, 1]; problems are the independent
        units. (None, None) for fewer than two problems."""
        means = [fmean(rewards) for rewards in self.of.get(place, {}).values()]
        if len(means) < 2:
            return None, None
        half = _NORMAL * stdev(means) / math.sqrt(len(means))
        return max(0.0, fmean(means) - half), min(1.0, fmean(means) + half)


def outcome_of(event: UpdateEvent) -> Outcome:
    verdict = event["gate"]["verdict"] if "gate" in event else "kept"
    if verdict == "reverted":
        return "refused"
    if event["accepted"]:
        return "shrunk" if verdict == "shrunk" or (number(event["scale"]) or 0) < 1 else "accepted"
    return "idle" if _taught_nothing(event) else "reverted"


def _taught_nothing(event: UpdateEvent) -> bool:
    """Whether no proposal was made. One that broke off at a number that is not finite was."""
    return "kl" not in event and "seconds" in event and not event["seconds"].get("update")


class Axis:
    """Where the steps of a run lie on the x axis."""

    def __init__(self, source: Source) -> None:
        self._steps: dict[int, int] = {}
        for event in source.of(UpdateEvent):
            stage = event["stage"]
            self._steps[stage] = max(self._steps.get(stage, 1), event["step"])
        over = {event["stage"] for event in source.of(StageEvent)}
        named = [len(event["agents"]) for event in source.of(RunEvent)]
        # A stage that is not over will have as many steps as another, or as there are agents.
        usual = max(
            [count for stage, count in self._steps.items() if stage in over] or named or [1]
        )
        for stage, count in self._steps.items():
            if stage not in over:
                self._steps[stage] = max(count, usual)
        self._usual = max(1, usual)

    def after(self, stage: int, step: int) -> float:
        """The place at which a step is done; step 0 is the beginning of the stage."""
        return stage - 1 + step / self._steps.get(stage, self._usual)


def reward_chart(source: Source, rewards: Rewards) -> Chart:
    """Team reward by sweep: training rollouts with their band, held-out evaluations, and below them
    what became of each agent's steps."""
    axis, series = Axis(source), []
    rollouts = [event for event in source.of(RolloutEvent) if event["step"] > 0]
    if rollouts:
        at = [(event["stage"], event["step"]) for event in rollouts]
        bands = [rewards.interval(place) for place in at]
        series.append(
            Series(
                "training problems",
                [axis.after(s, k - 1) for s, k in at],
                [number(event["reward"]) for event in rollouts],
                low=[low for low, _ in bands],
                high=[high for _, high in bands],
                tips=[
                    f"stage {s}, before step {k}; {event['episodes']:,} episodes"
                    for (s, k), event in zip(at, rollouts, strict=True)
                ],
            )
        )
    series += evaluation_series(source.of(EvalEvent))
    return Chart(
        "reward",
        "Team reward",
        SWEEPS,
        "reward",
        series,
        lanes=outcome_lanes(source),
        ceiling=1.0,
        explained=True,
        note="The line is the mean reward of the episodes that a sweep learns from, drawn where "
        "the sweep begins; points are evaluations on held-out problems. Band and whiskers: 95% by "
        "problem. Below: each step of each agent.",
        absent="The run has written no rollout and no evaluation yet.",
    )


def evaluation_series(evals: Sequence[EvalEvent]) -> list[Series]:
    found = []
    for greedy, marker in ((False, 0), (True, 1)):
        own = [event for event in evals if event["greedy"] == greedy]
        if own:
            intervals = [interval_of(event) for event in own]
            found.append(
                Series(
                    f"held-out, {'greedy' if greedy else 'sampled'}",
                    [float(event["stage"]) for event in own],
                    [number(event["reward"]) for event in own],
                    colour="held",
                    line="none",
                    marker=marker,
                    low=[low for low, _ in intervals],
                    high=[high for _, high in intervals],
                    tips=[
                        f"after stage {e['stage']}; {e['problems']} problems × {e['samples']}"
                        for e in own
                    ],
                )
            )
    return found


def interval_of(event: EvalEvent) -> tuple[Number, Number]:
    """The ends of the interval around an evaluation's reward; None where there is none."""
    interval = event["interval"]
    if interval is None or len(interval) != 2:
        return None, None
    return number(interval[0]), number(interval[1])


def outcome_lanes(source: Source) -> list[Lane]:
    axis, lanes = Axis(source), []
    for colour, agent in enumerate(source.agents):
        own = [event for event in source.of(UpdateEvent) if event["agent"] == agent]
        lanes.append(
            Lane(
                agent,
                colour,
                [axis.after(event["stage"], event["step"]) for event in own],
                [outcome_of(event) for event in own],
                [_told(event) for event in own],
            )
        )
    return lanes


def _told(event: UpdateEvent) -> str:
    gate = event["gate"].get("reason", "") if "gate" in event else ""
    return "; ".join(filter(None, (f"stage {event['stage']}", event["reason"], gate)))


def divergence_chart(source: Source) -> Chart:
    """The KL quantile that the trust region holds against δ, a step a point."""
    known = {number(event["delta"]) for event in source.of(UpdateEvent)} - {None}
    deltas = sorted(delta for delta in known if delta is not None)
    return Chart(
        "divergence",
        "KL to the anchor against δ",
        SWEEPS,
        "KL quantile, nats",
        by_agent(source, lambda e: e["kl"]["quantile"] if "kl" in e else None),
        rules=[Rule(delta, f"δ {delta:g}") for delta in deltas],
        explained=True,
        note="The quantile over the agent's own states of KL(proposal‖anchor), of what was "
        "measured last in the step. A quantile is no maximum: the largest value is in the tip.",
        absent="No step has been measured yet.",
    )


def violation_chart(source: Source) -> Chart:
    rates = by_agent(source, lambda e: e["kl"]["violation_rate"] if "kl" in e else None)
    uppers = by_agent(source, lambda e: e["kl"]["violation_ucb"] if "kl" in e else None)
    series = [
        replace(rate, low=rate.y, high=upper.y) for rate, upper in zip(rates, uppers, strict=True)
    ]
    return Chart(
        "violation",
        "Problems with a state beyond δ",
        SWEEPS,
        "share of problems",
        series,
        note="Whiskers reach up to the upper confidence bound of the share (Clopper-Pearson, by "
        "problem).",
        absent="No step has been measured yet.",
    )


def penalty_chart(source: Source) -> Chart:
    return Chart(
        "beta",
        "Weight β of the KL penalty",
        SWEEPS,
        "β",
        by_agent(source, lambda e: e["beta"]),
        log_y=True,
        floor=None,
        absent="There is no step yet.",
    )


def scale_chart(source: Source) -> Chart:
    return Chart(
        "scale",
        "Share of the proposal that was taken",
        SWEEPS,
        "scale",
        by_agent(source, lambda e: e["scale"], line="none"),
        ceiling=1.0,
        note="1: as the optimiser made it; less: drawn back towards the anchor until it lay "
        "inside; 0: taken back.",
        absent="There is no step yet.",
    )


def experience_chart(source: Source) -> Chart:
    """ESS as a share of the episodes, the threshold of hybrid, and where it rolled out anew."""
    name = source.recipe.get("schedule.name", "")
    threshold = number(source.recipe.get("schedule.ess", 0.5 if name == "hybrid" else None))
    axis = Axis(source)
    anew = [event for event in source.of(RolloutEvent) if event["step"] > 1]
    series = by_agent(source, lambda e: _share(e["ess"], e["episodes"]))
    if anew:
        series.append(
            Series(
                "rolled out anew before this step",
                [axis.after(event["stage"], event["step"]) for event in anew],
                [0.0] * len(anew),
                colour="ink",
                line="none",
                marker=6,
                tips=[f"stage {event['stage']}, step {event['step']}" for event in anew],
            )
        )
    return Chart(
        "experience",
        "Effective sample size",
        SWEEPS,
        "ESS / episodes",
        series,
        rules=[Rule(threshold, f"hybrid rolls out anew below {threshold:g}")] if threshold else [],
        ceiling=1.0,
        note=f"Schedule: {name or 'not known'}. 1: every episode weighs the same. Agents updated "
        "since the rollout make the weights uneven; a new rollout makes them even again.",
        absent="There is no step yet.",
    )


def _share(part: float, whole: float) -> Number:
    size = number(part)
    return None if size is None or not whole else size / whole


def by_agent(
    source: Source,
    value: Callable[[UpdateEvent], object],
    line: Literal["solid", "none"] = "solid",
) -> list[Series]:
    """A series an agent of ``value(event)``, a point a step."""
    axis, found = Axis(source), []
    for colour, agent in enumerate(source.agents):
        own = [event for event in source.of(UpdateEvent) if event["agent"] == agent]
        if own:
            found.append(
                Series(
                    agent,
                    [axis.after(event["stage"], event["step"]) for event in own],
                    [number(value(event)) for event in own],
                    colour,
                    line,
                    marker=colour,
                    outcomes=[outcome_of(event) for event in own],
                    tips=[_measured(event) for event in own],
                )
            )
    return found


def _measured(event: UpdateEvent) -> str:
    said = [f"stage {event['stage']}, step {event['step']}", event["reason"]]
    if "kl" in event:
        said.append(f"largest KL {float(event['kl']['max']):.3g}")
    return "; ".join(said)


def outcome_counts(source: Source) -> dict[Outcome, int]:
    """How many steps came to which end, in the order of ``OUTCOMES``; none of 0."""
    found = [outcome_of(event) for event in source.of(UpdateEvent)]
    return {outcome: found.count(outcome) for outcome in OUTCOMES if outcome in found}


def planned_stages(source: Source) -> int | None:
    return next((event["stages"] for event in source.of(RunEvent)), None)
