"""A team's directory: opened by Transformers and PEFT, by satune, and after a move."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from satune.agents.policy import Policy
from satune.agents.pretrained import AgentSpec, LoraSpec
from satune.agents.rendering import TemplateSettings
from satune.files.manifest import FORMAT
from satune.team import Team, build_team, load_team, manifest_of
from satune.tiny.tokenizers import llama_tokenizer, qwen3_tokenizer
from satune.types import UserError
from tiny_models import tiny_lm

IDS = torch.tensor([[9, 4, 200, 31, 7, 77]])
TOKENIZERS = {"qwen3": qwen3_tokenizer, "llama": llama_tokenizer}


def save_base(family: str, directory: Path, seed: int = 0) -> str:
    tokenizer = TOKENIZERS[family]()
    lm = tiny_lm(
        family,
        seed=seed,
        dtype=torch.float32,
        vocab=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=family == "qwen3",
    )
    # What a base brings along in its own settings must not reach the team.
    lm.generation_config.do_sample = True
    lm.generation_config.top_k = 20
    lm.generation_config.top_p = 0.9
    lm.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def shake(policy: Policy, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))


def separate_team(where: Path) -> Team:
    specs = [
        AgentSpec("writer", save_base("qwen3", where / "q"), 0.7, delta=0.02),
        AgentSpec("critic", save_base("llama", where / "l"), 1.2, TemplateSettings(names=False)),
    ]
    seats = {"one": "writer", "two": "critic", "three": "writer"}
    team = build_team(specs, seats, sharing="separate", device="cpu", task={"name": "relay"})
    for seed, policy in enumerate(team.policies.values()):
        shake(policy, seed)
    return team


def lora_team(where: Path, names: tuple[str, ...] = ("x", "y"), **options: Any) -> Team:
    base = save_base("qwen3", where / "base")
    lora = LoraSpec(rank=3, alpha=12.0)
    specs = [AgentSpec(n, base, 0.9, lora=lora) for n in names]
    team = build_team(specs, {n: n for n in names}, sharing="lora", device="cpu", **options)
    for seed, policy in enumerate(team.policies.values()):
        shake(policy, seed)
    return team


@torch.no_grad()
def logits(policy: Policy) -> Tensor:
    return policy.project(policy.hidden(IDS))


@torch.no_grad()
def hub_logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def assert_equal_teams(left: Team, right: Team, tolerance: float = 0.0) -> None:
    assert left.policies.keys() == right.policies.keys() and left.seats == right.seats
    for name, policy in left.policies.items():
        other = right.policies[name]
        assert torch.allclose(logits(policy), logits(other), rtol=0, atol=tolerance)
        assert policy.temperature == other.temperature and policy.eos_ids == other.eos_ids


def test_transformers_opens_every_agent(tmp_path):
    team = separate_team(tmp_path)
    team.save(tmp_path / "team")
    for name, policy in team.policies.items():
        directory = tmp_path / "team" / name
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert torch.equal(hub_logits(model), logits(policy))
        generation = model.generation_config
        assert generation.temperature == policy.temperature and generation.do_sample
        assert generation.top_p == 1.0 and not generation.top_k
        tokenizer = AutoTokenizer.from_pretrained(directory)
        text = "guess 1234"
        assert tokenizer(text)["input_ids"] == policy.tokenizer(text)["input_ids"]
        assert tokenizer.chat_template == policy.tokenizer.chat_template


def test_a_separate_team_comes_back(tmp_path):
    team = separate_team(tmp_path)
    team.save(tmp_path / "team")
    loaded = load_team(tmp_path / "team", device="cpu")
    assert_equal_teams(team, loaded)
    assert not loaded.specs["critic"].template.names
    assert loaded.specs["writer"].delta == 0.02 and loaded.task == {"name": "relay"}
    assert loaded.seats_of("writer") == ["one", "three"]
    # Saved again over itself, once the whole of it is written.
    shake(loaded.policies["writer"], 9)
    loaded.save(tmp_path / "team")
    assert_equal_teams(loaded, load_team(tmp_path / "team", device="cpu"))
    assert [p.name for p in tmp_path.glob("team*")] == ["team"]


def test_a_team_may_be_moved(tmp_path):
    for sharing, team in (
        ("separate", separate_team(tmp_path / "a")),
        ("lora", lora_team(tmp_path / "b")),
    ):
        team.save(tmp_path / "old" / sharing)
        (tmp_path / "new").mkdir(exist_ok=True)
        (tmp_path / "old" / sharing).rename(tmp_path / "new" / sharing)
    shutil.rmtree(tmp_path / "b" / "base")
    team = lora_team(tmp_path / "b")
    assert_equal_teams(team, load_team(tmp_path / "new" / "lora", device="cpu"))
    team = separate_team(tmp_path / "a")
    assert_equal_teams(team, load_team(tmp_path / "new" / "separate", device="cpu"))


@pytest.mark.parametrize("names", [("x", "y"), ("a", "lora"), ("model", "layers")])
def test_peft_opens_every_adapter(tmp_path, names):
    team = lora_team(tmp_path, names)
    first, second = (logits(policy) for policy in team.policies.values())
    assert not torch.allclose(first, second, atol=1e-2)
    team.save(tmp_path / "team")
    shutil.rmtree(tmp_path / "base")
    for name, policy in team.policies.items():
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "team" / name)
        assert torch.allclose(hub_logits(model), logits(policy), rtol=0, atol=1e-5)
    loaded = load_team(tmp_path / "team", device="cpu")
    assert_equal_teams(team, loaded)
    assert len({id(p.model) for p in loaded.policies.values()}) == 1  # one base in memory
    # And from there once more.
    loaded.save(tmp_path / "again")
    assert_equal_teams(team, load_team(tmp_path / "again", device="cpu"))


def test_a_team_says_which_of_its_models_are_the_hubs(tmp_path, monkeypatch):
    team = separate_team(tmp_path)
    monkeypatch.chdir(tmp_path)
    team.specs["critic"] = replace(team.specs["critic"], model="l")  # the same from here
    assert [team.entry(name)["base"] for name in team.specs] == [None, None]
    team.specs["writer"] = replace(team.specs["writer"], model="org/writer")
    team.save(tmp_path / "team")
    manifest = manifest_of(tmp_path / "team")
    held = {name: entry["base"] for name, entry in manifest["agents"].items()}
    assert held == {"writer": "org/writer", "critic": None}
    manifest["agents"]["critic"]["base"] = ["org/x"]
    (tmp_path / "team" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"agents\.critic: its base is no text"):
        manifest_of(tmp_path / "team")


def test_a_saved_agent_is_a_model_for_another_recipe(tmp_path):
    team = separate_team(tmp_path)
    team.save(tmp_path / "team")
    spec = AgentSpec("new", str(tmp_path / "team" / "critic"), 1.2)
    for sharing in ("separate", "lora"):
        other = build_team([spec], {"s": "new"}, sharing=sharing, device="cpu")
        # A fresh adapter changes nothing yet.
        assert torch.equal(logits(other.policies["new"]), logits(team.policies["critic"]))


@pytest.mark.parametrize("lora", [None, LoraSpec(3, 12.0)])
@pytest.mark.parametrize("sharing", ["separate", "lora"])
def test_a_saved_adapter_is_a_model_for_another_recipe(tmp_path, sharing, lora):
    # Rank 3 and alpha 12 are the adapter's own; a recipe need not repeat them.
    team = lora_team(tmp_path)
    team.save(tmp_path / "team")
    spec = AgentSpec("new", str(tmp_path / "team" / "y"), 0.9, lora=lora)
    other = build_team([spec], {"s": "new"}, sharing=sharing, device="cpu")
    policy = other.policies["new"]
    assert torch.allclose(logits(policy), logits(team.policies["y"]), rtol=0, atol=1e-5)
    other.save(tmp_path / "other")
    assert_equal_teams(other, load_team(tmp_path / "other", device="cpu"))


def test_an_adapter_of_another_rank_is_refused(tmp_path):
    team = lora_team(tmp_path)
    team.save(tmp_path / "team")
    spec = AgentSpec("new", str(tmp_path / "team" / "y"), lora=LoraSpec(rank=8, alpha=12.0))
    with pytest.raises(UserError, match=r"agent new: .*rank 3"):
        build_team([spec], {"s": "new"}, sharing="lora", device="cpu")


def test_a_bfloat16_base_under_float32_adapters(tmp_path):
    team = lora_team(tmp_path, dtype="bfloat16")
    policy = team.policies["x"]
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    assert policy.head.weight.dtype == torch.bfloat16 and logits(policy).dtype == torch.float32
    team.save(tmp_path / "team")
    assert_equal_teams(team, load_team(tmp_path / "team", dtype="bfloat16", device="cpu"))
    # The base on disk is still the float32 one it was.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "team" / "base-0")
    assert base.dtype == torch.float32


def test_the_manifest(tmp_path):
    separate_team(tmp_path).save(tmp_path / "team")
    manifest = manifest_of(tmp_path / "team")
    assert manifest["seats"] == {"one": "writer", "two": "critic", "three": "writer"}
    assert manifest["agents"]["writer"]["dir"] == "writer"
    assert manifest["agents"]["writer"]["temperature"] == 0.7
    assert manifest["agents"]["critic"]["sharing"] == "separate"
    path = tmp_path / "team" / "manifest.json"
    path.write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="format 99, this satune reads 1"):
        manifest_of(tmp_path / "team")
    path.write_text('{"format": 1,\n "seats": }')
    with pytest.raises(UserError, match=r"manifest.json:2: damaged JSON"):
        manifest_of(tmp_path / "team")
    with pytest.raises(UserError, match="not a team directory"):
        manifest_of(tmp_path)


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ("org/name", "served is not http://ADDRESS/v1#MODEL"),
        ("http://host/v1", "a model at host: give http://ADDRESS/v1#MODEL"),
        ("http://u:pw@host/v1#m", "a model at host: its address holds a key or a query"),
    ],
)
def test_a_served_model_that_is_none_is_a_fault_of_the_manifest(tmp_path, written, fault):
    agent = {"served": written, "temperature": 1.0, "template": {}, "sharing": "separate"}
    manifest = {"format": FORMAT, "seats": {"one": "ann"}, "protocol": {}, "task": {}}
    manifest["agents"] = {"ann": {**agent, "delta": None}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        manifest_of(tmp_path)
    path = tmp_path / "manifest.json"
    assert str(caught.value).startswith(f"{path}: damaged manifest (agents.ann: {fault}")
