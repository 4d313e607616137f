"""What a server of vLLM is started with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from satune.agents.memory import allowed_bytes
from satune.agents.policy import ENDLESS, Policy
from satune.engines.vllm.settings import VLLMSettings
from satune.types import UserError

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for."""
_CPU = ("--enforce-eager", "--no-enable-chunked-prefill")
"""Compiling for a CPU takes minutes and needs a compiler. A prompt that is fed in pieces ends a
server on a CPU: what was sampled after a piece is taken back from the request's generator, and
that of a CPU does not go back."""
_BATCHED = 8192
"""The most tokens that are fed at once on a CPU, and no fewer than the longest prompt has."""


def dtype_of(policy: Policy) -> torch.dtype:
    """The type that the server computes in: the learner's."""
    return policy.autocast or next(policy.model.parameters()).dtype


def context_of(policy: Policy, settings: VLLMSettings) -> int | None:
    """The longest sequence of a server, in tokens; None where nobody says one."""
    known = policy.context_limit if policy.context_limit < ENDLESS else None
    return min(filter(None, (settings.context, known)), default=None)


def arguments_of(
    policies: Mapping[str, Policy], settings: VLLMSettings, model: Path, sharing: int
) -> list[str]:
    """The arguments for a server of ``model``, which one agent has alone or several have adapters
    on. ``sharing`` servers share the memory of its device."""
    first = next(iter(policies.values()))
    arguments = [
        "--model", str(model.resolve()),
        "--served-model-name", "base",
        "--dtype", str(dtype_of(first)).removeprefix("torch."),
        "--max-num-seqs", str(settings.max_rows),
    ]  # fmt: skip
    limit = context_of(first, settings)
    if limit is not None:
        arguments += ["--max-model-len", str(limit)]
    arguments += _memory(first.device, settings, sharing, limit)
    if first.adapter is not None:
        arguments += _adapters(policies)
    return arguments


def _adapters(policies: Mapping[str, Policy]) -> list[str]:
    ranks: list[int] = []
    for policy in policies.values():
        model: Any = policy.model
        config = model.peft_config[policy.adapter]
        ranks += [config.r, *(config.rank_pattern or {}).values()]
    count, most = len(policies), max(ranks)
    if most > _RANKS[-1]:
        raise UserError(f"lora.rank: vLLM takes at most {_RANKS[-1]}, got {most}")
    return [
        "--enable-lora",
        # Rows without an adapter are silently wrong where all places are taken, also by adapters
        # that were unloaded: every seat has one, at first one that changes nothing.
        "--max-loras", str(count + 1),
        # While weights are given an agent has two.
        "--max-cpu-loras", str(2 * count + 1),
        "--max-lora-rank", str(next(rank for rank in _RANKS if rank >= most)),
    ]  # fmt: skip


def _memory(
    learner: torch.device, settings: VLLMSettings, sharing: int, limit: int | None
) -> list[str]:
    on_gpu = bool(settings.devices) or learner.type == "cuda"
    more = [] if on_gpu else [*_CPU, "--max-num-batched-tokens", str(max(limit or 0, _BATCHED))]
    if settings.memory > 1:
        return ["--kv-cache-memory-bytes", str(int(settings.memory)), *more]
    if on_gpu:
        return ["--gpu-memory-utilization", str(settings.memory / sharing)]
    share = allowed_bytes(settings.memory, torch.device("cpu")) // sharing
    return ["--kv-cache-memory-bytes", str(share), *more]
