"""Sizes of models that are not here: published architectures, counted without their weights.

The facts are those of the models' own config.json. A model that is neither listed nor in the hub's
local cache is not known; nothing about it is guessed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from satune.agents.sources import saved_adapter, source_of


def _dense(
    model_type: str, layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocabulary: int,
    **further: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **further,
    }


def _qwen3(
    layers: int, hidden: int, heads: int, mlp: int, kv_heads: int = 8, **further: Any
) -> dict[str, Any]:
    kind = "qwen3_moe" if "num_experts" in further else "qwen3"
    return _dense(kind, layers, hidden, heads, kv_heads, mlp, 151936, head_dim=128, **further)


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_LLAMA_8B = _dense("llama", 32, 4096, 32, 8, 14336, 128256)
_LLAMA_70B = _dense("llama", 80, 8192, 64, 8, 28672, 128256)
_QWEN25_32B = _dense("qwen2", 64, 5120, 40, 8, 27648, 152064)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, **_TIED),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, **_TIED),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 32, 9728, **_TIED),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 32, 12288),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 40, 17408),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 64, 25600),
    "Qwen/Qwen3-30B-A3B": _qwen3(
        48, 2048, 32, 6144, kv_heads=4,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        decoder_sparse_step=1, norm_topk_prob=True,
    ),
    "Qwen/Qwen2.5-3B-Instruct": _dense("qwen2", 36, 2048, 16, 2, 11008, 151936, **_TIED),
    "Qwen/Qwen2.5-32B-Instruct": _QWEN25_32B,
    "Qwen/Qwen2.5-72B-Instruct": _dense("qwen2", 80, 8192, 64, 8, 29568, 152064),
    "Qwen/QwQ-32B": _QWEN25_32B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.2-3B-Instruct": _dense(
        "llama", 28, 3072, 24, 8, 8192, 128256, head_dim=128, **_TIED
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _dense("qwen2", 28, 1536, 12, 2, 8960, 151936),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA_8B,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": _LLAMA_70B,
    # The checkpoint reads pictures too, and the vision tower is loaded with the rest.
    "google/gemma-3-12b-it": {
        "model_type": "gemma3",
        "text_config": _dense(
            "gemma3_text", 48, 3840, 16, 8, 15360, 262208,
            head_dim=256, sliding_window=1024, **_TIED,
        ) | {"tie_word_embeddings": True},
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896,
            "patch_size": 14, "vision_use_head": False,
        },
    },
}  # fmt: skip
"""config.json of the models that the shipped recipes name, as far as sizes depend on it."""


def configuration(model: str) -> PretrainedConfig | None:
    """The configuration of a model directory, of an adapter's base, of a model in the hub's local
    cache, or of one that is listed here; None where there is none of these. Nothing is fetched."""
    adapter = saved_adapter(model)
    if adapter is not None:
        return configuration(adapter.base)
    source, path = source_of(model), Path(model)
    if source.gguf is not None:
        return AutoConfig.from_pretrained(source.place, **source.options)
    found: Any = path / "config.json"
    if not found.is_file() and not path.exists() and model.count("/") == 1:
        found = try_to_load_from_cache(model, "config.json")
    if isinstance(found, (str, Path)) and Path(found).is_file():
        # Of a model that brings its own code the size cannot be told without running that code.
        if json.loads(Path(found).read_text()).get("model_type") not in CONFIG_MAPPING:
            return None
        return AutoConfig.from_pretrained(Path(found).parent)
    if model not in ARCHITECTURES or path.exists():
        return None
    return AutoConfig.for_model(**ARCHITECTURES[model])


def skeleton(config: PretrainedConfig) -> nn.Module:
    """The model of a configuration with parameters that have shapes and no values."""
    # accelerate's empty weights would untie tied embeddings and count them twice.
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def active_parameters(model: Any) -> int:
    """How many of a model's parameters a token goes through: of a mixture's experts those that it
    is given to."""
    text = model.config.get_text_config()
    whole = {id(p): p.numel() for p in model.parameters()}
    experts = {id(p): p.numel() for n, p in model.named_parameters() if ".experts." in n}
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((found for name in names if (found := getattr(text, name, None))), None)
    if not experts or not count:
        return sum(whole.values())
    asked = text.num_experts_per_tok
    return sum(whole.values()) - sum(experts.values()) * (count - asked) // count


def cached_numbers(config: PretrainedConfig) -> int | None:
    """How many numbers the key-value cache holds a token: a key and a value a layer and head.

    The local engine keeps every token of every layer, windows or not. None for models that keep
    something else than keys and values.
    """
    text: Any = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None)
    if heads is None or hasattr(text, "kv_lora_rank"):
        return None
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width
