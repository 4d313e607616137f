"""Architectures in the local engine: what it samples has the probability that the model says."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from satune.agents.learner import LocalLearner, OptimizerSettings
from satune.agents.packing import pack
from satune.agents.policy import Policy
from satune.engines.local import LocalEngine
from satune.types import Completion, Key, Prompt, Sampling, UserError, ids_of
from tiny_models import Letters, completion_logprobs, tiny_policy, turn

SIZES: dict[str, Any] = {
    "vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
    "head_dim": 4, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": 0, "initializer_range": 0.3, "tie_word_embeddings": False,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 24}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "head_dim": 8, "intermediate_size": 24,
}  # fmt: skip
# Windows and chunks of 8: the longest conversations below are several times as long.
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": GROUPED | {"sliding_window": 8},
    "gemma3_text": GROUPED | {"sliding_window": 8,
                              "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "gpt_oss": GROUPED | EXPERTS | {"sliding_window": 8},
    "llama4_text": GROUPED | EXPERTS | {"attention_chunk_size": 8, "intermediate_size_mlp": 24},
    "bloom": {"n_head": 4, "n_layer": 4},
    "mpt": {"d_model": 16, "n_heads": 4, "n_layers": 4, "max_seq_len": 128},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "window_size": 8,
                "attention_types": [[["global", "local"], 2]]},
    "xglm": {"d_model": 16, "num_layers": 4, "attention_heads": 4, "ffn_dim": 24},
    "falcon": {}, "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16}, "phi": GROUPED,
    "deepseek_v3": LATENT, "mixtral": GROUPED | EXPERTS, "olmo2": GROUPED, "starcoder2": GROUPED,
}  # fmt: skip


def policy_of(model_type: str, attention: str | None = None, **changes: Any) -> Policy:
    kind = CONFIG_MAPPING[model_type]
    aliases = getattr(kind, "attribute_map", {})
    given = {
        name: value
        for name, value in SIZES.items()
        if name not in aliases and not isinstance(getattr(kind, name, None), property)
    }
    config = AutoConfig.for_model(model_type, **given | changes)
    torch.manual_seed(0)
    options = {"attn_implementation": attention} if attention else {}
    return Policy("a", AutoModelForCausalLM.from_config(config, **options), Letters(), 1.0)


def written(completion: Completion) -> list[int]:
    assert completion.ids is not None
    return [int(each) for each in completion.ids]


def logprobs(completion: Completion) -> list[float]:
    assert completion.logprobs is not None
    return [float(each) for each in completion.logprobs]


def play(policy: Policy) -> list[list[tuple[tuple[int, ...], Completion]]]:
    """Twelve conversations of two turns over prompts of 1 to 30 tokens, six rows at a time."""
    engine = LocalEngine({"a": policy}, {"a": "a"}, max_rows=6)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 13, (n,), generator=generator).tolist() for n in (1, 3, 17, 30, 5)]
    keys = [Key(0, "train").at(problem=f"p{i % 5}", sample=i, seat="a") for i in range(12)]

    async def one(index: int) -> list[tuple[tuple[int, ...], Completion]]:
        said: list[tuple[tuple[int, ...], Completion]] = []
        ids = tuple(prompts[index % 5])
        for own in range(2):
            key = keys[index].at(own_index=own)
            completion = await engine.generate("a", Prompt((), ids_of(ids)), Sampling(10), key)
            said.append((ids, completion))
            ids = (*ids, *written(completion), 5, 6)
        engine.end(keys[index])
        return said

    async def everyone() -> Any:
        for key in keys:
            engine.begin(key)
        return await asyncio.gather(*(one(index) for index in range(12)))

    return asyncio.run(asyncio.wait_for(everyone(), 600))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_engine_and_learner_are_the_whole_model(model_type):
    policy = policy_of(model_type, **FAMILIES[model_type])
    conversations = play(policy)
    for ids, completion in itertools.chain(*conversations):
        expected = completion_logprobs(policy, ids, written(completion))
        sampled = torch.tensor(logprobs(completion))
        assert torch.allclose(sampled, expected, atol=1e-4), (model_type, len(ids))
    packed = pack([[turn(ids, written(c)) for ids, c in said] for said in conversations])
    scored = LocalLearner(policy, OptimizerSettings()).score(packed)
    sampled = torch.tensor([x for said in conversations for _, c in said for x in logprobs(c)])
    assert torch.allclose(scored, sampled, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gemma3_text", "mixtral", "llama4_text", "qwen3"])
def test_attention_makes_no_other_policy(model_type):
    changes = FAMILIES.get(model_type, GROUPED)
    said = [play(policy_of(model_type, attention, **changes)) for attention in ("sdpa", "eager")]
    for one, other in zip(*said, strict=True):
        for (_, first), (_, second) in zip(one, other, strict=True):
            assert written(first) == written(second)
            assert torch.allclose(*(torch.tensor(logprobs(c)) for c in (first, second)), atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("bart", {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 4,
                  "encoder_layers": 1, "decoder_ffn_dim": 24, "is_decoder": True},
         "another model in a batch of rows of different length"),
        ("openai-gpt", {"n_embd": 16, "n_layer": 2, "n_head": 4}, "does not decode in a batch"),
        ("mamba", {"state_size": 4}, "attention layers only"),
        ("falcon", {"alibi": True}, "does not decode in a batch"),
    ],
)  # fmt: skip
def test_what_it_cannot_serve_is_refused_in_one_line(model_type, changes, reason):
    policy = policy_of(model_type, **changes)
    with pytest.raises(UserError, match=rf"agent a: .*{reason}.*choose another model") as caught:
        LocalEngine({"a": policy}, {"a": "a"})
    assert "\n" not in str(caught.value)


def test_a_model_that_counts_positions_on_its_own_is_refused():
    policy = tiny_policy()
    hidden = policy.hidden

    def from_the_end(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("cache") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].amax(0, keepdim=True)
        return hidden(input_ids, **kwargs)

    policy.hidden = from_the_end  # type: ignore[method-assign]
    with pytest.raises(UserError, match="rows of different length"):
        LocalEngine({"a": policy}, {"a": "a"})
