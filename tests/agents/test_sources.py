"""GGUF files against the models they were written from, and names that leave a model open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from satune.agents import sources
from satune.agents.architectures import configuration
from satune.agents.policy import Policy
from satune.agents.pretrained import AgentSpec, LoraSpec
from satune.agents.sources import convert, source_of
from satune.team import build_team, load_team
from satune.types import UserError
from tiny_models import tiny_config

gguf = pytest.importorskip("gguf")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    *(chr(97 + n) for n in range(26)),
    "Ġ",
    "Ġa",
    "ab",
    "<|endoftext|>",
]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
# llama.cpp's names of the parts of a layer, and whether its rotary halves lie side by side there.
PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    config = tiny_config("llama", vocab=len(WORDS), bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(config).float().eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A query's or key's rows as llama.cpp rotates them: pairs that lie side by side."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def write_gguf(model: Any, path: Path, kind: Any = None) -> None:
    """A GGUF file of a Llama, matrices quantised to ``kind`` (None: float32)."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 4), 3])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def add(name: str, weight: torch.Tensor) -> None:
        values = weight.detach().numpy().astype(np.float32)
        if kind is None or values.ndim == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd", model.model.embed_tokens.weight)
    add("output_norm", model.model.norm.weight)
    add("output", model.lm_head.weight)
    for number, layer in enumerate(model.model.layers):
        for ours, theirs in PARTS.items():
            weight = layer.get_submodule(ours).weight
            if theirs in heads:
                weight = interleaved(weight, heads[theirs])
            add(f"blk.{number}.{theirs}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    write_gguf(llama(), tmp_path / "files" / "small.gguf")
    return tmp_path / "files" / "small.gguf"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[0]


def team_of(model: Path, **options: Any) -> Any:
    spec = AgentSpec("a", str(model), **options)
    return build_team([spec], {"seat": "a"}, sharing="separate", device="cpu")


@pytest.mark.parametrize("named", ["file", "directory"])
def test_a_gguf_file_is_the_model_it_was_written_from(file, named):
    team = team_of(file if named == "file" else file.parent)
    policy: Policy = team.policies["a"]
    assert torch.allclose(logits(policy.model), logits(llama()), atol=1e-5)
    tokenizer = policy.tokenizer
    assert tokenizer("ab a").input_ids[-2:] == [WORDS.index("ab"), WORDS.index("Ġa")]
    assert tokenizer.chat_template == TEMPLATE and policy.eos_ids == {2}


def test_quantised_weights_are_widened_and_trained(file):
    write_gguf_to = file.with_name("rounded.gguf")
    config = tiny_config("llama", vocab=len(WORDS), bos_token_id=1, eos_token_id=2,
                         hidden_size=64, intermediate_size=64, head_dim=32)  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).float().eval()
    write_gguf(model, write_gguf_to, gguf.GGMLQuantizationType.Q8_0)
    policy = team_of(write_gguf_to).policies["a"]
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    # Q8_0 keeps blocks of 32 numbers to 1/127 of the largest, half of that off at the most.
    for ours, theirs in zip(policy.model.parameters(), model.parameters(), strict=True):
        assert float((ours - theirs).abs().max()) <= float(theirs.abs().max()) / 127 * 0.51
    assert not torch.equal(policy.model.lm_head.weight, model.lm_head.weight)


def test_a_team_from_a_gguf_file_is_saved_as_any_other(file, tmp_path):
    team_of(file).save(tmp_path / "team")
    saved = tmp_path / "team" / "a"
    assert "quantization_config" not in AutoConfig.from_pretrained(saved).to_dict()
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.allclose(logits(again), logits(llama()), atol=1e-5)


def test_an_adapter_on_a_gguf_base_goes_along_with_a_base_that_peft_reads(file, tmp_path):
    from peft import AutoPeftModelForCausalLM

    team = team_of(file, lora=LoraSpec(2, 4.0))
    torch.manual_seed(0)
    for parameter in team.policies["a"].trainable().values():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = logits(team.policies["a"].model)
    team.save(tmp_path / "team")
    file.unlink()
    policy = load_team(tmp_path / "team", device="cpu").policies["a"]
    assert torch.allclose(logits(policy.model), expected, atol=1e-5)
    peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "team" / "a")
    assert torch.allclose(logits(peft), expected, atol=1e-5)


def test_converted_it_is_a_directory_as_from_a_hub(file, tmp_path):
    convert(source_of(str(file)), tmp_path / "model")
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(llama()), atol=1e-5
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "</s>"


def test_its_size_is_known_without_its_weights(file):
    config: Any = configuration(str(file))
    assert (config.num_hidden_layers, config.hidden_size) == (2, 16)


def test_names_that_leave_the_model_open(file, tmp_path, monkeypatch):
    assert source_of("somebody/some-model").gguf is None
    with pytest.raises(UserError, match=r"did you mean .*small\.gguf"):
        source_of(str(file.with_name("smal.gguf")))
    with pytest.raises(UserError, match=r"nowhere.gguf: no such file"):
        source_of("nowhere.gguf")
    (file.parent / "other.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(other.gguf, small.gguf\); name one"):
        source_of(str(file.parent))
    (file.parent / "model.safetensors").write_bytes(b"")
    assert source_of(str(file.parent)).gguf is None
    with pytest.raises(UserError, match=r"agent a: cannot load model .*other.gguf") as caught:
        team_of(file.with_name("other.gguf"))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'satune\[gguf\]'"):
        team_of(file)
