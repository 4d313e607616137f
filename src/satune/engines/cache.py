"""Key and value states of a batch whose rows are of different length, and what is kept of them
between the turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from satune.files.arrays import shared_prefix
from satune.types import Ids

_BLOCK = 64
_GROWTH = 1024


def rounded(length: int) -> int:
    """A capacity for ``length`` tokens, in blocks so that growing is rare."""
    return (length + _BLOCK - 1) // _BLOCK * _BLOCK


class RowCache(Cache):
    """Keys and values [rows, heads, capacity, dim] a layer; every row has its own length.

    Set ``positions`` [rows, n] before a forward of n new tokens a row: they are written there, and
    attention sees the first ``used`` places under the mask the caller gives. A forward may be of
    the first rows only. ``dtype`` is the type that attention computes in, where that is another
    than the type that keys and values come in (None: it is the same).
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__(layers=[])
        self.dtype = dtype
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.positions: Tensor | None = None
        self.used = 0
        self.capacity = 0
        self.room = 0

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0] if self.keys else 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @property
    def token_bytes(self) -> int:
        """What a token of a row takes; known once there are rows."""
        layers = (*self.keys, *self.values)
        return sum(each.shape[1] * each.shape[3] * each.itemsize for each in layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.positions is not None
        if self.dtype is not None:
            key_states, value_states = key_states.to(self.dtype), value_states.to(self.dtype)
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
        rows = key_states.shape[0]
        return keys[:rows, :, : self.used], values[:rows, :, : self.used]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.used

    def reserve(self, capacity: int, *, most: int | None = None, rows: int | None = None) -> None:
        """Make room for ``capacity`` tokens a row, and no more than ``most`` where that is enough;
        of the first ``rows`` only, if the others are given up."""
        if capacity <= self.capacity:
            return
        # Twice as much: a growing conversation is moved a few times only.
        ahead = max(capacity, min(self.capacity * 2, self.capacity + _GROWTH))
        if most is not None:
            ahead = max(capacity, min(ahead, most // _BLOCK * _BLOCK))
        self.capacity = rounded(ahead)
        for tensors in (self.keys, self.values):
            for layer, held in enumerate(tensors):
                old = held if rows is None else held[:rows]
                length = old.shape[2]
                grown = old.new_empty(*old.shape[:2], self.capacity, old.shape[3])
                grown[:, :, :length] = old
                # Masked places still enter a product with 0, so they must be finite.
                grown[:, :, length:] = 0
                tensors[layer] = grown

    def begin_with(self, other: RowCache, rows: int) -> None:
        """Have ``rows`` rows, each of which begins with all of the one row of ``other``."""
        for ours, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for source in theirs:
                _, heads, length, dim = source.shape
                layer = source.new_zeros(rows, heads, self.capacity, dim)
                layer[:, :, :length] = source
                ours.append(layer)

    def exchange(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Let the two rows of each pair change places."""
        if not pairs:
            return
        here = torch.tensor([a for a, _ in pairs], device=self.keys[0].device)
        there = torch.tensor([b for _, b in pairs], device=self.keys[0].device)
        for tensor in (*self.keys, *self.values):
            moved = tensor.index_select(0, here)
            tensor[here] = tensor.index_select(0, there)
            tensor[there] = moved

    def append(
        self, other: RowCache, rows: Tensor, length: int, *, held: int, most: int | None = None
    ) -> None:
        """Put ``rows`` of another cache (repeats allowed), their first ``length`` tokens, behind
        the first ``held`` rows; what was there is lost. ``most`` is that of ``reserve``.

        An empty cache takes the other's tensors over where all its rows are wanted as they are.
        """
        chosen = rows.tolist()
        if held == 0 and length <= other.capacity and chosen == list(range(other.rows)):
            self.keys, self.values = list(other.keys), list(other.values)
            self.capacity = other.capacity
            return
        if held == 0:
            self.keys, self.values, self.capacity = [], [], max(rounded(length), other.room)
        self.reserve(length, most=most)
        total = held + len(chosen)
        for ours, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, source in enumerate(theirs):
                if layer == len(ours) or ours[layer].shape[0] < total:
                    shape = (total, source.shape[1], self.capacity, source.shape[3])
                    grown = source.new_empty(shape)
                    if held:
                        grown[:held] = ours[layer][:held]
                    ours[layer : layer + 1] = [grown]
                _copy_rows(ours[layer], range(held, total), source, chosen, length)
                ours[layer][held:total, :, length:] = 0


def _copy_rows(
    target: Tensor, rows: Sequence[int], source: Tensor, source_rows: Sequence[int], length: int
) -> None:
    """target[rows, :, :length] = source[source_rows, :, :length]."""
    if source.device.type == "cpu":
        # Row by row moves the numbers once; indexing would gather them into a third tensor first.
        for row, source_row in zip(rows, source_rows, strict=True):
            target[row, :, :length] = source[source_row, :, :length]
        return
    device = source.device
    gathered = source[torch.tensor(source_rows, device=device), :, :length]
    target[torch.tensor(list(rows), device=device), :, :length] = gathered


@dataclass(slots=True)
class _Kept:
    """What is kept of one seat's conversation: its ids, the row of a block that holds their states,
    and how many tokens of the budget it takes."""

    ids: Ids
    block: RowCache
    row: int
    tokens: int


class PrefixStore:
    """States of finished turns, so that a seat's next turn only feeds what is new in its prompt.

    Holds at most ``budget`` tokens; when full, what would be kept is not. Emptied when the weights
    change.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._kept: dict[tuple[object, ...], _Kept] = {}
        self._tokens = 0

    @property
    def nbytes(self) -> int:
        blocks = {id(kept.block): kept.block for kept in self._kept.values()}
        return sum(block.nbytes for block in blocks.values())

    def clear(self) -> None:
        self._kept.clear()
        self._tokens = 0

    def drop_oldest(self) -> bool:
        """Forget whatever lies in one block with what was kept first; False if nothing is kept."""
        for oldest in list(self._kept)[:1]:
            for owner in list(self.companions(oldest)):
                self.forget(owner)
            return True
        return False

    def block_of(self, owners: Sequence[tuple[object, ...]]) -> RowCache | None:
        """The block that holds the states of all of ``owners``, if they fill most of its rows."""
        blocks = [kept.block for kept in map(self._kept.get, owners) if kept is not None]
        if len(blocks) < len(owners) or any(block is not blocks[0] for block in blocks):
            return None
        return blocks[0] if blocks and len(owners) * 4 >= blocks[0].rows * 3 else None

    def forget(self, owner: tuple[object, ...]) -> None:
        kept = self._kept.pop(owner, None)
        if kept is not None:
            self._tokens -= kept.tokens

    def match(self, owner: tuple[object, ...], ids: Ids) -> int:
        """How many leading tokens of ``ids`` are kept (at most all but one: the last is fed)."""
        kept = self._kept.get(owner)
        if kept is None:
            return 0
        return min(shared_prefix(kept.ids, ids), len(ids) - 1)

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
                        ours.append(source.new_empty(shape))
                        ours[layer][[o is None for o in owners]] = 0
                        ours[layer][:, :, length:] = 0
                    span = min(length, source.shape[2])
                    _copy_rows(ours[layer], targets, source, sources, span)
                    if span < length:
                        ours[layer][targets, :, span:length] = 0

    def take(self, owners: Sequence[tuple[object, ...]]) -> tuple[RowCache, list[int]] | None:
        """``block_of`` them and each one's row in it, for going on in place; None where there is no
        such block. The store forgets it."""
        block = self.block_of(owners)
        if block is None:
            return None
        rows = [self._kept[owner].row for owner in owners]
        for owner in [owner for owner, kept in self._kept.items() if kept.block is block]:
            self.forget(owner)
        return block, rows

    def companions(self, owner: tuple[object, ...]) -> Set[tuple[object, ...]]:
        """All owners whose states lie in one block with those of ``owner``."""
        kept = self._kept.get(owner)
        if kept is None:
            return frozenset()
        return {other for other, held in self._kept.items() if held.block is kept.block}

    def keep(
        self,
        owners: Sequence[tuple[object, ...]],
        ids: Sequence[Ids],
        cache: RowCache,
        rows: Sequence[int],
        *,
        whole: bool = False,
    ) -> None:
        """Keep the states of ``ids`` (all but the last token were fed) from ``rows`` of ``cache``.

        ``whole`` keeps the cache's own tensors instead of a copy, for when nobody else goes on
        with them; what is kept then counts with its unused room.
        """
        chosen: list[int] = []
        cost: list[int] = []
        for index, owner in enumerate(owners):
            self.forget(owner)
            tokens = cache.capacity if whole else len(ids[index]) - 1
            if self._tokens + tokens <= self.budget:
                chosen.append(index)
                cost.append(tokens)
                self._tokens += tokens
        if not chosen:
            return
        block = RowCache()
        if whole:
            block.keys, block.values = list(cache.keys), list(cache.values)
            block.capacity = cache.capacity
            places = [rows[index] for index in chosen]
        else:
            length = max(len(ids[index]) for index in chosen) - 1
            block.capacity = length
            take = torch.tensor([rows[index] for index in chosen], device=cache.keys[0].device)
            block.keys = [keys[:, :, :length].index_select(0, take) for keys in cache.keys]
            block.values = [values[:, :, :length].index_select(0, take) for values in cache.values]
            places = list(range(len(chosen)))
        for place, index, tokens in zip(places, chosen, cost, strict=True):
            self._kept[owners[index]] = _Kept(ids[index][:-1], block, place, tokens)
