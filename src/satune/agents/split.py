"""One experience over several processes: who scores which tokens, in how many micro-batches.

A process that had one micro-batch more than another would wait for it without end, since the
weights of each layer are gathered by all of them. So all have equal numbers, some of them empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from satune.agents.packing import MicroBatch, PackedTurns, micro_batches
from satune.agents.processes import Processes
from satune.agents.scoring import Scorer
from satune.core.logprobs import TokenScores

_NOWHERE = torch.empty(0, dtype=torch.long)
EMPTY = MicroBatch(torch.zeros(1, 1, dtype=torch.long), _NOWHERE, _NOWHERE, _NOWHERE, ())
"""A micro-batch of no own token: the model is fed a single id."""


def shares(packed: PackedTurns, count: int) -> tuple[PackedTurns, ...]:
    """``packed`` for each of ``count`` processes: all of its tokens, and some of its sequences.

    The longest come first, each to whoever has the fewest ids so far. Everybody finds the same.
    """
    owners: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    lengths = [len(sequence.ids) for sequence in packed.sequences]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        owner = min(range(count), key=loads.__getitem__)
        owners[owner].append(index)
        loads[owner] += lengths[index]
    return tuple(
        replace(
            packed,
            sequences=tuple(packed.sequences[index] for index in sorted(own)),
            _units={},
            _plans={},
        )
        for own in owners
    )


def padded_batches(
    parts: Sequence[PackedTurns], rank: int, budget: int, episodes: Sequence[int] | None
) -> Iterator[MicroBatch]:
    """The micro-batches of ``rank``'s part, followed by empty ones up to the number that the
    process with the most has."""
    plans = [part.plan(budget, episodes, whole_episodes=False) for part in parts]
    yield from micro_batches(parts[rank], budget, episodes, whole_episodes=False)
    for _ in range(max(map(len, plans)) - len(plans[rank])):
        yield EMPTY


@dataclass(frozen=True, slots=True)
class SplitScorer(Scorer):
    """A scorer of this process's share of every experience.

    A share is fixed by the experience alone, so that the states which a process holds are those of
    the tokens that it is asked for again. Prompts are not shared: the number of forwards would
    depend on the share.
    """

    processes: Processes
    _last: list[tuple[PackedTurns, tuple[PackedTurns, ...]]] = field(default_factory=list)

    @property
    def splits_episodes(self) -> bool:
        return True

    def together(self, *found: Tensor) -> tuple[Tensor, ...]:
        return self.processes.sum(torch.stack(found)).unbind()

    def everywhere(self, holds: bool) -> bool:
        return self.processes.everywhere(holds)

    def decided(self, value: float) -> float:
        return self.processes.decided(value)

    def batches(
        self,
        packed: PackedTurns,
        episodes: Sequence[int] | None = None,
        *,
        whole_episodes: bool = False,
    ) -> Iterator[MicroBatch]:
        assert not whole_episodes, "episodes are cut between processes"
        if not self._last or self._last[0][0] is not packed:
            self._last[:] = [(packed, shares(packed, self.processes.count))]
        parts = self._last[0][1]
        return padded_batches(parts, self.processes.rank, self.budget, episodes)

    def score(
        self, hidden_TH: Tensor, packed: PackedTurns, batch: MicroBatch, **wanted: Any
    ) -> TokenScores:
        if len(batch.tokens_T):
            return Scorer.score(self, hidden_TH, packed, batch, **wanted)
        # Every parameter has a part in what comes out, as in the other processes: FSDP sums only
        # the gradients that there are.
        row_NH = hidden_TH.new_zeros(1, hidden_TH.shape[-1])
        nothing_T = self.policy.project(row_NH).sum(-1)[:0] + hidden_TH.sum(-1)
        return TokenScores(*[nothing_T] * 5)
