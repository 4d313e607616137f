"""What a server of vLLM is started with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from satune.agents.memory import allowed_bytes
from satune.agents.policy import Policy
from satune.engines.vllm.settings import VLLMSettings

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for."""


def dtype_of(policy: Policy) -> torch.dtype:
    """The type that the server computes in: the learner's."""
    return policy.autocast or next(policy.model.parameters()).dtype


def arguments_of(
    policies: Mapping[str, Policy], settings: VLLMSettings, model: Path, places: int
) -> list[str]:
    """The arguments for a server of ``model``, which one agent has alone or several have adapters
    on. ``places`` servers share a CPU's memory."""
    first = next(iter(policies.values()))
    arguments = [
        "--model", str(model.resolve()),
        "--served-model-name", "base",
        "--dtype", str(dtype_of(first)).removeprefix("torch."),
        "--max-model-len", str(settings.context or first.context_limit),
        "--max-num-seqs", str(settings.max_rows),
    ]  # fmt: skip
    arguments += _memory(first.device, settings, places)
    if first.adapter is not None:
        arguments += _adapters(policies)
    return arguments


def _adapters(policies: Mapping[str, Policy]) -> list[str]:
    ranks: list[int] = []
    for policy in policies.values():
        model: Any = policy.model
        ranks.append(model.peft_config[policy.adapter].r)
    count = len(policies)
    return [
        "--enable-lora",
        # Rows without an adapter are silently wrong where all places are taken, also by adapters
        # that were unloaded: every seat has one, at first one that changes nothing.
        "--max-loras", str(count + 1),
        # While weights are given an agent has two.
        "--max-cpu-loras", str(2 * count + 1),
        "--max-lora-rank", str(next(rank for rank in _RANKS if rank >= max(ranks))),
    ]  # fmt: skip


def _memory(learner: torch.device, settings: VLLMSettings, places: int) -> list[str]:
    if settings.devices or learner.type == "cuda":
        if settings.memory > 1:
            return ["--kv-cache-memory-bytes", str(int(settings.memory))]
        return ["--gpu-memory-utilization", str(settings.memory)]
    share = allowed_bytes(settings.memory, torch.device("cpu")) // places
    # Compiling for a CPU takes minutes and needs a compiler.
    return ["--kv-cache-memory-bytes", str(share), "--enforce-eager"]
