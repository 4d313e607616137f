"""Checkpoints that somebody else wrote: nothing outside of the run is read, cut or removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from satune.training.checkpoint import FORMAT, Checkpoints
from satune.training.run_directory import RunDirectory
from satune.types import UserError


def state(**changes: Any) -> dict[str, Any]:
    sizes = {"events": 0, "episodes": {"stage-0001.jsonl": 0}}
    held: dict[str, Any] = {"certify": {"held": {}}}
    return {"format": FORMAT, "state": held, "files": {}, "sizes": sizes, **changes}


STRANGE: dict[str, dict[str, Any]] = {
    "a file elsewhere": {"files": {"../../../victim": [6, "0"]}},
    "an absolute file": {"files": {"/etc/hostname": [6, "0"]}},
    "episodes elsewhere": {"sizes": {"events": 0, "episodes": {"../../victim": 0}}},
    "absolute episodes": {"sizes": {"events": 0, "episodes": {"/etc/hostname": 0}}},
    "a snapshot elsewhere": {"state": {"certify": {"held": {"../../../victim": {}}}}},
    "a size below": {"sizes": {"events": -1, "episodes": {}}},
    "a huge size": {"sizes": {"events": 10**30, "episodes": {}}},
    "a size without end": {"sizes": {"events": float("inf"), "episodes": {}}},
    "a size that is none": {"sizes": {"events": True, "episodes": {"stage-0001.jsonl": "0"}}},
    "no sizes": {"sizes": None},
    "no names": {"sizes": {"events": 0, "episodes": ["stage-0001.jsonl"]}},
}


def run_with(folder: Path, text: dict[str, Any]) -> RunDirectory:
    run = RunDirectory(folder / "run")
    (run.checkpoints / "stage-0001").mkdir(parents=True)
    (run.checkpoints / "stage-0001" / "state.json").write_text(json.dumps(text))
    run.episodes.mkdir()
    (run.episodes / "stage-0001.jsonl").write_text("{}\n")
    run.events.write_text("{}\n")
    (folder / "victim").write_text("secret")
    return run


def test_a_plain_state_is_taken(tmp_path: Path):
    run = run_with(tmp_path, state())
    run.start(resume=True)
    assert Checkpoints(run.checkpoints, 2).latest() == ("stage-0001", [])
    run.truncate(state()["sizes"])
    assert run.events.read_text() == (run.episodes / "stage-0001.jsonl").read_text() == ""


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_state_is_refused_in_one_line(tmp_path: Path, name: str):
    run = run_with(tmp_path, state(**STRANGE[name]))
    with pytest.raises(UserError) as refused:
        Checkpoints(run.checkpoints, 2).latest("stage-0001")
    line = str(refused.value)
    assert line.startswith(f"{run.checkpoints}/stage-0001/state.json: damaged checkpoint")
    assert "\n" not in line and (tmp_path / "victim").read_text() == "secret"


@pytest.mark.parametrize("place", ["events.jsonl", "episodes", "episodes/stage-0001.jsonl",
                                   "training.png", "checkpoints/stage-0001"])  # fmt: skip
def test_a_run_with_a_link_that_leads_out_is_not_gone_on_with(tmp_path: Path, place: str):
    run = run_with(tmp_path, state())
    path = run.path / place
    if path.exists():
        path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / ("moved" if (tmp_path / "moved").exists() else "victim"))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=f"{place}: is a link that leads out of"):
        run.start(resume=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
