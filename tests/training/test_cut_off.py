"""A run that is cut off at any file operation, or that finds the disk full there, goes on as was
meant: what it leaves in the end is what it would have left without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fake_run
from fake_run import Faults, Killed, go, injected, left
from satune.training import checkpoint as checkpoint_module
from satune.training.run_directory import RunDirectory
from satune.types import UserError

STRIDE = 29
"""The fast tests cut off at every so manieth operation, the slow ones at each."""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake_run.fake(monkeypatch)
    return fake_run.write_recipe(tmp_path)


@pytest.fixture
def places(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def cut(do: Callable[[], object], at: int, *, full: bool) -> str:
    """Do it with a fault at its ``at``-th file operation; what the operation was."""
    with injected(Faults(at, full=full)) as faults:
        try:
            do()
        except Killed:
            assert not full
        except UserError as error:
            assert full and "the disk is full" in str(error) and "\n" not in str(error)
        else:
            # The disk was full where no room was needed any more.
            assert full and not faults.failed
    return (faults.failed or [""])[0]


def operations(do: Callable[[], object]) -> int:
    with injected(Faults()) as faults:
        do()
    assert faults.count > 50
    return faults.count


CASES = [
    pytest.param(STRIDE, False, id="killed"),
    pytest.param(STRIDE, True, id="full"),
    pytest.param(1, False, id="killed everywhere", marks=pytest.mark.slow),
    pytest.param(1, True, id="full everywhere", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stride", "full"), CASES)
def test_a_run_from_its_start_to_its_last_save(
    recipe: Path, places: Path, stride: int, full: bool
) -> None:
    count = operations(lambda: go(recipe, places / "whole"))
    whole = left(places / "whole")
    assert whole["finished"] and len(whole["certify.jsonl"].splitlines()) >= 4
    for at in range(1, count + 1, stride):
        out = places / str(at)
        what = cut(lambda out=out: go(recipe, out), at, full=full)
        if at % 2:
            # What began may be begun again without --resume where there is nothing to lose.
            try:
                go(recipe, out)
            except UserError as error:
                assert "already holds a run; go on with it by --resume" in str(error)
        go(recipe, out, resume=True)
        assert left(out) == whole, f"cut off at operation {at} ({what})"


@pytest.mark.parametrize(("stride", "full"), CASES)
def test_going_back_to_a_checkpoint(recipe: Path, places: Path, stride: int, full: bool) -> None:
    """Back to the first stage of a finished run, to go on with fewer stages: nothing that a resume
    would do by itself."""
    base, fewer = places / "base", "stages=1"
    go(recipe, base)
    before = left(base)
    back = lambda out: go(recipe, out, fewer, checkpoint="stage-0001-step-1")  # noqa: E731
    shutil.copytree(base, places / "whole")
    count = operations(lambda: back(places / "whole"))
    whole = left(places / "whole")
    assert whole["finished"] and "checkpoints/stage-0002/state.json" not in whole["names"]
    carried_out = 0
    for at in range(1, count + 1, stride):
        out = places / str(at)
        shutil.copytree(base, out)
        what = cut(lambda out=out: back(out), at, full=full)
        meant = RunDirectory(out).intended == "stage-0001-step-1"
        begun = meant or RunDirectory(out).unfinished() is not None
        go(recipe, out, fewer, resume=True)
        found = left(out)
        # A run that is finished is not written to, so these stay there; no start minds them.
        partial = (".writable", "..writable.partial", ".going-back.json.partial")
        for name in set(partial) & set(found["names"]):
            found["names"].remove(name), found.pop(name)
        # Before the intent is on the disk nothing has happened, and nothing does.
        assert found == whole or (not begun and found == before), f"operation {at} ({what})"
        carried_out += meant
    assert carried_out > (10 if stride == 1 else 0)


def test_whoever_has_learned_has_a_checkpoint(
    recipe: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late checkpoints are written: without one a run that has learned cannot go on."""

    class Late:
        def __init__(self, *arguments: Any, **named: Any) -> None: ...

        def submit(self, do: Callable[..., None], *arguments: Any) -> Any:
            return SimpleNamespace(result=lambda: do(*arguments))

    found: list[bool] = []
    append = RunDirectory.append_event

    def appended(run: RunDirectory, event: Any) -> None:
        if event["event"] == "rollout":
            found.append(any(run.checkpoints.glob("stage-*/state.json")))
        append(run, event)

    monkeypatch.setattr(checkpoint_module, "ThreadPoolExecutor", Late)
    monkeypatch.setattr(RunDirectory, "append_event", appended)
    go(recipe, places / "run")
    assert len(found) >= 2 and all(found)  # one a stage, and one more after a step that shrank


def test_an_intent_is_replaced_by_a_later_one(recipe: Path, places: Path) -> None:
    out = places / "run"
    go(recipe, out)
    whole = left(out)
    RunDirectory(out).intent.write_text('{"checkpoint": "stage-0000"}\n')
    go(recipe, out, checkpoint="stage-0001")
    assert left(out) == whole
    RunDirectory(out).intent.write_text('{"checkpoint": "stage-0099"}\n')
    with pytest.raises(UserError, match="no checkpoint 'stage-0099'; there are: stage-0000, "):
        go(recipe, out, resume=True)
