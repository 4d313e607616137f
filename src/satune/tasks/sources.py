"""Rows from a file or from a data set, each with the place to name when something is wrong with it.

JSONL needs the standard library only; Parquet and `datasets` sources need ``satune[data]``.
"""

from __future__ import annotations

import codecs
import importlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from satune.loading import missing_file
from satune.types import UserError

Row = dict[str, Any]

_TOO_DEEP = "nested too deeply"
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.\[\]%-]+){0,2}")
_SUFFIXES = (".jsonl", ".json", ".parquet")
DEEPEST = 100
"""Lists and objects inside one another that a row may have; what walks it need not fear more."""


def read_rows(source: str | Path, bare: str | None = None) -> list[tuple[str, Row]]:
    """(place, row) for each row of ``source``; place is "file, line n" or "file, row n".

    A source is a JSONL or Parquet file, a ``.json`` file that holds one list, a directory written
    by ``datasets.save_to_disk``, or a hub id ``org/name``, ``org/name:split`` (split "train" if
    left out) or ``org/name:configuration:split``. A list's items that are no objects become rows
    with the one field ``bare``, if that is given.

    Raises UserError for a missing file (naming the nearest), a damaged row, an empty source, and a
    format whose package is not installed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        rows = _from_datasets(str(source), path)
    elif path.suffix == ".parquet":
        if not path.is_file():
            raise missing_file(path)
        table = _extra("pyarrow.parquet", path).read_table(path)
        rows = [(f"{source}, row {i}", row) for i, row in enumerate(table.to_pylist(), 1)]
    elif path.is_file():
        content = read_bytes(path)
        listed = path.suffix == ".json" and content.lstrip()[:1] == b"["
        rows = _from_list(path, content, bare) if listed else _from_jsonl(path, content)
    elif path.suffix not in _SUFFIXES and _HUB.fullmatch(str(source)) and not path.parent.is_dir():
        rows = _from_datasets(str(source), None)
    else:
        raise missing_file(path)
    if not rows:
        raise UserError(f"{source}: it holds no rows; give a file with at least one")
    return rows


def field(place: str, row: Mapping[str, Any], name: str) -> Any:
    """A row's field. Raises UserError naming the place, the field and the fields there are."""
    if name not in row:
        there = ", ".join(row) or "none"
        raise UserError(f"{place}: no field {name!r}; the fields there are: {there}")
    return row[name]


def identity(row: Mapping[str, Any], default: str, name: str = "id") -> str:
    """A row's own name, as text; ``default`` where it has none or null."""
    value = row.get(name)
    return default if value is None else str(value)


def read_bytes(path: Path) -> bytes:
    """A file's content without the byte order mark that some editors put before UTF-8."""
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


def read_json(place: str, content: bytes, what: str = "damaged row") -> Any:
    """The value of a JSON text.

    Raises UserError "PLACE: WHAT (why); mend or delete it" for one that is damaged, nested deeper
    than ``DEEPEST`` or holds an integer longer than Python reads.
    """
    try:
        value = json.loads(content)
        why = "" if _shallow(content, value) else _TOO_DEEP
    except json.JSONDecodeError as error:
        place += f", line {error.lineno}" if b"\n" in content.strip() else ""
        why = error.msg
    except UnicodeDecodeError:
        why = "not UTF-8"
    except RecursionError:
        why = _TOO_DEEP
    except ValueError:
        why = f"an integer of more than {sys.get_int_max_str_digits()} digits"
    if why:
        raise UserError(f"{place}: {what} ({why}); mend or delete it")
    return value


def _shallow(content: bytes, value: Any) -> bool:
    if content.count(b"[") + content.count(b"{") <= DEEPEST:
        return True
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            item
            for holder in level
            if isinstance(holder, (dict, list))
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return True
    return False


def _from_list(path: Path, content: bytes, bare: str | None) -> list[tuple[str, Row]]:
    items = read_json(str(path), content, "not a whole JSON list")
    rows = []
    for number, item in enumerate(items, 1):
        place = f"{path}, row {number}"
        if not isinstance(item, dict):
            if bare is None or isinstance(item, list):
                raise UserError(f"{place}: it is no JSON object; give a list of objects")
            item = {bare: item}
        rows.append((place, item))
    return rows


def _from_jsonl(path: Path, content: bytes) -> list[tuple[str, Row]]:
    rows = []
    # Bytes: a file cut in the middle of a character is then damaged in one line only.
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        row = read_json(place, line)
        if not isinstance(row, dict):
            raise UserError(f'{place}: the row is no JSON object; write {{"prompt": ...}}')
        rows.append((place, row))
    return rows


def _from_datasets(source: str, directory: Path | None) -> list[tuple[str, Row]]:
    datasets = _extra("datasets", source)
    if directory is not None:
        markers = ("dataset_info.json", "dataset_dict.json")
        if not any((directory / marker).is_file() for marker in markers):
            raise UserError(f"{source}: a directory without a saved data set; give a file in it")
        loaded = datasets.load_from_disk(str(directory))
        if isinstance(loaded, Mapping):
            raise UserError(f"{source}: several splits; give one: {', '.join(sorted(loaded))}")
    else:
        name, *chosen = source.split(":")
        split = chosen.pop() if chosen else "train"
        try:
            loaded = datasets.load_dataset(name, *chosen, split=split)
        except (OSError, ValueError) as error:
            # No network, no such data set, no such split: the library says which.
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"{source}: the data set cannot be had ({said}); give data: a JSONL or Parquet file"
            ) from error
    return [(f"{source}, row {i}", dict(row)) for i, row in enumerate(loaded, 1)]


def _extra(module: str, source: object) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise UserError(
            f"{source}: reading it needs {package}; install it with pip install 'satune[data]'"
        ) from None
