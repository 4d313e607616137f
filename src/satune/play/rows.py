"""Episodes as rows, and back. Arrays stay arrays: ``files.arrays`` writes them beside the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from satune.types import Episode, Failure, Grade, Problem, Turn, UserError

Row = dict[str, Any]


def episode_to_row(episode: Episode) -> Row:
    """The episode as a row of what JSON knows, and of arrays of ids and log-probabilities where its
    turns have them. ``episode_from_row`` gives it back exactly, floats included, if the problem's
    answer and metadata are made of what JSON knows (lists rather than tuples).
    """
    row = _as_row(episode)
    row["problem"] = _as_row(episode.problem)
    row["problem"]["prompt"] = [dict(part) for part in episode.problem.prompt]
    row["problem"]["metadata"] = dict(episode.problem.metadata)
    row["turns"] = [_turn_row(turn) for turn in episode.turns]
    row["grade"] = _as_row(episode.grade)
    row["grade"]["components"] = dict(episode.grade.components)
    row["grade"]["seats"] = None if episode.grade.seats is None else dict(episode.grade.seats)
    row["failure"] = None if episode.failure is None else _as_row(episode.failure)
    row["observations"] = [list(observation) for observation in episode.observations]
    return row


def episode_from_row(row: Mapping[str, Any]) -> Episode:
    """The episode of a row that ``episode_to_row`` wrote.

    Raises UserError naming a field that is missing or unknown.
    """
    _check_fields(row, Episode)
    problem, grade = row["problem"], row["grade"]
    _check_fields(problem, Problem)
    _check_fields(grade, Grade)
    for turn in row["turns"]:
        _check_fields({"handle": None, **turn}, Turn)
    changes = {
        "problem": Problem(**{**problem, "prompt": tuple(problem["prompt"])}),
        "turns": tuple(Turn(**turn) for turn in row["turns"]),
        "grade": Grade(**grade),
        "failure": None if row["failure"] is None else Failure(**row["failure"]),
        "observations": tuple((int(count), text) for count, text in row["observations"]),
    }
    return Episode(**{**row, **changes})


def _turn_row(turn: Turn) -> Row:
    row = _as_row(turn)
    if turn.handle is None:  # its ids lie here
        del row["handle"]
    return row


def _as_row(item: Any) -> Row:
    """A dataclass's fields, one level deep, tuples as lists."""
    values = {field.name: getattr(item, field.name) for field in fields(item)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _check_fields(row: Mapping[str, Any], kind: type) -> None:
    names = {field.name for field in fields(kind)}
    for name in sorted(names ^ set(row)):
        state = "no field" if name in names else "an unknown field"
        raise UserError(
            f"{kind.__name__.lower()} row: {state} {name!r}; it was written by another version"
        )
