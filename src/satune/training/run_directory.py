"""The directory of one run: where everything lies, and how it is written so that it survives.

Events and episodes are appended a line at a time and can be cut back to the lengths a checkpoint
recorded; everything else is complete or absent.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from satune.files.arrays import append_rows, files_of_rows, read_rows
from satune.files.events import Event, append_event, read_events
from satune.files.names import is_plain, refuse_links
from satune.files.writing import disk_errors, strict_json, sync_directory, write_atomically
from satune.types import UserError


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
        anything else, or if it cannot be written; and for a run with a link that leads out of it.
        """
        if resume:
            refuse_links(self.path)
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

    def append_event(self, event: Event) -> None:
        """Add one event, with the time."""
        append_event(self.events, event)
        self._unsynced.add(self.events)

    def append_episodes(self, stage: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add conversations of ``stage`` (from 1; 0: before training) to the stage's files: rows of
        episodes as ``files.arrays.append_rows`` takes them."""
        path = self.episodes / f"stage-{stage:04d}.jsonl"
        append_rows(path, rows)
        self._unsynced |= set(files_of_rows(path))

    def read_events(self) -> list[Event]:
        """All events in order. A last line that was still being written is left out.

        Raises ``UserError`` with file and line for any other damaged line.
        """
        return read_events(self.events)

    def read_episodes(self, stage: int) -> list[dict[str, Any]]:
        """The conversations of ``stage``, as ``read_events``."""
        return read_rows(self.episodes / f"stage-{stage:04d}.jsonl")

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
        files = self._files_of_episodes()
        return {
            "events": self.events.stat().st_size if self.events.exists() else 0,
            "episodes": {path.name: path.stat().st_size for path in files},
        }

    def truncate(self, sizes: Mapping[str, Any]) -> None:
        """Cut events and episodes back to ``sizes``; files of episodes not listed are removed.

        Nothing is changed and ``UserError`` raised if a file is shorter than recorded. The names in
        ``sizes`` are those of files beside one another, as ``Checkpoints.damage`` holds.
        """
        kept: dict[str, int] = dict(sizes["episodes"])
        assert all(map(is_plain, kept))
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
            for path in self._files_of_episodes():
                if path.name not in kept:
                    path.unlink()
                    self._unsynced.discard(path)
            self.summary.unlink(missing_ok=True)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, the last act of a run."""
        write_atomically(self.summary, strict_json(summary) + "\n")

    def _files_of_episodes(self) -> list[Path]:
        # A killed process may have left numbers whose rows were not written.
        return sorted((*self.episodes.glob("*.jsonl"), *self.episodes.glob("*.arrays")))
