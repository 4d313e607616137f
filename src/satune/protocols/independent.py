"""Protocols without an exchange: one seat alone, or a vote among answers given independently."""

from __future__ import annotations

from satune.types import Conversation, UserError


async def solo(talk: Conversation, turns: int = 1) -> str | None:
    """The first seat alone writes ``turns`` messages; the last one is the answer."""
    at_least_one("solo", "turns", turns)
    for _ in range(turns):
        last = await talk.say(talk.seats[0])
    return last.text


async def vote(talk: Conversation) -> str | None:
    """Every seat answers at once, none seeing another's answer; the majority decides."""
    return talk.majority(await talk.all_say(talk.seats))


def at_least_one(protocol: str, option: str, value: int) -> None:
    """Raises UserError unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"protocol {protocol}: {option} is {value!r}; give an integer from 1 up")
