"""The directory of an evaluation: kept to one process, and left as it was found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from satune.commands.evaluate import _hold_against, place
from satune.commands.swap_request import SwapRequest, swap_lock
from satune.files.lock import LOCK, locked
from satune.types import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_evaluation_there_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "new" / "eval"
    with place(out):
        (out / "settings.json").write_text("{}")
        with pytest.raises(UserError, match=f"^{out}: process .* works there since"), place(out):
            pass
        assert names(out) == [LOCK, "settings.json"]
    assert names(out) == ["settings.json"]
    with place(out):
        pass


def test_one_that_failed_before_an_answer_is_left_as_it_was_found(tmp_path: Path) -> None:
    out = tmp_path / "new" / "eval"
    with pytest.raises(ZeroDivisionError), place(out):
        (out / "settings.json").write_text("{}")
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with pytest.raises(ZeroDivisionError), place(out):
        (out / "settings.json").write_text("{}")
        (out / "answers.jsonl").write_text("{}\n")
        raise ZeroDivisionError
    assert names(out) == ["answers.jsonl", "settings.json"]


@pytest.mark.parametrize("left", [LOCK, ".settings.json.partial", ".report.json.partial"])
def test_what_was_cut_off_locks_nothing(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text('{"pid')
    with place(tmp_path):
        pass
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no evaluation"), place(tmp_path):
        pass


def test_the_lock_of_another_machine_is_the_users_to_break(tmp_path: Path) -> None:
    there = {"pid": 7, "start": "noon", "host": "elsewhere", "boot": ""}
    (tmp_path / LOCK).write_text(json.dumps(there))
    with pytest.raises(UserError, match="on elsewhere, which is another machine"), place(tmp_path):
        pass
    with place(tmp_path, break_lock=True):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_damaged_settings_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(UserError, match=r"settings\.json: damaged"):
        _hold_against(tmp_path, {"seed": 0})


def test_two_swaps_into_one_place(tmp_path: Path) -> None:
    request, out = SwapRequest(tmp_path / "run", ["a"], ["m"]), tmp_path / "new" / "out"
    with swap_lock(request, out):
        assert names(out.parent) == [".out.lock"] and not out.exists()
        with (
            pytest.raises(UserError, match=f"^{out}: process .* works there"),
            swap_lock(request, out),
        ):
            pass
        dry = SwapRequest(tmp_path / "run", ["a"], ["m"], dry_run=True)
        with swap_lock(dry, out):
            pass
    assert names(out.parent) == []
    there = {"pid": 7, "start": "noon", "host": "elsewhere", "boot": ""}
    (out.parent / ".out.lock").write_text(json.dumps(there))
    with pytest.raises(UserError, match="--break-lock"), swap_lock(request, out):
        pass
    breaking = SwapRequest(tmp_path / "run", ["a"], ["m"], break_lock=True)
    with swap_lock(breaking, out), pytest.raises(UserError), locked(out.parent / ".out.lock", "x"):
        pass
