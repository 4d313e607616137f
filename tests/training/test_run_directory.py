"""The run directory: where lines go, cutting back, and what a new run may not be mixed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from satune.files.events import Event
from satune.files.writing import write_atomically
from satune.training.run_directory import RunDirectory
from satune.types import UserError, ids_of, logprobs_of


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.start()
    return directory


def event(kind: str, **fields: Any) -> Event:
    """An event that need not be whole."""
    return cast(Event, {"event": kind, **fields})


def episode(name: str) -> dict[str, Any]:
    """A row of one turn whose ids are the name's letters."""
    ids = ids_of(name.encode())
    turn = {"prompt_ids": ids, "completion_ids": ids, "sampled_logprobs": logprobs_of([-0.5])}
    return {"id": name, "turns": [turn]}


def stages(run: RunDirectory) -> list[int]:
    return [each["stage"] for each in run.read_events() if each["event"] == "stage"]


def test_events_and_episodes_have_their_places(run: RunDirectory) -> None:
    run.append_event(event("stage", stage=1))
    assert stages(run) == [1] and run.events == run.path / "events.jsonl"
    run.append_episodes(3, [episode("a")])
    run.append_episodes(3, [episode("b")])
    assert (run.episodes / "stage-0003.jsonl").exists()
    assert run.read_episodes(3) == [episode("a"), episode("b")]
    assert run.read_episodes(4) == []


# Cutting back


def test_truncate_restores_what_sizes_saw(run: RunDirectory) -> None:
    run.append_event(event("stage", stage=1))
    run.append_episodes(1, [episode("a")])
    sizes = json.loads(json.dumps(run.sizes()))
    names = (run.events, run.episodes / "stage-0001.jsonl", run.episodes / "stage-0001.arrays")
    held = {path: path.read_bytes() for path in names}
    run.append_event(event("stage", stage=2))
    run.append_episodes(1, [episode("b")])
    run.append_episodes(2, [episode("c")])
    with open(run.events, "ab") as file:
        file.write(b'{"half')
    (run.episodes / "stage-0003.arrays").write_bytes(b"numbers whose rows were not written")
    run.write_summary({"stages": 2})
    run.truncate(sizes)
    assert {path: path.read_bytes() for path in held} == held
    assert {path.name for path in run.episodes.iterdir()} == {path.name for path in names[1:]}
    assert not run.finished
    assert run.sizes() == sizes
    run.append_event(event("stage", stage=2))
    assert stages(run) == [1, 2]
    run.append_episodes(1, [episode("d")])
    assert run.read_episodes(1) == [episode("a"), episode("d")]


def test_sizes_of_a_run_without_lines(run: RunDirectory) -> None:
    assert run.sizes() == {"events": 0, "episodes": {}}
    run.append_event(event("run"))
    run.append_episodes(0, [episode("a")])
    run.truncate({"events": 0, "episodes": {}})
    assert run.sizes() == {"events": 0, "episodes": {}}


def test_a_file_shorter_than_recorded_changes_nothing(run: RunDirectory) -> None:
    run.append_event(event("stage", stage=1))
    run.append_episodes(1, [episode("a")])
    before = run.events.read_bytes()
    with pytest.raises(UserError, match=r"stage-0001\.jsonl: holds \d+ bytes where .* 999"):
        run.truncate({"events": 0, "episodes": {"stage-0001.jsonl": 999}})
    with pytest.raises(UserError, match=r"stage-0007\.jsonl: holds 0 bytes"):
        run.truncate({"events": 0, "episodes": {"stage-0007.jsonl": 1}})
    assert run.events.read_bytes() == before


# Starting


def test_a_directory_that_holds_a_run_is_refused(run: RunDirectory) -> None:
    run.start()  # nothing written yet
    write_atomically(run.recipe, "seed: 0\n")
    assert run.holds_run
    assert not run.finished
    with pytest.raises(UserError, match=r"already holds a run; go on with it by --resume"):
        RunDirectory(run.path).start()
    RunDirectory(run.path).start(resume=True)
    run.write_summary({"reward_after": 1.0})
    assert run.finished
    assert json.loads(run.summary.read_text()) == {"reward_after": 1.0}


def test_a_checkpoint_alone_is_a_run(run: RunDirectory) -> None:
    (run.checkpoints / "stage-0001").mkdir()
    with pytest.raises(UserError, match="--resume"):
        run.start()


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunDirectory(tmp_path).start()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_path_through_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of the path is a file"):
        RunDirectory(tmp_path / "file" / "run").start()
    with pytest.raises(UserError, match="a file stands where a directory is needed"):
        RunDirectory(tmp_path / "file").start()
