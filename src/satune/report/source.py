"""What a directory holds that a report can be made of: read leniently, with a line for everything
that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar, cast

import yaml

from satune.files.arrays import scan_rows
from satune.files.events import (
    EvalEvent,
    Event,
    RolloutEvent,
    RunEvent,
    StageEvent,
    SwapEvent,
    UpdateEvent,
)
from satune.files.lines import scan_lines
from satune.files.shapes import misfit
from satune.types import UserError

SHAPES: dict[str, Any] = {
    "run": RunEvent,
    "rollout": RolloutEvent,
    "update": UpdateEvent,
    "stage": StageEvent,
    "eval": EvalEvent,
    "swap": SwapEvent,
}
_MARKS = ("events.jsonl", "recipe.yaml", "summary.json", "episodes", "conversations.jsonl")


class TurnRow(TypedDict):
    seat: str
    agent: str
    moment: int
    text: str
    finish_reason: str
    version: int
    completion_ids: Any
    sampled_logprobs: Any
    dropped: int
    completion_tokens: int


class GradeRow(TypedDict):
    score: float
    components: dict[str, Any]
    detail: str
    seats: dict[str, Any] | None


class FailureRow(TypedDict):
    reason: str
    policy: bool


class ProblemRow(TypedDict):
    id: str
    prompt: list[dict[str, Any]]
    answer: Any


class EpisodeRow(TypedDict):
    """A conversation as ``play.rows`` writes it. One of a training rollout also has its stage and
    step, one of an evaluation in training the stage after which it was played."""

    problem: ProblemRow
    sample: int
    turns: list[TurnRow]
    answer: str | None
    grade: GradeRow
    observations: list[list[Any]]
    failure: FailureRow | None
    stage: NotRequired[int]
    step: NotRequired[int]
    greedy: NotRequired[bool]


_Kind = TypeVar("_Kind")


@dataclass(slots=True)
class Source:
    """One run, or one evaluation of ``satune eval``, as it lies on the disk.

    ``recipe`` has the recipe's values by dotted key, as texts. ``complaints`` are lines about what
    is damaged or missing, for a person.
    """

    path: Path
    name: str
    events: list[Event] = field(default_factory=list)
    recipe: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def of(self, kind: type[_Kind]) -> list[_Kind]:
        """The events of one kind, in order."""
        name = next(name for name, shape in SHAPES.items() if shape is kind)
        return cast(list[_Kind], [event for event in self.events if event["event"] == name])

    @property
    def agents(self) -> list[str]:
        """The agents that learn or learnt, in the order in which the run names them."""
        named = [agent for event in self.of(RunEvent) for agent in event["agents"]]
        stepped = {event["agent"]: None for event in self.of(UpdateEvent)}
        return [*(a for a in dict.fromkeys(named) if a in stepped or not stepped)] + [
            agent for agent in stepped if agent not in named
        ]

    def episodes(self) -> Iterator[EpisodeRow]:
        """Every conversation that can be read, file by file; the rest becomes a complaint."""
        for path in self._files_of_episodes():
            bad: list[str] = []
            try:
                for row in scan_rows(path):
                    if isinstance(row, UserError):
                        bad.append(str(row))
                        continue
                    place = misfit(row, EpisodeRow)
                    if place is None:
                        yield cast(EpisodeRow, row)
                    else:
                        bad.append(f"{path}: a conversation without a readable {place!r}")
            except OSError as error:
                bad.append(f"{path}: cannot be read ({error.strerror})")
            if bad:
                more = f" (and {len(bad) - 1} more lines of that file)" if len(bad) > 1 else ""
                self.complaints.append(f"{bad[0]}; left out{more}")

    def _files_of_episodes(self) -> list[Path]:
        """In the order in which they were played: a stage before the evaluation after it."""
        found = sorted(
            (self.path / "episodes").glob("*.jsonl"),
            key=lambda path: (path.stem.rpartition("-")[2], path.stem.startswith("evaluation")),
        )
        evaluated = self.path / "conversations.jsonl"
        return [*found, evaluated] if evaluated.is_file() else found


def read_source(path: Path) -> Source:
    """What ``path`` holds. Raises UserError where it is neither a run nor an evaluation."""
    if not path.is_dir() or not any((path / mark).exists() for mark in _MARKS):
        what = "no run" if path.is_dir() else "no such directory"
        raise UserError(
            f"{path}: {what}; give a directory that satune train, swap or eval has written"
        )
    source = Source(path, path.resolve().name)
    if (path / "conversations.jsonl").is_file():
        source.events = _evaluation(source)
    else:
        source.events = list(_events(source))
    source.recipe = _recipe(source)
    source.summary = _object(source, path / "summary.json") or {}
    return source


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """``read_source`` of each, under names of their own. Raises UserError as it does, and for a
    path that is given twice."""
    sources = [read_source(path) for path in paths]
    if len({source.path.resolve() for source in sources}) < len(sources):
        raise UserError("report: a run is given twice; give each once")
    names = [source.name for source in sources]
    for source in sources:
        if names.count(source.name) > 1:
            source.name = str(source.path)
    return sources


def _events(source: Source) -> Iterator[Event]:
    path = source.path / "events.jsonl"
    if not path.is_file():
        source.complaints.append(f"{path}: is missing; there are no figures of the training")
        return
    for number, row in scan_lines(path):
        where = f"{path}, line {number}"
        if row is None:
            source.complaints.append(f"{where}: not JSON, or no object; left out")
            continue
        kind = row.get("event")
        shape = SHAPES.get(kind) if isinstance(kind, str) else None
        if shape is None:
            source.complaints.append(f"{where}: an event of a kind this satune does not know")
            continue
        place = misfit(row, shape)
        if place is None:
            yield cast(Event, row)
        else:
            source.complaints.append(
                f"{where}: an {kind} event without a readable {place!r}; left out"
            )
    if path.read_bytes()[-1:] != b"\n":
        state = "is empty" if path.stat().st_size == 0 else "ends in a line that was being written"
        source.complaints.append(f"{path}: {state}")


def _evaluation(source: Source) -> list[Event]:
    """What ``satune eval`` found, as the event of an evaluation that no stage came before."""
    path = source.path / "report.json"
    report = _object(source, path)
    if report is None:
        source.complaints.append(f"{path}: is missing or damaged")
        return []
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    try:
        team: Mapping[str, Any] = report["team"]
        event = {
            "event": "eval",
            "time": written.isoformat(timespec="seconds"),
            "stage": 0,
            "greedy": all(t == 0 for t in report["temperature"].values()),
            "reward": team["avg_at_k"],
            "interval": team["interval"],
            "problems": report["problems"],
            "samples": report["k"],
            "per_problem": [
                sum(row["scores"]) / len(row["scores"]) for row in report["per_problem"]
            ],
            "tokens": report["tokens"],
            "failures": report["failures"],
            "figures": {k: v for k, v in team.items() if k not in ("avg_at_k", "interval")},
            "seconds": 0.0,
        }
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        event = {}
    place = misfit(event, EvalEvent)
    if place is not None:
        source.complaints.append(f"{path}: no readable {place or 'report'}")
        return []
    return [cast(Event, event)]


def _object(source: Source, path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        source.complaints.append(f"{path}: damaged")
        return None
    return found


def _recipe(source: Source) -> dict[str, str]:
    path = source.path / "recipe.yaml"
    if (source.path / "settings.json").is_file():
        return dict(flat(_object(source, source.path / "settings.json") or {}))
    if not path.is_file():
        source.complaints.append(f"{path}: is missing")
        return {}
    try:
        # Texts alone: what 1e-5 or `no` would mean does not matter to a comparison.
        found = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (ValueError, RecursionError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        source.complaints.append(f"{path}: damaged")
        return {}
    return dict(flat(found))


def flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The values in nested mappings and lists by dotted key, as texts."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        for at, inner in enumerate(value):
            yield from flat(inner, f"{key}.{at}")
    elif isinstance(value, list):
        yield key, ", ".join(map(str, value))
    else:
        yield key, str(value if value not in ({}, None) else "")
