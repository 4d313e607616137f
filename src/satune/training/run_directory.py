"""The directory of one run: where everything lies, and how it is written so that it survives.

Events and episodes are appended a line at a time and can be cut back to the lengths a checkpoint
recorded; certify.jsonl is never cut back; everything else is complete or absent. One process works
here at a time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from satune.files.arrays import append_rows, files_of_rows
from satune.files.events import Event, append_event, read_events
from satune.files.lines import cut_torn_line
from satune.files.lock import LOCK, locked
from satune.files.manifest import missing_part
from satune.files.names import is_plain, refuse_links
from satune.files.writing import (
    disk_errors,
    is_partial,
    remove_tree,
    strict_json,
    sync_directory,
    write_atomically,
)
from satune.types import UserError

_PROBE = ".writable"
_TRACKERS = ("tensorboard", "trackers.json")
"""What trackers leave here."""
_FIRST = b'{"event": "run",'
"""What the events of every run begin with."""


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
        self.certify = self.path / "certify.jsonl"
        self.report = self.path / "report.html"
        self.hosts = self.path / "hosts"
        self.intent = self.path / "going-back.json"
        self._unsynced: set[Path] = set()

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here: its first event or a checkpoint is there. A recipe, a
        team or a summary without them is somebody else's."""
        if any(self.checkpoints.glob("stage-*/state.json")):
            return True
        if not self.events.is_file():
            return False
        with open(self.events, "rb") as file:
            return file.read(len(_FIRST)) == _FIRST

    def unfinished(self) -> str | None:
        """What a run that says it is finished still lacks, "" where it does not say so; None where
        it lacks nothing. The summary is the last thing that a run writes."""
        if not self.summary.exists() or self.intent.exists():
            return ""
        if self.read_summary() is None:
            return f"{self.summary}: damaged"
        missing = missing_part(self.team)
        return None if missing is None else f"{missing}: is missing"

    def read_summary(self) -> dict[str, Any] | None:
        """What ``write_summary`` wrote; None where it is absent or damaged."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return summary if isinstance(summary, dict) and "stages" in summary else None

    def check_place(self, *, resume: bool = False) -> None:
        """Refuse a directory with contents that a run would mix with; touches nothing.

        Raises ``UserError`` if it holds a run and ``resume`` is not asked for, or if it holds
        anything else, a recipe included; and for a run with a link that leads out of it.
        """
        if resume:
            refuse_links(self.path)
        with disk_errors(self.path):
            if self.holds_run:
                if not resume:
                    raise UserError(
                        f"{self.path}: already holds a run; go on with it by --resume,"
                        " or give another --out"
                    )
                return
            # A start that failed half-way has left no more than this.
            ours = {"episodes", "checkpoints", "optimizers", "hosts", *_TRACKERS, _PROBE, LOCK}
            items = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
            if any(self.hosts.glob("*/checkpoints/run.json")):
                raise UserError(
                    f"{self.hosts}: holds agents that hosts have kept of another run; remove it, or"
                    " give another --out"
                )
            full = any(any(place.glob("*")) for place in (self.episodes, self.checkpoints))
            if full or any(name not in ours and not is_partial(name) for name in items):
                raise UserError(f"{self.path}: is not empty and holds no run; give another --out")

    @contextmanager
    def held(self, *, break_lock: bool = False) -> Iterator[None]:
        """Make the directory and keep every other process out of it until the block is done.

        Raises UserError where another one works there.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / LOCK, str(self.path), break_lock=break_lock):
            yield

    def start(self, *, resume: bool = False) -> None:
        """Make what a run writes into. Raises ``UserError`` as ``check_place`` does, and where the
        directory cannot be written."""
        self.check_place(resume=resume)
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.episodes.mkdir(exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            # Permissions alone do not tell whether the place can be written.
            probe = self.path / _PROBE
            write_atomically(probe, "")
            probe.unlink()

    def begin_anew(self) -> None:
        """Make way for a new beginning of a run that has no checkpoint; what it told stands until
        the new first event takes its place.

        Raises UserError where the run has learned something, or has a team or a summary, which are
        not given up. Without stages to learn in there is never a checkpoint, and no more to lose
        than an evaluation.
        """
        events = self.read_events()
        learns = any(event["event"] == "run" and event["stages"] > 0 for event in events)
        learned = any(event["event"] in ("rollout", "update") for event in events)
        if learned or (learns and (self.team.exists() or self.summary.exists())):
            raise UserError(
                f"{self.path}: the run's checkpoints are gone, and it cannot go on without one; "
                "give another --out"
            )
        with disk_errors(self.path):
            self.summary.unlink(missing_ok=True)
        remove_tree(self.team)

    @property
    def intended(self) -> str | None:
        """The checkpoint that a resume was going back to when it was cut off. Raises UserError
        where what says so is damaged."""
        if not self.intent.exists():
            return None
        try:
            return str(json.loads(self.intent.read_text(encoding="utf-8"))["checkpoint"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.intent}: damaged; name the checkpoint by --resume-from"
            ) from None

    @contextmanager
    def going_back(self, checkpoint: str) -> Iterator[None]:
        """Note that the run is to go on from ``checkpoint`` for as long as the block removes what
        came after it. A block that is cut off leaves the note, and it has to be run again."""
        write_atomically(self.intent, strict_json({"checkpoint": checkpoint}) + "\n")
        yield
        with disk_errors(self.path):
            for directory in (self.checkpoints, self.episodes, self.path):
                sync_directory(directory)
            self.intent.unlink()
            sync_directory(self.path)

    def append_event(self, event: Event) -> None:
        """Add one event, with the time. The first event of a run takes the place of all others, and
        of the conversations: they are of a beginning that came to nothing."""
        if event["event"] == "run":
            with disk_errors(self.path):
                for path in self._files_of_episodes():
                    path.unlink()
                    self._unsynced.discard(path)
            append_event(self.events, event, first=True)
            return
        append_event(self.events, event)
        self._unsynced.add(self.events)

    def append_episodes(self, stage: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add conversations of ``stage`` (from 1; 0: before training) to the stage's files: rows of
        episodes as ``files.arrays.append_rows`` takes them."""
        self._append_rows(self.episodes / f"stage-{stage:04d}.jsonl", rows)

    def append_evaluation(self, stage: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add conversations on held-out problems, played after ``stage`` stages, to a file of their
        own, as ``append_episodes``."""
        self._append_rows(self.episodes / f"evaluation-{stage:04d}.jsonl", rows)

    def _append_rows(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        append_rows(path, rows)
        self._unsynced |= set(files_of_rows(path))

    def read_events(self) -> list[Event]:
        """All events in order. A last line that was still being written is left out.

        Raises ``UserError`` with file and line for any other damaged line.
        """
        return read_events(self.events)

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

    def truncate(self, sizes: Mapping[str, Any]) -> list[str]:
        """Cut events and episodes back to ``sizes``; files of episodes not listed are removed, the
        summary too.

        What has been lost from a file stays lost, and costs the run nothing else: it keeps its
        whole lines, and one line a file says so. The names in ``sizes`` are those of files beside
        one another, as ``Checkpoints.damage`` holds.
        """
        kept: dict[str, int] = dict(sizes["episodes"])
        assert all(map(is_plain, kept))
        cuts = {self.events: int(sizes["events"])}
        cuts.update({self.episodes / name: int(size) for name, size in kept.items()})
        held = {path: path.stat().st_size if path.exists() else 0 for path in cuts}
        short = [path for path, size in cuts.items() if held[path] < size]
        with disk_errors(self.path):
            for path in short:
                if path.suffix == ".jsonl":
                    cut_torn_line(path)
                    continue
                # Rows that name lost numbers would be given those that are written next.
                for file in files_of_rows(path.with_suffix(".jsonl")):
                    file.rename(file.with_name(f"{file.name}.damaged"))
            for path, size in cuts.items():
                if path.exists():
                    if held[path] > size:
                        os.truncate(path, size)
                    self._unsynced.add(path)
            for path in self._files_of_episodes():
                if path.name not in kept:
                    path.unlink()
                    self._unsynced.discard(path)
            self.summary.unlink(missing_ok=True)
        return [
            f"{path}: holds {held[path]} bytes where the checkpoint recorded {cuts[path]}; what is "
            "missing stays missing, the run goes on"
            for path in short
        ]

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, the last act of a run."""
        write_atomically(self.summary, strict_json(summary) + "\n")

    def _files_of_episodes(self) -> list[Path]:
        # A killed process may have left numbers whose rows were not written.
        ours = re.compile(r"(stage|evaluation)-\d+\.(jsonl|arrays)")
        return sorted(path for path in self.episodes.glob("*") if ours.fullmatch(path.name))
