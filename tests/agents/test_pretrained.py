"""Models and adapters from disk: what is loaded is what transformers and PEFT make of the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from devices import Devices
from satune.agents.policy import Policy
from satune.agents.pretrained import AgentSpec, LoraSpec, Precision, load_policies
from satune.tiny.tokenizers import llama_tokenizer
from satune.types import UserError
from tiny_models import tiny_lm

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def load(spec: AgentSpec) -> Policy:
    precision, options = Precision.of("float32"), {"device": "cpu", "seed": 0}
    return load_policies([spec], shared_base=False, precision=precision, **options)[spec.name]  # type: ignore[arg-type]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[0]


def policy_logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.project(policy.hidden(IDS)[0])


def saved_model(where: Path, model: Any) -> str:
    model.float().save_pretrained(where)
    llama_tokenizer().save_pretrained(where)
    return str(where)


def saved_adapter(where: Path, base: str, config: Any) -> torch.Tensor:
    """Write an adapter far from zero; PEFT's own logits with it."""
    torch.manual_seed(0)
    peft: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(where)
    llama_tokenizer().save_pretrained(where)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), where)
    return logits(again.eval())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "adapted",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_an_adapter_is_merged_to_what_peft_makes_of_it(tmp_path, tied, adapted):
    base = saved_model(tmp_path / "base", tiny_lm("qwen3", tie_word_embeddings=tied))
    config = LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **adapted)
    expected = saved_adapter(tmp_path / "adapter", base, config)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1)
    policy = load(AgentSpec("a", str(tmp_path / "adapter")))
    assert torch.allclose(policy_logits(policy), expected, atol=1e-4)
    # What is saved is the merged model, also where its head no longer is the embedding.
    policy.model.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(again), expected, atol=1e-4)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "q_proj"])
def test_beside_the_weights_it_is_the_same(tmp_path, target):
    base = saved_model(tmp_path / "base", tiny_lm("qwen3", tie_word_embeddings=True))
    config = LoraConfig(r=2, lora_alpha=8, target_modules=[target], task_type="CAUSAL_LM")
    expected = saved_adapter(tmp_path / "adapter", base, config)
    policy = load(AgentSpec("a", str(tmp_path / "adapter"), lora=LoraSpec(2, 8.0)))
    assert torch.allclose(policy_logits(policy), expected, atol=1e-4)


def test_a_merge_that_is_another_model_is_refused(tmp_path, monkeypatch):
    base = saved_model(tmp_path / "base", tiny_lm("qwen3"))
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    saved_adapter(tmp_path / "adapter", base, config)
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(UserError, match=r"agent a: merged into the weights, .* lora block"):
        load(AgentSpec("a", str(tmp_path / "adapter")))


def test_adapters_of_one_base_lie_on_one_device(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base", tiny_lm("qwen3"))
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    saved_adapter(tmp_path / "adapter", base, config)
    ann = AgentSpec("ann", base, device="cuda:1")
    saved = str(tmp_path / "adapter")  # whose name says nothing of its base
    options: Any = {"precision": Precision.of("float32"), "device": "cuda:0", "seed": 0}
    with Devices():
        specs = [ann, AgentSpec("bob", saved, device="cuda:1")]
        found = load_policies(specs, shared_base=True, **options)
        assert found["ann"].model is found["bob"].model
        assert {str(t.device) for p in found.values() for t in p.export().values()} == {"cuda:1"}
        with pytest.raises(UserError) as caught:
            load_policies([ann, AgentSpec("bob", saved)], shared_base=True, **options)
        said = str(caught.value)
        assert said.startswith("team.agents.bob.device: cuda:0 is not where the base lies that it")
        assert "with ann (cuda:1)" in said and "\n" not in said
        # With a base each they are free to.
        apart = load_policies([ann, AgentSpec("bob", saved)], shared_base=False, **options)
        assert [str(policy.device) for policy in apart.values()] == ["cuda:1", "cuda:0"]


def test_a_device_that_is_not_there_is_named_by_its_key(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base", tiny_lm("qwen3"))
    options: Any = {"shared_base": False, "precision": Precision.of("float32"), "seed": 0}
    for spec, device, key in (
        (AgentSpec("ann", base, device="gpu7"), "cpu", "team.agents.ann.device: 'gpu7'"),
        (AgentSpec("ann", base), "gpu7", "team.device: 'gpu7'"),
    ):
        with pytest.raises(UserError, match=f"^{key} cannot be used .* give auto, cpu or cuda:N$"):
            load_policies([spec], device=device, **options)
    # Nobody lies where the team would.
    found = load_policies([AgentSpec("ann", base, device="cpu")], device="gpu7", **options)
    assert found["ann"].device.type == "cpu"


@pytest.mark.parametrize("lora", [None, LoraSpec(2, 8.0)])
def test_adapters_that_are_not_opened(tmp_path, lora):
    base = saved_model(tmp_path / "base", tiny_lm("qwen3"))
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    saved_adapter(tmp_path / "adapter", base, config)
    spec = AgentSpec("a", str(tmp_path / "adapter"), lora=lora)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"agent a: .*adapter has no .*\(\.bin\) are not opened"):
        load(spec)
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="names no base model"):
        load(spec)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json: damaged JSON"):
        load(spec)


@pytest.mark.parametrize("lora", [None, LoraSpec(2, 8.0)])
def test_an_adapter_that_changes_no_weights_is_refused(tmp_path, lora):
    base = saved_model(tmp_path / "base", tiny_lm("qwen3"))
    config = PromptTuningConfig(TaskType.CAUSAL_LM, num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(
        str(tmp_path / "adapter")
    )
    with pytest.raises(UserError, match=r"agent a: the adapter in .* is of type PROMPT_TUNING"):
        load(AgentSpec("a", str(tmp_path / "adapter"), lora=lora))


def small(model_type: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.5,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings, **changes))


def test_attention_is_what_the_model_says_or_what_is_asked(tmp_path):
    where = saved_model(tmp_path / "llama", tiny_lm("llama"))
    own = load(AgentSpec("a", where))
    assert own.config._attn_implementation == "sdpa"
    asked = load(AgentSpec("a", where, attention="eager"))
    assert asked.config._attn_implementation == "eager"
    assert torch.allclose(policy_logits(own), policy_logits(asked), atol=1e-4)
    where = saved_model(tmp_path / "oss", small("gpt_oss", num_local_experts=4))
    assert load(AgentSpec("a", where)).config._attn_implementation == "eager"


def test_attention_that_the_model_does_not_have_is_one_line(tmp_path):
    where = saved_model(tmp_path / "bloom", small("bloom"))
    with pytest.raises(
        UserError, match=r"agent a: cannot load .*bloom.*leave attention out"
    ) as caught:
        load(AgentSpec("a", where, attention="sdpa"))
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_utf_8_is_one_line(tmp_path):
    where = saved_model(tmp_path / "model", tiny_lm("llama"))
    odd = str(tmp_path / "odd\udcff")
    shutil.copytree(where, odd)
    with pytest.raises(UserError, match=r"odd\\udcff.*not UTF-8; rename it") as caught:
        load(AgentSpec("a", odd))
    str(caught.value).encode()  # it can be printed


def test_an_adapters_base_beside_it_goes_before_where_it_lay(tmp_path):
    base = saved_model(tmp_path / "base", tiny_lm("qwen3"))
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    expected = saved_adapter(tmp_path / "adapter", base, config)
    path = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(path.read_text()) | {"base_model_name_or_path": "/elsewhere/base"}
    path.write_text(json.dumps(said))
    assert torch.allclose(
        policy_logits(load(AgentSpec("a", str(tmp_path / "adapter")))), expected, atol=1e-4
    )
