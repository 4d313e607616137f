"""Prompts that several sequences of a batch begin with are fed once.

The samples of a problem share its prompt, often a good part of what is scored. The prompt's keys
and values are computed once and read by every sample; gradients flow back into them from all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from satune.agents.packing import MicroBatch
from satune.agents.policy import Policy

# Below this share of the batch's tokens, two forwards cost more than they save.
_WORTH_SAVING = 0.15


@dataclass(frozen=True, slots=True)
class Plan:
    """Trunks [G, P], the distinct beginnings of a batch's rows, and which one each row [B] has."""

    trunk_ids: Tensor
    trunk_B: Tensor


class _Trunk(Cache):
    """Keys and values of the trunks; a row's own are put behind those of its trunk."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.held: list[tuple[Tensor, Tensor]] = []
        self.trunk_B: Tensor | None = None
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.trunk_B is None:
            self.held.append((key_states, value_states))
            return key_states, value_states
        keys, values = (held.index_select(0, self.trunk_B) for held in self.held[layer_idx])
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.trunk_B is None else self.length


def states_of(policy: Policy, batch: MicroBatch, *, share_prompts: bool) -> Tensor:
    """Hidden states [T, H] at ``(row_T, column_T)`` of a batch that lies on the policy's device."""
    plan = plan_sharing(batch) if share_prompts and policy.attends_to_everything else None
    if plan is None:
        return policy.hidden(batch.input_ids)[batch.row_T, batch.column_T]
    hidden = shared_hidden(policy, batch.input_ids, plan)
    return hidden[batch.row_T, batch.column_T - plan.trunk_ids.shape[1]]


def plan_sharing(batch: MicroBatch) -> Plan | None:
    """The beginnings worth feeding once; None where there are not enough of them.

    They end before the first state that is asked for, so that the rows' own parts hold all states.
    """
    rows, width = batch.input_ids.shape
    first_B = torch.full((rows,), width).to(batch.column_T)
    first_B.scatter_reduce_(0, batch.row_T, batch.column_T, "amin")
    length = int(first_B.min())
    if rows < 2 or not worth_sharing(length * (rows - 1), batch.input_ids):
        return None
    trunk_ids, trunk_B = torch.unique(batch.input_ids[:, :length], dim=0, return_inverse=True)
    if not worth_sharing(length * (rows - trunk_ids.shape[0]), batch.input_ids):
        return None
    return Plan(trunk_ids, trunk_B)


def worth_sharing(saved: int, input_ids: Tensor) -> bool:
    """Whether so many tokens fewer to feed pay for a second forward."""
    return saved >= _WORTH_SAVING * input_ids.numel()


def shared_hidden(policy: Policy, input_ids: Tensor, plan: Plan) -> Tensor:
    """Hidden states [B, S - P, H] of the columns from P on of ``input_ids`` [B, S]."""
    length, width = plan.trunk_ids.shape[1], input_ids.shape[1]
    cache = _Trunk()
    positions_S = torch.arange(width, device=input_ids.device)[None]

    def feed(ids: Tensor, begin: int, end: int) -> Tensor:
        visible = torch.ones(end - begin, end, dtype=torch.bool, device=input_ids.device)
        return policy.hidden(
            ids,
            attention_mask=visible.tril(begin)[None, None],
            position_ids=positions_S[:, begin:end],
            cache=cache,
        )

    feed(plan.trunk_ids, 0, length)
    cache.trunk_B, cache.length = plan.trunk_B, length
    return feed(input_ids[:, length:], length, width)
