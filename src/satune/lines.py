"""JSON lines that survive whatever ends their writer: whole lines are kept, a torn one is cut off.

Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from satune.types import UserError


class JsonLines:
    """An append-only file of objects, one a line, written by one process at a time.

    Opening it makes its directory, and cuts off a last line that was still being written. Lines are
    appended unbuffered: a killed process leaves a prefix of them.
    Raises UserError where the place cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
        except OSError as error:
            raise self._unwritable(error) from error

    def read(self) -> list[dict[str, Any]]:
        """All objects in order. Raises UserError with file and line for a damaged line."""
        rows = []
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise self._damaged(number, "not JSON") from None
            if not isinstance(row, dict):
                raise self._damaged(number, "not an object")
            rows.append(row)
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one object. Raises UserError if the disk is full; the file is then as it was."""
        data = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                whole = file.tell()
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:
                    file.truncate(whole)  # or the next line would be glued to half of this one
                    raise
        except OSError as error:
            raise self._unwritable(error) from error

    def _damaged(self, number: int, what: str) -> UserError:
        return UserError(f"{self.path}, line {number}: {what}; remove the line, or the file")

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: cannot be written ({error.strerror}); mend that, or give another --out"
        )
