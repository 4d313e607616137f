"""Writing so that a reader finds the old or the new and never a half: beside, fsync, rename.

Problems with the disk become one ``UserError`` line.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from satune.types import Ids, LogProbs, UserError

WRITING = ".writing"
"""What the name of a directory ends with while it is being written, or removed."""
_PARTIAL = ".partial"

_MENDS = {
    errno.ENOSPC: "the disk is full; free some space or give another --out",
    errno.EDQUOT: "the disk quota is used up; free some space or give another --out",
    errno.EACCES: "no permission to write there; change it or give another --out",
    errno.EPERM: "no permission to write there; change it or give another --out",
    errno.EROFS: "the file system is read-only; give another --out",
    errno.ENOTDIR: "a part of the path is a file; give another --out",
    errno.EEXIST: "a file stands where a directory is needed; give another --out",
    errno.EISDIR: "a directory stands where a file is needed; give another --out",
    errno.ENAMETOOLONG: "the path is too long; give another --out",
}


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn what the system says of files into ``UserError``, with its mend where one is known.
    What it says of connections and processes is passed on, and what others call an ``OSError``."""
    try:
        yield
    except (ConnectionError, TimeoutError, ChildProcessError, ProcessLookupError):
        raise
    except OSError as error:
        if error.errno is None:
            raise
        mend = _MENDS.get(error.errno, f"{error.strerror}; give another --out")
        raise UserError(f"{error.filename or path}: cannot be written: {mend}") from error


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a whole file so that a reader, or the next start, finds the old one or the new one.

    Raises ``UserError`` if the disk is full or the place cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}{_PARTIAL}")
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path):
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_directory(path.parent)


def is_partial(name: str) -> bool:
    """Whether a file of this name is what ``write_atomically`` left when it was cut off."""
    return name.startswith(".") and name.endswith(_PARTIAL)


def remove_tree(directory: Path) -> None:
    """Remove a directory so that a reader finds all of it or none under its name; what a cut
    leaves is called as if it were being written. Nothing happens where there is none.

    Raises UserError where the disk refuses.
    """
    going = directory.with_name(directory.name + WRITING)
    with disk_errors(directory):
        if going.exists():
            shutil.rmtree(going)
        if directory.exists():
            directory.rename(going)
            shutil.rmtree(going)


def append_bytes(
    path: Path, parts: Iterable[bytes | Ids | LogProbs], *, sync: bool = False
) -> None:
    """Add bytes to a file, which is made if need be. A killed process leaves a prefix of them.
    ``sync``: they last through a loss of power when this returns.

    Raises UserError where the disk refuses; the file is then as it was.
    """
    with disk_errors(path), open(path, "ab", buffering=0) as file:
        whole = file.tell()
        try:
            for part in parts:
                left = memoryview(part).cast("B")
                while left:
                    left = left[file.write(left) or 0 :]
            if sync:
                os.fsync(file.fileno())
                sync_directory(path.parent)
        except OSError:
            if path.is_file():  # or what comes next would be glued to half of this
                file.truncate(whole)
            raise


def sync_directory(path: str | Path) -> None:
    """Make renames inside ``path`` last through a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def strict_json(value: Any) -> str:
    """``value`` on one line of strict JSON; "inf", "-inf" and "nan" stand for what JSON lacks.

    ``float`` turns them, and numbers, back into numbers. Raises ``TypeError`` for values that are
    neither numbers, texts, booleans, None, lists nor mappings.
    """
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


@contextmanager
def tensor_errors(path: Path) -> Iterator[None]:
    """``disk_errors`` for blocks that write safetensors or tokenizers, whose writers have errors of
    their own."""
    with disk_errors(path):
        try:
            yield
        except Exception as error:
            # These writers keep the system's number in their text alone; tokenizers' error has no
            # class of its own.
            if type(error) not in (SafetensorError, Exception):
                raise
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), str(error), str(path)) from error


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A new directory that becomes ``target`` when the block is done; nothing is left where it
    fails. What a killed process left beside is removed first. A ``target`` that is there by then is
    replaced: a caller that must not lose it looks beforehand.

    Raises UserError where the place cannot be written.
    """
    beside = target.with_name(target.name + WRITING)
    try:
        with tensor_errors(beside):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            sync_tree(beside)
            shutil.rmtree(target, ignore_errors=True)
            beside.rename(target)
            sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def sync_tree(directory: Path) -> None:
    """Make every file below ``directory``, and the names of all, last through a loss of power."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(Path(folder) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_directory(folder)


def link(source: Path, target: Path) -> None:
    """A hard link; where the file system has none, a copy."""
    try:
        os.link(source, target)
    except OSError:
        with disk_errors(target):
            shutil.copy2(source, target)


def identity(path: Path) -> list[Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return [path.stat().st_size, digest.hexdigest()]
