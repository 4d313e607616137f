"""Key and value states of a batch whose rows are of different length, and what is kept of them
between the turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

_BLOCK = 64


def rounded(length: int) -> int:
    """A capacity for ``length`` tokens, in blocks so that growing is rare."""
    return (length + _BLOCK - 1) // _BLOCK * _BLOCK


class RowCache(Cache):
    """Keys and values [rows, heads, capacity, dim] a layer; every row has its own length.

    Set ``positions`` [rows, n] before a forward of n new tokens a row: they are written there, and
    attention sees the first ``used`` places under the mask the caller gives.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.positions: Tensor | None = None
        self.used = 0
        self.capacity = 0

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0] if self.keys else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.positions is not None
        if layer_idx == len(self.keys):
            rows, heads, _, dim = key_states.shape
            self.keys.append(key_states.new_zeros(rows, heads, self.capacity, dim))
            self.values.append(
                value_states.new_zeros(rows, heads, self.capacity, value_states.shape[-1])
            )
        row = torch.arange(key_states.shape[0], device=key_states.device)[:, None]
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[row, :, self.positions] = key_states.transpose(1, 2)
        values[row, :, self.positions] = value_states.transpose(1, 2)
        return keys[:, :, : self.used], values[:, :, : self.used]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.used

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens a row."""
        if capacity <= self.capacity:
            return
        self.capacity = rounded(capacity)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                rows, heads, length, dim = old.shape
                grown = old.new_zeros(rows, heads, self.capacity, dim)
                grown[:, :, :length] = old
                tensors[layer] = grown

    def select(self, rows: Tensor) -> None:
        """Keep only ``rows``, in that order."""
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]

    def append(self, other: RowCache, rows: Tensor, length: int) -> None:
        """Add ``rows`` of another cache (repeats allowed), their first ``length`` tokens."""
        if not self.keys:
            self.capacity = max(self.capacity, rounded(length))
            for ours, theirs in ((self.keys, other.keys), (self.values, other.values)):
                for source in theirs:
                    ours.append(
                        source.new_zeros(0, source.shape[1], self.capacity, source.shape[3])
                    )
        self.reserve(length)
        for ours, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, source in enumerate(theirs):
                old = ours[layer]
                shape = (old.shape[0] + rows.numel(), *old.shape[1:])
                grown = old.new_zeros(shape)
                grown[: old.shape[0]] = old
                grown[old.shape[0] :, :, :length] = source.index_select(0, rows)[:, :, :length]
                ours[layer] = grown


@dataclass(slots=True)
class _Kept:
    """What is kept of one seat's conversation: its ids, and the block's row with their states."""

    ids: tuple[int, ...]
    block: RowCache
    row: int


class PrefixStore:
    """States of finished turns, so that a seat's next turn only feeds what is new in its prompt.

    Holds at most ``budget`` tokens; when full, what would be kept is not. Emptied when the weights
    change.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._kept: dict[tuple[object, ...], _Kept] = {}
        self._tokens = 0

    def clear(self) -> None:
        self._kept.clear()
        self._tokens = 0

    def forget(self, owner: tuple[object, ...]) -> None:
        kept = self._kept.pop(owner, None)
        if kept is not None:
            self._tokens -= len(kept.ids)

    def match(self, owner: tuple[object, ...], ids: Sequence[int]) -> int:
        """How many leading tokens of ``ids`` are kept (at most all but one: the last is fed)."""
        kept = self._kept.get(owner)
        if kept is None:
            return 0
        limit = min(len(kept.ids), len(ids) - 1)
        if tuple(ids[:limit]) == kept.ids[:limit]:
            return limit
        return next(i for i in range(limit) if ids[i] != kept.ids[i])

    def load(
        self, owners: Sequence[tuple[object, ...] | None], length: int, into: RowCache
    ) -> None:
        """Fill the leading ``length`` tokens of ``into``'s rows from their owners' states."""
        by_block: dict[int, tuple[RowCache, list[int], list[int]]] = {}
        for row, owner in enumerate(owners):
            if owner is None:
                continue
            kept = self._kept[owner]
            entry = by_block.setdefault(id(kept.block), (kept.block, [], []))
            entry[1].append(row)
            entry[2].append(kept.row)
        for block, targets, sources in by_block.values():
            for ours, theirs in ((into.keys, block.keys), (into.values, block.values)):
                for layer, source in enumerate(theirs):
                    while len(ours) <= layer:
                        shape = (len(owners), source.shape[1], into.capacity, source.shape[3])
                        ours.append(source.new_zeros(shape))
                    span = min(length, source.shape[2])
                    ours[layer][torch.tensor(targets, device=source.device), :, :span] = source[
                        torch.tensor(sources, device=source.device), :, :span
                    ]

    def keep(
        self,
        owners: Sequence[tuple[object, ...]],
        ids: Sequence[tuple[int, ...]],
        cache: RowCache,
        rows: Sequence[int],
    ) -> None:
        """Keep the states of ``ids`` (all but the last were fed) from ``rows`` of ``cache``."""
        chosen: list[int] = []
        for index, owner in enumerate(owners):
            self.forget(owner)
            if self._tokens + len(ids[index]) - 1 <= self.budget:
                chosen.append(index)
                self._tokens += len(ids[index]) - 1
        if not chosen:
            return
        length = max(len(ids[index]) for index in chosen) - 1
        block = RowCache()
        take = torch.tensor([rows[index] for index in chosen], device=cache.keys[0].device)
        block.keys = [keys[:, :, :length].index_select(0, take) for keys in cache.keys]
        block.values = [values[:, :, :length].index_select(0, take) for values in cache.values]
        for row, index in enumerate(chosen):
            self._kept[owners[index]] = _Kept(tuple(ids[index][:-1]), block, row)
