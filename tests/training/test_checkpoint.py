"""Runs that survive: cut off at any write, a full disk, damaged checkpoints, ctrl-C."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import tiny_world
from satune.cli.train import run_training
from satune.config.load import load_recipe
from satune.files.interrupts import uninterrupted
from satune.training import checkpoint as checkpoint_module
from satune.training.run_directory import RunDirectory
from satune.training.state_file import FORMAT
from satune.types import UserError

VARIANTS = {
    "reuse": ["schedule=reuse", "checkpoint.keep=1"],
    "fresh": ["schedule=fresh", "order=random", "optimizer.offload=disk"],
    "reference": ["schedule=stale", "objective.reference_kl=0.1", "order=greedy"],
    "by stage": ["schedule=hybrid", "checkpoint.every=stage", "evaluate.every=1"],
    "ahead": ["schedule=hybrid", "rollout.ahead=1"],
}

PLACES = ["", "stage-0000", "stage-0001-step-1", "stage-0001", "stage-0002-step-1", "stage-0002"]
"""The checkpoints of a run of two stages and two agents, in order, after having none."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


def go(
    recipe: Path, out: Path, overrides: list[str], *, resume: bool, checkpoint: str | None = None
) -> dict[str, Any]:
    loaded = load_recipe(recipe, overrides)
    return run_training(loaded, out, resume=resume, checkpoint=checkpoint, command="")


def left(out: Path) -> dict[str, Any]:
    """Everything a finished run leaves that does not tell the time or the place."""
    run = RunDirectory(out)
    return {
        "events": tiny_world.events(out),
        "episodes": {path.name: path.read_bytes() for path in run.episodes.iterdir()},
        "team": tiny_world.team_files(out),
        "checkpoints": tiny_world.checkpoints(out).names(),
        "finished": run.unfinished() is None,
    }


# An audit hook cannot be taken away again; this one is silent unless a test listens. Checkpoints
# are written by a thread of their own: while the listener is called, nobody else begins a write.
_listener: Callable[[], None] | None = None
_writing = threading.RLock()
_WRITES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _listener is None:
        return
    if event in _WRITES or (event == "open" and set("wa+x") & set(str(arguments[1] or "r"))):
        with _writing:
            if _listener is not None:
                _listener()


sys.addaudithook(_hook)


def moments(recipe: Path, folder: Path, overrides: list[str], wanted: Callable[[int], bool]) -> int:
    """Train in ``folder``/whole; before its n-th write, where ``wanted(n)``, copy the run as it
    lies on the disk to ``folder``/n: what SIGKILL would leave. Gives the number of writes."""
    global _listener
    count = 0

    def listen() -> None:
        global _listener
        nonlocal count
        count += 1
        if wanted(count) and (folder / "whole").exists():
            listener, _listener = _listener, None
            while True:
                try:
                    shutil.copytree(folder / "whole", folder / str(count))
                    break
                except (shutil.Error, FileNotFoundError):
                    # What the other thread had begun was still renamed meanwhile.
                    shutil.rmtree(folder / str(count))
            _listener = listener

    _listener = listen
    try:
        go(recipe, folder / "whole", overrides, resume=False)
    finally:
        _listener = None
    return count


def check_moments(recipe: Path, folder: Path, name: str, wanted: Callable[[int], bool]) -> int:
    overrides = VARIANTS[name]
    moments(recipe, folder, overrides, wanted)
    whole = left(folder / "whole")
    assert sum(event["event"] == "update" for event in whole["events"]) == 4
    copies = sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    for copy in copies:
        if (copy / "events.jsonl").exists() and int(copy.name) % 2:
            # A line that was being written when the end came.
            with open(copy / "events.jsonl", "ab") as file:
                file.write(b'{"event": "update", "ti')
        go(recipe, copy, overrides, resume=True)
        found = left(copy)
        assert found == whole, f"cut off before write {copy.name}"
        assert not list((copy / "checkpoints").glob("*.writing"))
    return len(copies)


@pytest.mark.parametrize(
    "name", ["reuse", *(pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS if n != "reuse")]
)
def test_cut_off_at_a_write_and_resumed_a_run_is_the_same(
    recipe: Path, tmp_path: Path, name: str
) -> None:
    # A stride that is prime to the repeating pattern of writes; the slow test has them all.
    assert check_moments(recipe, tmp_path, name, lambda n: n % 23 == 7) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_cut_off_at_every_third_write_a_run_is_the_same(
    recipe: Path, tmp_path: Path, name: str
) -> None:
    assert check_moments(recipe, tmp_path, name, lambda n: n % 3 == 1) >= 15


def test_two_runs_are_the_same(recipe: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        go(recipe, tmp_path / name, [], resume=False)
    assert left(tmp_path / "a") == left(tmp_path / "b")


@pytest.mark.slow
def test_a_run_goes_on_from_each_checkpoint_it_kept(recipe: Path, tmp_path: Path) -> None:
    overrides = ["checkpoint.keep=9", "schedule=reuse"]
    go(recipe, tmp_path / "whole", overrides, resume=False)
    whole = left(tmp_path / "whole")
    names = PLACES[1:]
    assert whole["checkpoints"] == names
    for name in names:
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        go(recipe, tmp_path / name, overrides, resume=True, checkpoint=name)
        assert left(tmp_path / name) == whole
    with pytest.raises(UserError, match=r"no checkpoint 'stage-7'; there are: stage-0000, ") as e:
        go(recipe, tmp_path / "whole", overrides, resume=True, checkpoint="stage-7")
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_twice_cut_off_inside_a_stage(recipe: Path, tmp_path: Path) -> None:
    """The second checkpoint after a resume knows as much as the first one did."""
    overrides = ["checkpoint.keep=9", "schedule=simultaneous"]
    go(recipe, tmp_path / "whole", overrides, resume=False)
    whole = left(tmp_path / "whole")
    for name in ("stage-0001-step-1", "stage-0001", "stage-0002-step-1"):
        go(recipe, tmp_path / "whole", overrides, resume=True, checkpoint=name)
    assert left(tmp_path / "whole") == whole


def test_keep_bounds_the_checkpoints_and_unchanged_files_are_linked(
    recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    go(recipe, out, ["checkpoint.keep=2"], resume=False)
    assert tiny_world.checkpoints(out).names() == ["stage-0002-step-1", "stage-0002"]
    older, newer = (out / "checkpoints" / name for name in ("stage-0002-step-1", "stage-0002"))
    # Between the two bob alone was updated.
    for file, linked in {"ann.weights": True, "ann.optimizer": True, "bob.weights": False}.items():
        inodes = {(place / f"{file}.safetensors").stat().st_ino for place in (older, newer)}
        assert (len(inodes) == 1) is linked


def test_experience_is_written_once_and_only_where_somebody_learns_from_it(
    recipe: Path, tmp_path: Path
) -> None:
    """Three agents share one rollout under reuse, and under fresh each has its own."""
    three = tiny_world.build(tmp_path / "three", ("ann", "bob", "cat"))
    for schedule, written in (("reuse", [True, True]), ("fresh", [False, False])):
        out = tmp_path / schedule
        overrides = [f"schedule={schedule}", "stages=1", "checkpoint.keep=9"]
        go(three, out, overrides, resume=False)
        for name in ("experience.jsonl", "experience.arrays"):
            files = [out / "checkpoints" / f"stage-0001-step-{step}" / name for step in (1, 2)]
            assert [file.exists() for file in files] == written
            if all(written):
                assert files[0].stat().st_ino == files[1].stat().st_ino
            assert not (out / "checkpoints" / "stage-0001" / name).exists()


# In the background


def test_a_checkpoint_is_written_while_the_run_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each checkpoint but the first, which a run waits for, and the last waits until the next
    rollout is over: a run that waited for the checkpoint would never come there. What is written is
    what was there when it was asked for."""
    overrides = ["schedule=fresh", "checkpoint.keep=9"]
    go(recipe, tmp_path / "whole", overrides, resume=False)
    write, append = checkpoint_module.Checkpoints._write, RunDirectory.append_episodes
    rolled_out = threading.Event()

    def waiting(self: Any, now: Any, *rest: Any) -> None:
        if now.path.name not in ("stage-0000", PLACES[-1]):
            assert rolled_out.wait(60), "the run waits for its checkpoint"
        rolled_out.clear()
        write(self, now, *rest)

    def appending(self: RunDirectory, *rest: Any) -> None:
        append(self, *rest)
        rolled_out.set()

    monkeypatch.setattr(checkpoint_module.Checkpoints, "_write", waiting)
    monkeypatch.setattr(RunDirectory, "append_episodes", appending)
    go(recipe, tmp_path / "run", overrides, resume=False)
    assert left(tmp_path / "run") == left(tmp_path / "whole")
    for name in PLACES[1:]:
        files = [
            {
                path.name: path.read_bytes()
                for path in (tmp_path / run / "checkpoints" / name).glob("*.safetensors")
            }
            for run in ("whole", "run")
        ]
        assert files[0] == files[1] != {}


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_is_refused_is_not_finished(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    write = checkpoint_module.Checkpoints._write

    def writing(self: Any, now: Any, *rest: Any) -> None:
        if now.path.name == PLACES[-1]:
            raise UserError(f"{now.path}: cannot be written: the disk is full")
        write(self, now, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.Checkpoints, "_write", writing)
        with pytest.raises(UserError, match="stage-0002: cannot be written"):
            go(recipe, out, [], resume=False)
    assert RunDirectory(out).unfinished() is not None
    go(recipe, out, [], resume=True)
    go(recipe, tmp_path / "whole", [], resume=False)
    assert left(out) == left(tmp_path / "whole")


def test_what_is_not_a_checkpoint_is_let_be(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    go(recipe, out, [], resume=False)
    last = out / "checkpoints" / "stage-0002"
    for name in ("stage-0002.writing", "my-copy", "stage-0002.bak"):
        shutil.copytree(last, out / "checkpoints" / name)
    assert tiny_world.checkpoints(out).names() == ["stage-0002-step-1", "stage-0002"]


# Damage


def damages() -> Iterator[tuple[str, Callable[[Path], object]]]:
    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.unlink()  # a checkpoint's files may be links, and only this one is to be damaged
        file.write_bytes(data)

    def cut(file: Path) -> None:
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data[:-1])

    yield "flipped", flip
    yield "cut", cut
    yield "removed", Path.unlink


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    recipe: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    go(recipe, whole, ["schedule=reuse"], resume=False)
    names = tiny_world.checkpoints(whole).names()
    first, last = names
    shutil.rmtree(whole / "checkpoints" / last)
    shutil.copytree(whole / "checkpoints" / first, whole / "checkpoints" / "stage-0009-step-1")
    place = whole / "checkpoints" / "stage-0009-step-1"
    files = sorted(path.name for path in place.iterdir() if path.name != "state.json")
    assert len(files) == 6  # two weights, two optimisers, the experience's text and arrays
    kept = tmp_path / "kept"
    shutil.copytree(place, kept)
    for file in files:
        for _, damage in damages():
            shutil.rmtree(place)
            shutil.copytree(kept, place)
            damage(place / file)
            found = tiny_world.checkpoints(whole).latest()
            assert found is not None
            name, passed = found
            assert name == first
            assert len(passed) == 1 and f"{place / file}: damaged checkpoint" in passed[0]
            with pytest.raises(UserError, match="damaged checkpoint"):
                tiny_world.checkpoints(whole).latest("stage-0009-step-1")


DAMAGED = {
    "empty": "",
    "cut": "{",
    "no object": "[]",
    "another format": '{"format": 1}',
    "a format to come": '{"format": 99, "files": {}}',
    "no digest": f'{{"format": {FORMAT}, "files": {{}}}}',
    "another digest": f'{{"format": {FORMAT}, "files": {{}}, "digest": "0"}}',
    "numbers that are none": f'{{"format": {FORMAT}, "files": NaN, "digest": "0"}}',
    "too deep": f'{{"format": {FORMAT}, "files": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "nearly too deep": f'{{"format": {FORMAT}, "files": ' + "[" * 900 + "]" * 900 + "}",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_state_is_passed_over(
    recipe: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    go(recipe, whole, ["stages=1"], resume=False)
    before = left(whole)
    (whole / "summary.json").unlink()
    (whole / "checkpoints" / "stage-0001" / "state.json").write_text(text)
    capsys.readouterr()
    go(recipe, whole, ["stages=1"], resume=True)
    assert "going on from stage-0001-step-1" in capsys.readouterr().err
    assert left(whole) == before


def test_without_an_undamaged_checkpoint_nothing_is_touched(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    go(recipe, out, ["stages=1"], resume=False)
    (out / "summary.json").unlink()
    for name in tiny_world.checkpoints(out).names():
        (out / "checkpoints" / name / "ann.weights.safetensors").unlink()
    events = (out / "events.jsonl").read_bytes()
    with pytest.raises(UserError, match="no undamaged checkpoint is left") as caught:
        go(recipe, out, ["stages=1"], resume=True)
    assert "\n" not in str(caught.value)
    assert (out / "events.jsonl").read_bytes() == events
    assert len(tiny_world.checkpoints(out).names()) == 2


def test_lost_events_cost_no_trained_result(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    go(recipe, out, ["stages=1"], resume=False)
    before = left(out)
    (out / "summary.json").unlink()
    os.truncate(out / "events.jsonl", 10)
    capsys.readouterr()
    go(recipe, out, ["stages=1"], resume=True)
    said = capsys.readouterr().err
    assert said.count(f"{out / 'events.jsonl'}: holds 10 bytes where the checkpoint recorded") == 1
    after = left(out)
    lost = len(before["events"]) - len(after["events"])
    assert after | {"events": before["events"]} == before
    assert lost > 0 and after["events"] == before["events"][lost:]


# A disk that refuses


def refuse(code: int) -> Callable[..., Any]:
    def write(*arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    return write


def refuse_tensors(*arguments: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


@pytest.mark.parametrize(
    ("module", "function", "refusal", "mend"),
    [
        (checkpoint_module, "save_file", refuse_tensors, "the disk is full"),
        (os, "fsync", refuse(errno.ENOSPC), "the disk is full"),
        (os, "fsync", refuse(errno.EDQUOT), "quota"),
        (os, "replace", refuse(errno.EROFS), "read-only"),
        (Path, "rename", refuse(errno.EACCES), "no permission"),
        (Path, "mkdir", refuse(errno.ENOSPC), "the disk is full"),
    ],
)
def test_a_refused_checkpoint_is_one_line_and_the_last_one_stays(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    function: str,
    refusal: Callable[..., Any],
    mend: str,
) -> None:
    overrides = ["schedule=reuse"]
    go(recipe, tmp_path / "whole", overrides, resume=False)
    out = tmp_path / "run"
    write = checkpoint_module.Checkpoints._write

    def writing(self: Any, now: Any, *rest: Any) -> None:
        with monkeypatch.context() as patch:
            if now.path.name == "stage-0002-step-1":
                patch.setattr(module, function, refusal)
            write(self, now, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.Checkpoints, "_write", writing)
        with pytest.raises(UserError, match=mend) as caught:
            go(recipe, out, overrides, resume=False)
    assert "\n" not in str(caught.value)
    assert tiny_world.checkpoints(out).names() == ["stage-0001-step-1", "stage-0001"]
    assert not list((out / "checkpoints").glob("*.writing"))
    go(recipe, out, overrides, resume=True)
    assert left(out) == left(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 64 KiB large at first."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_grows_full_again_and_again(
    recipe: Path, tmp_path: Path, small_disk: Path
) -> None:
    overrides = ["schedule=reuse"]
    go(recipe, tmp_path / "whole", overrides, resume=False)
    out = small_disk / "run"
    refusals, reached = 0, []
    for size in range(64, 2000, 96):
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(small_disk)], check=True)
        try:
            go(recipe, out, overrides, resume=refusals > 0)
        except UserError as error:
            assert "the disk is full" in str(error) and "\n" not in str(error)
            refusals += 1
            held = tiny_world.checkpoints(out)
            assert all(held.damage(name) is None for name in held.names())
            reached.append(PLACES.index((held.names() or [""])[-1]))
            continue
        break
    assert refusals >= 3
    assert reached == sorted(reached) and reached[-1] > 0
    assert left(out) == left(tmp_path / "whole")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="read-only"):
        go(recipe, small_disk / "other", overrides, resume=False)


# Ctrl-C


def test_an_interrupt_waits_for_the_write(tmp_path: Path) -> None:
    written = False
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            written = True
        pytest.fail("the interrupt was lost")
    assert written
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_every_second_stage_and_the_last_are_saved(recipe: Path, tmp_path: Path) -> None:
    overrides = ["stages=3", "checkpoint={every: 2, keep: 9}"]
    go(recipe, tmp_path / "whole", overrides, resume=False)
    whole = left(tmp_path / "whole")
    assert whole["checkpoints"] == ["stage-0000", "stage-0002", "stage-0003"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    go(recipe, tmp_path / "again", overrides, resume=True, checkpoint="stage-0002")
    assert left(tmp_path / "again") == whole
