"""Hosts and runs that die, and what they go on from: a step that was lost is as if it had never
been proposed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_world
from owners import Owners, alone, owners
from satune.hosts.client import HostLost
from satune.training.run import Training
from satune.types import UserError

AGENTS = ("ann", "bob")
OVERRIDES = ("stages=2", "certify.problems=2", "certify.samples=2", "certify.every=3")
"""A window of three steps is open at the second stage's first, so snapshots are held."""


class Killed(Exception):
    """In the place of a signal."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Training]:
    """The recipe, and the run of it that nothing happened to."""
    folder = tmp_path_factory.mktemp("survival")
    recipe = tiny_world.build(folder / "world")
    return recipe, folder / "one", alone(recipe, folder / "one", *OVERRIDES)


def at(stage: int, kind: str, act: Callable[[], object], step: int | None = None) -> Any:
    """A watcher that acts once, when the first such event is told."""
    done: list[bool] = []

    def watch(event: Any) -> None:
        here = event["event"] == kind and event.get("stage") == stage
        if here and step in (None, event.get("step")) and not done:
            done.append(True)
            act()

    return watch


def assert_same(whole: tuple[Path, Path, Training], there: Owners, out: Path) -> None:
    _, one, run = whole
    assert tiny_world.events(one) == tiny_world.events(out)
    for agent, learner in run.learners.items():
        mine, theirs = learner, there.owner(agent).learner
        assert tiny_world.same(dict(mine.export()), theirs.export())  # type: ignore[arg-type]
        assert tiny_world.same(mine.optimizer_state(), theirs.optimizer_state())  # type: ignore[union-attr]


def latest(out: Path) -> str:
    found = tiny_world.checkpoints(out).latest()
    assert found is not None
    return found[0]


def test_a_host_that_dies_before_its_step(
    whole: tuple[Path, Path, Training], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with owners(whole[0], tmp_path / "owners", AGENTS, OVERRIDES) as there:
        with pytest.raises(
            HostLost, match=r"agent bob: its host http://127.0.0.1:\d+ is lost.*--resume"
        ):
            there.train(out, watch=at(2, "update", lambda: there.stop("bob"), step=1))
        there.start("bob")
        there.train(out, checkpoint=latest(out))
        assert_same(whole, there, out)


@pytest.mark.slow
def test_a_run_that_waits_for_its_host(whole: tuple[Path, Path, Training], tmp_path: Path) -> None:
    """The host comes back at the same address, as its memory never had been."""
    out = tmp_path / "run"
    with owners(whole[0], tmp_path / "owners", AGENTS, OVERRIDES) as there:

        def away() -> None:
            there.start("ann", there.stop("ann"))

        there.train(out, "hosts.wait=60", watch=at(2, "rollout", away))
        assert_same(whole, there, out)
        assert "going on from stage-0001" in there.told[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind", "step"), [(1, "update", 2), (2, "rollout", 1), (2, "update", 1)]
)
def test_a_run_that_is_killed(
    whole: tuple[Path, Path, Training], tmp_path: Path, stage: int, kind: str, step: int
) -> None:
    """Its hosts have gone on meanwhile and go back with it."""

    def die() -> None:
        raise Killed

    out = tmp_path / "run"
    with owners(whole[0], tmp_path / "owners", AGENTS, OVERRIDES) as there:
        with pytest.raises(Killed):
            there.train(out, watch=at(stage, kind, die, step))
        there.train(out, checkpoint=latest(out))
        assert_same(whole, there, out)


@pytest.mark.slow
def test_everybody_dies_and_all_stand_at_the_checkpoint(
    whole: tuple[Path, Path, Training], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with owners(whole[0], tmp_path / "owners", AGENTS, OVERRIDES) as there:
        with pytest.raises(HostLost):
            there.train(out, watch=at(2, "update", lambda: [there.stop(a) for a in AGENTS], step=1))
        for agent in AGENTS:
            there.start(agent)
        kept = {p.name for p in (tmp_path / "owners/bob/checkpoints").iterdir() if p.is_dir()}
        # Of stage-0001 the owner has not heard yet that it is safe: what it is to replace stays.
        assert kept == {"stage-0000", "stage-0001-step-1", "stage-0001"}
        there.train(out, checkpoint=latest(out))
        assert_same(whole, there, out)


def test_a_host_that_cannot_stand_there_is_named(
    whole: tuple[Path, Path, Training], tmp_path: Path
) -> None:
    recipe, out = whole[0], tmp_path / "run"
    few = (*OVERRIDES, "stages=1")
    with owners(recipe, tmp_path / "owners", AGENTS, few) as there:
        there.train(out)
        files = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        place = tmp_path / "owners" / "bob" / "checkpoints"

        # A new run would take from the first what it may go on from.
        with pytest.raises(UserError, match="has trained since it was started"):
            there.train(tmp_path / "other")
        there.start("bob", there.stop("bob"))
        with pytest.raises(UserError, match=r"bob.*holds checkpoints that another run"):
            there.start("ann", there.stop("ann"))
            shutil.rmtree(tmp_path / "owners" / "ann" / "checkpoints")
            there.train(tmp_path / "third")

        weights = place / "stage-0001" / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        with pytest.raises(UserError, match=r"ann.*has no checkpoint stage-0001"):
            there.train(out, checkpoint="stage-0001")
        with pytest.raises(UserError, match=r"bob.*damaged checkpoint \(content changed\)"):
            run = there.training(out, resume=True)
            run.learners["bob"].stand("stage-0001", reference(out, "bob"))  # type: ignore[union-attr]
        with pytest.raises(UserError, match=r"bob.*is not the one that the run has named"):
            run.learners["bob"].stand("stage-0001", reference(out, "bob") + "0")  # type: ignore[union-attr]
        now = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p in files}
        assert now == files


def reference(out: Path, agent: str) -> str:
    from satune.training.state_file import read_state

    return read_state(out / "checkpoints" / "stage-0001")["hosts"][agent]
