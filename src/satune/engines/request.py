"""What the local engine is asked for: one completion, and what of it is written."""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
from dataclasses import dataclass, field

from satune.engines.cache import rounded
from satune.types import Completion, Ids, Key, Sampling, ids_of

ConversationId = tuple[object, ...]

# Places a cache holds free for tokens to come; it grows beyond when they do.
ROOM_AHEAD = 256


@dataclass(slots=True, eq=False)
class Request:
    """A completion that is waited for, and what of it is written. ``future`` is an event loop's, or
    that of a caller who has none.

    Requests come into a batch, and are given up, by ``place``: their keys, or when they came.
    """

    key: Key
    ids: Ids
    sampling: Sampling
    future: asyncio.Future[Completion] | concurrent.futures.Future[Completion]
    place: Key | int
    rng: random.Random = field(init=False)
    written: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = self.key.rng("tokens")

    @property
    def conversation(self) -> ConversationId:
        return conversation_id(self.key)

    @property
    def fed(self) -> Ids:
        """What its next token is sampled after: the prompt, and what was written before its row
        was given up."""
        return self.ids + ids_of(self.written) if self.written else self.ids

    @property
    def remaining(self) -> int:
        """The most tokens that may still be written."""
        return self.sampling.max_new_tokens - len(self.written)

    @property
    def ahead(self) -> int:
        """Places that its row is given to begin with."""
        return rounded(len(self.ids) + len(self.written) + min(self.remaining, ROOM_AHEAD))

    @property
    def owner(self) -> ConversationId:
        return (*self.conversation, self.key.seat)


def conversation_id(key: Key) -> ConversationId:
    """What the keys of all turns of one conversation have in common."""
    return (key.stage, key.step, key.draw, key.problem, key.sample, key.copy)
