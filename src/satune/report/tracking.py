"""Passes what a run tells on to trackers, which can neither hold it up nor end it."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

from satune.files.events import Event, Note
from satune.files.lines import scan_lines
from satune.files.printing import encodable, printable
from satune.files.writing import strict_json, write_atomically
from satune.report.public import public
from satune.report.scalars import scalars
from satune.report.settings import LogSettings
from satune.report.trackers import TRACKERS, About, Said, Tracker
from satune.types import UserError

GRACE, CUT_GRACE = 30.0, 5.0
"""Seconds that a run waits for a tracker to take what was sent: one that is over, one cut off."""
LONGEST = 20_000
"""Characters of a message that are sent."""
IDS = "trackers.json"

Watch = Callable[[Event | Note], None]


@contextmanager
def tracking(
    settings: LogSettings, run: Path, recipe: Mapping[str, Any], tell: Callable[[str], None]
) -> Iterator[Watch]:
    """A watcher of the events of the run in ``run``, whose recipe has the plain values ``recipe``.

    A run goes on in each tracker where it was; a tracker that has not had it yet is sent all that
    ``events.jsonl`` holds first. ``tell`` is given a line when one fails, which costs nothing else.
    Raises UserError for a tracker that is not installed, lets nobody in or cannot be reached.
    """
    senders: list[_Sender] = []
    ended = False
    try:
        for name in dict.fromkeys(settings.report_to):
            tracker, known = _open(name, settings, run, recipe)
            senders.append(_Sender(name, tracker, known, run, settings, tell))

        def watch(event: Event | Note) -> None:
            if event["event"] != "note":
                for sender in senders:
                    sender.take(event)

        yield watch
        ended = True
    finally:
        for sender in senders:
            sender.finish(ended=ended)
        for sender in senders:
            sender.wait()


def _open(
    name: str, settings: LogSettings, run: Path, recipe: Mapping[str, Any]
) -> tuple[Tracker, bool]:
    """The tracker, and whether it has had this run before."""
    path = run / IDS
    ids = _ids(path)
    about = About(run, settings.project, run.resolve().name, public(recipe), ids.get(name))
    try:
        tracker = TRACKERS[name](about)
    except UserError:
        raise
    except Exception as error:  # whatever a library of somebody else's raises
        begin = f", or remove {path} to begin another run there" if about.known else ""
        raise UserError(
            f"log.report_to: {name}: {_one_line(error)}; mend that, or leave {name} out{begin}"
        ) from None
    if tracker.id is not None and tracker.id != about.known:
        write_atomically(path, strict_json({**ids, name: tracker.id}) + "\n")
    return tracker, tracker.id is not None and tracker.id == about.known


def _ids(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise UserError(f"{path}: damaged; remove it, and trackers are sent the run anew")
    return found


class _Sender(threading.Thread):
    """Sends one tracker what there is, beside the run. The first failure ends it."""

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        known: bool,
        run: Path,
        settings: LogSettings,
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(name=f"log to {name}", daemon=True)
        self._tracker, self._run_path, self._tell = tracker, run, tell
        self._count = settings.report_conversations
        self._label, self._up_to_date, self._ended = name, known, False
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._failed = False
        self.start()

    def take(self, event: Event) -> None:
        """The event, and before it all others where the tracker does not have them."""
        if self._up_to_date:
            self._events.put(event)
            return
        self._up_to_date = True
        for _, row in scan_lines(self._run_path / "events.jsonl"):
            if row is not None:
                self._events.put(cast(Event, row))

    def finish(self, *, ended: bool) -> None:
        self._ended = ended
        self._events.put(None)

    def wait(self) -> None:
        grace = GRACE if self._ended else CUT_GRACE
        self.join(grace)
        if self.is_alive():
            self._tell(f"{self._label}: has not taken everything within {grace:g} s")

    def run(self) -> None:
        while (event := self._events.get()) is not None:
            self._guarded(lambda event=event: self._send(event))
        self._guarded(lambda: self._tracker.close(ended=self._ended))

    def _guarded(self, do: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            do()
        except Exception as error:  # whatever a library of somebody else's raises
            self._failed = True
            self._tell(
                f"{self._label}: {_one_line(error)}; the run goes on without it, "
                "events.jsonl has every figure"
            )

    def _send(self, event: Event) -> None:
        stage = 0 if event["event"] == "run" else event["stage"]
        figures = scalars(event)
        if figures:
            self._tracker.figures(figures, stage)
        if self._count:
            where, said = _conversations(self._run_path / "episodes", event, self._count)
            if said:
                self._tracker.conversations(where, said, stage)


def _conversations(folder: Path, event: Event, count: int) -> tuple[str, Sequence[Said]]:
    """The first ``count`` conversations that an event tells of, and what they are."""
    if event["event"] == "rollout":
        path, mark = folder / f"stage-{event['stage']:04d}.jsonl", ("step", event["step"])
        where = "training"
    elif event["event"] == "eval":
        path = folder / f"evaluation-{event['stage']:04d}.jsonl"
        mark = ("greedy", event["greedy"])
        where = f"held_out_{'greedy' if event['greedy'] else 'sampled'}"
    else:
        return "", []
    rows = (row for _, row in scan_lines(path) if row is not None and row[mark[0]] == mark[1])
    return where, [_said(row) for row in islice(rows, count)]


def _said(row: Mapping[str, Any]) -> Said:
    """A row of ``play.rows`` as trackers are sent it; none of its arrays is read."""
    observed = list(row["observations"])
    prompt = "".join(part.get("text", "") for part in row["problem"]["prompt"])
    said = [("user", _text(prompt))]
    for number, turn in enumerate([*row["turns"], None]):
        while observed and observed[0][0] <= number:
            said.append(("user", _text(observed.pop(0)[1])))
        if turn is not None:
            said.append((turn["seat"], _text(turn["text"])))
    failure = row["failure"] or {}
    return {
        "problem": _text(row["problem"]["id"]),
        "sample": row["sample"],
        "said": said,
        "answer": _text(row["answer"] or ""),
        "reward": float(row["grade"]["score"]),
        "verdict": _text(failure.get("reason") or row["grade"]["detail"]),
    }


def _text(text: str) -> str:
    """What any tracker can write: whole characters, and not too many."""
    whole = encodable(text)
    cut = len(whole) - LONGEST
    return f"{whole[:LONGEST]} ({cut:,} characters more)" if cut > 0 else whole


def _one_line(error: Exception) -> str:
    said = printable(" ".join(str(error).split()))
    return f"{type(error).__name__}: {said[:300]}"
