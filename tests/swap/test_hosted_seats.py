"""Seats of agents that live with their owners, handed over from and to: what comes of it is what
one process with all weights makes of the same swap."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny_world
from command_line import Run
from owners import Owners, alone, owners
from satune.loading import HostAddress, host_in
from satune.team import load_team
from satune.types import UserError
from swapped_teams import digests

ANYHOW = ("--tolerance", "1", "--problems", "8", "--samples", "2", "--looks", "1")
HANDOVER = ("--method", "handover", *ANYHOW)
TOKEN = "SATUNE_HOST_TOKEN"


@dataclass
class World:
    """One team made in one process, ``one``, and with an owner of bob, ``two``, who is ``there``
    still; ``new`` is another model, kept by an owner of a bob as well."""

    one: Path
    two: Path
    new: Path
    there: Owners
    other: Owners


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hosted-seats")
    recipe = tiny_world.build(folder / "world")
    new = tiny_world.save_model(folder / "new", seed=7)
    alone(recipe, folder / "one", "stages=1")
    theirs = ["stages=1", f"team.agents.bob.model={new}"]
    with (
        owners(recipe, folder / "owners", ["bob"], ["stages=1"]) as there,
        owners(recipe, folder / "others", ["bob"], theirs) as other,
    ):
        there.train(folder / "two")
        yield World(folder / "one" / "team", folder / "two" / "team", new, there, other)


def swapped(satune: Run, team: Path, out: Path, *words: str | Path) -> dict[str, Any]:
    before = digests(team)
    code, said, error = satune("swap", team, "--out", out, "--json", *words)
    assert code == 0, error
    assert digests(team) == before
    return json.loads(said)


def figures(result: dict[str, Any]) -> Any:
    """What is measured, without the models' names and without times."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in ("seconds", "models")}
        return [plain(each) for each in value] if isinstance(value, list) else value

    return plain(result["swaps"])


def evidence(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "swap-evidence.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["coin"], row["problem"], row["sample"]))


def entry(out: Path, agent: str = "bob") -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())["agents"][agent]


def test_from_an_owner_to_a_model_here(world: World, satune: Run, tmp_path: Path) -> None:
    seat = ["--seat", "bob", "--with", world.new, *HANDOVER]
    here = swapped(satune, world.one, tmp_path / "here", *seat)
    there = swapped(satune, world.two, tmp_path / "there", *seat)
    assert figures(here) == figures(there) and here["verdict"] == "accepted"
    assert evidence(tmp_path / "here") == evidence(tmp_path / "there")
    assert len({row["reward"] for row in evidence(tmp_path / "here")}) > 2
    assert entry(tmp_path / "there") == entry(tmp_path / "here")  # nothing of the owner is left
    assert list(load_team(tmp_path / "there", device="cpu").policies) == ["ann", "bob"]


def test_to_an_owner(world: World, satune: Run, tmp_path: Path) -> None:
    url = world.other.url("bob")
    here = swapped(
        satune, world.one, tmp_path / "here", "--seat", "bob", "--with", world.new, *HANDOVER
    )
    for team in (world.one, world.two):
        out = tmp_path / team.parent.name
        there = swapped(satune, team, out, "--seat", "bob", "--with", f"host:{url}", *ANYHOW)
        assert there["swaps"][0]["method"] == "handover"
        assert figures(here) == figures(there)
        assert evidence(tmp_path / "here") == evidence(out)
        found = entry(out)
        assert (found["host"], found["host_token_env"]) == (url, TOKEN)
        assert found["digest"] == world.other.owner("bob").in_place
        assert "dir" not in found and not (out / "bob").exists()
    # The team that came of it is asked at the newcomer's owner.
    reports = []
    for out in (tmp_path / "here", tmp_path / "one", tmp_path / "two"):
        code, said, error = satune(
            "eval", out, "-k", "3", "--json", "--out", tmp_path / f"e{out.name}"
        )
        assert code == 0, error
        reports.append({k: v for k, v in json.loads(said).items() if k != "out"})
    assert reports[0] == reports[1] == reports[2]


@pytest.mark.slow  # a round of distillation plays 192 problems
def test_another_seat_beside_an_owners(world: World, satune: Run, tmp_path: Path) -> None:
    """It is projected too: the weights of this seat are here. The owner's seat stays."""
    url = world.there.url("bob")
    seat = ["--seat", "ann", "--with", world.new, "--delta", "50", "--rounds", "1"]
    seat += ["--method", "project"]
    here = swapped(satune, world.one, tmp_path / "here", *seat)
    moved = ["--agent-host", f"bob={url}"]
    there = swapped(satune, world.two, tmp_path / "there", *seat, *moved)
    assert here["verdict"] == "accepted" and figures(here) == figures(there)
    assert entry(tmp_path / "there") == entry(world.two) and entry(world.two)["host"] == url


def refused(satune: Run, *words: str | Path) -> str:
    code, _, said = satune("swap", *words)
    lines = [line for line in said.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1, said
    return lines[0]


def test_what_is_refused(
    world: World, satune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ["--out", tmp_path / "out"]
    bob = ["--seat", "bob", "--with"]
    url = world.other.url("bob")
    line = refused(satune, world.two, *bob, world.new, "--method", "project", *to)
    assert "--seat bob: is filled by a model whose weights are elsewhere" in line
    line = refused(satune, world.one, *bob, f"host:{url}", "--method", "project", *to)
    assert "its owner gives no weights, and a projection needs them" in line
    line = refused(satune, world.one.parent, *bob, f"host:{url}", *to)
    assert f"give {world.one}, of which a team comes" in line
    line = refused(satune, world.two.parent, *bob, world.new, *to)
    assert "agent bob lives with its owner" in line and f"give {world.two}, of" in line
    line = refused(satune, world.one, "--seat", "ann", "--with", f"host:{url}", *to)
    assert "keeps no agent 'ann'; there is bob" in line
    line = refused(satune, world.one, *bob, "host:http://127.0.0.1:9", *to)
    assert "agent bob: its host http://127.0.0.1:9 is lost" in line
    line = refused(satune, world.one, *bob, f"host:{url}=NO_SUCH", *to)
    assert "$NO_SUCH holds no token" in line
    line = refused(satune, world.two, *bob, world.new, "--agent-host", f"bob={url}", *to)
    assert "the team was saved with" in line  # it is another bob that lives there
    monkeypatch.setenv("SATUNE_STATE", str(tmp_path / "somebody"))
    line = refused(satune, world.two, *bob, world.new, *to, "--trust")
    assert f"--allow-address {world.there.url('bob')}={TOKEN}" in line
    assert not (tmp_path / "out").exists()


def test_how_a_host_is_named() -> None:
    assert host_in("host:http://a:1/b") == HostAddress("http://a:1/b", TOKEN)
    assert host_in("host:https://a=MINE") == HostAddress("https://a", "MINE")
    assert host_in("http://a/v1#m") is None and host_in("models/host") is None
    for text in ("host:", "host:a", "host:http://u:p@a", "host:http://a#m", "host:http://a?k=v"):
        with pytest.raises(UserError, match="a host is named by host:URL"):
            host_in(text)
