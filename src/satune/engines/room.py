"""How many bytes an engine's keys and values may take, over all of its agents on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from satune.agents.memory import allowed_bytes
from satune.agents.policy import Policy
from satune.engines.cache import PrefixStore, RowCache
from satune.engines.request import Request


class Room:
    """``limit`` bytes for the rows that are decoded and for the turns that are kept in ``stores``.

    Rows go before kept turns: these are dropped, oldest first, where rows need the room, and the
    next turn then feeds its whole prompt. Of agents that decode side by side each has an equal
    share while it has requests in ``waiting``. While tensors grow, one layer's are there twice.
    """

    def __init__(
        self,
        limit: int,
        stores: Mapping[str, PrefixStore],
        waiting: Mapping[str, Sequence[Request]],
    ) -> None:
        self.limit = limit
        self._stores = stores
        self._waiting = waiting
        self._decoded: dict[str, RowCache] = {}

    def clear(self) -> None:
        """Nothing is decoded."""
        self._decoded.clear()

    def decodes(self, agent: str, cache: RowCache) -> None:
        """From now on the agent's rows lie in ``cache``."""
        self._decoded[agent] = cache

    def alone(self, agent: str) -> bool:
        """Whether no other agent has rows."""
        return not any(cache.rows for name, cache in self._decoded.items() if name != agent)

    @property
    def kept(self) -> int:
        """Bytes of the turns that are kept."""
        return sum(store.nbytes for store in self._stores.values())

    def left(self, agent: str) -> int:
        """Bytes that the agent's rows may take, those that they have included."""
        equal = self.limit // len(self._stores)
        others = sum(
            max(cache.nbytes, equal if self._waiting.get(name) else 0)
            for name, cache in self._decoded.items()
            if name != agent
        )
        return self.limit - others - self.kept

    def make(self, agent: str, wanted: int, *, keep: int = 0) -> int:
        """Drop kept turns until the agent's rows may take ``wanted`` bytes, or no more than
        ``keep`` bytes of kept turns are there; returns what the rows may take then."""
        for store in self._stores.values():
            while self.left(agent) < wanted and self.kept > keep and store.drop_oldest():
                pass
        return self.left(agent)


def rooms(
    memory: float,
    policies: Mapping[str, Policy],
    stores: Mapping[str, PrefixStore],
    waiting: Mapping[str, Sequence[Request]],
) -> dict[str, Room]:
    """The room of each agent, which those on one device share: up to 1 ``memory`` is a share of
    what is free there now, above 1 a number of bytes."""
    together: dict[torch.device, list[str]] = {}
    for name, policy in policies.items():
        together.setdefault(policy.device, []).append(name)
    found: dict[str, Room] = {}
    for device, names in together.items():
        own = {name: stores[name] for name in names}
        found |= dict.fromkeys(names, Room(allowed_bytes(memory, device), own, waiting))
    return found
