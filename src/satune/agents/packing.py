"""From an agent's own turns to padded batches of token ids.

Turns whose prompt begins with the whole of an earlier turn (prompt and completion) share one
sequence with it: a causal model gives every own token the same distribution either way, and a
long conversation is encoded once instead of once a turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from satune.types import Ids, Turn

# Larger batches are no faster on a CPU, and their activations are taken from and given back to the
# operating system each time, which is slow.
_LARGEST_ON_CPU = 4096


def padded_budget(tokens: int, device: torch.device) -> int:
    """How many padded tokens a micro-batch has on ``device`` where ``tokens`` are allowed."""
    return min(tokens, _LARGEST_ON_CPU) if device.type == "cpu" else tokens


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One sequence of ids; ``ids[positions[k]]`` is the flat own token ``tokens[k]``."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    episode: int


@dataclass(frozen=True, slots=True)
class PackedTurns:
    """One agent's own tokens in an experience, flat in the order episode, turn, token.

    ``targets_T`` the ids, ``episode_T`` and ``turn_T`` (counted over the whole experience) where
    each belongs; ``episodes`` E counts all episodes, also those in which the agent never spoke.
    """

    sequences: tuple[TokenSequence, ...]
    targets_T: Tensor
    episode_T: Tensor
    turn_T: Tensor
    episodes: int
    turns: int

    @property
    def tokens(self) -> int:
        return self.targets_T.numel()


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
    targets: list[int] = []
    episode_of: list[int] = []
    turn_of: list[int] = []
    turns = 0
    for episode, written in enumerate(own_turns):
        open_sequences: list[tuple[list[int], list[int], list[int]]] = []
        for turn in written:
            if turn.prompt_ids is None or turn.completion_ids is None:
                raise ValueError(
                    f"a turn of seat {turn.seat!r} has no token ids: it cannot be trained on"
                )
            prompt, completion = turn.prompt_ids, turn.completion_ids
            extended = next((s for s in open_sequences if list(prompt[: len(s[0])]) == s[0]), None)
            if extended is None:
                extended = ([], [], [])
                open_sequences.append(extended)
            ids, positions, tokens = extended
            ids.extend(prompt[len(ids) :])
            positions.extend(range(len(ids), len(ids) + len(completion)))
            tokens.extend(range(len(targets), len(targets) + len(completion)))
            ids.extend(completion)
            targets.extend(completion)
            episode_of.extend([episode] * len(completion))
            turn_of.extend([turns] * len(completion))
            turns += 1
        sequences.extend(
            TokenSequence(tuple(ids), tuple(positions), tuple(tokens), episode)
            for ids, positions, tokens in open_sequences
        )
    return PackedTurns(
        tuple(sequences),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(episode_of, dtype=torch.long),
        torch.tensor(turn_of, dtype=torch.long),
        len(own_turns),
        turns,
    )


def micro_batches(
    packed: PackedTurns,
    budget: int,
    episodes: Sequence[int] | None = None,
    *,
    whole_episodes: bool,
) -> Iterator[MicroBatch]:
    """Batches of at most ``budget`` padded tokens (one sequence or episode at least), by length.

    ``whole_episodes`` keeps the sequences of an episode together, which objectives over the sum of
    an episode's log-ratios need; scoring does not and buckets tighter.
    """
    wanted = None if episodes is None else set(episodes)
    units: dict[int, list[TokenSequence]] = {}
    for index, sequence in enumerate(packed.sequences):
        if wanted is None or sequence.episode in wanted:
            units.setdefault(sequence.episode if whole_episodes else index, []).append(sequence)
    ordered = sorted(
        units.values(), key=lambda unit: (max(len(s.ids) for s in unit), unit[0].tokens)
    )
    batch: list[TokenSequence] = []
    for unit in ordered:
        width = max(len(sequence.ids) for sequence in unit)
        if batch and (len(batch) + len(unit)) * width > budget:
            yield _collate(batch)
            batch = []
        batch.extend(unit)
    if batch:
        yield _collate(batch)


def padded(rows: Sequence[Ids], width: int) -> Tensor:
    """Ids [B, ``width``] (int64) with one of ``rows`` each, zeros on the right."""
    ids_BS = torch.zeros(len(rows), width, dtype=torch.long)
    for row, ids in enumerate(rows):
        ids_BS[row, : len(ids)] = torch.from_numpy(np.asarray(ids))
    return ids_BS


def _collate(sequences: Sequence[TokenSequence]) -> MicroBatch:
    # The last token of a sequence predicts nothing that is scored, so it is not fed.
    width = max(len(sequence.ids) for sequence in sequences) - 1
    input_ids = torch.zeros(len(sequences), max(width, 1), dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    tokens: list[int] = []
    for row, sequence in enumerate(sequences):
        fed = sequence.ids[:-1]
        input_ids[row, : len(fed)] = torch.tensor(fed, dtype=torch.long)
        rows.extend([row] * len(sequence.positions))
        columns.extend(position - 1 for position in sequence.positions)
        tokens.extend(sequence.tokens)
    return MicroBatch(
        input_ids,
        torch.tensor(rows, dtype=torch.long),
        torch.tensor(columns, dtype=torch.long),
        torch.tensor(tokens, dtype=torch.long),
        tuple(sorted({sequence.episode for sequence in sequences})),
    )
