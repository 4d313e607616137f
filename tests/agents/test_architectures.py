"""Sizes of models that are not here, against published counts and against models that are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from satune.agents import architectures
from satune.agents.architectures import ARCHITECTURES, cached_numbers, configuration, skeleton
from satune.tiny.zoo import tiny_model

# Elements in the published safetensors files, tied embeddings once.
PUBLISHED = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/QwQ-32B": 32_763_876_352,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
    "google/gemma-3-12b-it": 12_187_325_040,
}


@pytest.fixture(autouse=True)
def no_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever models this machine holds, the table is what is tested."""
    monkeypatch.setattr(architectures, "try_to_load_from_cache", lambda *_: None)


def parameters(config: Any) -> int:
    return sum(p.numel() for p in skeleton(config).parameters())


def test_every_listed_model_has_a_published_count() -> None:
    assert set(PUBLISHED) == set(ARCHITECTURES)


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_parameters_are_the_published_ones(model: str) -> None:
    assert parameters(configuration(model)) == PUBLISHED[model]


def test_the_text_part_of_gemma() -> None:
    config: Any = configuration("google/gemma-3-12b-it")
    # By hand. Embeddings (tied) 262,208 x 3,840. A layer: q and o 3,840 x 4,096 each, k and v
    # 3,840 x 2,048 each, their two norms 2 x 256, three matrices 3,840 x 15,360, four norms 3,840.
    layer = 2 * 3840 * 4096 + 2 * 3840 * 2048 + 2 * 256 + 3 * 3840 * 15360 + 4 * 3840
    assert parameters(config.text_config) == 262_208 * 3840 + 48 * layer + 3840 == 11_766_034_176


@pytest.mark.parametrize("spec", ["tiny:qwen3-s", "tiny:llama-s"])
def test_the_cache_holds_that_many_numbers_a_token(spec: str) -> None:
    model = tiny_model(spec, 0)
    cache = DynamicCache()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.zeros(1, 5, dtype=torch.long), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    assert (
        cached_numbers(model.config) == sum(x.keys.numel() + x.values.numel() for x in layers) / 5
    )
    # What the description assumes: the weights' precision at most, also where the rest is computed
    # in half. transformers from 5.24 on keeps values in half, before it neither.
    assert {x.keys.dtype for x in layers} == {torch.float32}
    assert {x.values.dtype for x in layers} <= {torch.float32, torch.bfloat16}


def test_published_cache_sizes() -> None:
    # Two (key, value) x layers x key-value heads x head size.
    assert cached_numbers(configuration("Qwen/Qwen3-4B")) == 2 * 36 * 8 * 128  # type: ignore[arg-type]
    gemma: Any = configuration("google/gemma-3-12b-it")
    assert cached_numbers(gemma) == 2 * 48 * 8 * 256


def test_what_is_not_known() -> None:
    assert configuration("somebody/some-model") is None
    assert configuration("nowhere") is None
    assert configuration("tests") is None


def write_config(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SMALL = {"model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 12,
         "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
         "tie_word_embeddings": False}  # fmt: skip
# Embeddings and head 2 x 80; q and o 64 each; k and v 32 each; MLP 3 x 96; norms 3 x 8.
SMALL_COUNT = 160 + 128 + 64 + 288 + 24


def test_models_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = write_config(tmp_path / "model", **SMALL)
    assert parameters(configuration(str(here))) == SMALL_COUNT
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(here)}))
    assert parameters(configuration(str(adapter))) == SMALL_COUNT
    # What the hub's cache holds goes before the table: it is the revision that would be loaded.
    cached = str(here / "config.json")
    monkeypatch.setattr(architectures, "try_to_load_from_cache", lambda *_: cached)
    assert parameters(configuration("Qwen/Qwen3-4B")) == SMALL_COUNT
    assert parameters(configuration("somebody/some-model")) == SMALL_COUNT


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    here = write_config(tmp_path / "model", model_type="of_their_own", auto_map=own)
    (here / "own.py").write_text("raise SystemExit('this ran')")
    assert configuration(str(here)) is None
