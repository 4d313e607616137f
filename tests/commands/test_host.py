"""Agents that live with their owner, as they are put together there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import tiny_world
from satune.agents import memory
from satune.commands.host import assemble_owners
from satune.config.load import load_recipe

AGENTS = ("ann", "bob", "eve")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"), AGENTS)


@pytest.mark.parametrize(
    "agents, given, bytes_each",
    [
        (AGENTS, 0.75, 2_000_000),
        (AGENTS[:2], 0.75, 3_000_000),
        (AGENTS[:1], 0.75, 6_000_000),
        (AGENTS, 600_000, 200_000),
        # Less than a byte each is not a share.
        (AGENTS, 2, 2),
    ],
)
def test_agents_that_live_together_share_the_engines_memory(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    agents: Sequence[str],
    given: float,
    bytes_each: int,
) -> None:
    """Those of the recipe that live elsewhere take nothing here."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8_000_000)
    loaded = load_recipe(recipe, [f"engine={{name: local, memory: {given}}}"])
    owners = assemble_owners(loaded, {name: tmp_path / name for name in agents})
    for owner in owners.values():
        visits = owner.visits
        visit = visits.speaker(visits.enter(["ann"]))
        for engine in (owner.engine, visit.engine):
            assert [room.limit for room in engine._rooms.values()] == [bytes_each]
