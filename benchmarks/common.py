"""What the speed comparisons share: a model, a tokenizer of whole words, and medians."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from satune.agents.policy import Policy

PROMPT_TOKENS = 37
SEQUENCES = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The user's words and nothing else, so that satune and its peer feed the same ids.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... are the tokens 0, 1, ...; the end of text stands behind the model's last
    output, so that it is looked for and never sampled and all completions are equally long."""
    words = {f"w{index}": index for index in range(vocabulary)} | {"<end>": vocabulary}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="w0", clean_up_tokenization_spaces=False
    )


def build_model(vocabulary: int, dtype: torch.dtype, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 of 3.3M parameters besides its embedding of 192 × vocabulary, untaught."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=vocabulary,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=vocabulary)
    return model


def load_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A pretrained model whose end of text stands behind its last output, as ``build_model``'s."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    end = model.config.vocab_size
    model.config.eos_token_id, model.config.pad_token_id = end, 0
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=end)
    return model


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a pretrained model, or one that is built for a vocabulary."""

    directory: Path | None
    vocabulary: int

    @classmethod
    def all(cls, directory: Path | None, vocabularies: Sequence[int]) -> list[Subject]:
        """The model in a directory, else one built for each vocabulary."""
        if directory is None:
            return [cls(None, vocabulary) for vocabulary in vocabularies]
        return [cls(directory, AutoConfig.from_pretrained(directory).vocab_size)]

    @property
    def name(self) -> str:
        return self.directory.name if self.directory else f"vocabulary {self.vocabulary}"

    def model(self, dtype: torch.dtype) -> PreTrainedModel:
        if self.directory is not None:
            return load_model(self.directory, dtype)
        return build_model(self.vocabulary, dtype)


def build_policy(model: PreTrainedModel, vocabulary: int) -> Policy:
    return Policy("agent", model, build_tokenizer(vocabulary), 1.0)


def prompts(count: int, vocabulary: int, seed: int = 1) -> list[tuple[int, ...]]:
    """``count`` distinct prompts of PROMPT_TOKENS ids."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, vocabulary, (count, PROMPT_TOKENS), generator=generator)
    return [tuple(row) for row in drawn.tolist()]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one side's repetitions, and the tokens each of them sampled."""

    seconds: Sequence[float]
    tokens: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def compared(ours: Timings, peer: Timings) -> dict[str, float]:
    """Medians, rates, and the peer's time over ours (above 1: satune is faster) with the spread of
    the ratios of repetitions that ran one after the other.

    Raises RuntimeError where the two sides sampled different numbers of tokens.
    """
    if ours.tokens != peer.tokens:
        raise RuntimeError(f"satune sampled {ours.tokens} tokens, the peer {peer.tokens}")
    pairs = sorted(b / a for a, b in zip(ours.seconds, peer.seconds, strict=True))
    return {
        "tokens": ours.tokens,
        "satune_seconds": ours.median,
        "peer_seconds": peer.median,
        "satune_tokens_per_second": ours.tokens / ours.median,
        "peer_tokens_per_second": peer.tokens / peer.median,
        "ratio": peer.median / ours.median,
        "ratio_low": pairs[0],
        "ratio_high": pairs[-1],
    }


def show(name: str, figures: Mapping[str, float]) -> None:
    print(
        f"{name:<44} satune {figures['satune_seconds']:6.3f} s "
        f"({figures['satune_tokens_per_second']:7,.0f} tokens/s)   "
        f"peer {figures['peer_seconds']:6.3f} s "
        f"({figures['peer_tokens_per_second']:7,.0f})   "
        f"ratio {figures['ratio']:.2f} "
        f"({figures['ratio_low']:.2f} to {figures['ratio_high']:.2f})",
        flush=True,
    )


def finish(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        print("ratio: the peer's seconds over satune's; above 1 satune is faster")
