"""Batches that are drawn before their stage: by which weights, with which w, and after a kill."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_world
from far_engine import FarEngine
from satune.agents.policy import Policy
from satune.commands.world import AheadWorld
from satune.engines.base import ENGINES
from satune.files.arrays import read_rows
from satune.files.events import Event
from satune.training.ahead import correction
from satune.training.ascent import own_turns
from satune.training.run import Training
from satune.training.run_directory import RunDirectory
from satune.training.self_check import Tolerance
from satune.training.state_file import past_file
from satune.training.trainer import train
from satune.types import Episode, Key, UserError

TOLERANCE = Tolerance(1e-3, 1e-3)
REUSE = ["schedule=reuse", "stages=4", "checkpoint.keep=9", "evaluate={problems: 2, samples: 1}"]
GATED = "certify={problems: 2, samples: 2, every: 3, accept: certified, backtracks: 0}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


class Killed(BaseException):
    """Stands for the end of the process."""


def rows_of(out: Path, stage: int) -> list[dict[str, Any]]:
    return list(read_rows(RunDirectory(out).episodes / f"stage-{stage:04d}.jsonl"))


def versions_in(rows: Sequence[dict[str, Any]]) -> dict[str, set[int]]:
    """The versions that wrote turns, by agent."""
    found: dict[str, set[int]] = {}
    for row in rows:
        for turn in row["turns"]:
            found.setdefault(turn["agent"], set()).add(turn["version"])
    return found


def left(out: Path) -> dict[str, Any]:
    """What a run leaves."""
    episodes = {p.name: p.read_bytes() for p in RunDirectory(out).episodes.iterdir()}
    return {
        "events": tiny_world.events(out),
        "episodes": episodes,
        "team": tiny_world.team_files(out),
    }


def trained(recipe: Path, out: Path, overrides: Sequence[str]) -> Training:
    run = tiny_world.training(recipe, out, overrides)
    train(run, tolerance=TOLERANCE)
    return run


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_batch_is_drawn_by_the_team_of_so_many_stages_before(
    recipe: Path, tmp_path: Path, ahead: int
) -> None:
    out = tmp_path / "run"
    trained(recipe, out, [*REUSE, f"rollout.ahead={ahead}"])
    updates = tiny_world.events(out, "update")
    assert all(event["accepted"] for event in updates)  # so that stage s begins with version s - 1
    rollouts = tiny_world.events(out, "rollout")
    assert [(event["stage"], event["step"]) for event in rollouts] == [(s, 1) for s in range(1, 5)]
    assert "ahead" not in rollouts[0]
    for event in rollouts[1:]:
        wrote = max(1, event["stage"] - ahead) - 1
        assert event["ahead"]["versions"] == {"ann": wrote, "bob": wrote}
        assert versions_in(rows_of(out, event["stage"])) == {"ann": {wrote}, "bob": {wrote}}
        # Each turn is scored twice, under who wrote it and under the anchor.
        assert event["ahead"]["scored"] == 2 * event["tokens"]["sampled"]
        assert event["ahead"]["mismatch"]["max"] < 1e-4
        first = next(e for e in updates if e["stage"] == event["stage"])
        assert first["ess"] == event["ahead"]["ess"] < 11.99
        assert first["tokens"]["sampled"] == event["tokens"]["sampled"]
    # No problem is drawn twice or left out: 3 a stage of 9 in turn.
    drawn = [{row["problem"]["id"] for row in rows_of(out, stage)} for stage in (1, 2, 3)]
    assert len(set().union(*drawn)) == 9
    # What the engine said is compared with the version that wrote, never with a later anchor.
    assert [("mismatch" in e) for e in updates] == [e["stage"] == 1 for e in updates]


def test_nothing_ahead_draws_in_this_thread(recipe: Path, tmp_path: Path) -> None:
    run = tiny_world.training(recipe, tmp_path / "run", ["rollout.ahead=0"])
    assert not isinstance(run.world, AheadWorld) and run.ahead.drawer is None
    train(run, tolerance=TOLERANCE)
    assert not run.state.early and not run.state.past
    assert all("ahead" not in event for event in tiny_world.events(tmp_path / "run", "rollout"))


def test_weights_come_from_all_turns(recipe: Path, tmp_path: Path) -> None:
    """log w of an episode is the sum over both agents of log-probability now minus then."""
    run = tiny_world.training(recipe, tmp_path / "run", ["optimizer.lr=3e-3"])
    for name in run.learners:
        run.publish(name)
    episodes = run.supply.batch(1, 1).episodes
    then = {name: learner.export() for name, learner in run.learners.items()}
    wanted_E = torch.zeros(len(episodes), dtype=torch.float64)
    learners: dict[str, Any] = dict(run.learners)
    for seed, (name, learner) in enumerate(learners.items()):
        packed = own_turns(name, episodes)
        before_T = learner.score(packed).double()
        noise = torch.Generator().manual_seed(seed)
        moved = {n: w + 0.02 * torch.randn(w.shape, generator=noise) for n, w in then[name].items()}
        learner.load_weights(moved)
        after_T = learner.score(packed).double()
        wanted_E.index_add_(0, packed.episode_T, after_T - before_T)
    now = tiny_world.weights(run)
    past = {name: {0: weights} for name, weights in then.items()}
    found = correction(learners, episodes, {"ann": 1, "bob": 1}, past)
    assert wanted_E.abs().max() > 0.01
    assert torch.allclose(found.log_weights_E, wanted_E, rtol=0, atol=1e-9)
    for name, weights in tiny_world.weights(run).items():
        assert tiny_world.same(now[name], weights)
    # What the present version wrote is not scored; neither is what the world ended.
    ann = correction(learners, episodes, {"ann": 0, "bob": 1}, past)
    assert ann.figures["scored"] == 2 * sum(
        len(t.completion_ids or ()) for e in episodes for t in e.turns if t.agent == "bob"
    )
    assert correction(learners, episodes, {"ann": 0, "bob": 0}, past).figures == {"scored": 0}


def test_hybrid_rolls_out_anew_where_the_batch_tells_too_little(
    recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    overrides = ["schedule=hybrid", "schedule.ess=1.0", "stages=2", "rollout.ahead=1"]
    run = trained(recipe, out, overrides)
    rollouts = [e for e in tiny_world.events(out, "rollout") if e["stage"] == 2]
    # The batch that was drawn ahead, of which no step learns, and one before each step.
    assert [event["step"] for event in rollouts] == [0, 1, 2]
    assert ["ahead" in event for event in rollouts] == [True, False, False]
    first = next(e for e in tiny_world.events(out, "update") if e["stage"] == 2)
    assert first["ess"] == pytest.approx(12) and "mismatch" in first
    stage = tiny_world.events(out, "stage")[1]
    assert stage["reward"] == rollouts[1]["reward"] != rollouts[0]["reward"]
    assert run.state.totals["episodes"] == 12 * len(tiny_world.events(out, "rollout"))


@pytest.mark.parametrize("at", ["stage-0002-step-1", "stage-0002"])
def test_killed_with_batches_under_way_and_resumed_a_run_is_the_same(
    recipe: Path, tmp_path: Path, at: str
) -> None:
    overrides = [*REUSE, "rollout.ahead=2"]
    trained(recipe, tmp_path / "whole", overrides)
    killed = tiny_world.training(recipe, tmp_path / "killed", overrides)

    def end(event: Event) -> None:
        if event["event"] == "update" and event["stage"] == 3:
            raise Killed

    killed.watch = end
    with pytest.raises(Killed):
        train(killed, tolerance=TOLERANCE)
    held = set(p.name for p in (tmp_path / "killed" / "checkpoints" / at).iterdir())
    # Stages 3 and 4 are drawn by the teams that stages 1 and 2 began with.
    assert {past_file(a, v) for a in ("ann", "bob") for v in (0, 1)} <= held
    again = tiny_world.training(recipe, tmp_path / "killed", overrides, resume=True)
    train(again, tolerance=TOLERANCE, checkpoint=at)
    assert left(tmp_path / "killed") == left(tmp_path / "whole")


def test_more_stages_are_the_same_as_if_they_had_been_asked_for_at_once(
    recipe: Path, tmp_path: Path
) -> None:
    overrides = [*REUSE, "rollout.ahead=1"]
    trained(recipe, tmp_path / "whole", overrides)
    trained(recipe, tmp_path / "short", [*overrides, "stages=2"])
    more = tiny_world.training(recipe, tmp_path / "short", overrides, resume=True)
    train(more, tolerance=TOLERANCE, checkpoint="stage-0002")
    whole, grown = (tiny_world.team_files(tmp_path / name) for name in ("whole", "short"))
    assert whole == grown
    for stage in (3, 4):
        assert versions_in(rows_of(tmp_path / "short", stage)) == versions_in(
            rows_of(tmp_path / "whole", stage)
        )


def test_what_a_reverted_candidate_drew_is_never_used(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate covers three steps: both of stage 1 and the first of stage 2, all reverted. By
    then version 1 draws for stage 4: that is dropped. What version 0 draws for stage 3 is not."""
    tiny_world.judged(monkeypatch, [-1.0, 1.0, 1.0, 1.0])
    out = tmp_path / "run"
    trained(recipe, out, [*REUSE, GATED, "rollout.ahead=2", "stages=5"])
    verdicts = [e["gate"]["verdict"] for e in tiny_world.events(out, "update") if "gate" in e]
    assert verdicts == ["reverted", "kept", "kept", "kept"]
    stages = tiny_world.events(out, "stage")
    assert [event.get("ahead_dropped") for event in stages] == [None, [4], None, None, None]
    opening = {e["stage"]: e for e in tiny_world.events(out, "rollout") if e["step"] == 1}
    assert opening[3]["ahead"]["versions"] == {"ann": 0, "bob": 0}
    # The batch of stage 4 is begun anew when stage 3 begins, after bob's second step.
    assert opening[4]["ahead"]["versions"] == opening[5]["ahead"]["versions"]
    assert opening[4]["ahead"]["versions"] == {"ann": 0, "bob": 2}
    refused = {"ann": {1, 2}, "bob": {1}}
    for stage in (3, 4, 5):
        for agent, versions in versions_in(rows_of(out, stage)).items():
            assert not versions & refused[agent], (stage, agent)


def test_the_engine_keeps_its_team_until_the_batch_is_drawn(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_world.training(recipe, tmp_path / "run", [*REUSE, "rollout.ahead=1"])
    world: Any = run.world
    for name in run.learners:
        run.publish(name)
    state, go_on = run.state, threading.Event()
    problems = world.cast.train_problems
    monkeypatch.setattr(
        type(world.cast), "train_problems", lambda cast, *a: go_on.wait(60) and problems(*a)
    )
    state.batch = None
    run._draw_ahead(1)
    ann: Any = run.learners["ann"]
    before = ann.export()
    ann.load_weights({name: w + 1.0 for name, w in before.items()})
    state.versions["ann"] = 1
    run.publish("ann")
    assert world.cast.engine.versions == {"ann": 0, "bob": 0}
    assert tiny_world.same(world.cast.copies["ann"].export(), before)
    go_on.set()
    world._settle()
    assert world.cast.engine.versions == {"ann": 1, "bob": 0}
    assert tiny_world.same(world.cast.copies["ann"].export(), ann.export())
    drawn: list[Episode] = run.ahead.drawn(state.early[0])
    assert {t.version for e in drawn for t in e.turns} == {0}
    run.ahead.stop()


def test_what_the_engine_has_not_is_given_where_ctrl_c_ends_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume begins to draw before the engine has any weights, and an engine may take minutes to
    take the first. By then all copies have theirs; what the engine has is not given again."""
    run = tiny_world.training(recipe, tmp_path / "run", [*REUSE, "rollout.ahead=1"])
    world: Any = run.world
    engine, copies = world.cast.engine, world.cast.copies
    publish = engine.publish
    given: list[tuple[str, int]] = []
    stepped = {name: {n: w + 1 for n, w in weights.items()} for name, weights in _held(run).items()}

    def taken(agent: str, version: int, weights: Any) -> Any:
        assert threading.current_thread() is threading.main_thread()
        assert all(tiny_world.same(copies[name].export(), stepped[name]) for name in copies)
        given.append((agent, version))
        if len(given) == 1:
            raise KeyboardInterrupt
        return publish(agent, version, weights)

    monkeypatch.setattr(engine, "publish", taken)
    key, team = Key(0, "train", 2, step=0), {name: (3, held) for name, held in stepped.items()}
    with pytest.raises(KeyboardInterrupt):
        world.draw_ahead(key, 0, 2, team)
    first, second = (world.draw_ahead(key, 0, 2, team) for _ in range(2))
    assert {t.version for e in first.result() for t in e.turns} == {3}
    assert len(second.result()) == len(first.result())
    assert sorted(given) == [("ann", 3), ("ann", 3), ("bob", 3)]
    run.ahead.stop()


def _held(run: Training) -> dict[str, dict[str, torch.Tensor]]:
    learners: dict[str, Any] = dict(run.learners)
    return {name: learner.export() for name, learner in learners.items()}


def test_a_run_that_ends_does_not_wait_for_what_it_draws(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_world.training(recipe, tmp_path / "run", [*REUSE, "rollout.ahead=2"])
    world: Any = run.world
    for name in run.learners:
        run.publish(name)
    asked = threading.Event()

    async def never(*arguments: Any) -> Any:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(world.cast.engine, "generate", never)
    run._draw_ahead(1)
    assert asked.wait(60)
    first, second = run.ahead._under_way.values()
    run.ahead.stop()
    assert second.cancelled() and isinstance(first.exception(), KeyboardInterrupt)


@dataclass(frozen=True)
class FarSettings:
    """An engine with weights of its own, which says so."""

    own_weights = True
    conversations = 64

    def make(self, policies: Mapping[str, Policy], seats: Mapping[str, str]) -> FarEngine:
        return FarEngine(policies, seats)


def test_an_engine_with_weights_of_its_own_needs_no_copies_and_draws_the_same(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*REUSE, "rollout.ahead=2", "certify={problems: 2, samples: 2, every: 3}"]
    near: Any = trained(recipe, tmp_path / "near", overrides)
    monkeypatch.setitem(ENGINES, "local", lambda **options: FarSettings())
    far: Any = trained(recipe, tmp_path / "far", overrides)
    assert set(near.world.cast.copies) == {"ann", "bob"} and not far.world.cast.copies
    assert left(tmp_path / "far") == left(tmp_path / "near")


def test_frozen_agents_are_neither_copied_nor_kept(recipe: Path, tmp_path: Path) -> None:
    overrides = [*REUSE, "rollout.ahead=1", "team.agents.ann.frozen=true", "stages=3"]
    run = trained(recipe, tmp_path / "run", overrides)
    world: Any = run.world
    assert set(world.cast.copies) == set(run.state.past) == {"bob"}
    found = tiny_world.events(tmp_path / "run", "rollout")[2]
    assert 0 < found["ahead"]["scored"] < 2 * found["tokens"]["sampled"]


def test_a_frozen_agent_on_a_base_that_learns_is_drawn_with_on_the_copy(
    recipe: Path, tmp_path: Path
) -> None:
    """The base has one active adapter, which is the learner's to choose while it learns."""
    shared = str(recipe.parent / "model-0")
    overrides = [*REUSE, "rollout.ahead=1", "team.sharing=lora", f"team.agents.bob.model={shared}"]
    overrides += ["team.agents.ann.frozen=true", "stages=2"]
    run = trained(recipe, tmp_path / "run", overrides)
    world: Any = run.world
    assert set(world.cast.copies) == {"ann", "bob"} and set(run.state.past) == {"bob"}
    engine: Any = world.cast.engine
    learnt = world.cast.team.policies["bob"].model
    assert all(policy.model is not learnt for policy in engine.policies.values())


def test_who_rests_is_given_before_anything_is_drawn_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*REUSE, "rollout.ahead=1", "team.agents.ann.frozen=true", "stages=2"]
    trained(recipe, tmp_path / "run", overrides)
    run = tiny_world.training(recipe, tmp_path / "run", [*overrides[:-1], "stages=3"], resume=True)
    done: list[str] = []
    begin, publish = type(run.ahead).begin, type(run).publish

    def began(self: Any, *given: Any) -> None:
        done.append("begin")
        begin(self, *given)

    def published(self: Any, agent: str) -> Any:
        done.append(agent)
        return publish(self, agent)

    monkeypatch.setattr(type(run.ahead), "begin", began)
    monkeypatch.setattr(type(run), "publish", published)
    train(run, tolerance=TOLERANCE, checkpoint="stage-0002")
    assert done[:3] == ["ann", "begin", "bob"]


def test_gains_are_not_predicted_from_an_old_batch(recipe: Path, tmp_path: Path) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text("def by_gain(sweep):\n    return sorted(sweep.gains())\n")
    overrides = [*REUSE, "rollout.ahead=1", f"order={rule}:by_gain"]
    with pytest.raises(UserError, match=r"order: gains are predicted from what the present team"):
        trained(recipe, tmp_path / "run", overrides)


def test_agents_of_one_base_share_its_copy(recipe: Path, tmp_path: Path) -> None:
    shared = str(recipe.parent / "model-0")
    overrides = [*REUSE, "rollout.ahead=1", "team.sharing=lora", f"team.agents.bob.model={shared}"]
    run = trained(recipe, tmp_path / "run", [*overrides, "stages=2"])
    world: Any = run.world
    ann, bob = (world.cast.copies[name].model for name in ("ann", "bob"))
    assert ann is bob and ann is not world.cast.team.policies["ann"].model
    assert all("lora" in name for name in run.state.past["ann"][1])
