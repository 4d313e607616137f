"""An adapter added to the base that it works on, for a block in which that pays.

A layer with a LoRA adapter multiplies three times: by its own matrix, and by the two small ones of
the adapter. The sum of the base and the adapter's product does the same at once, but in a type of
less than float32 it would round away most of what an adapter has learnt, so there it is not made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from satune.agents.policy import Policy

_EXACT = (torch.float32, torch.float64)


@contextmanager
def merged(policy: Policy, tokens: int) -> Iterator[bool]:
    """Inside the block the policy's adapter is added to its base if it is to be fed ``tokens``,
    padding included, and so many pay for making the sums; gives whether it is. A copy of the layers
    is made, and after the block the base is what it was, bit for bit, whatever happened. No other
    agent of the base may be asked for anything meanwhile, and nothing may learn."""
    layers = _layers(policy)
    if not layers or tokens < _break_even(layers):
        yield False
        return
    assert policy.adapter is not None
    policy.activate()
    bases: list[nn.Module] = [layer.get_base_layer() for layer in layers]
    held = [[(p, p.data) for p in base.parameters(recurse=False)] for base in bases]
    try:
        for layer in layers:
            layer.merge(safe_merge=True, adapter_names=[policy.adapter])
        yield True
    finally:
        for layer, parameters in zip(layers, held, strict=True):
            layer.merged_adapters.clear()
            for parameter, values in parameters:
                parameter.data = values


def _layers(policy: Policy) -> list[LoraLayer]:
    """The layers that have a part of the policy's adapter; none where they cannot be summed, or not
    exactly enough, or where something else reads a matrix that an adapter works on."""
    if policy.adapter is None or policy.autocast is not None:
        return []
    modules = list(policy.model.modules())
    readers = Counter(id(p) for module in modules for p in module.parameters(recurse=False))
    found: list[LoraLayer] = []
    found += [m for m in modules if isinstance(m, LoraLayer) and policy.adapter in m.lora_A]
    weights = [getattr(layer.get_base_layer(), "weight", None) for layer in found]
    fit = all(
        isinstance(weight, nn.Parameter)
        and weight.dim() == 2
        and weight.dtype in _EXACT
        and readers[id(weight)] == 1
        for weight in weights
    )
    return found if fit else []


def _break_even(layers: list[LoraLayer]) -> float:
    """Tokens from which on the sums cost fewer multiplications than the adapter's own products: of
    a matrix [I, O], a token saves (I + O) r of them and the sum costs I O r."""
    bases: list[Any] = [layer.get_base_layer() for layer in layers]
    shapes = [tuple(base.weight.shape) for base in bases]
    return sum(a * b for a, b in shapes) / sum(a + b for a, b in shapes)
