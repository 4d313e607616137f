"""A stage and a run: who is touched, what is written, and what stops a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import tiny_world
from satune.files.arrays import read_rows
from satune.files.events import Event
from satune.report.plots import plot_training
from satune.training.run_directory import RunDirectory
from satune.training.self_check import Tolerance
from satune.training.trainer import train
from satune.types import Episode, Grade, Key

TOLERANCE = Tolerance(1e-3, 1e-3)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


def test_frozen_agents_end_as_they_began(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = tiny_world.training(recipe, out, ["team.agents.ann.frozen=true"])
    before = tiny_world.weights(run)
    train(run, tolerance=TOLERANCE)
    after = tiny_world.weights(run)
    assert tiny_world.same(before["ann"], after["ann"])
    assert not tiny_world.same(before["bob"], after["bob"])
    assert {event["agent"] for event in tiny_world.events(out, "update")} == {"bob"}
    saved = AutoModelForCausalLM.from_pretrained(out / "team" / "ann").state_dict()
    assert tiny_world.same(before["ann"], {name: saved[name] for name in before["ann"]})


def test_only_who_is_trained_keeps_a_reference(recipe: Path, tmp_path: Path) -> None:
    changes = ["objective={name: sat, reference_kl: 0.1}", "team.agents.bob.frozen=true"]
    run = tiny_world.training(recipe, tmp_path / "run", [*changes, "stages=1"])
    train(run, tolerance=TOLERANCE)
    ann, bob = (run.learners[name] for name in ("ann", "bob"))
    assert ann.reference_weights and bob.reference_weights is None


def test_the_team_on_disk_is_the_one_that_was_trained(recipe: Path, tmp_path: Path) -> None:
    run = tiny_world.training(recipe, tmp_path / "run")
    train(run, tolerance=TOLERANCE)
    for agent, wanted in tiny_world.weights(run).items():
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "team" / agent).state_dict()
        assert tiny_world.same(wanted, {name: saved[name] for name in wanted})


def test_a_shared_base_is_never_touched(recipe: Path, tmp_path: Path) -> None:
    shared = str(recipe.parent / "model-0")
    run = tiny_world.training(
        recipe, tmp_path / "run", ["team.sharing=lora", f"team.agents.bob.model={shared}"]
    )
    base = run.learners["ann"].policy.model
    assert base is run.learners["bob"].policy.model
    fixed = {n: p.detach().clone() for n, p in base.named_parameters() if "lora" not in n}
    before = tiny_world.weights(run)
    train(run, tolerance=TOLERANCE)
    now = dict(base.named_parameters())
    assert fixed and tiny_world.same(fixed, {name: now[name].detach() for name in fixed})
    for agent, weights in tiny_world.weights(run).items():
        assert not tiny_world.same(before[agent], weights)


def test_a_step_touches_one_agent_only(recipe: Path, tmp_path: Path) -> None:
    run = tiny_world.training(recipe, tmp_path / "run")
    seen: list[str] = []
    before = tiny_world.weights(run)

    def watch(fields: Event) -> None:
        if fields["event"] != "update":
            return
        now = tiny_world.weights(run)
        changed = [name for name in now if not tiny_world.same(before[name], now[name])]
        assert changed == ([fields["agent"]] if fields["accepted"] else [])
        seen.append(fields["agent"])
        before.update(now)

    run.watch = watch
    train(run, tolerance=TOLERANCE)
    assert seen == ["ann", "bob"] * 2


def test_reverted_steps_leave_the_team_and_are_written(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = tiny_world.training(
        recipe, out, ["trust_region.delta=1e-12", "trust_region.backtracks=1", "schedule=reuse"]
    )
    before = tiny_world.weights(run)
    summary = train(run, tolerance=TOLERANCE)
    after = tiny_world.weights(run)
    assert all(tiny_world.same(before[name], after[name]) for name in before)
    updates = tiny_world.events(out, "update")
    assert [event["accepted"] for event in updates] == [False] * 4
    assert all(event["scale"] == 0.0 and event["version"] == 0 for event in updates)
    assert all("above delta" in event["reason"] for event in updates)
    # Nobody changed, so everybody's experience has weight 1, and the same held-out episodes.
    assert all(event["ess"] == 12 for event in updates)
    assert summary["updates_accepted"] == 0
    assert summary["reward_after"] == summary["reward_before"]
    assert summary["difference"] == [0.0, 0.0, 0.0]


def test_a_reward_that_is_not_a_number_reaches_the_events_and_not_the_team(
    recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = tiny_world.training(recipe, out, ["stages=2", "schedule=stale"])
    draw = run.supply.draw

    def damaged(key: Key, offset: int, count: int) -> list[Episode]:
        first, *rest = draw(key, offset, count)
        if key.stage == 1:
            first = replace(first, grade=Grade(math.nan))
        return [first, *rest]

    run.supply.draw = damaged
    train(run, tolerance=TOLERANCE)
    updates = tiny_world.events(out, "update")
    assert [event["accepted"] for event in updates] == [False, False, True, True]
    assert all("not finite" in event["reason"] for event in updates[:2])
    stages = tiny_world.events(out, "stage")
    assert stages[0]["reward"] == "nan" and stages[1]["reward"] != "nan"
    for weights in tiny_world.weights(run).values():
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    # A step without a KL can be drawn all the same.
    assert plot_training(out, tmp_path / "figure.png")


def test_an_engine_left_behind_stops_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_world.training(recipe, tmp_path / "run", ["schedule=fresh"])
    publish = run.world.publish
    monkeypatch.setattr(
        run.world,
        "publish",
        lambda agent, version, weights: version or publish(agent, version, weights),
    )
    with pytest.raises(RuntimeError, match="version 0 of agent ann, the learner is at 1"):
        train(run, tolerance=TOLERANCE)


def test_an_update_event_says_what_was_done(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(
        tiny_world.training(recipe, out, ["team.agents.bob.delta=0.02"]),
        tolerance=TOLERANCE,
    )
    events = RunDirectory(out).read_events()
    assert [event["event"] for event in events] == [
        "run", "eval", "eval",
        "rollout", "update", "update", "stage",
        "rollout", "update", "update", "stage",
        "eval", "eval",
    ]  # fmt: skip
    wanted = {
        "stage", "step", "agent", "seats", "schedule", "version", "episodes", "ess", "kl",
        "delta", "beta", "scale", "accepted", "reason", "objective", "clip_fraction", "grad_norm",
        "tokens", "seconds",
    }  # fmt: skip
    for event in events:
        if event["event"] == "update":
            assert wanted <= set(event) and "certificate" not in event
            assert {
                "mean", "quantile", "max", "trajectory", "violation_rate", "violation_ucb",
                "reverse_quantile",
            } <= set(event["kl"])  # fmt: skip
            assert {"rollout", "update", "measure"} <= set(event["seconds"])
            assert event["delta"] == {"ann": 0.05, "bob": 0.02}[event["agent"]]
            assert event["kl"]["quantile"] <= event["delta"]
        if event["event"] == "stage":
            assert {"reward", "order", "seconds", "memory"} <= set(event)
            assert event["order"] == ["ann", "bob"]
            assert event["memory"]["peak"] > 1 << 20


def test_what_the_engine_says_of_new_weights_stands_beside_the_step(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an accepted step alone: the weights of the beginning are nobody's step, and where nothing
    was taken nothing is given."""
    out = tmp_path / "run"
    run = tiny_world.training(recipe, out, ["team.agents.bob.delta=1e-9"])
    given: list[tuple[str, int]] = []

    def publish(agent: str, version: int, weights: object) -> dict[str, float]:
        given.append((agent, version))
        return {"error": version / 100}

    monkeypatch.setattr(run.world, "publish", publish)
    monkeypatch.setattr(type(run), "_check_versions", lambda *_: None)
    train(run, tolerance=TOLERANCE)
    assert given[:2] == [("ann", 0), ("bob", 0)]
    updates = tiny_world.events(out, "update")
    assert {event["accepted"] for event in updates} == {True, False}
    for event in updates:
        shown = {"error": event["version"] / 100}
        assert event.get("publish") == (shown if event["accepted"] else None)


def test_the_own_tokens_of_the_agents_are_the_sampled_ones(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = train(tiny_world.training(recipe, out, ["schedule=reuse"]), tolerance=TOLERANCE)
    rollouts = tiny_world.events(out, "rollout")
    updates = tiny_world.events(out, "update")
    sampled = sum(event["tokens"]["sampled"] for event in rollouts)
    assert sampled == sum(event["tokens"]["own"] for event in updates)
    assert sampled == summary["tokens"]
    rows = [
        row
        for stage in (1, 2)
        for row in read_rows(RunDirectory(out).episodes / f"stage-{stage:04d}.jsonl")
    ]
    assert len(rows) == summary["episodes"] == 24
    assert sampled == sum(len(turn["completion_ids"]) for row in rows for turn in row["turns"])
    # What an update cost beside its own tokens stands only where a rollout was made for it.
    assert ["sampled" in event["tokens"] for event in updates] == [True, False, True, False]


def test_warm_up_keeps_first_steps_small(recipe: Path, tmp_path: Path) -> None:
    """With 9 warm-up steps the first optimiser step has a tenth of the rate: Adam's first step is
    the rate times the sign of the gradient (weight decay aside)."""
    moved = {}
    for warm in (0, 9):
        run = tiny_world.training(
            recipe, tmp_path / str(warm),
            ["stages=1", f"optimizer.warmup_steps={warm}", "optimizer.mini_batches=1",
             "optimizer.weight_decay=0", "trust_region.enabled=false", "schedule=stale"],
        )  # fmt: skip
        before = tiny_world.weights(run)["ann"]
        train(run, tolerance=TOLERANCE)
        after = tiny_world.weights(run)["ann"]
        moved[warm] = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert moved[0] == pytest.approx(1e-3, rel=1e-2)
    assert moved[9] == pytest.approx(1e-4, rel=1e-2)
