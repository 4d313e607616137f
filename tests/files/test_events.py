"""Events: one line each with its kind and time, read back as they were written."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from satune.files.events import Event, append_event, read_events


def event(kind: str, **fields: Any) -> Event:
    """An event that need not be whole."""
    return cast(Event, {"event": kind, **fields})


def test_events_are_lines_with_kind_and_time(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    before = datetime.now(UTC)
    append_event(file, event("stage", stage=1, reward=0.5, order=("a", "b")))
    append_event(file, event("eval", stage=1, reward=0.25))
    stage, evaluation = read_events(file)
    assert list(stage) == ["event", "time", "stage", "reward", "order"]
    assert stage["event"] == "stage" and evaluation["event"] == "eval"
    assert stage["order"] == ["a", "b"] and "time" in stage
    written = datetime.fromisoformat(stage["time"])
    assert abs((written - before).total_seconds()) < 60
    assert file.read_bytes().count(b"\n") == 2


def test_what_json_lacks_is_written_as_text(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    values = {"quantile": math.inf, "mean": [math.nan, -math.inf, 1e-300]}
    append_event(file, event("update", kl=values))
    json.loads(
        file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON")
    )
    (update,) = read_events(file)
    kl: Any = dict(update)["kl"]
    assert kl["quantile"] == "inf"
    assert kl["mean"][1:] == ["-inf", 1e-300]
    assert math.isnan(float(kl["mean"][0]))


def test_values_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        append_event(tmp_path / "events.jsonl", event("stage", reward={1, 2}))
    assert not (tmp_path / "events.jsonl").exists()
