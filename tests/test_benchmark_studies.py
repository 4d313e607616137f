"""Studies of many runs: which runs they are, when they stop, what is read of them."""

from __future__ import annotations

import importlib
import json
import threading
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from satune.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("study")


@pytest.fixture
def violations(study: ModuleType) -> ModuleType:
    return importlib.import_module("violations")


def test_both_sides_of_the_gate_have_as_many_stages(study: ModuleType) -> None:
    runs = list(study.models_gate(Namespace(models=Path("models"))))
    stages = {run.label: [o for o in run.overrides if o.startswith("stages=")][-1] for run in runs}
    assert stages == {"ungated": "stages=3", "gated": "stages=3"}


def test_every_run_of_a_model_has_a_recipe(study: ModuleType) -> None:
    runs = [r for rows in study.OF_MODELS for r in rows(Namespace(models=Path("models")))]
    for run in (run for run in runs if run.seed == 0):
        recipe = load_recipe(ROOT / run.recipe, ["seed=0", *run.overrides])
        alone = run.label.startswith("alone")
        models = {name: agent.model for name, agent in recipe.team.agents.items()}
        seats = ["first"] if alone else ["first", "second", "third"]
        assert models == dict.fromkeys(seats, "models/smollm2-135m"), run.label
        messages = recipe.rollout.problems * recipe.rollout.samples * len(seats)
        assert messages == 192 and recipe.evaluate.problems == 128, run.label
        far = "4 x step" in run.label
        assert far == (recipe.optimizer.lr == 4 * 1e-5), run.label
        assert recipe.trust_region.enabled != (alone or "no region" in run.label), run.label


def test_after_a_run_that_fails_no_other_is_begun(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended, both = [], [], threading.Barrier(2)
    told: list[threading.Event] = []

    def event() -> threading.Event:
        """What a call notes a failure by."""
        told.append(threading.Event())
        return told[-1]

    def perform(run: Any, out: Path, threads: int) -> dict[str, Any]:
        begun.append(run.seed)
        if run.seed < 2:
            both.wait()
        if run.seed == 1:
            raise SystemExit("satune train: no such recipe")
        if run.seed == 0:
            assert told[0].wait(60), "nobody was told of the failure"
        ended.append(run.seed)
        return {"seed": run.seed}

    study_runs = importlib.import_module("study_runs")
    monkeypatch.setattr(study_runs, "perform", perform)
    monkeypatch.setattr(study_runs, "threading", SimpleNamespace(Event=event))
    runs = [study_runs.Run("a", seed, "", ()) for seed in range(9)]
    with pytest.raises(SystemExit, match="no such recipe"):
        study_runs.perform_all(runs, tmp_path, jobs=2)
    assert sorted(begun) == [0, 1] and ended == [0]
    assert study_runs.perform_all(runs[2:], tmp_path, jobs=2) == [{"seed": s} for s in range(2, 9)]


def write_run(run: Any, out: Path, updates: list[dict[str, Any]]) -> None:
    run.directory(out).mkdir(parents=True)
    lines = [json.dumps({"event": "update", **update}) + "\n" for update in updates]
    (run.directory(out) / "events.jsonl").write_text("".join(lines))
    (run.directory(out) / "summary.json").write_text(json.dumps({"difference": [0.5, 0.4, 0.6]}))


def update(scale: float, trajectory: float) -> dict[str, Any]:
    kl = {
        "trajectory": {"forward": trajectory}, "violation_share": 0.1, "violation_rate": 0.2,
        "quantile": 0.3,
    }  # fmt: skip
    return {"accepted": scale > 0, "scale": scale, "kl": kl}


def test_every_update_that_was_measured_counts(violations: ModuleType, tmp_path: Path) -> None:
    runs = violations.runs_of(("sat", "grpo"), (0,), 1, 8)[:3]
    untried = {"accepted": False, "scale": 0.0, "reason": "no group's rewards differ"}
    write_run(runs[0], tmp_path, [update(1, 2.0), update(0.5, 4.0), update(0, 9.0), untried])
    write_run(runs[1], tmp_path, [untried])
    rows, missing = violations.read(runs, tmp_path)
    ((found,),) = rows.values()
    assert found["updates"] == 3 and found["trajectory_kl"] == 5.0 and found["shrunk"] == 1
    first, second = (f"{run.label} seed 0" for run in runs[1:])
    assert missing == [f"{first} (no update was measured)", second]


def test_runs_of_other_lengths_are_not_taken_for_these(
    violations: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []

    def perform_all(runs: list[Any], out: Path, jobs: int) -> None:
        places.append(out)
        for run in runs:
            write_run(run, out, [update(1, 2.0)])

    monkeypatch.setattr(violations, "perform_all", perform_all)
    for stages in ("1", "2"):
        given = ["violations", "--out", str(tmp_path), "--methods", "sat", "--seeds", "0"]
        monkeypatch.setattr("sys.argv", [*given, "--stages", stages, "--problems", "8"])
        violations.main()
        assert json.loads((tmp_path / "violations.json").read_text())["stages"] == int(stages)
    assert len(set(places)) == 2


def test_violations_are_compared_seed_by_seed(violations: ModuleType) -> None:
    """Of two seeds a method has .02 and .04 more than SAT at SAT's distance, which lies half-way
    between two of its rates in the logarithm; t at 1 degree of freedom is 12.706."""

    def row(distance: float, share: float) -> dict[str, float]:
        return {"trajectory_kl": distance, "violation_share": share}

    rows = {f"ppo lr {rate}": [row(0.01, 0.0), row(0.01, 0.0)] for rate in violations.RATES[:2]}
    rows |= {f"ppo lr {rate}": [row(1.0, 0.06), row(1.0, 0.12)] for rate in violations.RATES[2:]}
    rows["sat lr 1e-3"] = [row(0.1, 0.01), row(0.1, 0.02)]
    half = 12.706 * 0.01
    assert violations.excess(rows, "ppo", "1e-3") == (
        f"{0.03:+.2%} [{0.03 - half:+.2%}, {0.03 + half:+.2%}]"
    )
    rows["sat lr 1e-3"].pop()
    assert violations.excess(rows, "ppo", "1e-3") == ""


def test_what_drawing_ahead_costs_is_read_off_settled_stages(study: ModuleType) -> None:
    ahead = importlib.import_module("ahead")
    given = Namespace(models=Path("models"), stages=3, overrides=[], seeds=[0], ahead=[0, 2])
    recipes = [load_recipe(ROOT / run.recipe, run.overrides) for run in ahead.runs(given)]
    assert [recipe.rollout.ahead for recipe in recipes] == [0, 2]
    assert recipes[0].rollout == replace(recipes[1].rollout, ahead=0)

    def stage(number: int, waited: float, score: float, ess: float) -> list[dict[str, Any]]:
        update = {"event": "update", "stage": number, "seconds": {"update": 2.0, "measure": 0.5}}
        return [
            {"event": "rollout", "stage": number, "step": 1, "episodes": 8,
             "seconds": {"rollout": waited, "score": score}, "ahead": {"ess": ess}},
            update, update,
            {"event": "stage", "stage": number, "seconds": 5.0 + waited + score},
        ]  # fmt: skip

    events = [*stage(2, 99.0, 99.0, 1.0), *stage(3, 1.0, 0.5, 6.0), *stage(4, 3.0, 0.5, 7.0)]
    assert ahead.figures(events) == {
        "stage": 7.5, "waited": 2.0, "scored": 0.5, "updates": 5.0, "ess": 6.5 / 8, "anew": 0.0,
    }  # fmt: skip
    alone = [{k: v for k, v in event.items() if k != "ahead"} for event in events]
    assert ahead.figures(alone)["ess"] is None and ahead.figures(alone)["waited"] == 2.0


def test_rows_are_held_against_the_first_problem_by_problem(
    study: ModuleType, tmp_path: Path
) -> None:
    tables = importlib.import_module("study_tables")
    Run = importlib.import_module("study_runs").Run
    runs = [Run(label, seed, "", ()) for seed in (0, 1) for label in ("vote", "alone")]
    sampled = {"vote": [1.0, 0.0, 1.0, 0.0], "alone": [0.0, 0.0, 1.0, 0.0]}
    greedily = {"vote": [0.0] * 4, "alone": [1.0] * 4}
    for run in runs:
        run.directory(tmp_path).mkdir()
        last = ((False, sampled[run.label]), (True, greedily[run.label]))
        lines = [
            {"event": "eval", "greedy": greedy, "per_problem": rewards}
            for greedy, rewards in ((False, [0.0] * 4), (True, [0.0] * 4), *last)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.directory(tmp_path) / "events.jsonl").write_text(text)
    alone = [run for run in runs if run.label == "alone"]
    answered = {"per_problem": [{"majority": r} for r in (1.0, 1.0, 1.0, 1.0)]}

    def cells() -> list[str]:
        row = tables.against_the_first(runs, tmp_path).splitlines()[2]
        return [cell.strip().partition(" ")[0] for cell in row.split("|")[1:-1]]

    for run, majority in zip(alone, ("", "+0.500"), strict=True):  # of one seed alone it is none
        (run.directory(tmp_path) / "majority.json").write_text(json.dumps(answered))
        assert cells() == ["alone", "8", "-0.250", "+1.000", majority]
