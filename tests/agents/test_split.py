"""How one experience is divided over processes; no process is needed for that."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from satune.agents.packing import PackedTurns, pack
from satune.agents.split import EMPTY, padded_batches, shares
from tiny_models import turn

lengths = st.lists(st.lists(st.integers(1, 12), max_size=3), min_size=1, max_size=8)


def experience(own: list[list[int]]) -> PackedTurns:
    """Episodes whose turns have these many own tokens; no turn goes on from another."""
    return pack(
        [
            [turn([1 + (10 * e + t) % 12] * 3, [2] * count) for t, count in enumerate(turns)]
            for e, turns in enumerate(own)
        ]
    )


@given(lengths, st.integers(1, 5))
def test_every_sequence_has_one_owner_and_loads_are_even(own: Any, count: int) -> None:
    packed = experience(own)
    parts = shares(packed, count)
    owned = [sequence for part in parts for sequence in part.sequences]
    assert sorted(map(id, owned)) == sorted(map(id, packed.sequences))
    # Whoever has the most took the last one when it had the fewest.
    loads = [sum(len(sequence.ids) for sequence in part.sequences) for part in parts]
    longest = max((len(sequence.ids) for sequence in packed.sequences), default=0)
    assert max(loads) - min(loads) <= longest
    assert all(part.targets_T is packed.targets_T for part in parts)


@given(lengths, st.integers(1, 4), st.integers(4, 40), st.data())
def test_all_have_equal_numbers_of_micro_batches(
    own: Any, count: int, budget: int, data: Any
) -> None:
    packed = experience(own)
    chosen = data.draw(st.none() | st.sets(st.sampled_from(range(len(own)))).map(sorted))
    parts = shares(packed, count)
    batches = [list(padded_batches(parts, rank, budget, chosen)) for rank in range(count)]
    assert len({len(each) for each in batches}) == 1
    tokens_T = torch.cat([b.tokens_T for each in batches for b in each] or [EMPTY.tokens_T])
    wanted_T = torch.ones(packed.tokens, dtype=torch.bool)
    if chosen is not None:
        wanted_T = torch.isin(packed.episode_T, torch.tensor(chosen, dtype=torch.long))
    assert tokens_T.sort().values.tolist() == wanted_T.nonzero().squeeze(-1).tolist()
    # Who has one at all has one that is not empty.
    assert not batches[0] or any(len(each[0].tokens_T) for each in batches)
