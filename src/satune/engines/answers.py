"""What servers answered, on file, so that nothing is asked twice."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from satune.files.lines import JsonLines
from satune.types import Completion, Key, UserError


class Answers:
    """What servers answered, by request, on file (None: it is not kept). Engines may share one, if
    each is told apart by its ``place``.

    Raises UserError with file and line for a line that is no answer.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = JsonLines(path) if path is not None else None
        self._held: dict[str, Completion] = {}
        for number, row in enumerate(self._file.read() if self._file is not None else (), 1):
            try:
                completion = Completion(**row["completion"])
                sound = isinstance(row["request"], str) and isinstance(completion.text, str)
            except (KeyError, TypeError):
                sound = False
            if not sound:
                raise UserError(f"{path}, line {number}: not an answer; remove the line")
            self._held[row["request"]] = completion

    def get(self, request: str) -> Completion | None:
        return self._held.get(request)

    def keep(self, request: str, key: Key, completion: Completion, note: str = "") -> None:
        """Write an answer down. ``note`` says what stood in place of a text."""
        if self._file is not None:
            row = {"request": request, "key": asdict(key), "completion": asdict(completion)}
            self._file.append(row | ({"note": note} if note else {}))
            self._held[request] = completion
