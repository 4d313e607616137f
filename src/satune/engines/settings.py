"""How a server is asked. Nothing here needs the package that asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from satune.loading import KEY_VARIABLE
from satune.ranges import Count, Positive, Range, Whole, check


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How the server of a model at ``http://ADDRESS/v1#MODEL`` is asked.

    ``api_key_env`` names the environment variable that holds its key. ``concurrency`` bounds the
    requests at a time, ``retries`` how often one is repeated after a failure that may pass.
    ``timeout`` is what one request may take, in seconds; with ``stream`` what may pass between two
    pieces of its answer. ``requests_per_minute`` and ``tokens_per_minute`` set no limit when None.
    ``seed`` sends a seed made from each request's key, so that a server that heeds it answers the
    same again.
    Raises: ValueError if a value lies outside its range.
    """

    api_key_env: Annotated[str, Range(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = KEY_VARIABLE
    concurrency: Count = 32
    retries: Whole = 8
    timeout: Positive = 1200.0
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    stream: bool = False
    seed: bool = True

    def __post_init__(self) -> None:
        check(self, "server")
