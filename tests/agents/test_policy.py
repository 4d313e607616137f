"""A policy against the whole Hugging Face model it is made of."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from satune.agents.merging import merged
from satune.agents.policy import Policy
from satune.types import UserError
from tiny_models import EOS, Letters, tiny_lm, tiny_policy

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 0, 0, 0, 0]])


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "gpt2", "gpt_neox"])
def test_states_and_head_are_the_whole_model(family):
    policy = tiny_policy(family=family)
    expected = policy.model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(policy.project(policy.hidden(IDS)), expected)
    # Causality hides the padding on the right: the second row alone gives the same.
    alone = policy.project(policy.hidden(IDS[1:, :4]))
    assert torch.allclose(alone, expected[1:, :4], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("config", "model", "changes"),
    [
        (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 2.0}),
        (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
        (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 3.0}),
    ],
)
def test_what_an_architecture_does_to_its_logits(config, model, changes: dict[str, Any]):
    torch.manual_seed(0)
    lm = model(
        config(
            vocab_size=13,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.5,
            bos_token_id=1,
            eos_token_id=0,
            pad_token_id=0,
            **changes,
        )
    ).eval()
    policy = Policy("a", lm, Letters(), 1.0)
    expected = lm(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(policy.project(policy.hidden(IDS)), expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_treatment_of_logits_is_refused():
    lm = tiny_lm("llama")
    forward = lm.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    lm.forward = doubled  # type: ignore[method-assign]
    with pytest.raises(UserError, match="does something to its logits"):
        Policy("a", lm, Letters(), 1.0)


def test_logits_are_at_least_float32():
    policy = tiny_policy(dtype=torch.bfloat16)
    assert policy.project(policy.hidden(IDS)).dtype == torch.float32
    assert tiny_policy().project(tiny_policy().hidden(IDS)).dtype == torch.float64


def test_dropout_is_off_even_in_training_mode():
    policy = tiny_policy(family="gpt2")  # its configuration asks for dropout of .1
    assert policy.config.resid_pdrop > 0
    expected = policy.hidden(IDS)
    policy.model.train()
    assert torch.equal(policy.hidden(IDS), expected)
    policy = tiny_policy(attention_dropout=0.5)
    expected = policy.hidden(IDS)
    policy.model.train()
    assert torch.equal(policy.hidden(IDS), expected)


def test_ids_that_end_a_turn():
    policy = tiny_policy()
    assert policy.eos_ids == {EOS}
    policy.causal_lm.generation_config.eos_token_id = [5, 7]
    assert policy.eos_ids == {EOS, 5, 7}
    assert policy.context_limit == 128


def test_tied_parameters_are_listed_once():
    policy = tiny_policy(tie_word_embeddings=True)
    parameters = policy.trainable()
    assert len({id(p) for p in parameters.values()}) == len(parameters)
    assert "lm_head.weight" not in parameters and policy.head.weight is not None
    assert "lm_head.weight" in tiny_policy().trainable()


@pytest.mark.parametrize("tied", [True, False])
def test_projection_with_other_weights(tied):
    policy = tiny_policy(tie_word_embeddings=tied)
    hidden = policy.hidden(IDS)[0].detach()
    before = policy.project(hidden).detach()
    held = {name: p.detach().clone() for name, p in policy.trainable().items()}
    project = policy.projection_with(held)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.mul_(1.5)
    assert torch.equal(project(hidden), before)
    assert not torch.allclose(policy.project(hidden), before)


def adapted(*names: str) -> dict[str, Policy]:
    """Policies of these names on one base, their adapters far from zero."""
    base: Any = tiny_lm("qwen3")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    torch.manual_seed(0)
    policies = {n: Policy(n, model, Letters(), 1.0, adapter=n) for n in names}
    for policy in policies.values():
        for parameter in policy.trainable().values():
            nn.init.normal_(parameter, std=0.3)
    return policies


@pytest.mark.parametrize("other", ["model", "layers", "self_attn", "weight", "default"])
def test_an_adapter_owns_its_own_parameters_alone(other):
    # Whatever an agent is called, also like a part of the model.
    policies = adapted("a", other)
    for name, policy in policies.items():
        parameters = policy.trainable()
        assert len(parameters) == 2 * 7 * 2  # A and B, seven linear layers, two blocks
        assert all("lora_" in each and f".{name}." in each for each in parameters)


def test_adapters_take_turns_on_one_base():
    policies = adapted("a", "b")
    first = policies["a"].hidden(IDS)
    second = policies["b"].hidden(IDS)
    assert not torch.allclose(first, second)
    assert torch.equal(policies["a"].hidden(IDS), first)
    model: PreTrainedModel = policies["a"].causal_lm
    assert model is policies["b"].causal_lm


def test_checkpointing_lasts_for_its_block():
    policy = tiny_policy()
    with policy.checkpointing(False):
        assert not policy.causal_lm.is_gradient_checkpointing
    with pytest.raises(RuntimeError, match="inside"), policy.checkpointing(True):
        assert policy.causal_lm.is_gradient_checkpointing and policy.model.training
        raise RuntimeError("inside")
    assert not policy.causal_lm.is_gradient_checkpointing and not policy.model.training


def test_a_model_that_reads_pictures_keeps_its_windows() -> None:
    config = AutoConfig.for_model(
        "gemma3",
        text_config={
            "model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "sliding_window": 4, "vocab_size": 64, "tie_word_embeddings": True,
            "max_position_embeddings": 512,
        },
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4, image_token_index=63, boi_token_index=62, eoi_token_index=61,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    policy = Policy("seer", model, None, 1.0)
    assert policy.context_limit == 512 and not policy.attends_to_everything
    ids, places = torch.arange(1, 13)[None], torch.arange(12)
    causal = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    masks = policy.masks(places[None], 12)
    with torch.no_grad():
        own = policy.hidden(ids)
        engines = policy.hidden(ids, attention_mask=masks, position_ids=places[None])
        without = policy.hidden(ids, attention_mask=causal, position_ids=places[None])
    assert torch.allclose(own, engines, atol=1e-6)
    # The windows matter from the fifth token on, or the test would not see them.
    assert torch.allclose(own[:, :4], without[:, :4], atol=1e-6)
    assert not torch.allclose(own[:, 4:], without[:, 4:], atol=1e-3)


def weights_of(policy: Policy) -> dict[str, tuple[int, torch.Tensor]]:
    """Where each parameter's values lie, and a copy of them."""
    return {n: (p.data_ptr(), p.detach().clone()) for n, p in policy.model.named_parameters()}


def test_a_merged_adapter_multiplies_once_and_leaves_its_base_as_it_was():
    policies = adapted("a", "b")
    policy, before = policies["a"], weights_of(policies["a"])
    called: list[nn.Module] = []
    for name, module in policy.model.named_modules():
        if name.endswith(".lora_A.a"):
            module.register_forward_hook(lambda module, *_: called.append(module))
    policies["b"].activate()
    with torch.no_grad():
        apart = policy.hidden(IDS)
        assert len(called) == 2 * 7
        called.clear()
        policies["b"].activate()
        with pytest.raises(RuntimeError, match="inside"), merged(policy, 10_000) as together:
            assert together
            torch.testing.assert_close(policy.hidden(IDS), apart, rtol=1e-5, atol=1e-5)
            assert not called
            raise RuntimeError("inside")
        after = weights_of(policy)
        assert all(after[n][0] == p and torch.equal(after[n][1], v) for n, (p, v) in before.items())
        assert torch.equal(policy.hidden(IDS), apart) and len(called) == 2 * 7


def test_adapters_are_merged_where_that_pays_and_loses_nothing():
    policy = adapted("a")["a"]
    # 7 matrices a block, [I, O]: the sums cost as much as so many tokens' products.
    config: Any = policy.config
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.head_dim
    queries = heads * config.num_attention_heads
    keys = heads * config.num_key_value_heads
    shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    even = sum(a * b for a, b in shapes) / sum(a + b for a, b in shapes)
    for tokens, pays in ((int(even), False), (int(even) + 1, True)):
        with merged(policy, tokens) as together:
            assert together is pays
    whole = tiny_policy()
    with merged(whole, 10_000) as together:
        assert not together
    policy.autocast = torch.bfloat16
    with merged(policy, 10_000) as together:
        assert not together
    policy.autocast = None
    policy.model.to(torch.bfloat16)  # type: ignore[operator]
    with merged(policy, 10_000) as together:
        assert not together


def test_a_matrix_that_something_else_reads_is_not_merged():
    base: Any = tiny_lm("qwen3")
    base.lm_head.weight = base.get_input_embeddings().weight
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config, adapter_name="a")
    with merged(Policy("a", model, Letters(), 1.0, adapter="a"), 10_000) as together:
        assert not together
