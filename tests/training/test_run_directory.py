"""The run directory: where lines go, cutting back, and what a new run may not be mixed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from satune.files.arrays import read_rows
from satune.files.events import Event
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
    assert read_rows(run.episodes / "stage-0003.jsonl") == [episode("a"), episode("b")]
    assert read_rows(run.episodes / "stage-0004.jsonl") == []


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
    assert run.unfinished() is not None
    assert run.sizes() == sizes
    run.append_event(event("stage", stage=2))
    assert stages(run) == [1, 2]
    run.append_episodes(1, [episode("d")])
    assert read_rows(run.episodes / "stage-0001.jsonl") == [episode("a"), episode("d")]


def test_sizes_of_a_run_without_lines(run: RunDirectory) -> None:
    assert run.sizes() == {"events": 0, "episodes": {}}
    run.append_event(event("run"))
    run.append_episodes(0, [episode("a")])
    run.truncate({"events": 0, "episodes": {}})
    assert run.sizes() == {"events": 0, "episodes": {}}


def test_what_a_file_has_lost_is_said_and_costs_nothing_else(run: RunDirectory) -> None:
    run.append_event(event("stage", stage=1))
    run.append_episodes(1, [episode("a")])
    run.append_episodes(2, [episode("b")])
    kept = read_rows(run.episodes / "stage-0001.jsonl")
    whole = run.sizes()
    run.append_event(event("stage", stage=2))
    with open(run.episodes / "stage-0001.jsonl", "ab") as file:
        file.write(b'{"id": "tor')
    held = (run.episodes / "stage-0001.jsonl").stat().st_size
    lost = {"stage-0001.jsonl": 999, "stage-0002.arrays": 77, "stage-0007.jsonl": 1}
    lines = run.truncate({"events": whole["events"], "episodes": {**whole["episodes"], **lost}})
    assert [line.split(";")[0].removeprefix(f"{run.episodes}/") for line in lines] == [
        f"stage-0001.jsonl: holds {held} bytes where the checkpoint recorded 999",
        f"stage-0002.arrays: holds {whole['episodes']['stage-0002.arrays']} bytes where the "
        "checkpoint recorded 77",
        "stage-0007.jsonl: holds 0 bytes where the checkpoint recorded 1",
    ]
    # The whole lines stay, the torn one would be glued to the next.
    assert read_rows(run.episodes / "stage-0001.jsonl") == kept and stages(run) == [1]
    # Rows whose numbers are lost are set aside: they would be given those that come next.
    assert read_rows(run.episodes / "stage-0002.jsonl") == []
    assert not (run.episodes / "stage-0002.arrays").exists()
    assert (run.episodes / "stage-0002.jsonl.damaged").exists()
    assert not (run.episodes / "stage-0007.jsonl").exists()


# Starting


def test_a_directory_that_holds_a_run_is_refused(run: RunDirectory) -> None:
    run.start()  # nothing written yet
    assert not run.holds_run
    run.append_event(event("run", stages=1))
    assert run.holds_run
    assert run.unfinished() is not None
    with pytest.raises(UserError, match=r"already holds a run; go on with it by --resume"):
        RunDirectory(run.path).start()
    RunDirectory(run.path).start(resume=True)


def save_team(run: RunDirectory) -> None:
    """A team of one agent that lies in it and one that is served elsewhere."""
    common = {"temperature": 1.0, "template": {}, "sharing": "separate", "delta": None}
    agents = {"ann": {"dir": "ann", **common}, "bob": {"served": "http://a/v1#M", **common}}
    (run.team / "ann").mkdir(parents=True)
    (run.team / "ann" / "model.safetensors").write_bytes(b"weights")
    manifest = {"format": 1, "seats": {"a": "ann"}, "agents": agents, "protocol": {}, "task": {}}
    (run.team / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_is_finished_with_its_summary_and_its_whole_team(run: RunDirectory) -> None:
    assert run.unfinished() == ""
    run.write_summary({"stages": 1, "reward_after": 1.0})
    assert run.read_summary() == {"stages": 1, "reward_after": 1.0}
    assert run.unfinished() == f"{run.team / 'manifest.json'}: is missing"
    save_team(run)
    assert run.unfinished() is None
    (run.team / "ann" / "model.safetensors").unlink()
    assert run.unfinished() == f"{run.team / 'ann' / '*.safetensors'}: is missing"
    (run.team / "ann" / "model.safetensors").write_bytes(b"weights")
    for damage in ("", "{", "[]", '{"reward_after": 1.0}', "\udc80"):
        run.summary.write_text(damage, errors="surrogateescape")
        assert run.unfinished() == f"{run.summary}: damaged"


def test_a_run_that_is_going_back_is_not_finished(run: RunDirectory) -> None:
    save_team(run)
    run.write_summary({"stages": 1})
    assert run.intended is None
    with pytest.raises(ZeroDivisionError), run.going_back("stage-0001"):
        raise ZeroDivisionError
    assert run.intended == "stage-0001" and run.unfinished() is not None
    with run.going_back("stage-0000"):
        assert run.intended == "stage-0000"
    assert run.intended is None and run.unfinished() is None
    run.intent.write_text("{}")
    with pytest.raises(UserError, match=r"going-back\.json: damaged; name the checkpoint"):
        run.intended  # noqa: B018


@pytest.mark.parametrize(
    "left",
    [
        "episodes", "checkpoints", "tensorboard", "trackers.json", "optimizers", ".lock",
        ".writable",
        "..writable.partial", ".recipe.yaml.partial", ".settings.json.partial",
    ],
)  # fmt: skip
def test_what_a_start_leaves_that_was_cut_off_locks_nothing(tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir() if "." not in left else (tmp_path / left).write_text("")
    run = RunDirectory(tmp_path)
    with run.held():
        run.start()


def test_a_checkpoint_alone_is_a_run(run: RunDirectory) -> None:
    (run.checkpoints / "stage-0001").mkdir()
    (run.checkpoints / "stage-0001" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="--resume"):
        run.start()


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunDirectory(tmp_path).start()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "theirs",
    [
        "recipe.yaml", "summary.json", "team/notes.txt", "episodes/mydata.jsonl", "certify.jsonl",
        "checkpoints/checkpoint-500/model.safetensors", "events.jsonl",
    ],
)  # fmt: skip
def test_what_no_run_wrote_makes_no_run(tmp_path: Path, theirs: str) -> None:
    path = tmp_path / theirs
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"event": "concert"}\n')
    assert not RunDirectory(tmp_path).holds_run
    with pytest.raises(UserError, match="is not empty and holds no run; give another --out"):
        RunDirectory(tmp_path).start()


def test_the_first_event_takes_the_place_of_an_earlier_beginning(run: RunDirectory) -> None:
    for seed in (1, 2):
        run.append_event(event("run", seed=seed, stages=1))
        run.append_event(event("eval", stage=0))
    assert [each["event"] for each in run.read_events()] == ["run", "eval"]
    assert json.loads(run.events.read_text().splitlines()[0])["seed"] == 2


def test_a_path_through_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of the path is a file"):
        RunDirectory(tmp_path / "file" / "run").start()
    with pytest.raises(UserError, match="a file stands where a directory is needed"):
        RunDirectory(tmp_path / "file").start()
