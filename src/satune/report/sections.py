"""What a report says of one run, section by section, and of several together."""

from __future__ import annotations

from collections.abc import Sequence

from satune.files.events import EvalEvent, RolloutEvent, StageEvent, UpdateEvent
from satune.report import claims, comparison, precision, timeline, training
from satune.report.charts import Chart, Section, Table, Timeline, number
from satune.report.source import Source

Item = Chart | Timeline | Table


def head(source: Source) -> list[tuple[str, str]]:
    """The facts at the top: (what, figure); a figure that was not measured is absent."""
    found: list[tuple[str, str]] = []
    sampled = [event for event in source.of(EvalEvent) if not event["greedy"]]
    if sampled:
        rewards = [number(event["reward"]) for event in (sampled[0], sampled[-1])]
        shown = ["?" if reward is None else f"{reward:.3f}" for reward in rewards]
        arrow = " → ".join(shown) if len(sampled) > 1 else shown[0]
        found.append(("held-out reward", arrow))
    gain = sampled[-1].get("difference") if sampled else None
    if gain and len(gain) == 3:
        mean, low, high = map(float, gain)
        found.append(("paired change, 95%", f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"))
    stages, planned = len(source.of(StageEvent)), training.planned_stages(source)
    if stages or planned:
        found.append(("stages", f"{stages}" + (f" of {planned}" if planned else "")))
    steps = [f"{count:,} {outcome}" for outcome, count in training.outcome_counts(source).items()]
    if steps:
        found.append(("steps", ", ".join(steps)))
    episodes = sum(event["episodes"] for event in source.of(RolloutEvent))
    if episodes:
        found.append(("training episodes", f"{episodes:,}"))
    if tokens := timeline.sampled_tokens(source):
        found.append(("sampled tokens", f"{tokens:,}"))
    if seconds := timeline.total_seconds(source):
        found.append(("time", _duration(seconds)))
    peaks = [event["memory"].get("peak") for event in source.of(StageEvent)]
    if peaks and peaks[-1]:
        found.append(("largest memory", f"{peaks[-1] / 2**30:.1f} GiB"))
    return found


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def of_run(source: Source, rewards: training.Rewards) -> list[Section]:
    """The sections of one run. What an evaluation of ``satune eval`` cannot have is left out."""
    sections = [
        Section("reward", "Reward", "", [training.reward_chart(source, rewards)]),
        Section(
            "trust-region",
            "Trust region",
            "How far each step moved its agent, and what was done about it. One step updates one "
            "agent; its anchor is the agent before the step.",
            [
                training.divergence_chart(source),
                training.violation_chart(source),
                training.scale_chart(source),
                training.penalty_chart(source),
            ],
        ),
        Section(
            "experience",
            "Experience",
            "What the steps learnt from, and how far it had grown stale.",
            _experience(source),
        ),
        Section("certificates", "Certificates", "", _certificates(source)),
        Section(
            "cost",
            "Time, tokens, memory",
            "",
            [
                timeline.timeline(source),
                timeline.time_table(source),
                timeline.token_chart(source),
                timeline.memory_chart(source),
            ],
        ),
        Section("swaps", "Swaps", "", claims.swap_tables(source)),
        Section("trouble", "What went wrong", *_trouble(source)),
        Section("recipe", "Recipe and versions", "", _making(source)),
    ]
    if not source.of(UpdateEvent) and (source.path / "conversations.jsonl").is_file():
        sections = [s for s in sections if s.id in ("reward", "trouble", "recipe")]
    return [section for section in sections if section.items or section.text]


def _experience(source: Source) -> list[Item]:
    found: list[Item] = [
        training.experience_chart(source),
        precision.mismatch_chart(source),
        precision.rounding_chart(source),
    ]
    table = precision.rounding_table(source)
    return found if table is None else [*found, table]


def _certificates(source: Source) -> list[Item]:
    chart = claims.certificate_chart(source)
    table = claims.certificate_table(source)
    return [chart, table] if table.rows else [chart]


def _trouble(source: Source) -> tuple[str, list[Item]]:
    tables = [
        claims.complaint_table(source),
        claims.failure_table(source),
        claims.trouble_table(source),
    ]
    found: list[Item] = [table for table in tables if table is not None]
    text = "" if found else "Nothing: no failed conversation, no step taken back, no damaged file."
    return text, found


def _making(source: Source) -> list[Item]:
    facts = claims.versions(source)
    tables = [
        Table("Made with", ["what", "value"], [list(fact) for fact in facts]) if facts else None,
        claims.self_check_table(source),
        Table("Recipe", ["key", "value"], [[k, v] for k, v in source.recipe.items()]),
    ]
    return [table for table in tables if table is not None and table.rows]


def of_several(sources: Sequence[Source]) -> list[Section]:
    """What several runs say beside one another."""
    return [
        Section(
            "compare",
            "Runs beside one another",
            "",
            [
                comparison.reward_comparison(sources),
                comparison.training_comparison(sources),
                comparison.result_table(sources),
                comparison.recipe_differences(sources),
            ],
        ),
        Section(
            "delta",
            "Trust region against its size",
            "",
            [comparison.violations_by_delta(sources)],
        ),
    ]
