"""The directory, where TMPDIR says, in which weights lie on their way to servers.

Its process holds a lock in it for as long as it lives. What a killed one left, also before the
machine was started anew, is removed by the next: it is as large as all agents.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from satune.files.writing import tensor_errors
from satune.types import UserError

_PREFIX = "satune-vllm-"
_LOCK = ".lock"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MACHINE = Path("/etc/machine-id")


class Scratch:
    """A new directory, ``path``. Raises UserError where none can be made."""

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        with scratch_errors(parent):
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            beside = self.path / f"{_LOCK}.new"
            beside.write_text(f"{_boot()}\n{_machine()}\n")
            self._handle = os.open(beside, os.O_RDONLY)
            # On a disk without locks it is removed by its own process alone.
            with suppress(OSError):
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.replace(beside, self.path / _LOCK)
        for other in parent.glob(f"{_PREFIX}*/{_LOCK}"):
            if _left(other):
                shutil.rmtree(other.parent, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._handle)


@contextmanager
def scratch_errors(place: Path) -> Iterator[None]:
    """``tensor_errors`` for what lies where TMPDIR says."""
    try:
        with tensor_errors(place):
            yield
    except UserError as error:
        raise UserError(str(error).replace("another --out", "another TMPDIR")) from error


def _left(lock: Path) -> bool:
    """Whether nobody holds a lock that was made on this machine, whenever that was. Of other
    machines' locks, on a disk that they share, nothing is known here."""
    try:
        # Whoever may write there may have put something else in its place.
        handle = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        said = os.pread(handle, 1024, 0).decode(errors="replace").splitlines()
        boot, machine = (*said, "", "")[:2]
        # The lock tells apart what machines hold that have one name by mistake.
        if not _boot() or (boot != _boot() and machine != (_machine() or None)):
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _boot() -> str:
    """What names this run of the machine; empty where nothing does."""
    return _BOOT.read_text().strip() if _BOOT.is_file() else ""


def _machine() -> str:
    """What names this machine, however often it starts: its number and, because copies of one image
    may share that, its name; empty where it has no number."""
    number = _MACHINE.read_text().strip() if _MACHINE.is_file() else ""
    return f"{number} {os.uname().nodename}" if number else ""
