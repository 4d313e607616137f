"""Where a model's files lie: a directory, a hub id, or one GGUF file of llama.cpp's."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from satune.types import UserError


@dataclass(frozen=True, slots=True)
class Source:
    """``place`` is the directory or hub id that transformers is given, ``gguf`` the name of the
    GGUF file in it that holds configuration, tokenizer and weights, where one does."""

    place: str
    gguf: str | None = None

    @property
    def options(self) -> Mapping[str, str]:
        """What ``from_pretrained`` of a configuration, tokenizer or model needs beside ``place``.
        Raises UserError for a GGUF file where the package that reads it is missing."""
        if self.gguf is None:
            return {}
        if importlib.util.find_spec("gguf") is None:
            raise UserError(
                f"{self}: reading it needs gguf; install it with pip install 'satune[gguf]'"
            )
        return {"gguf_file": self.gguf}

    def __str__(self) -> str:
        return str(Path(self.place, self.gguf)) if self.gguf else self.place


def source_of(model: str) -> Source:
    """Where the model that a recipe or a command names lies.

    A name that ends in .gguf is that file, and so is a directory that holds one GGUF file and no
    safetensors. Raises UserError for a GGUF file that is not there, and for a directory that
    leaves open which of several is meant, or whose name is no UTF-8 (tokenizers and safetensors
    cannot open those).
    """
    if model != model.encode(errors="ignore").decode():
        raise UserError(f"{model!a}: the path is not UTF-8; rename it")
    path = Path(model)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise UserError(misspelt_path(model) or f"{model}: no such file")
        return Source(str(path.parent), path.name)
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return Source(model)
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{model} holds {len(files)} GGUF files ({', '.join(files)}); name one")
    return Source(model, files[0]) if files else Source(model)


def read_model(source: Source, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The causal language model at ``source`` with its weights in ``dtype``. Quantised weights of
    a GGUF file are widened, and the model is from then on an ordinary one."""
    if source.gguf is None:
        options["use_safetensors"] = True
    model = AutoModelForCausalLM.from_pretrained(
        source.place, dtype=dtype, **source.options, **options
    )
    if source.gguf is not None:
        # The weights are quantised no longer, but would be saved and reloaded as if they were.
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            if hasattr(model, name):
                delattr(model, name)
        config: Any = model.config
        del config.quantization_config
        model.config._name_or_path = str(source)
    return model


def read_tokenizer(source: Source, **options: Any) -> Any:
    """The tokenizer at ``source``, with the chat template that lies there if one does."""
    return AutoTokenizer.from_pretrained(source.place, **source.options, **options)


def convert(source: Source, directory: Path) -> None:
    """Write what a GGUF file holds as config.json, float32 safetensors and tokenizer files, which
    transformers, PEFT and other tools read. ``directory`` is made; its parent must exist."""
    directory.mkdir()
    read_tokenizer(source).save_pretrained(directory)
    read_model(source, torch.float32).save_pretrained(directory)


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """A PEFT adapter in a directory: ``config`` as adapter_config.json has it, ``base`` the model
    that it changes, which a directory of that name beside it goes before."""

    config: Mapping[str, Any]
    base: str


def saved_adapter(model: str) -> SavedAdapter | None:
    """The adapter that lies in the directory ``model``, None where it holds none.

    Raises UserError for a configuration that is damaged or names no base.
    """
    path = Path(model) / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged JSON ({error})") from error
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: names no base model; give base_model_name_or_path")
    if config.get("megatron_config"):
        # PEFT would import the module that the file names for it.
        raise UserError(f"{path}: names a module to import (megatron_core); remove megatron_config")
    beside = path.parent.parent / Path(base).name
    return SavedAdapter(config, str(beside) if beside.exists() else base)


def misspelt_path(model: str) -> str:
    """What is wrong with a model in a directory that lies here and holds nothing of the name, where
    the hub's cache has none of it either; "" for any other. The hub would be asked again and again
    for what is no id of it.
    """
    path = Path(model)
    cached = Path(constants.HF_HUB_CACHE, "models--" + model.replace("/", "--"))
    if "/" not in model or path.exists() or not path.parent.is_dir() or cached.is_dir():
        return ""
    names = [item.name for item in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    mend = f"did you mean {path.parent / close[0]}?" if close else "nothing there is named like it"
    return f"{path.parent} has no {path.name}; {mend}"
