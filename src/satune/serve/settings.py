"""What a served team bears. Nothing here loads a library."""

from __future__ import annotations

from dataclasses import dataclass

from satune.ranges import Count, Positive, Whole, check

LOOPBACK = "127.0.0.1"
MODEL = "team"
"""What requests call the team; a seat alone is ``team/SEAT``."""


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Limits of a served team.

    ``concurrency`` bounds the conversations that are played at a time and ``waiting`` those that
    wait for one to end; whoever comes then is told to come again. ``choices`` bounds the answers to
    one request, ``body`` its bytes and ``arrival`` the seconds in which they have to come.
    Raises: ValueError if a value lies outside its range.
    """

    concurrency: Count = 256
    waiting: Whole = 256
    choices: Count = 128
    body: Count = 4 * 2**20
    arrival: Positive = 60.0

    def __post_init__(self) -> None:
        check(self, "serve")
