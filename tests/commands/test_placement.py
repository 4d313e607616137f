"""Where everything of a recipe lies, as ``satune describe`` says it."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny_world
from command_line import Run
from satune.agents import memory as free
from satune.cli.describe import place_lines
from satune.commands.assemble import assemble
from satune.commands.describe import bytes_text, describe_recipe
from satune.config.load import load_recipe
from satune.engines.vllm import server as servers
from satune.engines.vllm.server import Server

PLAIN = ("engine=vllm", "engine={name: vllm, memory: 1073741824}")
APART = ["team.agents.ann.device=cuda:0", "team.agents.bob.device=cuda:1"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"), ("ann", "bob", "eve"))


def described(recipe: Path, *overrides: str) -> dict[str, Any]:
    return describe_recipe(load_recipe(recipe, overrides))


def test_what_a_device_is_asked_to_hold(recipe: Path) -> None:
    found = described(
        recipe, *APART, "team.agents.eve.device=cuda:1", "team.agents.eve.frozen=true"
    )
    size = found["agents"]["ann"]["parameters"]
    assert found["places"]["agents"] == {
        "ann": {"device": "cuda:0"}, "bob": {"device": "cuda:1"}, "eve": {"device": "cuda:1"},
    }  # fmt: skip
    # float32; a step: gradients, two moments, anchor and proposal.
    assert found["places"]["devices"] == {
        "cuda:0": {"agents": ["ann"], "all_weights": 4 * size, "largest_step": 20 * size,
                   "together": 24 * size},
        "cuda:1": {"agents": ["bob", "eve"], "all_weights": 8 * size, "largest_step": 20 * size,
                   "together": 28 * size},
    }  # fmt: skip
    assert found["memory"] == {
        "all_weights": 12 * size, "largest_step": 20 * size, "together": 32 * size,
    }  # fmt: skip
    said = "devices of 80 GB, of which cuda:1 is the fullest: fits, 74.5 GiB left for activations"
    assert found["fit"].startswith(said) and found["fit"].endswith("tokens of every agent there")
    assert place_lines(found["places"]) == [
        f"on cuda:0: ann, {24 * size / 1024:.1f} KiB of weights and the largest step",
        f"on cuda:1: bob, eve, {28 * size / 1024:.1f} KiB of weights and the largest step",
    ]


def test_critics_and_copies_lie_with_their_agents(recipe: Path) -> None:
    plain = described(recipe, *APART)["places"]["devices"]
    critics = ["credit=gae", "critic.kind=model"]
    critic = described(recipe, *APART, *critics)["places"]["devices"]
    found = described(recipe, *APART, *critics)["agents"]["bob"]["critic"]["memory"]
    grown = critic["cuda:1"]["together"] - plain["cuda:1"]["together"]
    assert grown == found["weights"] + found["step"]
    ahead = ["schedule=reuse", "rollout.ahead=1", "team.agents.ann.frozen=true"]
    copied = described(recipe, *APART, *ahead)["places"]["devices"]
    assert copied["cuda:1"]["all_weights"] == 2 * plain["cuda:1"]["all_weights"]
    assert copied["cuda:0"]["all_weights"] == plain["cuda:0"]["all_weights"]


def test_a_base_is_copied_whoever_brings_it(recipe: Path) -> None:
    """The first agent of a base is frozen, and the copy that is drawn with has the base too."""
    one, other = (str(recipe.parent / f"model-{n}") for n in (0, 1))

    def team(ann: bool, bob: bool, eve: bool) -> list[str]:
        agents = {
            "ann": {"model": one, "frozen": ann},
            "bob": {"model": one, "frozen": bob},
            "eve": {"model": other, "frozen": eve},
        }
        return [f"team.agents={json.dumps(agents)}", "team.sharing=lora", "schedule=reuse"]

    def weights(*overrides: str) -> int:
        return described(recipe, *overrides)["memory"]["all_weights"]

    learns = team(True, False, True)
    eve = described(recipe, *learns)["agents"]["eve"]["memory"]["weights"]
    ahead = load_recipe(recipe, [*learns, "rollout.ahead=1"])
    found = describe_recipe(ahead)["memory"]["all_weights"]
    assert found == 2 * (weights(*learns) - eve) + eve
    # What is there in truth, each model once.
    cast = assemble(ahead, apart=True)
    models = {id(p.model): p.model for p in (*cast.team.policies.values(), *cast.copies.values())}
    assert found == sum(t.nbytes for model in models.values() for t in model.parameters())
    # A base on which nobody learns is not copied.
    still = team(True, True, False)
    assert weights(*still, "rollout.ahead=1") == weights(*still) + eve


@pytest.mark.parametrize("devices", ([], [2], [2, 3], [2, 2, 3]))
@pytest.mark.parametrize("memory", (0.6, 5e8))
@pytest.mark.parametrize("sharing", ("separate", "lora"))
def test_servers_are_told_what_they_are_started_with(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    devices: list[int],
    memory: float,
    sharing: str,
) -> None:
    """Of the memory of each server; with adapters two of the agents have one."""
    monkeypatch.setenv(servers.PYTHON, sys.executable)
    began: list[dict[str, str]] = []

    def launch(server: Server, words: Sequence[str], log: Path, own: Mapping[str, str]) -> None:
        server.starts += 1
        began.append({**dict(itertools.pairwise(words)), **own})

    monkeypatch.setattr(Server, "launch", launch)
    monkeypatch.setattr(Server, "wait", lambda server: None)
    monkeypatch.setattr(free, "free_bytes", lambda device: 6 * 10**9)
    engine = f"engine={{name: vllm, devices: {devices}, memory: {memory}}}"
    base = f"team.agents.eve.model={recipe.parent / 'model-0'}"
    loaded = load_recipe(recipe, [engine, f"team.sharing={sharing}", base])
    made: Any = assemble(loaded).engine
    made._launch_all()
    told = describe_recipe(loaded)["places"]["agents"]
    assert len(began) == (2 if sharing == "lora" else 3)
    for agent in ("ann", "bob", "eve"):
        server = told[agent]["server"]
        words = began[server["number"]]
        if devices and memory <= 1:
            assert words["--gpu-memory-utilization"] == str(server["memory"])
        else:
            taken = server["memory"] if memory > 1 else server["memory"] * 6 * 10**9
            assert int(words["--kv-cache-memory-bytes"]) == pytest.approx(taken, abs=1)
        assert words.get("CUDA_VISIBLE_DEVICES") == server.get("device")


def test_servers_and_owners(recipe: Path) -> None:
    vllm = "engine={name: vllm, devices: [2, 3]}"
    places = described(recipe, vllm)["places"]
    assert [a["server"] for a in places["agents"].values()] == [
        {"number": 0, "device": "2", "memory": 0.125},
        {"number": 1, "device": "3", "memory": 0.25},
        {"number": 2, "device": "2", "memory": 0.125},
    ]
    base = [f"team.agents.{n}.model={recipe.parent / 'model-0'}" for n in ("bob", "eve")]
    places = described(recipe, vllm, "team.sharing=lora", *base)["places"]
    assert place_lines(places) == [
        "on cpu: ann, bob, eve",
        "vLLM server 0 on CUDA device 2, 25% of its memory: ann, bob, eve",
    ]
    given = "engine={name: vllm, servers: ['http://a:1', 'http://b:1', 'http://c:1']}"
    assert place_lines(described(recipe, given)["places"])[1:] == [
        "vLLM server 0 at http://a:1: ann",
        "vLLM server 1 at http://b:1: bob",
        "vLLM server 2 at http://c:1: eve",
    ]
    assert [place_lines(described(recipe, each)["places"])[1] for each in PLAIN] == [
        "vLLM server 0, 8.33% of the memory: ann",
        "vLLM server 0, 1.0 GiB of keys and values: ann",
    ]
    away = [
        "team.agents.bob.host=https://there", "team.agents.bob.device=cuda:5",
        "team.agents.eve={model: 'http://served/v1#M', frozen: true}",
    ]  # fmt: skip
    places = described(recipe, *away)["places"]
    assert places["agents"]["bob"] == {"host": "https://there"}
    assert place_lines(places) == [
        "on cpu: ann", "with its owner, at https://there: bob", "served at http://served/v1: eve",
    ]  # fmt: skip


def test_with_sharding_everything_lies_everywhere(recipe: Path) -> None:
    places = described(recipe, "sharding={}")["places"]
    assert places["devices"] == {} and places["agents"]["ann"] == {"processes": "all"}
    assert place_lines(places) == ["cut over all processes: ann, bob, eve"]


def test_a_size_that_is_not_known_is_not_summed(recipe: Path) -> None:
    found = described(recipe, *APART, "team.agents.bob.model=somebody/some-model")
    assert found["places"]["devices"]["cuda:1"] == {"agents": ["bob"]}
    assert found["places"]["devices"]["cuda:0"]["together"] > 0 and found["memory"] == {}
    assert place_lines(found["places"])[1].startswith("on cuda:1: bob, not known here of weights")


def test_the_tensors_of_a_stage_are_told_by_device(satune: Run, tmp_path: Path) -> None:
    two = tiny_world.build(tmp_path)
    small = ["rollout={problems: 1, samples: 2, max_new_tokens: 4}", "optimizer.mini_batches=1"]
    still = [*small, *APART, "team.agents.bob.frozen=true"]
    code, out, err = satune("describe", two, *still, "--json")
    assert code == 0, err
    told = json.loads(out)
    peaks = {device: there["peak"] for device, there in told["places"]["devices"].items()}
    # Who learns takes what a step takes; who does not, what it is read and decoded with.
    assert told["peak"]["peak"] == peaks["cuda:0"] > peaks["cuda:1"]
    assert told["peak"]["rollout"] == peaks["cuda:1"]
    _, out, _ = satune("describe", two, *still)
    most = bytes_text(peaks["cuda:0"])
    assert f"tensors of a stage on the fullest device: at most {most} at once" in out
    assert f" of weights and the largest step, at most {most} of tensors\n" in out
