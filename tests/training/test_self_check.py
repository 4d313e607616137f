"""Before training, engine and learner have to be one policy; otherwise the run stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_world
from satune.training.run import Training
from satune.training.self_check import Tolerance, self_check
from satune.types import Episode, Key, UserError

TOLERANCE = Tolerance(1e-3, 1e-3)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


def drawn(recipe: Path, out: Path) -> tuple[Training, list[Episode]]:
    run = tiny_world.training(recipe, out)
    for name in run.learners:
        run.publish(name)
    return run, run.supply.draw(Key(0, "train"), 0, 3)


def test_one_policy_passes(recipe: Path, tmp_path: Path) -> None:
    run, episodes = drawn(recipe, tmp_path / "run")
    report = self_check(run.learners, episodes, Tolerance(1e-4, 1e-4))
    assert list(report) == ["ann", "bob"]
    for figures in report.values():
        assert figures["ratio"] == 0.0 and figures["kl"] == 0.0
        assert abs(figures["mismatch_mean"]) <= figures["mismatch_max"] <= 1e-4


def test_another_temperature_in_the_engine_is_found(recipe: Path, tmp_path: Path) -> None:
    run, episodes = drawn(recipe, tmp_path / "run")
    # Sampled at 1.0; the learner now scores at .9, as if the two had been told different things.
    run.learners["bob"].policy.temperature = 0.9
    with pytest.raises(UserError, match=r"self-check: agent bob: engine and learner") as caught:
        self_check(run.learners, episodes, Tolerance(1e-3, 1e-3))
    assert "\n" not in str(caught.value)


def test_other_weights_in_the_engine_are_found(recipe: Path, tmp_path: Path) -> None:
    run, episodes = drawn(recipe, tmp_path / "run")
    with torch.no_grad():
        next(iter(run.learners["ann"].policy.trainable().values())).mul_(1.01)
    with pytest.raises(UserError, match=r"self-check: agent ann: engine and learner"):
        self_check(run.learners, episodes, Tolerance(1e-3, 1e-3))


def test_scoring_that_does_not_repeat_itself_is_found(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, episodes = drawn(recipe, tmp_path / "run")
    policy = run.learners["ann"].policy
    hidden, calls = policy.hidden, []

    def drifting(ids: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(1)
        return hidden(ids, **options) * (1 + 0.01 * len(calls))

    monkeypatch.setattr(policy, "hidden", drifting)
    with pytest.raises(UserError, match="two scorings of one token differ"):
        self_check(run.learners, episodes, Tolerance(1e-3, 1e-3))


def test_a_log_probability_that_is_not_a_number_is_found(recipe: Path, tmp_path: Path) -> None:
    run, episodes = drawn(recipe, tmp_path / "run")
    with torch.no_grad():
        next(iter(run.learners["ann"].policy.trainable().values())).fill_(float("nan"))
    with pytest.raises(UserError, match="self-check: agent ann"):
        self_check(run.learners, episodes, Tolerance(1e9, 1e9))


def test_a_run_that_fails_the_check_does_not_start(recipe: Path, tmp_path: Path) -> None:
    from satune.training.trainer import train

    run = tiny_world.training(recipe, tmp_path / "run")
    run.learners["ann"].policy.temperature = 0.5
    draw = run.supply.draw

    def cold(key: Key, offset: int, count: int) -> list[Episode]:
        run.learners["ann"].policy.temperature = 1.0
        episodes = draw(key, offset, count)
        run.learners["ann"].policy.temperature = 0.5
        return episodes

    run.supply.draw = cold
    with pytest.raises(UserError, match="self-check"):
        train(run, tolerance=TOLERANCE)
    assert tiny_world.events(tmp_path / "run") == []
    assert tiny_world.checkpoints(tmp_path / "run").names() == []
