"""JSON lines: whole ones stay, a torn one is left out, a damaged one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from satune.files.lines import JsonLines, append_lines, read_lines
from satune.types import UserError


def test_a_text_with_line_separators_stays_one_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    # The last one is half a surrogate pair, which UTF-8 cannot hold.
    rows = [{"text": "a\nb\u2028c\x85d\re"}, {"text": "\ud800"}]
    append_lines(file, rows)
    append_lines(file, [{"text": "g"}])
    assert read_lines(file) == [*rows, {"text": "g"}]


def test_a_last_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"stage": 1}\n{"stage": 2')
    assert read_lines(file) == [{"stage": 1}]
    # Who goes on writing cuts it off first.
    JsonLines(file).append({"stage": 3})
    assert file.read_bytes() == b'{"stage": 1}\n{"stage": 3}\n'


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"stage": 1}\n{"stage": \n{"stage": 2}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: not JSON"):
        read_lines(file)


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "nothing.jsonl") == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    # Writing to this device fails as on a full disk.
    file = tmp_path / "rows.jsonl"
    file.symlink_to("/dev/full")
    with pytest.raises(UserError) as caught:
        append_lines(file, [{"stage": 1}])
    assert str(caught.value) == (
        f"{file}: cannot be written: the disk is full; free some space or give another --out"
    )
