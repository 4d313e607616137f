"""Weights travel with their number: an engine with copies of its own serves the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_world
from far_engine import FarEngine
from satune.agents.policy import Policy
from satune.commands import project as projecting
from satune.commands import swap as swapping
from satune.commands.swap import swap
from satune.commands.swap_request import SwapRequest
from satune.engines.base import ENGINES, LocalSettings
from satune.files.events import Event
from satune.swap.settings import HandOverSettings
from satune.training.run import Training
from satune.training.run_directory import RunDirectory
from satune.training.self_check import Tolerance
from satune.training.trainer import train

TOLERANCE = Tolerance(1e-3, 1e-3)
GATED = [
    "certify={problems: 3, samples: 2, every: 2, evidence: balance, accept: certified,"
    " tolerance: 0.1, backtracks: 1}",
    "stages=4",
    "checkpoint.keep=9",
    "evaluate={problems: 2, samples: 1}",
]
LOWERS = [0.0, -0.5, 0.0, -0.5, -0.5, 0.2]
"""Lower bounds of the run's tests: a window kept, one shrunk, one reverted, one kept."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_world.save_model(folder / "newcomer", seed=7)
    return tiny_world.build(folder)


class Killed(BaseException):
    """Stands for the end of the process."""


Names = dict[tuple[str, int], str]


@dataclass(frozen=True)
class FarSettings:
    """An engine that keeps weights of its own. Engines with the same ``names`` hold one another to
    what a number names."""

    names: Names | None = None
    conversations: int = 64

    def make(self, policies: Mapping[str, Policy], seats: Mapping[str, str]) -> FarEngine:
        return FarEngine(policies, seats, self.names)


KINDS = ("far", "near")


def use(monkeypatch: pytest.MonkeyPatch, engine: str, names: Names | None = None) -> None:
    """Let the engine that is made from now on for "local" be this one."""
    settings = {"far": FarSettings(names), "near": LocalSettings()}[engine]
    monkeypatch.setitem(ENGINES, "local", lambda **options: settings)


def left(run: Training, out: Path) -> dict[str, Any]:
    """What a run leaves."""
    return {
        "events": tiny_world.events(out),
        "episodes": {p.name: p.read_bytes() for p in RunDirectory(out).episodes.iterdir()},
        "team": tiny_world.team_files(out),
        "versions": run.state.versions,
        "issued": run.state.issued,
    }


def publications(run: Training) -> list[tuple[str, int, Mapping[str, torch.Tensor]]]:
    """What the run publishes from now on, in order."""
    given: list[tuple[str, int, Mapping[str, torch.Tensor]]] = []
    publish = run.world.publish

    def watched(agent: str, version: int, weights: Mapping[str, torch.Tensor]) -> None:
        given.append((agent, version, weights))
        publish(agent, version, weights)

    run.world.publish = watched  # type: ignore[method-assign]
    return given


def trained(recipe: Path, out: Path, overrides: Sequence[str]) -> tuple[Training, dict[str, Any]]:
    run = tiny_world.training(recipe, out, overrides)
    train(run, tolerance=TOLERANCE)
    return run, left(run, out)


@pytest.mark.slow
def test_a_run_with_certificates_reverts_and_a_kill_is_the_same(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_world.judged(monkeypatch, LOWERS)
    _, here = trained(recipe, tmp_path / "near", GATED)
    use(monkeypatch, "far")
    run, there = trained(recipe, tmp_path / "far", GATED)
    assert there == here
    verdicts = [e["gate"]["verdict"] for e in there["events"] if "gate" in e]
    assert verdicts == ["kept", "shrunk", "reverted", "kept"]
    # Window by window: 1; 2 and, shrunk, 3; 4 and 5, of which neither stayed; 6.
    assert there["versions"] == there["issued"] == {"ann": 6, "bob": 6}
    updates = [e for e in there["events"] if e["event"] == "update"]
    assert [e["version"] for e in updates if e["agent"] == "ann"] == [1, 2, 4, 6]
    assert [e["version"] for e in updates if e["agent"] == "bob"] == [1, 3, 3, 6]
    engine: Any = run.world.cast.engine  # type: ignore[attr-defined]
    assert engine.versions == there["versions"] and len(engine.names) == 2 * 7

    # Cut off inside the third window, and gone on with before an engine that has no weights but
    # holds the run to the numbers that the first one gave.
    killed = tiny_world.training(recipe, tmp_path / "killed", GATED)

    def end(event: Event) -> None:
        if event["event"] == "update" and event["stage"] == 3:
            raise Killed

    killed.watch = end
    with pytest.raises(Killed):
        train(killed, tolerance=TOLERANCE)
    again = tiny_world.training(recipe, tmp_path / "killed", GATED, resume=True)
    again.world.cast.engine.names.update(engine.names)  # type: ignore[attr-defined]
    train(again, tolerance=TOLERANCE, checkpoint="stage-0002")
    assert left(again, tmp_path / "killed") == here


@pytest.mark.parametrize("schedule", ["fresh", "simultaneous"])
def test_every_schedule_gives_the_engine_what_it_needs(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    found = []
    for engine in KINDS:
        use(monkeypatch, engine)
        found.append(trained(recipe, tmp_path / engine, [f"schedule={schedule}"])[1])
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["handover", "project"])
def test_a_swap_and_the_training_after_it_are_the_same(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    """The projection stays outside delta and is judged by its reward: its student has learnt. Run,
    every engine of the swap and the training after it give no number to two sets of weights."""
    names: Names = {}
    use(monkeypatch, "far", names)
    run, _ = trained(recipe, tmp_path / "run", ["stages=1"])
    of_the_run = dict(names)
    for name in ("PREVIEWED", "PROBLEMS", "MEASURED"):
        monkeypatch.setattr(projecting, name, 6)
    monkeypatch.setattr(swapping, "PREVIEWED", 6)
    found = []
    for engine in KINDS:
        use(monkeypatch, engine, names)
        out = tmp_path / engine
        request = SwapRequest(
            tmp_path / "run", ["bob"], [str(recipe.parent / "newcomer")], method, rounds=2,
            otherwise="handover", out=out,
            hand_over=HandOverSettings(tolerance=1.0, problems=8, samples=2, looks=1),
        )  # fmt: skip
        result = swap(request)
        assert result["verdict"] == "accepted"
        assert ("grad_norm" in str(result)) is (method == "project")
        more = tiny_world.training(out / "recipe.yaml", out, ["stages=2"], resume=True)
        train(more, tolerance=TOLERANCE, checkpoint="stage-0001")
        found.append(left(more, out))
        # The newcomer bears bob's name, and numbers that bob's weights never had.
        assert more.state.versions["bob"] > run.state.issued["bob"]
        if engine == "far":
            # The newcomer as it came, and its student before a round, after each and at the end.
            during = {version for agent, version in names if agent == "bob"}
            assert during == set(range(more.state.issued["bob"] + 1))
            assert len(during) > len([a for a, _ in of_the_run if a == "bob"]) + 1
    assert found[0] == found[1]


def test_an_engine_that_shares_the_parameters_has_nothing_copied_for_it(
    recipe: Path, tmp_path: Path
) -> None:
    run = tiny_world.training(recipe, tmp_path / "run")
    given = publications(run)
    train(run, tolerance=TOLERANCE)
    # Two agents at the beginning, and one for each of the four steps, all accepted.
    assert len(given) == 2 + 4
    assert all(weights._found is None for _, _, weights in given)  # type: ignore[attr-defined]


def test_a_decision_publishes_what_it_decided_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides of each test are published to be drawn from, then what stays, and no more."""
    tiny_world.judged(monkeypatch, [0.0, -0.5, -0.5])
    overrides = ["certify={problems: 3, samples: 2, accept: certified, backtracks: 1}", "stages=1"]
    run = tiny_world.training(recipe, tmp_path / "run", overrides)
    given = publications(run)
    train(run, tolerance=TOLERANCE)
    assert [(agent, version) for agent, version, _ in given] == [
        ("ann", 0), ("bob", 0),
        ("ann", 1), ("ann", 0), ("ann", 1),
        ("bob", 1), ("bob", 0), ("bob", 2), ("bob", 0), ("bob", 0),
    ]  # fmt: skip
