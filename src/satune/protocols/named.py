"""The protocols by name, and how a recipe's protocol becomes a function of the conversation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from satune.loading import check_options, nearest_hint, pick
from satune.protocols.discussion import debate, judge, role_play
from satune.protocols.independent import solo, vote
from satune.protocols.sequential import chain, random_routing, round_robin
from satune.types import TeamProtocol, UserError

PROTOCOLS: dict[str, Callable[..., Awaitable[str | None]]] = {
    "solo": solo,
    "vote": vote,
    "chain": chain,
    "round_robin": round_robin,
    "random_routing": random_routing,
    "debate": debate,
    "judge": judge,
    "role_play": role_play,
}

UNREAD = frozenset({"solo", "chain", "round_robin", "random_routing", "judge", "role_play"})
"""Those that never ask what answer a message holds."""


def load_protocol(
    name_or_path: str, seats: Sequence[str], base: Path | None = None, /, **options: Any
) -> TeamProtocol:
    """The protocol of that name, or the user's own (``file.py:name``, ``package.module:name``),
    with its options filled in. ``base`` is where relative files are sought.

    The options ``judge`` (a seat) and ``roles`` (a mapping from seats) are held against ``seats``.
    Raises UserError for an unknown protocol, option or seat, and for a function that is not async.
    """
    function = pick("protocol", name_or_path, PROTOCOLS, base)
    if not inspect.iscoroutinefunction(function):
        raise UserError(f"protocol {name_or_path}: not an async function; write `async def`")
    check_options(f"protocol {name_or_path}", function, options, skip=1)
    named = [options["judge"]] if isinstance(options.get("judge"), str) else []
    named += list(options.get("roles") or {})
    for seat in named:
        if seat not in seats:
            raise UserError(f"protocol {name_or_path}: no seat {seat!r}{nearest_hint(seat, seats)}")
    return functools.partial(function, **options)
