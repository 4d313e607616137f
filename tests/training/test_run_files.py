"""What somebody changed or damaged in a run's directory, and who else works there."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import fake_run
import tiny_world
from fake_run import World, go, left
from satune.config.load import load_recipe
from satune.report import plots
from satune.training.run_directory import RunDirectory
from satune.training.state_file import read_state, write_state
from satune.types import UserError

plot_training = plots.plot_training


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake_run.fake(monkeypatch)
    return fake_run.write_recipe(tmp_path)


@pytest.fixture
def run(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = tmp_path / "run"
    go(recipe, out)
    capsys.readouterr()
    return out


# Conversations on held-out problems


def test_conversations_of_evaluations_lie_apart(run: Path) -> None:
    def rows(stage: int) -> list[dict[str, Any]]:
        text = (run / "episodes" / f"evaluation-{stage:04d}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    assert sorted(path.name for path in (run / "episodes").glob("*.jsonl")) == [
        "evaluation-0000.jsonl", "evaluation-0002.jsonl", "stage-0001.jsonl", "stage-0002.jsonl",
    ]  # fmt: skip
    before, after = rows(0), rows(2)
    assert [row["problem"]["id"] for row in before] == [row["problem"]["id"] for row in after]
    assert {(row["stage"], row["greedy"]) for row in before} == {(0, False)}
    assert all("step" not in row for row in after)


def test_a_resume_cuts_them_back(run: Path, recipe: Path) -> None:
    whole = {path.name: path.read_bytes() for path in (run / "episodes").iterdir()}
    (run / "summary.json").unlink()
    go(recipe, run, checkpoint="stage-0001")
    assert {path.name: path.read_bytes() for path in (run / "episodes").iterdir()} == whole


def test_a_finished_run_that_goes_on_evaluates_as_one_that_never_stopped(
    recipe: Path, tmp_path: Path
) -> None:
    every = "evaluate.every=1"
    go(recipe, tmp_path / "whole", every, "stages=4")
    go(recipe, tmp_path / "longer", every, "stages=2")
    go(recipe, tmp_path / "longer", every, "stages=4", resume=True)
    whole, longer = (tiny_world.events(tmp_path / name, "eval") for name in ("whole", "longer"))
    assert [event["stage"] for event in longer] == [0, 1, 2, 3, 4]
    assert longer == whole


def test_the_state_keeps_the_problems_of_the_first_evaluation_alone(
    recipe: Path, tmp_path: Path
) -> None:
    go(recipe, tmp_path / "run", "evaluate.every=1", "stages=3")
    state = read_state(tmp_path / "run" / "checkpoints" / "stage-0003")["state"]
    assert [e["stage"] for e in state["evaluations"]] == [0, 1, 2]
    assert ["per_problem" in e for e in state["evaluations"]] == [True, False, False]
    assert all("per_problem" in e for e in tiny_world.events(tmp_path / "run", "eval"))


# The recipe


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("ess: ", None, ""),
        ("tolerance: 0.0", "tolerance: 0.5", "certify.tolerance"),
        ("max_new_tokens: 4", "max_new_tokens: 5", "rollout.max_new_tokens"),
        ("seed: 0\nteam", "seed: 1\nteam", "seed"),
    ],
)
def test_an_edited_recipe_is_refused_by_the_key_that_decides(
    run: Path, old: str, new: str | None, key: str
) -> None:
    own = run / "recipe.yaml"
    if new is None:  # as it was written it is taken
        go(own, run, resume=True)
        return
    edit(own, old, new)
    for resume in ({"resume": True}, {"checkpoint": "stage-0001"}):
        with pytest.raises(UserError, match=rf"started with another recipe \({key}\)") as caught:
            go(own, run, **resume)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_an_edited_recipe_is_taken_where_an_override_would_be(run: Path, recipe: Path) -> None:
    own = run / "recipe.yaml"
    edit(own, "stages: 2", "stages: 3")
    edit(own, "max_rows: 256", "max_rows: 8")
    assert go(own, run, resume=True)["stages"] == 3
    recorded = read_state(run / "checkpoints" / "stage-0003")["recipe"]
    assert (recorded["stages"], recorded["engine"]["max_rows"]) == (3, 8)
    assert load_recipe(own).stages == 3
    # The checkpoint that was made before knows what it was made under.
    assert read_state(run / "checkpoints" / "stage-0001")["recipe"]["stages"] == 2


def test_a_missing_recipe_is_said_and_written_anew(
    run: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = left(run)
    (run / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"another recipe \(seed\)"):
        go(recipe, run, "seed=4", resume=True)
    capsys.readouterr()
    go(recipe, run, checkpoint="stage-0001")
    said = capsys.readouterr().err
    assert said.count(f"{run / 'recipe.yaml'}: is missing; it is written anew\n") == 1
    assert left(run) == whole


def test_a_project_with_a_recipe_of_its_own_is_no_run(recipe: Path, tmp_path: Path) -> None:
    """Its recipe lies where a run would have its own, and other files where a run has its own."""
    project = tmp_path / "project"
    (project / "episodes").mkdir(parents=True)
    own = {
        "recipe.yaml": f"# mine\n{recipe.read_text()}",
        "episodes/mydata.jsonl": "{}\n",
        "summary.json": "{}",
    }
    for name, text in own.items():
        (project / name).write_text(text)
    for how in ({}, {"resume": True}):
        with pytest.raises(UserError) as caught:
            go(project / "recipe.yaml", project, **how)  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"{project}: is not empty and holds no run; give another --out"
        )
    assert {name: (project / name).read_text() for name in own} == own
    assert sorted(path.name for path in project.iterdir() if path.name != ".lock") == [
        "episodes", "recipe.yaml", "summary.json"
    ]  # fmt: skip


def test_files_of_ones_own_among_the_episodes_outlive_a_resume(run: Path, recipe: Path) -> None:
    (run / "episodes" / "mydata.jsonl").write_text("{}\n")
    go(recipe, run, checkpoint="stage-0001")
    assert (run / "episodes" / "mydata.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("also", ["", "summary.json", "team", "events.jsonl"])
def test_a_run_without_its_checkpoints_is_not_begun_anew(
    run: Path, recipe: Path, also: str
) -> None:
    shutil.rmtree(run / "checkpoints")
    if also == "events.jsonl":
        # Down to what every run begins with.
        lines = (run / also).read_bytes().splitlines(keepends=True)
        (run / also).write_bytes(lines[0])
    elif also:
        path = run / also
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    there = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        go(recipe, run, "stages=3", resume=True)
    assert str(caught.value) == (
        f"{run}: the run's checkpoints are gone, and it cannot go on without one; give another "
        "--out"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == there


def test_a_run_without_stages_may_be_begun_anew(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert go(recipe, out, "stages=0")["stages"] == 0
    go(recipe, tmp_path / "whole")
    assert go(recipe, out, resume=True)["stages"] == 2
    assert left(out) == left(tmp_path / "whole")


# Damage


def test_a_state_that_somebody_changed_is_passed_over(
    run: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = left(run)
    path = run / "checkpoints" / "stage-0002"
    fields = json.loads((path / "state.json").read_text())
    fields["state"]["certify"]["spending"]["used"] = 0
    (path / "state.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"state\.json: damaged checkpoint \(content changed\)"):
        go(recipe, run, checkpoint="stage-0002")
    (run / "summary.json").unlink()
    go(recipe, run, resume=True)
    said = capsys.readouterr().err
    assert "state.json: damaged checkpoint (content changed); going on from stage-0002-step-1" in (
        said
    )
    assert left(run) == whole


def test_spaces_and_the_order_of_keys_are_not_the_content(run: Path) -> None:
    path = run / "checkpoints" / "stage-0002"
    fields = read_state(path)
    (path / "state.json").write_text(
        json.dumps(json.loads((path / "state.json").read_text()), indent=3)
    )
    assert read_state(path) == fields
    write_state(path, fields)
    assert read_state(path) == fields


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"stages": ', "\x00"])
def test_a_damaged_summary_is_written_anew(
    run: Path, recipe: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = left(run)
    (run / "summary.json").write_text(damage)
    go(recipe, run, resume=True)
    said = capsys.readouterr().err
    assert said.count(f"{run / 'summary.json'}: damaged; it is written anew\n") == 1
    assert left(run) == whole


@pytest.mark.parametrize("lost", ["team", "team/manifest.json", "team/bob/model.safetensors"])
def test_a_run_without_its_whole_team_is_not_finished(
    run: Path, recipe: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = left(run)
    path = run / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    go(recipe, run, resume=True)
    assert "is missing; it is written anew" in capsys.readouterr().err
    assert left(run) == whole


def test_damaged_events_cost_the_figures_alone(
    run: Path, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "plot_training", plot_training)
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff" * (len(lines[2]) - 1) + b"\n"
    (run / "events.jsonl").write_bytes(b"".join(lines))
    summary = go(recipe, run, "stages=3", resume=True)
    said = capsys.readouterr().err
    assert said.count(f"figures skipped: {run / 'events.jsonl'}, line 3: not JSON") == 1
    assert summary["stages"] == 3 and RunDirectory(run).unfinished() is None


# Two processes


def started(
    recipe: Path, out: Path, number: int, barrier: Any, refused: Any, others: int, log: Path
) -> None:
    """The main of a process: it trains, and once it has begun waits until all others were refused;
    ends with 0, or 2 with its line in ``log``."""
    evaluate = World.evaluate
    waited = False

    def waiting(self: World, **named: Any) -> dict[str, Any]:
        nonlocal waited
        for _ in range(0 if waited else others):
            assert refused.acquire(timeout=120)
        waited = True
        return evaluate(self, **named)

    World.evaluate = waiting  # type: ignore[method-assign]
    barrier.wait(120)
    try:
        go(recipe, out, resume=number % 2 == 0 or out.exists())
    except UserError as error:
        (log / f"{number}").write_text(str(error))
        refused.release()
        os._exit(2)
    os._exit(0)


def race(recipe: Path, out: Path, processes: int, log: Path) -> None:
    # A fork has the fake run; it begins in microseconds, so that all of them meet.
    context = multiprocessing.get_context("fork")
    barrier, refused = context.Barrier(processes), context.Semaphore(0)
    log.mkdir()
    started_all = [
        context.Process(
            target=started, args=(recipe, out, number, barrier, refused, processes - 1, log)
        )
        for number in range(processes)
    ]
    for process in started_all:
        process.start()
    for process in started_all:
        process.join(300)
    codes = [process.exitcode for process in started_all]
    assert sorted(codes, key=str) == [0] + [2] * (processes - 1)
    winner = started_all[codes.index(0)].pid
    for number, code in enumerate(codes):
        if code == 2:
            line = (log / f"{number}").read_text()
            assert "\n" not in line
            # Whoever comes without --resume after the other has written something is told that.
            theirs = (f"process {winner} works there since", "another process works there")
            assert any(each in line for each in (*theirs, "already holds a run")), line


@pytest.mark.parametrize(
    "times", [pytest.param(3), pytest.param(30, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_of_several_processes_at_a_directory_one_runs(
    recipe: Path, tmp_path: Path, processes: int, times: int
) -> None:
    go(recipe, tmp_path / "whole")
    whole = left(tmp_path / "whole")
    for time in range(times):
        out = tmp_path / str(time)
        race(recipe, out, processes, tmp_path / f"log-{time}")
        assert left(out) == whole
