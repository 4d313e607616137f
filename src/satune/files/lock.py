"""A lock that one process holds on a directory for as long as it lives.

The lock is the operating system's (``flock``) on a file inside the directory: it ends with its
process, however that ends, so that a killed run locks nothing. What the file says is for the
message alone, but for the machine: on a disk that several machines share, nobody here can tell
whether another one's process still lives, and its word stands until the user takes it away.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from satune.files.writing import disk_errors
from satune.types import UserError

LOCK = ".lock"
"""The lock's file in the directory that it locks."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def locked(file: Path, what: str, *, break_lock: bool = False) -> Iterator[None]:
    """Hold ``file`` locked until the block is done; ``what`` is the place that the message names.

    ``break_lock`` takes a lock that was left by another machine, and goes on without one on a disk
    that knows none. A process that lives on this machine is never passed over.

    Raises UserError, one line that says who holds it, where somebody does.
    """
    with disk_errors(file):
        handle = _take(file, what, break_lock)
    try:
        yield
    finally:
        try:
            # Removed while it is held: whoever opened it meanwhile finds that it is not there.
            file.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _take(file: Path, what: str, break_lock: bool) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(_held(what, _read(handle))) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                if not break_lock:
                    raise UserError(
                        f"{what}: the file system knows no locks; where no other process works "
                        "there, go on without by --break-lock"
                    ) from None
            if not _is(handle, file):
                # Its holder removed it after we opened it; the next one may lie there already.
                os.close(handle)
                continue
            there = _read(handle)
            if there and not _of_this_machine(there) and not break_lock:
                raise UserError(
                    f"{_held(what, there)}, which is another machine than this one; if it no "
                    "longer works there, take the lock away by --break-lock"
                )
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(_ourselves()).encode(), 0)
            return handle
        except BaseException:
            os.close(handle)
            raise


def _is(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _ourselves() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "start": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "boot": _boot(),
    }


def _boot() -> str:
    """What the processes of one running kernel have in common, containers included; "" unknown."""
    return _BOOT.read_text().strip() if _BOOT.is_file() else ""


def _read(handle: int) -> dict[str, Any]:
    """What the holder wrote; nothing where it wrote nothing, or was ended while it wrote."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    whole = isinstance(found, dict) and {"pid", "start", "host", "boot"} <= set(found)
    return found if whole else {}


def _of_this_machine(there: dict[str, Any]) -> bool:
    return there["host"] == socket.gethostname() or (bool(_boot()) and there["boot"] == _boot())


def _held(what: str, there: dict[str, Any]) -> str:
    if not there:
        return f"{what}: another process works there; wait for it, or give another --out"
    return (
        f"{what}: process {there['pid']} works there since {there['start']} on {there['host']}"
        + ("; wait for it, or give another --out" if _of_this_machine(there) else "")
    )
