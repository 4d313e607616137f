"""Protocols in which one seat speaks at a time and every seat sees the whole exchange."""

from __future__ import annotations

import random

from satune.protocols.independent import at_least_one
from satune.types import Conversation


async def chain(talk: Conversation, rounds: int = 1) -> str | None:
    """Seat after seat goes on from what was said before, ``rounds`` times; the last message is the
    answer."""
    at_least_one("chain", "rounds", rounds)
    for _ in range(rounds):
        for seat in talk.seats:
            last = await talk.say(seat)
    return last.text


async def round_robin(talk: Conversation, turns: int = 1) -> str | None:
    """The next ``turns`` seats in cyclic order; the last message is the answer.

    Who is next follows from the number of messages so far, so that in an environment the seats
    take turns from action to action.
    """
    at_least_one("round_robin", "turns", turns)
    for _ in range(turns):
        last = await talk.say(talk.seats[len(talk.turns) % len(talk.seats)])
    return last.text


async def random_routing(talk: Conversation, turns: int | None = None) -> str | None:
    """``turns`` seats drawn at random, with replacement; the last message is the answer.

    ``turns`` defaults to the number of seats, and to 1 for each action in an environment. The
    route is a function of the seed alone and is drawn before anybody speaks: a routing rule that
    looked at messages would be part of what is trained (THEORY §1 keeps it in the environment).
    """
    if turns is None:
        turns = 1 if talk.acting else len(talk.seats)
    at_least_one("random_routing", "turns", turns)
    # A copy of the conversation's generator gives the same endless route at every action.
    generator = random.Random()
    generator.setstate(talk.rng.getstate())
    said = len(talk.turns)
    route = [generator.choice(talk.seats) for _ in range(said + turns)][said:]
    for seat in route:
        last = await talk.say(seat)
    return last.text
