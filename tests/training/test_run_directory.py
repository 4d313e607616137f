"""The run directory: appended lines, cutting back, whole-file writes, and a disk that refuses."""

from __future__ import annotations

import errno
import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from satune.files.lines import read_lines
from satune.files.writing import disk_errors, strict_json, write_atomically
from satune.training.run_directory import RunDirectory
from satune.types import UserError, ids_of, logprobs_of


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.start()
    return directory


def episode(name: str) -> dict[str, Any]:
    """A row of one turn whose ids are the name's letters."""
    ids = ids_of(name.encode())
    turn = {"prompt_ids": ids, "completion_ids": ids, "sampled_logprobs": logprobs_of([-0.5])}
    return {"id": name, "turns": [turn]}


# Events and episodes


def test_events_are_lines_with_kind_and_time(run: RunDirectory) -> None:
    before = datetime.now(UTC)
    run.append_event("stage", stage=1, reward=0.5, order=("a", "b"))
    run.append_event("eval", stage=1, reward=0.25)
    stage, evaluation = run.read_events()
    assert list(stage) == ["event", "time", "stage", "reward", "order"]
    assert (stage["event"], stage["order"], evaluation["event"]) == ("stage", ["a", "b"], "eval")
    written = datetime.fromisoformat(stage["time"])
    assert abs((written - before).total_seconds()) < 60
    assert run.events.read_bytes().count(b"\n") == 2


def test_what_json_lacks_is_written_as_text(run: RunDirectory) -> None:
    run.append_event("update", kl={"quantile": math.inf, "mean": [math.nan, -math.inf, 1e-300]})
    line = run.events.read_text()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    kl = run.read_events()[0]["kl"]
    assert kl["quantile"] == "inf"
    assert kl["mean"][1:] == ["-inf", 1e-300]
    assert math.isnan(float(kl["mean"][0]))


def test_values_that_are_not_plain_are_refused(run: RunDirectory) -> None:
    with pytest.raises(TypeError):
        run.append_event("stage", reward={1, 2})
    assert not run.events.exists()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_strict_json_is_one_line_and_exact(value: Any) -> None:
    def finite(item: Any) -> Any:
        if isinstance(item, float) and math.isinf(item):
            return str(item)
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        return [finite(inner) for inner in item] if isinstance(item, list) else item

    line = strict_json(value)
    assert "\n" not in line
    assert json.loads(line) == finite(value)


def test_a_text_with_line_separators_stays_one_row(run: RunDirectory) -> None:
    # The last one is half a surrogate pair, which UTF-8 cannot hold.
    rows = [{"text": "a\nb\u2028c\x85d\re", "turns": []}, {"text": "\ud800", "turns": []}]
    run.append_episodes(3, rows)
    run.append_episodes(3, [{"text": "g", "turns": []}])
    assert (run.episodes / "stage-0003.jsonl").exists()
    assert run.read_episodes(3) == [*rows, {"text": "g", "turns": []}]
    assert run.read_episodes(4) == []


def test_a_last_line_still_being_written_is_left_out(run: RunDirectory) -> None:
    run.append_event("stage", stage=1)
    with open(run.events, "ab") as file:
        file.write(b'{"event": "sta')
    assert [event["stage"] for event in run.read_events()] == [1]


def test_a_damaged_line_is_named(run: RunDirectory) -> None:
    run.events.write_bytes(b'{"event": "stage"}\n{"event": \n{"event": "stage"}\n')
    with pytest.raises(UserError, match=r"events\.jsonl, line 2: not JSON"):
        run.read_events()


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "nothing.jsonl") == []


# Cutting back


def test_truncate_restores_what_sizes_saw(run: RunDirectory) -> None:
    run.append_event("stage", stage=1)
    run.append_episodes(1, [episode("a")])
    sizes = json.loads(json.dumps(run.sizes()))
    names = (run.events, run.episodes / "stage-0001.jsonl", run.episodes / "stage-0001.arrays")
    held = {path: path.read_bytes() for path in names}
    run.append_event("stage", stage=2)
    run.append_episodes(1, [episode("b")])
    run.append_episodes(2, [episode("c")])
    with open(run.events, "ab") as file:
        file.write(b'{"half')
    run.write_summary({"stages": 2})
    run.truncate(sizes)
    assert {path: path.read_bytes() for path in held} == held
    assert {path.name for path in run.episodes.iterdir()} == {path.name for path in names[1:]}
    assert not run.finished
    assert run.sizes() == sizes
    run.append_event("stage", stage=2)
    assert [event["stage"] for event in run.read_events()] == [1, 2]
    run.append_episodes(1, [episode("d")])
    assert run.read_episodes(1) == [episode("a"), episode("d")]


def test_sizes_of_a_run_without_lines(run: RunDirectory) -> None:
    assert run.sizes() == {"events": 0, "episodes": {}}
    run.append_event("run")
    run.append_episodes(0, [episode("a")])
    run.truncate({"events": 0, "episodes": {}})
    assert run.sizes() == {"events": 0, "episodes": {}}


def test_a_file_shorter_than_recorded_changes_nothing(run: RunDirectory) -> None:
    run.append_event("stage", stage=1)
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


# Whole files


def test_a_failed_write_leaves_the_old_file(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_summary({"stages": 1})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"summary\.json: cannot be written: the disk is full"):
        run.write_summary({"stages": 2})
    assert json.loads(run.summary.read_text()) == {"stages": 1}


def test_a_full_disk_is_one_line(run: RunDirectory) -> None:
    # Writing to this device fails as on a full disk.
    run.events.symlink_to("/dev/full")
    with pytest.raises(UserError) as caught:
        run.append_event("stage", stage=1)
    assert str(caught.value) == (
        f"{run.events}: cannot be written: the disk is full; free some space or give another --out"
    )


def test_a_path_through_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of the path is a file"):
        RunDirectory(tmp_path / "file" / "run").start()
    with pytest.raises(UserError, match="a file stands where a directory is needed"):
        RunDirectory(tmp_path / "file").start()


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.EACCES, "no permission"), (errno.EROFS, "read-only"), (errno.ENOSPC, "full")],
)
def test_errors_of_the_disk_are_worded(number: int, says: str) -> None:
    with (
        pytest.raises(UserError, match=rf"^/runs/a: cannot be written: .*{says}"),
        disk_errors("/runs/a"),
    ):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "nothing").read_bytes()
