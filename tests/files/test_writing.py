"""Whole files, strict JSON, and a disk that refuses."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from satune.files.writing import disk_errors, strict_json, write_atomically
from satune.types import UserError


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_strict_json_is_one_line_and_exact(value: Any) -> None:
    def finite(item: Any) -> Any:
        if isinstance(item, float) and math.isinf(item):
            return str(item)
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        return [finite(inner) for inner in item] if isinstance(item, list) else item

    line = strict_json(value)
    assert "\n" not in line
    assert json.loads(line) == finite(value)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "summary.json"
    write_atomically(file, '{"stages": 1}')

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"summary\.json: cannot be written: the disk is full"):
        write_atomically(file, '{"stages": 2}')
    assert json.loads(file.read_text()) == {"stages": 1}


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.ENOSPC, "full"),
        (errno.EIO, "Input/output error; give another --out"),
        (errno.ELOOP, "symbolic links; give"),
        (errno.ESTALE, "tale file handle; give"),
        (errno.ENOENT, "No such file or directory; give"),
    ],
)
def test_errors_of_the_disk_are_worded(number: int, says: str) -> None:
    with (
        pytest.raises(UserError, match=rf"^/runs/a: cannot be written: .*{says}"),
        disk_errors("/runs/a"),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(errno.EPIPE, "pipe"), TimeoutError(errno.ETIMEDOUT, "time"), OSError("model")],
    ids=repr,
)
def test_errors_that_are_of_no_file_pass(error: OSError) -> None:
    with pytest.raises(type(error)) as caught, disk_errors("/runs/a"):
        raise error
    assert caught.value is error
