"""The team of a run whose agents were trained by hosts of one's own is the one that one process
would have written, file by file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import tiny_world
from owners import alone, owners
from satune.commands.gather import gather
from satune.config.load import load_recipe
from satune.loading import LAUNCH_VARIABLE
from satune.team import load_team
from satune.training.run_directory import RunDirectory


def files(team: Path) -> dict[str, bytes]:
    """What lies in a team directory, which is called TEAM where it is named."""
    name = str(team.resolve()).encode()
    return {
        str(path.relative_to(team)): _in_order(path).replace(name, b"TEAM")
        for path in team.rglob("*")
        if path.is_file()
    }


def _in_order(path: Path) -> bytes:
    """The content of a file. PEFT writes a set, which has no order, into one of them."""
    if path.name != "adapter_config.json":
        return path.read_bytes()
    config = json.loads(path.read_text())
    return json.dumps(config | {"target_modules": sorted(config["target_modules"])}).encode()


@pytest.mark.parametrize(
    ("agents", "hosted", "overrides"),
    [
        (["ann", "bob"], ["ann", "bob"], []),
        # An adapter that is trained elsewhere rests on the base of one that stayed in the run.
        (
            ["cat", "ann", "bob"],
            ["ann", "bob"],
            [
                "team.sharing=lora",
                "team.agents.cat.frozen=true",
                "team.agents.bob.model={}/model-0",
            ],
        ),
        (["ann", "bob"], ["ann", "bob"], ["credit=gae", "critic={{kind: head}}"]),
    ],
    ids=["weights of their own", "adapters", "critics"],
)
def test_the_team_is_that_of_one_process(
    agents: Sequence[str],
    hosted: Sequence[str],
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny_world.build(tmp_path / "world", agents)
    overrides = ["stages=1", *(each.format(recipe.parent) for each in overrides)]
    run = RunDirectory(tmp_path / "run")
    monkeypatch.setenv(LAUNCH_VARIABLE, "the owners' word")
    tokens = [f"team.agents.{agent}.host_token_env={LAUNCH_VARIABLE}" for agent in hosted]
    with owners(recipe, run.hosts, hosted, [*overrides, *tokens]) as there:
        there.train(run.path)
    kept = files(run.hosts)
    loaded = load_recipe(recipe, overrides)
    gather(run, loaded)

    one = alone(recipe, tmp_path / "one", *overrides).directory.team
    assert files(run.team) == files(one)
    assert files(run.hosts) == kept  # what is linked was not written into
    assert run.unfinished() is None
    # Nothing of it is loaded from elsewhere.
    (run.hosts).rename(tmp_path / "away")
    mine, theirs = load_team(run.team), load_team(one)
    for agent, policy in mine.policies.items():
        assert tiny_world.same(dict(policy.export()), dict(theirs.policies[agent].export()))
    before = {path: path.stat().st_mtime_ns for path in run.team.rglob("*")}
    gather(run, loaded)  # once more finds nothing to do
    assert {path: path.stat().st_mtime_ns for path in run.team.rglob("*")} == before


def test_a_reference_to_another_owner_stays(tmp_path: Path) -> None:
    recipe = load_recipe(tiny_world.build(tmp_path / "world"))
    run = RunDirectory(tmp_path / "run")
    run.team.mkdir(parents=True)
    entry = {"temperature": 1.0, "template": {}, "sharing": "separate", "delta": None}
    far = entry | {"host": "https://far.example", "host_token_env": "FAR", "digest": "d"}
    manifest = {
        "format": 1, "seats": {"ann": "ann", "bob": "bob"}, "agents": {"ann": far, "bob": far},
        "protocol": {}, "task": {},
    }  # fmt: skip
    (run.team / "manifest.json").write_text(json.dumps(manifest))
    ours = dict(far, host_token_env=LAUNCH_VARIABLE)
    gather(run, recipe)
    assert json.loads((run.team / "manifest.json").read_text()) == manifest
    (run.team / "manifest.json").write_text(
        json.dumps(manifest | {"agents": {"ann": far, "bob": ours}})
    )
    saved = run.hosts / "bob" / "agent" / "bob"
    saved.mkdir(parents=True)
    (saved / "model.safetensors").write_bytes(b"weights")
    gather(run, recipe)
    found = json.loads((run.team / "manifest.json").read_text())["agents"]
    assert found == {"ann": far, "bob": {"dir": "bob", "base": None, **entry}}
    assert (run.team / "bob" / "model.safetensors").read_bytes() == b"weights"
