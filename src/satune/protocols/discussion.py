"""Protocols in which seats discuss: debate, a debate before a judge, and roles by seat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from satune.protocols.independent import at_least_one
from satune.types import Conversation, UserError

JUDGE = "You decide for the team. Weigh the answers above and state the one that is right."

ROLES = {
    "planner": "You plan. Outline the steps that lead to the answer, without carrying them out.",
    "solver": "You solve. Carry out the plan and state the answer.",
    "critic": "You check. Point out every mistake in the solution above, or confirm it.",
}
REVISION = "You solve. Take the remarks above into account and state the final answer."


async def debate(talk: Conversation, rounds: int = 2) -> str | None:
    """All seats write at once, ``rounds`` times, seeing the rounds before; the majority of the
    last round decides."""
    at_least_one("debate", "rounds", rounds)
    for _ in range(rounds):
        turns = await talk.all_say(talk.seats)
    return talk.majority(turns)


async def judge(talk: Conversation, rounds: int = 1, judge: str | None = None) -> str | None:
    """The other seats debate for ``rounds`` rounds, then the seat ``judge`` (default: the last
    seat) decides; its message is the answer.

    Raises UserError for a team of one seat and for a judge that is not a seat.
    """
    at_least_one("judge", "rounds", rounds)
    if len(talk.seats) < 2:
        raise UserError("protocol judge: it needs at least two seats, debaters and a judge")
    decider = talk.seats[-1] if judge is None else judge
    debaters = [seat for seat in talk.seats if seat != decider]
    for _ in range(rounds):
        await talk.all_say(debaters)
    return (await talk.say(decider, JUDGE)).text


async def role_play(
    talk: Conversation, roles: Mapping[str, str] | None = None, rounds: int = 1
) -> str | None:
    """Planner, solver, critic, and the solver's revision, which is the answer; critic and revision
    are repeated ``rounds`` times.

    ``roles`` maps each seat to "planner", "solver" or "critic". Without it the first seat plans,
    the second solves and the rest criticise. Several seats of one role speak one after the other;
    the first solver revises.

    Raises UserError for an unknown role or seat, and if a role has no seat.
    """
    at_least_one("role_play", "rounds", rounds)
    planners, solvers, critics = _cast(talk.seats, roles)
    for seat in planners:
        await talk.say(seat, ROLES["planner"])
    for seat in solvers:
        await talk.say(seat, ROLES["solver"])
    for _ in range(rounds):
        for seat in critics:
            await talk.say(seat, ROLES["critic"])
        last = await talk.say(solvers[0], REVISION)
    return last.text


def _cast(
    seats: Sequence[str], roles: Mapping[str, str] | None
) -> tuple[list[str], list[str], list[str]]:
    if roles is None:
        by_order = ["planner", "solver"] + ["critic"] * max(len(seats) - 2, 0)
        roles = dict(zip(seats, by_order, strict=False))
    for seat, role in roles.items():
        if seat not in seats:
            raise UserError(f"protocol role_play: no seat {seat!r}; there are {', '.join(seats)}")
        if role not in ROLES:
            raise UserError(
                f"protocol role_play: seat {seat!r} has the unknown role {role!r}; "
                f"the roles are {', '.join(ROLES)}"
            )
    cast = [[seat for seat in seats if roles.get(seat) == role] for role in ROLES]
    for role, members in zip(ROLES, cast, strict=True):
        if not members:
            raise UserError(
                f"protocol role_play: no seat is the {role}; name three seats or give `roles`"
            )
    return cast[0], cast[1], cast[2]
