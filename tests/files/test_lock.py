"""One process at a time: what a second one is told, and what is left by one that died."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from satune.files import lock as lock_module
from satune.files.lock import LOCK, locked
from satune.types import UserError

HOLDER = """
import sys, pathlib
from satune.files.lock import locked
with locked(pathlib.Path(sys.argv[1]), "there"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / LOCK


def holder(file: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_is_there(file: Path) -> None:
    other = holder(file)
    said = json.loads(file.read_text())
    with pytest.raises(UserError) as caught, locked(file, "runs/x"):
        pass
    assert said["pid"] == other.pid
    assert str(caught.value) == (
        f"runs/x: process {other.pid} works there since {said['start']} on {said['host']}; "
        "wait for it, or give another --out"
    )
    # The word of somebody on this machine is not taken away.
    with pytest.raises(UserError, match="works there since"), locked(file, "x", break_lock=True):
        pass
    other.communicate("")
    assert other.returncode == 0 and not file.exists()
    with locked(file, "x"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()


def test_a_process_that_was_killed_locks_nothing(file: Path) -> None:
    other = holder(file)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert json.loads(file.read_text())["pid"] == other.pid
    with locked(file, "x"):
        pass


def test_within_a_process_a_second_one_waits_too(file: Path) -> None:
    with locked(file, "x"), pytest.raises(UserError, match="works there"), locked(file, "x"):
        pass


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"pid": 1, "host": "elsewhere"}', "\x00" * 40]
)
def test_a_file_that_was_cut_off_locks_nothing(file: Path, text: str) -> None:
    file.write_text(text)
    with locked(file, "x"):
        pass


def elsewhere(**changes: str) -> str:
    return json.dumps({"pid": 7, "start": "noon", "host": "elsewhere", "boot": "b", **changes})


def test_the_word_of_another_machine_stands_until_it_is_taken_away(file: Path) -> None:
    file.write_text(elsewhere())
    with pytest.raises(UserError) as caught, locked(file, "x"):
        pass
    assert str(caught.value) == (
        "x: process 7 works there since noon on elsewhere, which is another machine than this "
        "one; if it no longer works there, take the lock away by --break-lock"
    )
    assert file.read_text() == elsewhere()
    with locked(file, "x", break_lock=True):
        pass
    with locked(file, "x"):
        pass


def test_containers_of_one_machine_judge_each_other(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "_boot", lambda: "b")
    file.write_text(elsewhere())
    with locked(file, "x"):
        pass
    # Where the kernel has no name, its name says nothing.
    monkeypatch.setattr(lock_module, "_boot", lambda: "")
    file.write_text(elsewhere(boot=""))
    with pytest.raises(UserError, match="another machine"), locked(file, "x"):
        pass


def test_a_lock_removed_by_its_holder_is_not_the_lock(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder ends between our opening the file and our locking it, and a third one comes."""
    real, third = fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        file.unlink()
        third.append(os.open(file, os.O_RDWR | os.O_CREAT))
        real(third[0], fcntl.LOCK_EX)
        real(handle, how)  # what we opened is nobody's any more, so this succeeds

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="another process works there"), locked(file, "x"):
        pass
    os.close(third[0])


def test_a_disk_that_knows_no_locks_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="the file system knows no locks"), locked(file, "x"):
        pass
    with locked(file, "x", break_lock=True):
        pass


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="a part of the path is a file"),
        locked(tmp_path / "file" / LOCK, "x"),
    ):
        pass
