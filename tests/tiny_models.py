"""Genuine Hugging Face models of a few hundred parameters, and what tests of them need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from satune.agents.policy import Policy
from satune.types import Episode, Grade, Problem, Turn, ids_of

FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
}
"""In float64 the first three still round to float32 inside their norms; the last two do not."""
EOS = 0


class Letters:
    """A tokenizer of as many letters as there are ids; id 0 ends a turn."""

    eos_token_id = EOS

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(96 + i) for i in ids if i != EOS or not skip_special_tokens)


class Alphabet(Letters):
    """Letters with what a mixture asks of a tokenizer."""

    all_special_ids = (EOS,)

    def __init__(self, size: int = 13) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {chr(96 + i): i for i in range(self.size)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) % self.size for letter in text]


def tiny_config(family: str, *, vocab: int = 13, layers: int = 2, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        # Large enough that the next-token distributions are far from uniform and from each other.
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }
    if family == "gpt2":  # the only one that ties its head and learns its positions
        settings |= {"n_embd": 16, "n_head": 2, "n_layer": layers, "n_inner": 24}
        settings |= {"n_positions": 128, "tie_word_embeddings": True}
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            del settings[name]
    return FAMILIES[family][0](**(settings | changes))


def tiny_lm(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any
) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FAMILIES[family][1](tiny_config(family, **changes)).to(dtype).eval()


def tiny_policy(
    name: str = "a", family: str = "qwen3", *, temperature: float = 0.8, **changes: Any
) -> Policy:
    return Policy(name, tiny_lm(family, **changes), Letters(), temperature)


def next_token_logprobs(policy: Policy, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [S, V] after each of ``ids`` by the whole model, apart from satune."""
    policy.activate()
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return torch.log_softmax(logits / policy.temperature, dim=-1)


def completion_logprobs(
    policy: Policy, prompt: Sequence[int], completion: Sequence[int]
) -> torch.Tensor:
    """Log-probabilities [T] of a completion's tokens, by the whole model."""
    rows = next_token_logprobs(policy, (*prompt, *completion))[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(list(completion))[:, None])[:, 0]


def turn(
    prompt: Sequence[int] | None,
    completion: Sequence[int] | None,
    *,
    seat: str = "a",
    agent: str = "a",
    moment: int = 0,
    own_index: int = 0,
) -> Turn:
    return Turn(
        seat=seat,
        agent=agent,
        moment=moment,
        own_index=own_index,
        text="",
        finish_reason="stop",
        version=0,
        prompt_ids=None if prompt is None else ids_of(prompt),
        completion_ids=None if completion is None else ids_of(completion),
    )


def episode(turns: Sequence[Turn], reward: float, problem: str = "p", sample: int = 0) -> Episode:
    return Episode(Problem.of(problem, ""), sample, tuple(turns), None, Grade(reward))
