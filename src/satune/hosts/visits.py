"""Those who ask an agent at its owner and do not train it: evaluations, and teams that are served.

Each visit has an engine of its own, so that what one asks is in no batch of another's, nor in one
of the run that trains the agent: every visitor is answered as if it were alone.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from satune.engines.local import LocalEngine
from satune.hosts.speaker import Speaker
from satune.hosts.wire import Estranged
from satune.types import Renderer

MOST = 16
"""So many visits are remembered. The one that has asked nothing for longest goes first."""
IDLE = 600.0
"""Seconds after which a visit that asks nothing is over: what it holds may be needed."""


class Visits:
    """The visits to the agent ``name``, whose messages have at most ``max_new_tokens``.

    ``make`` gives a new engine that samples from the agent for these seats. ``facts`` is what a
    visitor is told of how the agent speaks, as plain values.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[Mapping[str, str]], LocalEngine],
        renderer: Renderer,
        max_new_tokens: int,
        facts: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.facts = dict(facts)
        self._make = make
        self._renderer = renderer
        self._max_new_tokens = max_new_tokens
        self._speakers: dict[str, Speaker] = {}
        self._asked: dict[str, float] = {}

    def end_idle(self) -> None:
        """Forget those who have asked nothing for long."""
        now = time.monotonic()
        for visit in [v for v, asked in self._asked.items() if now - asked > IDLE]:
            self.leave(visit)

    def enter(self, seats: Sequence[str]) -> str:
        """Begin a visit in which the agent fills ``seats``; the name of the visit."""
        self.end_idle()
        while len(self._speakers) >= MOST:
            self.leave(next(iter(self._speakers)))
        engine = self._make(dict.fromkeys(seats, self.name))
        visit = secrets.token_hex(8)
        self._asked[visit] = time.monotonic()
        self._speakers[visit] = Speaker(self.name, engine, self._renderer, self._max_new_tokens)
        return visit

    def speaker(self, visit: str) -> Speaker:
        """What speaks in a visit. Raises Estranged where nothing is known of it."""
        found = self._speakers.pop(visit, None)
        if found is None:
            raise Estranged("knows nothing of this visit: it was started anew, or many came since")
        self._speakers[visit] = found  # the newest stands last
        self._asked[visit] = time.monotonic()
        return found

    def leave(self, visit: str) -> None:
        """Forget a visit, if it is known."""
        self._speakers.pop(visit, None)
        self._asked.pop(visit, None)
