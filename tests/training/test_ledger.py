"""Spent confidence: what was tested stays tested, wherever the run goes back to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fake_run
from fake_run import go, left
from satune.core.confidence import Spending
from satune.training import stage as stage_module
from satune.training.ledger import Ledger
from satune.training.state_file import read_state
from satune.types import Key, UserError

KEY = Key(3, "certify", stage=1, step=2)
OLD, NEW = {"ann": "aa"}, {"ann": "bb"}


def enter(
    ledger: Ledger,
    key: Key = KEY,
    old: dict[str, str] = OLD,
    new: dict[str, str] = NEW,
    *,
    used: int = 0,
    offset: int = 0,
    decisions: int | None = 4,
) -> Any:
    spending = Spending(0.04, decisions, used)
    return ledger.enter(key, old, new, spending=spending, offset=offset, problems=10)


def test_the_same_test_is_paid_for_once(tmp_path: Path) -> None:
    path = tmp_path / "certify.jsonl"
    first = enter(Ledger(path))
    # A share of .04 over 4 tests is .01; the first test draws problems 0 to 9.
    assert (first.number, first.alpha, first.offset, first.end) == (1, 0.01, 0, 10)
    written = path.read_bytes()
    assert enter(Ledger(path)) == first and path.read_bytes() == written
    assert json.loads(written) == {
        "number": 1, "alpha": 0.01, "offset": 0, "problems": 10, "seed": 3, "stage": 1, "step": 2,
        "draw": 0, "old": OLD, "new": NEW,
    }  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [
        {"new": {"ann": "cc"}},
        {"old": {"ann": "cc"}},
        {"old": {**OLD, "bob": "dd"}, "new": {**NEW, "bob": "ee"}},
        {"key": KEY.at(draw=1)},
        {"key": KEY.at(stage=2)},
    ],
)
def test_any_other_test_is_the_next_on_new_problems(tmp_path: Path, other: Any) -> None:
    ledger = Ledger(tmp_path / "certify.jsonl")
    enter(ledger)
    # The run went back to before all tests: its state says 0 used, problems from 0.
    second = enter(ledger, **other)
    assert (second.number, second.offset) == (2, 10)
    assert Ledger(ledger.path).tests == ledger.tests


def test_a_state_that_is_ahead_of_the_file_counts(tmp_path: Path) -> None:
    """As after a swap, whose evidence took problems of the same stream."""
    test = enter(Ledger(tmp_path / "certify.jsonl"), used=2, offset=70)
    assert (test.number, test.offset) == (3, 70)


def test_no_test_beyond_those_declared(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "certify.jsonl")
    made = [enter(ledger, KEY.at(draw=draw)) for draw in range(4)]
    assert enter(ledger, KEY.at(draw=4)) is None
    assert enter(ledger, KEY.at(draw=2)) == made[2]
    assert len(ledger.path.read_bytes().splitlines()) == 4
    # Without end, test k has 6a/(pi^2 k^2): .04 * 6 / (pi^2 * 25) = .000972683.
    assert enter(ledger, KEY.at(draw=4), decisions=None).alpha == pytest.approx(0.000972683)


def test_a_torn_line_was_no_test_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "certify.jsonl"
    enter(Ledger(path))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"number": 2, "al')
    assert Ledger(path).used == 1 and path.read_bytes() != whole
    assert enter(Ledger(path), KEY.at(draw=1)).number == 2
    assert [test.number for test in Ledger(path).tests] == [1, 2]
    # In the middle, since a last line might be one that was never whole.
    for line in (b'{"number": 2}', b"{", b"7", whole.strip().replace(b'"draw": 0', b'"draw": "x"')):
        path.write_bytes(whole + line + b"\n" + whole)
        with pytest.raises(UserError, match=r"certify\.jsonl, line 2: no[t]? ") as refused:
            Ledger(path)
        said = str(refused.value)
        # Without the line the run would spend again what is spent.
        assert "put the line back" in said and "remove" not in said and "\n" not in said


# In a run

KEEPING = "certify.tolerance=1"
"""Every change stays, so that each of the four steps makes one test."""


@pytest.mark.parametrize(
    "field",
    [("number", 0), ("number", -1), ("offset", -10), ("problems", 0), ("problems", -5),
     ("step", -1), ("alpha", 0.0), ("alpha", 1.5), ("alpha", -0.01), ("alpha", float("nan"))],
)  # fmt: skip
def test_a_line_with_numbers_that_no_test_has_is_named(
    field: tuple[str, float], tmp_path: Path
) -> None:
    """A negative count would give confidence back."""
    path = tmp_path / "certify.jsonl"
    enter(Ledger(path))
    row = json.loads(path.read_text()) | dict([field])
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"certify\.jsonl, line 1: "):
        Ledger(path)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake_run.fake(monkeypatch)
    return fake_run.write_recipe(tmp_path)


def recorded(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "certify.jsonl").read_text().splitlines()]


def test_a_run_that_goes_back_the_same_way_spends_nothing(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    go(recipe, out, KEEPING)
    whole = left(out)
    assert [test["number"] for test in recorded(out)] == [1, 2, 3, 4]
    assert [test["offset"] for test in recorded(out)] == [0, 2, 4, 6]
    go(recipe, out, KEEPING, checkpoint="stage-0000")
    assert left(out) == whole


def test_a_run_that_goes_another_way_spends_anew(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second way's first step comes out otherwise, as it may on an accelerator: its tests are
    the fifth to eighth of an open sequence, on problems that none before has drawn."""
    out, open_end = tmp_path / "run", ("certify.decisions=open", KEEPING)
    go(recipe, out, *open_end)
    before = recorded(out)

    def other(*arguments: Any, key: Key, **named: Any) -> Any:
        return fake_run.improve(*arguments, key=key.at(draw=1), **named)

    monkeypatch.setattr(stage_module, "improve", other)
    go(recipe, out, *open_end, checkpoint="stage-0000")
    after = recorded(out)
    assert after[:4] == before
    assert [test["number"] for test in after[4:]] == [5, 6, 7, 8]
    assert [test["offset"] for test in after[4:]] == [8, 10, 12, 14]
    certify = read_state(out / "checkpoints" / "stage-0002")["state"]["certify"]
    assert certify["spending"]["used"] == 8 and certify["offset"] == 16


def test_a_run_does_not_end_with_steps_that_its_gate_has_not_tested(
    recipe: Path, tmp_path: Path
) -> None:
    """A window of three steps: after the first stage two of them wait for their test."""
    out, window = tmp_path / "run", "certify.every=3"
    go(recipe, out, window)
    whole = left(out)
    with pytest.raises(UserError) as caught:
        go(recipe, out, window, "stages=1", checkpoint="stage-0001")
    assert str(caught.value) == (
        f"{out}/checkpoints/stage-0001: holds steps of ann, bob that the gate has not tested, and "
        "stages=1 would end the run with them; give at least stages=2, or resume from another "
        "checkpoint"
    )
    assert left(out) == whole
    # Within the stage the last step comes and is tested, as the last one of a run is.
    assert go(recipe, out, window, "stages=1", checkpoint="stage-0001-step-1")["stages"] == 1


def test_what_other_ways_have_spent_stands_in_the_summary(recipe: Path, tmp_path: Path) -> None:
    out, eight = tmp_path / "run", ("certify.decisions=8", KEEPING)
    # Each of four steps makes one test, of 8 that are declared; .05 / 8 each.
    assert go(recipe, out, *eight)["certificates"]["tests"] == 4
    back = go(recipe, out, *eight, "stages=1", checkpoint="stage-0001")["certificates"]
    assert (back["tests"], back["confidence_spent"]) == (4, pytest.approx(0.025, rel=1e-12))


def test_a_run_without_tests_left_says_so_before_it_starts(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, eight = tmp_path / "run", ("certify.decisions=8", KEEPING)
    go(recipe, out, *eight)  # one backtrack a step: at most 8 tests
    capsys.readouterr()
    go(recipe, out, *eight, checkpoint="stage-0001")
    # 4 are made; after the first stage at most 4 more may come, and 4 are left.
    assert "declared tests" not in capsys.readouterr().err

    def other(*arguments: Any, key: Key, **named: Any) -> Any:
        return fake_run.improve(*arguments, key=key.at(draw=1), **named)

    monkeypatch.setattr(stage_module, "improve", other)
    go(recipe, out, *eight, checkpoint="stage-0000")
    assert "certify.jsonl: 4 of 8 declared tests are made, up to 8 more" in capsys.readouterr().err
    assert len(recorded(out)) == 8
    third = lambda *a, key, **n: fake_run.improve(*a, key=key.at(draw=2), **n)  # noqa: E731
    monkeypatch.setattr(stage_module, "improve", third)
    go(recipe, out, *eight, checkpoint="stage-0000")
    said = capsys.readouterr().err
    assert "8 of 8 declared tests are made" in said and "find 0 left" in said
    assert said.index("declared tests") < said.index("step 1")
    assert len(recorded(out)) == 8 and said.count("the declared number of decisions is used up")
