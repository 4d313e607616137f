"""Prompts that several sequences of a batch begin with are fed once.

The samples of a problem share its prompt, often a good part of what is scored, and the prompts of
all problems may begin with one system message. Their keys and values are computed once and read by
every sequence that goes on from them; gradients flow back into them from all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from satune.agents.packing import MicroBatch
from satune.agents.policy import Policy

# Below this share of the tokens, a further forward costs more than it saves.
WORTH_SAVING = 0.15
# What all prompts begin with has a forward of its own from so many tokens on: one of fewer takes as
# long, since the weights are read whatever it is fed.
SHORTEST_OPENING = 16
# Rows whose beginnings end at different places need a mask each, of at most so many bytes together.
_LARGEST_MASK = 2**26
_NOWHERE = 1 << 60
"""The place of padding: behind every token, so that none attends to it."""


@dataclass(frozen=True, slots=True)
class Level:
    """Ids [R, S] that are fed together, row r after row ``parent_R[r]`` of the level before (None:
    nothing comes before). ``start_R`` is the place of a row's first id in its sequence,
    ``length_R`` how many of its ids are no padding. ``alike``: all rows, with what they go on from,
    have the same places."""

    ids_RS: Tensor
    start_R: Tensor
    length_R: Tensor
    parent_R: Tensor | None = None
    alike: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What is fed for a batch, level after level. The last one has all rows of the batch, each from
    its column ``first_B`` on."""

    levels: tuple[Level, ...]
    first_B: Tensor

    @property
    def tokens(self) -> int:
        """How many are fed, padding included."""
        return sum(level.ids_RS.numel() for level in self.levels)

    @property
    def mask_size(self) -> int:
        """Entries of the last level's mask where each of its rows needs its own."""
        return self.levels[-1].ids_RS.numel() * sum(level.ids_RS.shape[1] for level in self.levels)


def states_of(policy: Policy, batch: MicroBatch, *, share_prompts: bool) -> Tensor:
    """Hidden states [T, H] at ``(row_T, column_T)`` of a batch that lies on the policy's device."""
    plan = plan_sharing(batch) if share_prompts and policy.attends_to_everything else None
    if plan is None:
        return policy.hidden(batch.input_ids)[batch.row_T, batch.column_T]
    column_T = batch.column_T - plan.first_B[batch.row_T]
    return shared_hidden(policy, plan.levels)[batch.row_T, column_T]


def plan_sharing(batch: MicroBatch) -> Plan | None:
    """What of the batch's beginnings is worth feeding once; None where there is not enough of it.

    A row's beginning ends before the first state that is asked for, so that its own part holds all
    of them. All are cut where the shortest ends, unless it saves enough to cut each at its own end,
    and to feed what all of them begin with once.
    """
    rows, width = batch.input_ids.shape
    first_B = torch.full((rows,), width).to(batch.column_T)
    first_B.scatter_reduce_(0, batch.row_T, batch.column_T, "amin")
    if rows < 2 or int(first_B.min()) < 1:
        return None
    even = _cut_at(batch, first_B.min().expand(rows))
    cut = _cut_at(batch, first_B)
    uneven = Plan(with_opening(cut.levels, _alike(cut.levels[0])), cut.first_B)
    saved = even.tokens - uneven.tokens
    if worth_sharing(saved, batch.input_ids) and uneven.mask_size <= _LARGEST_MASK:
        return uneven
    return even if worth_sharing(rows * width - even.tokens, batch.input_ids) else None


def worth_sharing(saved: int, input_ids: Tensor) -> bool:
    """Whether so many tokens fewer to feed pay for a further forward."""
    return saved >= WORTH_SAVING * input_ids.numel()


def _cut_at(batch: MicroBatch, first_B: Tensor) -> Plan:
    """The plan under which row b's beginning ends before column ``first_B[b]``."""
    ids_BS = batch.input_ids
    width = ids_BS.shape[1]
    columns_S = torch.arange(width, device=ids_BS.device)
    beginning_BP = ids_BS.masked_fill(columns_S >= first_B[:, None], -1)[:, : int(first_B.max())]
    trunk_GP, trunk_B = torch.unique(beginning_BP, dim=0, return_inverse=True)
    length_G = (trunk_GP >= 0).sum(1)
    alike = bool((first_B == first_B[0]).all())
    trunk = Level(trunk_GP.clamp(min=0), torch.zeros_like(length_G), length_G, alike=alike)
    # Nothing is fed behind the last state that is asked for.
    longest = int((batch.column_T - first_B[batch.row_T]).max()) + 1
    column_BS = (first_B[:, None] + columns_S[:longest]).clamp(max=width - 1)
    length_B = (width - first_B).clamp(max=longest)
    own = Level(ids_BS.gather(1, column_BS), first_B, length_B, trunk_B, alike)
    return Plan((trunk, own), first_B)


def _alike(trunk: Level) -> int:
    """So many ids do all rows of a level begin with."""
    equal_P = (trunk.ids_RS == trunk.ids_RS[0]).all(0)
    return min(int(equal_P.long().cumprod(0).sum()), int(trunk.length_R.min()))


def with_opening(levels: tuple[Level, ...], alike: int) -> tuple[Level, ...]:
    """Trunks and the rows' own parts, with the ``alike`` ids that all trunks begin with as a level
    before them where that is worth it. Looks at no values."""
    trunk, own = levels
    count, width = trunk.ids_RS.shape
    if alike < SHORTEST_OPENING or alike * (count - 1) < WORTH_SAVING * count * width:
        return levels
    whole = torch.full_like(trunk.length_R[:1], alike)
    opening = Level(trunk.ids_RS[:1, :alike], trunk.start_R[:1], whole, alike=True)
    rest = Level(
        trunk.ids_RS[:, alike:],
        trunk.start_R + alike,
        trunk.length_R - alike,
        torch.zeros_like(trunk.length_R),
        trunk.alike,
    )
    return opening, rest, own


class _Branches(Cache):
    """Keys and values of one level's rows, each behind those of the row that it goes on from;
    ``places`` [R, C] has the place of each in its sequence."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.held: list[tuple[Tensor, Tensor]] = []
        self.places: Tensor = torch.empty(0, 0)
        self.parent_R: Tensor | None = None
        self.before = 0
        self.last = False

    def begin(self, level: Level, places_RS: Tensor, *, last: bool) -> None:
        """Take the rows of ``level`` next, whose ids have these places."""
        self.parent_R, self.last = level.parent_R, last
        if self.parent_R is not None:
            self.before = self.places.shape[1]
            places_RS = torch.cat([self.places.index_select(0, self.parent_R), places_RS], dim=1)
        self.places = places_RS

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states = key_states, value_states
        if self.parent_R is not None:
            held = (each.index_select(0, self.parent_R) for each in self.held[layer_idx])
            keys, values = (torch.cat(both, dim=2) for both in zip(held, states, strict=True))
            states = keys, values
        if not self.last:
            self.held[layer_idx : layer_idx + 1] = [states]
        return states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.before


def shared_hidden(policy: Policy, levels: Sequence[Level]) -> Tensor:
    """Hidden states [R, S, H] of the last of ``levels``."""
    cache = _Branches()
    hidden = torch.empty(0)
    for level in levels:
        columns_S = torch.arange(level.ids_RS.shape[1], device=level.ids_RS.device)
        # Padding stands where the last id does, so that no place is beyond what the model knows.
        position_RS = level.start_R[:, None] + columns_S.minimum(level.length_R[:, None] - 1)
        padding_RS = columns_S >= level.length_R[:, None]
        cache.begin(level, position_RS.masked_fill(padding_RS, _NOWHERE), last=level is levels[-1])
        places_RC = cache.places
        if level.alike:
            # One mask does for all rows, however many there are.
            places_RC, position_RS = places_RC[:1], position_RS[:1]
        seen_RSC = places_RC[:, None] <= position_RS[..., None]
        hidden = policy.hidden(
            level.ids_RS, attention_mask=seen_RSC[:, None], position_ids=position_RS, cache=cache
        )
    return hidden
