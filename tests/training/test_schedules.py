"""Where a step's experience comes from: how often is rolled out, and with which weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_world
from satune.files.arrays import read_rows
from satune.training.schedules import SCHEDULES, Hybrid, experience_for, needs_rollout
from satune.training.self_check import Tolerance
from satune.training.settings import TrainingSettings, UpdateSettings
from satune.training.state import Batch
from satune.training.supply import MAX_DRAWS, Supply
from satune.training.trainer import train
from satune.types import Episode, Grade, Key, Problem

TOLERANCE = Tolerance(1e-3, 1e-3)

AGENTS = ("ann", "bob", "cat")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"), AGENTS)


def episode(problem: str, reward: float, sample: int = 0) -> Episode:
    return Episode(Problem.of(problem, "?"), sample, (), None, Grade(reward))


def batch(log_weights: list[float], drawn_before: int = 1) -> Batch:
    return Batch([episode("p", 0.0)] * len(log_weights), log_weights, drawn_before, 0.0)


# When to roll out


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("fresh", True), ("reuse", False), ("stale", False), ("simultaneous", False)],
)
def test_only_fresh_rolls_out_before_each_agent(name: str, wanted: bool) -> None:
    settings = SCHEDULES[name]()
    assert needs_rollout(settings, batch([0.0, -9.0]), step=2) is wanted
    assert needs_rollout(settings, batch([0.0, -9.0], drawn_before=2), step=2) is False


@pytest.mark.parametrize(
    ("log_weights", "wanted"),
    [
        ([0.0] * 4, False),  # ESS 4 of 4
        ([math.log(3.0), 0.0, 0.0, 0.0], False),  # (3+1+1+1)²/(9+1+1+1) = 3 of 4
        ([0.0, 0.0, -math.inf, -math.inf], False),  # 2 of 4: not below one half
        ([math.log(10.0), 0.0, 0.0, 0.0], True),  # 169/103 = 1.64 of 4
        ([0.0, math.nan, 0.0, 0.0], True),
    ],
)
def test_hybrid_renews_below_its_share_of_effective_samples(
    log_weights: list[float], wanted: bool
) -> None:
    assert needs_rollout(Hybrid(), batch(log_weights), step=2) is wanted
    lax = Hybrid(ess=0.25)
    assert needs_rollout(lax, batch(log_weights), step=2) is math.isnan(sum(log_weights))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(-3, 3))
def test_hybrid_does_not_mind_a_common_factor(log_weights: list[float], shift: float) -> None:
    # ESS is homogeneous of degree 0 in w.
    w = torch.tensor(log_weights, dtype=torch.float64).exp()
    share = float(w.sum() ** 2 / w.square().sum()) / len(log_weights)
    if abs(share - 0.5) < 1e-6:
        return
    shifted = batch([value + shift for value in log_weights])
    assert needs_rollout(Hybrid(), shifted, step=2) is (share < 0.5)


@pytest.mark.parametrize("name", ["fresh", "hybrid", "reuse"])
def test_weighted_schedules_hand_on_w(name: str) -> None:
    held = batch([0.0, 0.5])
    held.reweight(torch.tensor([0.25, -1.0]))
    assert experience_for(SCHEDULES[name](), held).log_weights == (0.25, -0.5)


@pytest.mark.parametrize("name", ["stale", "simultaneous"])
def test_naive_schedules_do_not(name: str) -> None:
    held = batch([0.0, 0.5])
    assert experience_for(SCHEDULES[name](), held).log_weights == (0.0, 0.0)


# Drawing


def supply(rewards: list[list[list[float]]], dynamic: bool) -> tuple[Supply, list[tuple[int, int]]]:
    """``rewards[draw][problem][sample]`` are handed out; the calls are noted as (offset, draw)."""
    calls: list[tuple[int, int]] = []

    def draw(key: Key, offset: int, count: int) -> list[Episode]:
        calls.append((offset, key.draw))
        given = rewards[len(calls) - 1]
        assert len(given) == count
        return [
            episode(f"p{offset + i}", reward, sample)
            for i, group in enumerate(given)
            for sample, reward in enumerate(group)
        ]

    settings = TrainingSettings(
        seed=0, stages=1, problems=2, samples=2, update=UpdateSettings(), dynamic_sampling=dynamic
    )
    return Supply(draw, settings), calls


FLAT, MIXED = [1.0, 1.0], [0.0, 1.0]


def test_one_rollout_is_a_batch() -> None:
    source, calls = supply([[FLAT, MIXED]], dynamic=False)
    drawn = source.batch(1, 1)
    assert [e.problem.id for e in drawn.episodes] == ["p0", "p0", "p1", "p1"]
    assert (drawn.log_weights, drawn.reward, calls) == ([0.0] * 4, 0.75, [(0, 0)])
    assert source.offset == 2


def test_dynamic_sampling_draws_until_enough_groups_differ() -> None:
    source, calls = supply([[FLAT, MIXED], [FLAT, FLAT], [MIXED, MIXED]], dynamic=True)
    drawn = source.batch(1, 1)
    # p1 of the first draw and p4, the first of the third: two groups, as asked.
    assert [e.problem.id for e in drawn.episodes] == ["p1", "p1", "p4", "p4"]
    assert calls == [(0, 0), (2, 1), (4, 2)] and source.offset == 6
    # The reward is that of everything drawn: choosing the groups would bias it. 9 of 12.
    assert len(source.fresh_episodes) == 12 and drawn.reward == 0.75


def test_dynamic_sampling_ends_where_nothing_differs() -> None:
    source, calls = supply([[FLAT, FLAT]] * MAX_DRAWS, dynamic=True)
    # Nothing to learn from: no more is kept than a rollout holds, and the step changes nothing.
    assert len(source.batch(1, 1).episodes) == 2 * 2
    assert len(calls) == MAX_DRAWS


# In a run


@pytest.mark.parametrize(
    ("schedule", "rollouts"),
    [
        (["schedule=fresh"], 3),
        (["schedule=reuse"], 1),
        (["schedule=stale"], 1),
        (["schedule=simultaneous"], 1),
        (["schedule=hybrid", "schedule.ess=1.0"], 3),  # any weight that differs is too much
        (["schedule=hybrid", "schedule.ess=0.001"], 1),
    ],
)
def test_a_stage_of_three_agents_rolls_out_as_often_as_it_should(
    recipe: Path, tmp_path: Path, schedule: list[str], rollouts: int
) -> None:
    out = tmp_path / "run"
    train(tiny_world.training(recipe, out, [*schedule, "stages=1"]), tolerance=TOLERANCE)
    drawn = tiny_world.events(out, "rollout")
    assert [event["step"] for event in drawn] == [1, 2, 3][:rollouts]
    updates = tiny_world.events(out, "update")
    assert [event["agent"] for event in updates] == list(AGENTS)
    # After a rollout all weights are 1, and so they are for the schedules that have none.
    whole = rollouts == 3 or schedule[0] in ("schedule=stale", "schedule=simultaneous")
    for event in updates[1:]:
        assert (event["ess"] == pytest.approx(12)) == whole
    # Episodes are rolled out from the versions of their step.
    rows = read_rows(tiny_world.RunDirectory(out).episodes / "stage-0001.jsonl")
    for row in rows:
        for turn in row["turns"]:
            updated_before = AGENTS.index(turn["agent"]) < row["step"] - 1
            accepted = {e["agent"]: int(e["accepted"]) for e in updates}
            assert turn["version"] == (accepted[turn["agent"]] if updated_before else 0)


def test_stale_and_simultaneous_are_the_same_for_separate_agents(
    recipe: Path, tmp_path: Path
) -> None:
    ends = {}
    for name in ("stale", "simultaneous", "reuse"):
        run = tiny_world.training(recipe, tmp_path / name, [f"schedule={name}"])
        train(run, tolerance=TOLERANCE)
        assert any(event["accepted"] for event in tiny_world.events(tmp_path / name, "update"))
        ends[name] = tiny_world.weights(run)
    for agent in AGENTS:
        assert tiny_world.same(ends["stale"][agent], ends["simultaneous"][agent])
    # The first agent meets weights of 1 in its first step only; reuse must not be the same run.
    assert not tiny_world.same(ends["stale"]["cat"], ends["reuse"]["cat"])


def test_reuse_weighs_by_the_agents_before(recipe: Path, tmp_path: Path) -> None:
    from satune.training.update import improve

    run = tiny_world.training(recipe, tmp_path / "run", ["schedule=reuse", "optimizer.lr=3e-3"])
    for name in run.learners:
        run.publish(name)
    held = run.supply.batch(1, 1)
    total, reuse = torch.zeros(len(held.episodes), dtype=torch.float64), SCHEDULES["reuse"]()
    for step, agent in enumerate(("ann", "bob"), start=1):
        outcome = improve(
            run.learners[agent], agent, experience_for(reuse, held), run.settings.update,
            beta=0.0, cap=None, key=Key(0, "train", 1, step),
        )  # fmt: skip
        held.reweight(outcome.log_ratio_E)
        total += outcome.log_ratio_E
    w = total.exp()
    outcome = improve(
        run.learners["cat"], "cat", experience_for(reuse, held),
        replace(run.settings.update), beta=0.0, cap=None, key=Key(0, "train", 1, 3),
    )  # fmt: skip
    assert outcome.event["ess"] == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
    assert outcome.event["ess"] < 11.9
    assert "capped_mass" not in outcome.event
