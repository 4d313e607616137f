"""What an owner remembers of the messages that the agent wrote: their ids, by handle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from satune.types import Completion, Episode, Ids, Key, LogProbs, Turn, UserError

_REMEMBERED = ("train", "certify")
"""The purposes of conversations that are scored afterwards."""
_IDS = ("prompt_ids", "completion_ids", "sampled_logprobs")

Part: TypeAlias = "tuple[Ids, Ids, LogProbs | None]"
"""Prompt, completion, and the log-probabilities that the engine gave."""


class Written:
    """Ids of the messages of one rollout for training and one certificate, the newest of each.

    Those of an earlier rollout go when the first message of a later one comes; what is drawn before
    the first stage, to hold engine and learner against one another, drives nothing out.
    """

    def __init__(self) -> None:
        self._of: dict[str, dict[str, Part]] = {purpose: {} for purpose in _REMEMBERED}
        self._drawn: dict[str, tuple[int, ...]] = {}

    def add(self, key: Key, prompt: Ids, completion: Completion) -> str | None:
        """Remember a completion; its handle, None where nobody will ask for it."""
        if key.purpose not in self._of:
            return None
        assert completion.ids is not None
        rollout = (key.stage, key.step, *([key.draw] if key.purpose == "certify" else []))
        if key.stage and self._drawn.get(key.purpose) != rollout:
            self._drawn[key.purpose] = rollout
            self._of[key.purpose].clear()
        named = hashlib.blake2b(repr((key, completion.version)).encode(), digest_size=12)
        handle = f"{key.purpose}-{named.hexdigest()}"
        self._of[key.purpose][handle] = (prompt, completion.ids, completion.logprobs)
        return handle

    def fill(self, agent: str, episodes: Sequence[Episode]) -> list[Episode]:
        """The episodes with the ids of the agent's turns in them. Raises UserError for a turn of
        which nothing is remembered."""
        return [replace(e, turns=tuple(self._filled(agent, t) for t in e.turns)) for e in episodes]

    def _filled(self, agent: str, turn: Turn) -> Turn:
        if turn.agent != agent:
            return turn
        purpose = (turn.handle or "").partition("-")[0]
        part = self._of.get(purpose, {}).get(turn.handle or "")
        if part is None:
            raise UserError(
                f"has no ids of a message of seat {turn.seat} that it is asked about; resume the"
                " run from its last checkpoint"
            )
        return replace(turn, **dict(zip(_IDS, part, strict=True)))

    # -- as rows of a checkpoint -----------------------------------------------------------------

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is remembered for training, as ``files.arrays.append_rows`` takes it."""
        turns = [
            {"handle": handle, **dict(zip(_IDS, part, strict=True))}
            for handle, part in self._of["train"].items()
        ]
        if turns:
            yield {"drawn": list(self._drawn.get("train", ())), "turns": turns}

    def take(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Remember what ``rows`` gave, and nothing else."""
        self.clear()
        for row in rows:
            self._drawn["train"] = tuple(row["drawn"])
            for turn in row["turns"]:
                prompt, completion, logprobs = (turn[name] for name in _IDS)
                self._of["train"][turn["handle"]] = (prompt, completion, logprobs)

    def clear(self) -> None:
        self._drawn.clear()
        for held in self._of.values():
            held.clear()
