"""How fast a server may be asked: requests a minute, tokens a minute, and pauses it asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

LONGEST_PAUSE = 600.0
"""Seconds that nobody is kept waiting for longer, whatever a server says."""


class Pace:
    """Spaces requests evenly at ``requests`` a minute and holds tokens to ``tokens`` a minute.

    What a request costs in tokens is known only when it is answered. So ``spent`` draws on an
    allowance that refills steadily (up to one minute's worth), and requests wait while it is
    overdrawn, at most ``LONGEST_PAUSE``. None sets no limit. ``clock`` gives seconds.
    """

    def __init__(
        self,
        requests: float | None = None,
        tokens: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._between = 60.0 / requests if requests else 0.0
        self._tokens = tokens
        self._clock = clock
        self._sleep = sleep
        self._next = clock()
        self._allowance = tokens or 0.0
        self._counted = clock()

    async def turn(self) -> None:
        """Wait until the next request may start."""
        while True:
            now = self._clock()
            wait = max(self._next - now, self._overdrawn(now))
            if wait <= 0:
                self._next = now + self._between
                return
            await self._sleep(wait)

    def spent(self, tokens: int) -> None:
        """A reply came that cost so many tokens."""
        if self._tokens:
            self._overdrawn(self._clock())
            deepest = -self._tokens * LONGEST_PAUSE / 60.0
            self._allowance = max(deepest, self._allowance - max(0, tokens))

    def pause(self, seconds: float) -> None:
        """The server asked for a pause: nobody starts before it is over, or ``LONGEST_PAUSE``."""
        self._next = max(self._next, self._clock() + min(seconds, LONGEST_PAUSE))

    def _overdrawn(self, now: float) -> float:
        """Seconds until the allowance is no longer overdrawn."""
        if not self._tokens:
            return 0.0
        refill = (now - self._counted) * self._tokens / 60.0
        self._allowance = min(self._tokens, self._allowance + refill)
        self._counted = now
        return max(0.0, -self._allowance * 60.0 / self._tokens)
