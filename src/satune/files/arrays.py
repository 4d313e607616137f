"""Arrays of token ids and log-probabilities, and rows of episodes on disk: text as JSON lines,
arrays beside.

``NAME.jsonl`` holds an episode a line. ``NAME.arrays`` holds numbers of four bytes, little-endian,
one after another, and only ever grows. In a line an array is ``{"int32": [[at, count], ...]}`` or
``{"float32": ...}``: the pieces of which it is made, each ``count`` numbers from the ``at``-th of
that file on. What is common is stored once: a prompt that begins with an earlier turn, prompt and
completion, is one with it there, and samples of one problem share their first prompt.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from satune.files.lines import append_lines, scan_lines
from satune.files.writing import append_bytes, disk_errors
from satune.types import Ids, LogProbs, UserError, ids_of

Row = Mapping[str, Any]
Piece = tuple[int, int]

_BYTES = 4
_KINDS = {"int32": "i", "float32": "f"}
_IDS = ("prompt_ids", "completion_ids")


def shared_prefix(a: Ids, b: Ids) -> int:
    """With how many equal ids ``a`` and ``b`` begin."""
    length = min(len(a), len(b))
    differ = np.asarray(a)[:length] != np.asarray(b)[:length]
    return int(differ.argmax()) if differ.any() else length


def merge(sequences: list[Ids], prompt: Ids, completion: Ids) -> int:
    """Let a turn go on with the first of ``sequences`` that its prompt begins with, in place, or
    begin a new one; returns which. It then holds the prompt and behind it the completion."""
    place = next(
        (i for i, ids in enumerate(sequences) if prompt[: len(ids)] == ids), len(sequences)
    )
    if place == len(sequences):
        sequences.append(ids_of())
    ids = sequences[place]
    ids.extend(prompt[len(ids) :])
    ids.extend(completion)
    return place


def arrays_beside(path: Path) -> Path:
    """The file of numbers that belongs to a file of rows."""
    return path.with_suffix(".arrays")


def files_of_rows(path: Path) -> list[Path]:
    """Those of the two files of rows that are there."""
    return [file for file in (arrays_beside(path), path) if file.exists()]


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows of episodes to ``path`` and the arrays of their turns to the file beside it.

    The arrays are ``prompt_ids`` and ``completion_ids`` (int32) and ``sampled_logprobs`` (float32)
    of each of ``row["turns"]``, or None. The numbers are written first: a killed process leaves
    whole lines, each with its numbers, and perhaps numbers that no line names.

    Raises UserError where the disk refuses.
    """
    beside = arrays_beside(path)
    held = beside.stat().st_size if beside.exists() else 0
    store = _Store(-(-held // _BYTES))
    lines = [store.put(row) for row in rows]
    if store.chunks:
        torn = b"\0" * (-held % _BYTES)  # a number that was still being written
        append_bytes(beside, [torn, *map(_little, store.chunks)])
    append_lines(path, lines)


def scan_rows(path: Path) -> Iterator[dict[str, Any] | UserError]:
    """The rows that ``append_rows`` wrote, arrays included; none if there is no file. In place of a
    line that is damaged, or names numbers that the file beside it does not hold, stands what would
    be said of it, with file and line."""
    beside = arrays_beside(path)
    with disk_errors(beside):
        numbers = memoryview(beside.read_bytes() if beside.exists() else b"")
    for line, row in scan_lines(path):
        where = f"{path}, line {line}"
        if row is None:
            yield UserError(f"{where}: not JSON, or no object; remove the line or the run")
            continue
        try:
            for turn in row.get("turns", []):
                for name, value in turn.items():
                    if isinstance(value, dict):
                        turn[name] = _read(value, numbers, where, beside)
        except UserError as error:
            yield error
        except (AttributeError, KeyError, TypeError, ValueError):
            yield UserError(f"{where}: turns or arrays that cannot be read; remove the line")
        else:
            yield row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that ``append_rows`` wrote, arrays included; none if there is no file.

    Raises UserError, with file and line, for a line that is damaged or names numbers that the file
    beside it does not hold.
    """
    rows = []
    for row in scan_rows(path):
        if isinstance(row, UserError):
            raise row
        rows.append(row)
    return rows


class _Store:
    """Where arrays go in a file that holds ``end`` numbers; ``chunks`` are to be added to it."""

    def __init__(self, end: int) -> None:
        self.chunks: list[array[Any]] = []
        self._end = end
        self._heads: dict[bytes, Piece] = {}

    def put(self, row: Row) -> Row:
        """The row with places instead of its turns' arrays."""
        sequences: list[Ids] = []
        firsts: list[Ids] = []
        places: list[int] = []
        for turn in row["turns"]:
            prompt, completion = (ids_of() if turn[n] is None else turn[n] for n in _IDS)
            places.append(merge(sequences, prompt, completion))
            if len(sequences) > len(firsts):
                firsts.append(prompt)
        stored = [self._sequence(ids, first) for ids, first in zip(sequences, firsts, strict=True)]
        turns = []
        for turn, place in zip(row["turns"], places, strict=True):
            start = 0
            made = dict(turn)
            for name in _IDS:
                if turn[name] is not None:
                    end = start + len(turn[name])
                    made[name] = {"int32": list(_cut(stored[place], start, end))}
                    start = end
            if turn["sampled_logprobs"] is not None:
                made["sampled_logprobs"] = {"float32": [self._add(turn["sampled_logprobs"])]}
            turns.append(made)
        return {**row, "turns": turns}

    def _sequence(self, ids: Ids, first: Ids) -> list[Piece]:
        """Store a sequence whose first prompt is ``first``."""
        name = first.tobytes()
        if name in self._heads:
            return [self._heads[name], self._add(ids[len(first) :])]
        whole = self._add(ids)
        self._heads[name] = (whole[0], len(first))
        return [whole]

    def _add(self, numbers: Ids | LogProbs) -> Piece:
        at = self._end
        if numbers:
            self.chunks.append(numbers)
            self._end += len(numbers)
        return at, len(numbers)


def _cut(pieces: Sequence[Piece], start: int, end: int) -> Iterator[Piece]:
    """Where numbers ``start`` to ``end`` of what ``pieces`` hold together stand."""
    for at, count in pieces:
        here, there = max(start, 0), min(end, count)
        if here < there:
            yield at + here, there - here
        start, end = start - count, end - count


def _little(numbers: Ids | LogProbs) -> Ids | LogProbs:
    if sys.byteorder == "little":
        return numbers
    swapped = numbers[:]
    swapped.byteswap()
    return swapped


def _read(value: Mapping[str, Any], numbers: memoryview, line: str, beside: Path) -> Any:
    """The array that a line describes by ``value``."""
    ((kind, pieces),) = value.items()
    made: array[Any] = array(_KINDS[kind])
    for at, count in pieces:
        piece = numbers[at * _BYTES : (at + count) * _BYTES]
        if at < 0 or len(piece) != count * _BYTES:
            raise UserError(
                f"{line}: names {count} numbers from number {at} on, which {beside} does not hold; "
                "the run is damaged, start it anew in another --out"
            )
        made.frombytes(piece)
    return _little(made)
