"""The directory of one run: where everything lies, and how it is written so that it survives.

Events and episodes are appended a line at a time and can be cut back to the lengths a checkpoint
recorded; everything else is written beside its place and renamed, so that it is complete or
absent. Problems with the disk become one ``UserError`` line.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from satune.types import UserError

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
    """Turn what the disk or its owner can mend into ``UserError``; the rest is passed on."""
    try:
        yield
    except OSError as error:
        mend = _MENDS.get(error.errno or 0)
        if mend is None:
            raise
        raise UserError(f"{error.filename or path}: cannot be written: {mend}") from error


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a whole file so that a reader, or the next start, finds the old one or the new one.

    Raises ``UserError`` if the disk is full or the place cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.partial")
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path):
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_directory(path.parent)


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


class RunDirectory:
    """The layout of a run and the writers of its files. Creating the object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.events = self.path / "events.jsonl"
        self.episodes = self.path / "episodes"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.team = self.path / "team"
        self.report = self.path / "report.html"
        self._unsynced: set[Path] = set()

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here and left something to go on with or to lose."""
        written = (self.recipe, self.events, self.summary, self.team)
        return any(path.exists() for path in written) or (
            self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        )

    @property
    def finished(self) -> bool:
        """Whether the run here came to its end; the summary is the last thing it writes."""
        return self.summary.exists()

    def start(self, *, resume: bool = False) -> None:
        """Make the directory, refusing one with contents that a new run would mix with.

        Raises ``UserError`` if it holds a run and ``resume`` is not asked for, if it holds
        anything else, or if it cannot be written.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not resume:
                if self.holds_run:
                    raise UserError(
                        f"{self.path}: already holds a run; go on with it by --resume,"
                        " or give another --out"
                    )
                # A start that failed half-way has left no more than this.
                ours = (self.episodes, self.checkpoints, self.path / ".writable")
                if any(item not in ours for item in self.path.iterdir()):
                    raise UserError(
                        f"{self.path}: is not empty and holds no run; give another --out"
                    )
            self.episodes.mkdir(exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        # Permissions alone do not tell whether the place can be written.
        probe = self.path / ".writable"
        write_atomically(probe, "")
        probe.unlink()

    def append_event(self, kind: str, **fields: Any) -> None:
        """Add one event. ``time`` is when it was written, in UTC, and the only timestamp."""
        assert "event" not in fields and "time" not in fields
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._append(self.events, [{"event": kind, "time": now, **fields}])

    def append_episodes(self, stage: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add conversations of ``stage`` (from 1; 0: before training) to the stage's file."""
        self._append(self.episodes / f"stage-{stage:04d}.jsonl", rows)

    def read_events(self) -> list[dict[str, Any]]:
        """All events in order. A last line that was still being written is left out.

        Raises ``UserError`` with file and line for any other damaged line.
        """
        return read_lines(self.events)

    def read_episodes(self, stage: int) -> list[dict[str, Any]]:
        """The conversations of ``stage``, as ``read_events``."""
        return read_lines(self.episodes / f"stage-{stage:04d}.jsonl")

    def sizes(self) -> dict[str, Any]:
        """{"events": bytes, "episodes": {file name: bytes}}, safely on disk when this returns."""
        with disk_errors(self.path):
            for path in sorted(self._unsynced):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            if self._unsynced:
                sync_directory(self.episodes)
                sync_directory(self.path)
            self._unsynced.clear()
        files = sorted(self.episodes.glob("*.jsonl"))
        return {
            "events": self.events.stat().st_size if self.events.exists() else 0,
            "episodes": {path.name: path.stat().st_size for path in files},
        }

    def truncate(self, sizes: Mapping[str, Any]) -> None:
        """Cut events and episodes back to ``sizes``; files of episodes not listed are removed.

        Nothing is changed and ``UserError`` raised if a file is shorter than recorded.
        """
        kept: dict[str, int] = dict(sizes["episodes"])
        cuts = {self.events: int(sizes["events"])}
        cuts.update({self.episodes / name: int(size) for name, size in kept.items()})
        for path, size in cuts.items():
            held = path.stat().st_size if path.exists() else 0
            if held < size:
                raise UserError(
                    f"{path}: holds {held} bytes where the checkpoint recorded {size};"
                    " the run is damaged, start it anew in another --out"
                )
        with disk_errors(self.path):
            for path, size in cuts.items():
                if path.exists():
                    os.truncate(path, size)
                    self._unsynced.add(path)
            for path in self.episodes.glob("*.jsonl"):
                if path.name not in kept:
                    path.unlink()
                    self._unsynced.discard(path)
            self.summary.unlink(missing_ok=True)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, the last act of a run."""
        write_atomically(self.summary, strict_json(summary) + "\n")

    def _append(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        data = "".join(f"{strict_json(row)}\n" for row in rows).encode()
        with disk_errors(path):
            # Unbuffered and in append mode: what a killed run leaves is a prefix of its lines.
            with open(path, "ab", buffering=0) as file:
                written = 0
                while written < len(data):
                    written += file.write(data[written:]) or 0
            self._unsynced.add(path)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that this module wrote; none if it does not exist.

    Raises ``UserError`` with file and line for a damaged line that a newline ends.
    """
    path = Path(path)
    if not path.exists():
        return []
    complete, newline, _ = path.read_bytes().rpartition(b"\n")
    lines = complete.split(b"\n") if newline else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(
                f"{path}, line {number}: not JSON; remove the line or the run"
            ) from None
    return rows
