"""What a server is given, as files: a model's directory, and the weights of one version beside it.

Weights go by ``AGENT@VERSION@DIGEST``. The name is never used for other weights, so that nothing
that a server remembers under it (a cache of prefixes, an adapter) can be of older ones.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

from satune.agents.policy import Policy
from satune.engines.vllm.scratch import scratch_errors
from satune.engines.vllm.worker.satune_worker import digest_of
from satune.types import UserError

WEIGHTS = "model.safetensors"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER = re.compile(r"\.lora_(\w+)\.[^.]+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Published:
    """Weights of an agent that a server has, or is to have. ``path`` is the file of a whole model,
    the directory of an adapter."""

    agent: str
    version: int
    digest: str
    path: Path

    @property
    def name(self) -> str:
        return f"{self.agent}@{self.version}@{self.digest}"

    @property
    def salt(self) -> str:
        """Its name for the cache of prefixes, which takes no @ and no long names."""
        return f"{self.version}-{self.digest}"

    def remove(self) -> None:
        """Take the files away."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)


def write_weights(
    place: Path, policy: Policy, version: int, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> Published:
    """Write an agent's own parameters (names as ``Policy.export`` gives them) beneath ``place``, in
    the type that the server computes in. Raises UserError where the disk refuses."""
    adapter = policy.adapter is not None
    tensors = {
        _peft_name(name) if adapter else name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in weights.items()
    }
    written = place / f"{policy.name}@{version}.writing"
    try:
        with scratch_errors(place):
            save_file(tensors, written, metadata={"format": "pt"})
            digest = digest_of(written)
            path = place / f"{policy.name}@{version}@{digest}{'' if adapter else '.safetensors'}"
            if not adapter:
                os.replace(written, path)
            elif not (path / _ADAPTER_WEIGHTS).exists():
                model: Any = policy.model
                model.peft_config[policy.adapter].save_pretrained(str(path))
                os.replace(written, path / _ADAPTER_WEIGHTS)
    finally:
        written.unlink(missing_ok=True)
    return Published(policy.name, version, digest, path)


def holds_weights(published: Published, weights: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether a whole model's file is what ``write_weights`` would write of these, bit for bit; not
    where it cannot be read."""
    try:
        with safe_open(published.path, framework="pt") as held:
            return set(held.keys()) == set(weights) and all(
                _equal(held.get_tensor(name), tensor.detach().to("cpu", dtype))
                for name, tensor in weights.items()
            )
    except (OSError, SafetensorError):
        return False


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(*flat)


def read_weights(policy: Policy, published: Published) -> dict[str, Tensor]:
    """What ``write_weights`` wrote, by the names of ``Policy.export``."""
    if policy.adapter is None:
        return load_file(published.path)
    held = load_file(published.path / _ADAPTER_WEIGHTS)
    return {name: held[_peft_name(name)] for name in policy.trainable()}


def write_model(place: Path, policy: Policy, dtype: torch.dtype, start: Published | None) -> Path:
    """The directory that a server starts from: configuration, tokenizer, and weights: a link to
    those of ``start``, or, for adapters, those of their base.

    Raises UserError where the model's parameters are not what its checkpoint holds."""
    directory = place / "model"
    causal_lm: Any = policy.causal_lm
    with scratch_errors(place):
        directory.mkdir(parents=True, exist_ok=True)
        causal_lm.config.save_pretrained(str(directory))
        policy.tokenizer.save_pretrained(str(directory))
        weights = directory / WEIGHTS
        if start is not None:
            link_weights(directory, start)
        elif not weights.exists():
            base = {
                name.replace(".base_layer.", "."): parameter.detach().to("cpu", dtype).contiguous()
                for name, parameter in causal_lm.named_parameters()
                if ".lora_" not in name
            }
            save_file(base, weights, metadata={"format": "pt"})
    return directory


def link_weights(directory: Path, published: Published) -> None:
    """Have a server that is started from ``directory`` begin with these weights."""
    beside = directory / f".{WEIGHTS}"
    beside.unlink(missing_ok=True)
    beside.symlink_to(published.path.resolve())
    os.replace(beside, directory / WEIGHTS)


def check_checkpoint(policy: Policy) -> None:
    """Raise UserError for a model whose parameters are not what its checkpoints hold, by which a
    server takes them: those that go by other names here, and those that have more to keep."""
    causal_lm: Any = policy.causal_lm
    kind = type(causal_lm).__name__
    if get_model_conversion_mapping(causal_lm, add_legacy=False):
        raise UserError(
            f"agent {policy.name}: {kind} names its weights otherwise than its checkpoints do, and "
            "vLLM would not know them; take engine: local"
        )
    parameters = dict(causal_lm.named_parameters(remove_duplicate=False))
    if set(causal_lm.state_dict()) - set(parameters):
        raise UserError(
            f"agent {policy.name}: {kind} keeps more than parameters, which vLLM is not given; "
            "take engine: local"
        )


def _peft_name(name: str) -> str:
    """A parameter's name as PEFT writes it into an adapter's file: without the adapter's own."""
    return _ADAPTER.sub(r".lora_\1", name)
