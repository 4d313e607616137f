"""JSON lines that survive whatever ends their writer: whole lines stay, a torn one is cut off."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from satune.files.writing import append_bytes, disk_errors, strict_json
from satune.types import UserError


def append_lines(
    path: str | Path, rows: Iterable[Mapping[str, Any]], *, sync: bool = False
) -> None:
    """Add objects, one a line of strict JSON. A killed process leaves a prefix of the lines.
    ``sync``: they last through a loss of power when this returns.

    Raises UserError where the disk refuses; the file is then as it was.
    """
    data = "".join(f"{strict_json(row)}\n" for row in rows).encode()
    append_bytes(Path(path), [data], sync=sync)


def scan_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(number from 1, object) of each line of a JSON-lines file that a newline ends; None in place
    of the object where the line is damaged. Nothing if the file does not exist."""
    path = Path(path)
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else None


def read_lines(path: str | Path, mend: str = "remove the line or the run") -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none if it does not exist. A last
    line that was still being written is left out.

    Raises ``UserError`` with file, line and ``mend`` for a damaged line that a newline ends.
    """
    rows = []
    for number, row in scan_lines(path):
        if row is None:
            raise UserError(f"{path}, line {number}: not JSON, or no object; {mend}")
        rows.append(row)
    return rows


def cut_torn_line(path: Path) -> None:
    """Cut off a last line that was still being written; nothing where there is no such file."""
    if path.exists():
        with disk_errors(path), open(path, "ab") as file:
            file.truncate(path.read_bytes().rfind(b"\n") + 1)


class JsonLines:
    """An append-only file of objects, one a line, written by one process at a time.

    Opening it makes its directory, and cuts off a last line that was still being written.
    Raises UserError where the place cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        cut_torn_line(self.path)

    def read(self) -> list[dict[str, Any]]:
        """All objects in order. Raises UserError with file and line for a damaged line."""
        return read_lines(self.path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one object. Raises UserError if the disk is full."""
        append_lines(self.path, [row])
