"""Tiny base models: genuine Qwen3 and Llama models with tokenizers and chat templates of their own,
small enough to be built on a laptop in well under a minute and cached.

They are taught by imitating players who err on purpose, so that reinforcement learning has
something to gain.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from satune.agents.rendering import ChatRenderer, TemplateSettings
from satune.tiny.tokenizers import MAX_LENGTH, llama_tokenizer, qwen3_tokenizer
from satune.tiny.training import TinySettings, imitate, rows_of
from satune.types import Entry, Progress, UserError

# Part of every fingerprint: a base built by an older recipe than this module's is built anew.
_EDITION = 1

Conversations = Sequence[Sequence[Entry]]
Success = Callable[[PreTrainedModel, PreTrainedTokenizerBase], float]


@dataclass(frozen=True, slots=True)
class _Size:
    hidden: int
    layers: int
    heads: int
    inner: int


_SIZES = {"s": _Size(96, 3, 3, 256), "m": _Size(160, 4, 5, 352)}
_FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, qwen3_tokenizer),
    "llama": (LlamaConfig, LlamaForCausalLM, llama_tokenizer),
}
SPECS = tuple(f"tiny:{family}-{size}" for family in _FAMILIES for size in _SIZES)
"""The names a recipe may give for a model: "tiny:qwen3-s" and so on."""


@dataclass(frozen=True, slots=True)
class TinyBase:
    """A tiny model with its tokenizer and how its training went.

    ``greedy_success`` is None where it was not measured; ``reached`` is False where it is below
    the settings' target although all of ``max_steps`` were spent.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    steps: int
    greedy_success: float | None
    reached: bool
    seconds: float


def is_tiny(model: str) -> bool:
    """Whether a recipe's model name asks for a tiny model."""
    return model.startswith("tiny:")


def tiny_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a tiny model; all sizes of a family have the same one."""
    return _parts(spec)[0][2]()


def tiny_model(spec: str, seed: int) -> PreTrainedModel:
    """An untaught tiny model in float32, a function of ``spec`` and ``seed`` alone.

    About .36M parameters for ``-s`` and 1.1M for ``-m``.
    """
    (config_class, model_class, make_tokenizer), size = _parts(spec)
    tokenizer = make_tokenizer()
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def build_tiny(
    spec: str,
    conversations: Conversations,
    settings: TinySettings,
    *,
    template: TemplateSettings | None = None,
    held_out_success: Success | None = None,
    progress: Progress | None = None,
) -> TinyBase:
    """A tiny model that imitates the own messages of ``conversations``.

    Args:
        spec: one of SPECS.
        conversations: what one seat saw and wrote, each in the order it did.
        settings: see TinySettings; with equal settings, conversations and number of threads the
            result is the same bit for bit.
        template: how agents of this base will render.
        held_out_success: greedy success in [0, 1] of a team of this model.
        progress: called with steps done, steps planned and a message.

    Raises:
        UserError: an unknown spec, or conversations without own messages.
    """
    started = time.perf_counter()
    tokenizer = tiny_tokenizer(spec)
    renderer = ChatRenderer(tokenizer, template or TemplateSettings(), MAX_LENGTH)
    rows = [row for conversation in conversations for row in rows_of(conversation, renderer)]
    if not rows:
        raise UserError(f"{spec}: the demonstrations hold no own messages to imitate; give some")
    model = tiny_model(spec, settings.seed)
    steps, success = imitate(
        model,
        rows,
        tokenizer.pad_token_id,  # type: ignore[arg-type]
        settings,
        success=None if held_out_success is None else lambda: held_out_success(model, tokenizer),
        progress=progress,
    )
    reached = success is None or success >= settings.greedy_target
    return TinyBase(model, tokenizer, steps, success, reached, time.perf_counter() - started)


def fingerprint(
    spec: str, settings: TinySettings, template: TemplateSettings, description: str
) -> str:
    """Names what a tiny model is a function of; ``description`` stands for its demonstrations."""
    made_of = [_EDITION, spec, asdict(settings), asdict(template), description]
    text = json.dumps(made_of, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def tiny_directory(
    spec: str,
    settings: TinySettings,
    description: str,
    demonstrate: Callable[[int, int], Conversations],
    *,
    template: TemplateSettings | None = None,
    held_out_success: Success | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The directory of a tiny model for AutoModelForCausalLM and AutoTokenizer, built if absent.

    It is written beside its place and renamed, so it is complete or absent. How the training went
    stands in its ``tiny.json``: spec, steps, greedy_success, reached, seconds, settings.

    Args:
        description: names task and protocol with their options; the same description must mean
            the same demonstrations.
        demonstrate: (number of conversations, seed) to the conversations to imitate; called only
            when the model is built.
        cache: where such directories are kept; ~/.cache/satune/tiny if None.

    Raises:
        UserError: as build_tiny, or the cache cannot be written.
    """
    _parts(spec)
    template = template or TemplateSettings()
    cache = cache if cache is not None else Path.home() / ".cache" / "satune" / "tiny"
    mark = fingerprint(spec, settings, template, description)
    place = cache / f"{spec.removeprefix('tiny:')}-{mark}"
    if place.exists():
        return place
    try:
        cache.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=cache))
    except OSError as error:
        raise UserError(
            f"{cache}: tiny models cannot be kept there ({error.strerror}); name a directory that "
            "can be written"
        ) from error
    try:
        base = build_tiny(
            spec,
            demonstrate(settings.examples, settings.seed),
            settings,
            template=template,
            held_out_success=held_out_success,
            progress=progress,
        )
        base.model.save_pretrained(beside)
        base.tokenizer.save_pretrained(beside)
        figures = {
            "spec": spec,
            "steps": base.steps,
            "greedy_success": base.greedy_success,
            "reached": base.reached,
            "seconds": round(base.seconds, 3),
            "settings": asdict(settings),
        }
        (beside / "tiny.json").write_text(json.dumps(figures, indent=2) + "\n")
        try:
            os.rename(beside, place)
        except OSError:
            # Another process may have built the same one meanwhile; either will do.
            if not place.exists():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return place


def load_tiny(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model (float32) and tokenizer of a directory that tiny_directory returned."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(directory)


def _parts(spec: str) -> tuple[tuple[Any, Any, Any], _Size]:
    if spec not in SPECS:
        near = get_close_matches(spec, SPECS, 1, 0.0)
        raise UserError(f"{spec}: no such tiny model; did you mean {near[0]}? ({', '.join(SPECS)})")
    family, _, size = spec.removeprefix("tiny:").partition("-")
    return _FAMILIES[family], _SIZES[size]
