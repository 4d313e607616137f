"""From an agent's own turns to padded batches of token ids.

Turns whose prompt begins with the whole of an earlier turn (prompt and completion) share one
sequence with it: a causal model gives every own token the same distribution either way, and a
long conversation is encoded once instead of once a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from satune.files.arrays import merge
from satune.types import Ids, LogProbs, Turn

# Larger batches are no faster on a CPU, and their activations are taken from and given back to the
# operating system each time, which is slow.
_LARGEST_ON_CPU = 4096


def padded_budget(tokens: int, device: torch.device) -> int:
    """How many padded tokens a micro-batch has on ``device`` where ``tokens`` are allowed."""
    return min(tokens, _LARGEST_ON_CPU) if device.type == "cpu" else tokens


class Span(NamedTuple):
    """``count`` own tokens that follow one another: the flat ones from ``token`` on, which stand in
    their sequence from ``position`` on."""

    position: int
    token: int
    count: int


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One sequence of ids that the model is fed, and where in it the own tokens of ``episode``
    stand: one span a turn."""

    ids: Ids
    spans: tuple[Span, ...]
    episode: int


Unit = tuple[TokenSequence, ...]
"""Sequences that go into one micro-batch."""


@dataclass(frozen=True, slots=True)
class PackedTurns:
    """One agent's own tokens in an experience, flat in the order episode, turn, token.

    ``targets_T`` the ids, ``episode_T`` and ``turn_T`` (counted over the whole experience) where
    each belongs, int64; ``sampled_T`` their log-probabilities as the engine gave them, float32
    (None where it gave none for some); ``episodes`` E counts all episodes, also those in which the
    agent never spoke.
    """

    sequences: tuple[TokenSequence, ...]
    targets_T: Tensor
    episode_T: Tensor
    turn_T: Tensor
    sampled_T: Tensor | None
    episodes: int
    turns: int
    _units: dict[bool, tuple[Unit, ...]] = field(default_factory=dict, repr=False, compare=False)
    _plans: dict[tuple[int, bool], tuple[Unit, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def tokens(self) -> int:
        return self.targets_T.numel()

    def units(self, per: str) -> Tensor:
        """The number [T] of each token's episode, turn or token, as ``per`` says."""
        if per == "token":
            return torch.arange(self.tokens)
        return self.turn_T if per == "turn" else self.episode_T

    def plan(
        self, budget: int, episodes: Sequence[int] | None, *, whole_episodes: bool
    ) -> tuple[Unit, ...]:
        """The sequences of each micro-batch; see ``micro_batches``. A step asks for that of the
        whole experience (``episodes`` None) again and again; it is made once."""
        if episodes is None:
            name = (budget, whole_episodes)
            if name not in self._plans:
                self._plans[name] = _filled(self._ordered(whole_episodes), budget)
            return self._plans[name]
        wanted = set(episodes)
        units = self._ordered(whole_episodes)
        return _filled([unit for unit in units if unit[0].episode in wanted], budget)

    def longer_than(self, budget: int, episodes: Sequence[int]) -> set[int]:
        """Those of ``episodes`` that are more than ``budget`` padded tokens and could be cut."""
        wanted = set(episodes)
        return {
            unit[0].episode
            for unit in self._ordered(whole_episodes=True)
            if unit[0].episode in wanted and len(unit) > 1 and len(unit) * _width(unit) > budget
        }

    def _ordered(self, whole_episodes: bool) -> tuple[Unit, ...]:
        """All units by length, those of one length by their first own token."""
        if whole_episodes not in self._units:
            units: dict[int, list[TokenSequence]] = {}
            for index, sequence in enumerate(self.sequences):
                name = sequence.episode if whole_episodes else index
                units.setdefault(name, []).append(sequence)
            self._units[whole_episodes] = tuple(
                sorted(map(tuple, units.values()), key=lambda u: (_width(u), _first_token(u)))
            )
        return self._units[whole_episodes]


def _width(unit: Unit) -> int:
    return max(len(sequence.ids) for sequence in unit)


def _first_token(unit: Unit) -> int:
    return next((span.token for span in unit[0].spans if span.count), -1)


def _filled(units: Iterable[Unit], budget: int) -> tuple[Unit, ...]:
    """``units``, which come by length, put together up to ``budget`` padded tokens."""
    batches: list[Unit] = []
    batch: list[TokenSequence] = []
    for unit in units:
        if batch and (len(batch) + len(unit)) * _width(unit) > budget:
            batches.append(tuple(batch))
            batch = []
        batch.extend(unit)
    return (*batches, tuple(batch)) if batch else tuple(batches)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Right-padded ids [B, S] and where the own tokens are.

    The hidden state at ``(row_T, column_T)`` predicts flat own token ``tokens_T``.
    """

    input_ids: Tensor
    row_T: Tensor
    column_T: Tensor
    tokens_T: Tensor
    episodes: tuple[int, ...]

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self
        return MicroBatch(
            self.input_ids.to(device),
            self.row_T.to(device),
            self.column_T.to(device),
            self.tokens_T,
            self.episodes,
        )


def pack(own_turns: Sequence[Sequence[Turn]]) -> PackedTurns:
    """Pack ``own_turns[e]``, the agent's turns in episode e in the order they were written.

    Raises ValueError for a turn without token ids: it cannot be trained on.
    """
    sequences: list[TokenSequence] = []
    completions: list[Ids] = []
    sampled: list[LogProbs] = []
    episode_N: list[int] = []
    token = 0
    for episode, written in enumerate(own_turns):
        merged: list[Ids] = []
        spans: list[list[Span]] = []
        for turn in written:
            prompt, completion = turn.prompt_ids, turn.completion_ids
            if prompt is None or completion is None:
                raise ValueError(
                    f"a turn of seat {turn.seat!r} has no token ids: it cannot be trained on"
                )
            place = merge(merged, prompt, completion)
            if place == len(spans):
                spans.append([])
            spans[place].append(Span(len(prompt), token, len(completion)))
            completions.append(completion)
            if turn.sampled_logprobs is not None:
                sampled.append(turn.sampled_logprobs)
            episode_N.append(episode)
            token += len(completion)
        sequences.extend(
            TokenSequence(ids, tuple(of_ids), episode)
            for ids, of_ids in zip(merged, spans, strict=True)
        )
    count_N = torch.tensor([len(ids) for ids in completions], dtype=torch.long)
    sampled_T = _joined(sampled, np.float32)
    return PackedTurns(
        sequences=tuple(sequences),
        targets_T=_joined(completions, np.int32).long(),
        episode_T=torch.tensor(episode_N, dtype=torch.long).repeat_interleave(count_N),
        turn_T=torch.arange(len(completions)).repeat_interleave(count_N),
        sampled_T=sampled_T if sampled_T.numel() == token else None,
        episodes=len(own_turns),
        turns=len(completions),
    )


def _joined(arrays: Sequence[Ids] | Sequence[LogProbs], kind: type[np.generic]) -> Tensor:
    """One flat tensor of all ``arrays``, which hold numbers of ``kind``."""
    return torch.from_numpy(np.concatenate([np.zeros(0, kind), *map(np.asarray, arrays)]))


def micro_batches(
    packed: PackedTurns,
    budget: int,
    episodes: Sequence[int] | None = None,
    *,
    whole_episodes: bool,
) -> Iterator[MicroBatch]:
    """Batches of at most ``budget`` padded tokens (one sequence or episode at least), by length.

    ``whole_episodes`` keeps the sequences of an episode together, which objectives over the sum of
    an episode's log-ratios need; scoring does not and buckets tighter. ``episodes`` None is all.
    """
    return map(_collate, packed.plan(budget, episodes, whole_episodes=whole_episodes))


def mini_batches(order: Sequence[int], parts: int) -> list[list[int]]:
    """``order`` cut into at most ``parts`` pieces whose lengths differ by one at most."""
    parts = min(parts, len(order))
    bounds = [len(order) * part // parts for part in range(parts + 1)]
    return [list(order[a:b]) for a, b in pairwise(bounds)]


def padded(rows: Sequence[Ids], width: int) -> Tensor:
    """Ids [B, ``width``] (int64) with one of ``rows`` each, zeros on the right."""
    ids_BS = np.zeros((len(rows), width), dtype=np.int64)
    for row, ids in enumerate(rows):
        ids_BS[row, : len(ids)] = np.asarray(ids)
    return torch.from_numpy(ids_BS)


def _collate(unit: Unit) -> MicroBatch:
    # The last token of a sequence predicts nothing that is scored, so it is not fed.
    width = _width(unit) - 1
    placed = [(row, *span) for row, sequence in enumerate(unit) for span in sequence.spans]
    row_N, position_N, token_N, count_N = np.array(placed, dtype=np.int64).reshape(-1, 4).T
    # How far each own token stands behind the first of its span.
    within_T = np.arange(count_N.sum()) - np.repeat(np.cumsum(count_N) - count_N, count_N)
    return MicroBatch(
        padded([sequence.ids[:-1] for sequence in unit], max(width, 1)),
        torch.from_numpy(np.repeat(row_N, count_N)),
        torch.from_numpy(np.repeat(position_N - 1, count_N) + within_T),
        torch.from_numpy(np.repeat(token_N, count_N) + within_T),
        tuple(sorted({sequence.episode for sequence in unit})),
    )
