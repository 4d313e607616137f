"""Blocksworld in short: stacks as strings, plans as moves of two characters, shortest plans.

"AB/C" is a table with two stacks, B on A, and C beside them. A goal is written alike: "CBA" wants B
on C and A on B and nothing else. The move "BA" puts B on A, "B-" puts it on the table. Blocks are
capital letters here, small ones in problems.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import random
import re
from collections.abc import Mapping, Sequence

from satune.tasks.strips import Fact, Instance, PddlError
from satune.thoughts import without_thoughts

Below = dict[str, str]
"""What each block stands on, "-" for the table."""

TABLE = "-"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_STACKS = re.compile(r"[A-Z]+(?:/[A-Z]+)*")
_MOVES = re.compile(r"(?<![\w/-])((?:[A-Z][A-Z-])+)(?![\w/-])")


def read_stacks(text: str) -> Below:
    """Raises ValueError for text of another form or a block that stands twice."""
    if not _STACKS.fullmatch(text):
        raise ValueError(f"{text!r} is not of the form AB/C")
    below: Below = {}
    for stack in text.split("/"):
        for under, block in zip(TABLE + stack, stack, strict=False):
            if block in below:
                raise ValueError(f"{text!r} holds {block} twice")
            below[block] = under
    return below


def write_stacks(below: Mapping[str, str]) -> str:
    """Stacks in the order of their lowest blocks. A block that is only stood upon is a lowest."""
    on_top = {under: block for block, under in below.items() if under != TABLE}
    lowest = {b for b, under in below.items() if under == TABLE} | (set(on_top) - set(below))
    stacks = []
    for block in sorted(lowest):
        stack = ""
        while block:
            stack += block
            block = on_top.get(block, "")
        stacks.append(stack)
    return "/".join(stacks)


def goal_of(text: str) -> Below:
    """The goal that stacks describe: what stands on what, nothing about the table."""
    return {block: under for block, under in read_stacks(text).items() if under != TABLE}


def is_clear(below: Mapping[str, str], block: str) -> bool:
    return block in below and block not in below.values()


def legal_moves(below: Mapping[str, str]) -> list[str]:
    """Every move that changes something."""
    clear = [block for block in sorted(below) if is_clear(below, block)]
    return [
        block + onto
        for block in clear
        for onto in [*clear, TABLE]
        if onto not in (block, below[block])
    ]


def reached(below: Mapping[str, str], goal: Mapping[str, str]) -> bool:
    return all(below.get(block) == under for block, under in goal.items())


def must_move(below: Mapping[str, str], goal: Mapping[str, str]) -> int:
    """How many blocks have to move at least once: those that the goal wants on another block than
    they are on, and all that stand on such a one."""
    settled: dict[str, bool] = {TABLE: True}

    def stays(block: str) -> bool:
        if block not in settled:
            under = below[block]
            settled[block] = goal.get(block, under) == under and stays(under)
        return settled[block]

    return sum(not stays(block) for block in below)


@functools.lru_cache(maxsize=1 << 16)
def shortest_moves(stacks: str, goal: str) -> tuple[str, ...]:
    """A shortest sequence of moves (of two actions each) to the goal; always the same one.

    A* whose bound is ``must_move``: it grows by one at most with a move, so that a state is final
    when it is first taken up. Raises ValueError for a goal that cannot be reached.
    """
    start, wanted = read_stacks(stacks), goal_of(goal)
    done: set[str] = set()
    order = itertools.count()
    waiting: list[tuple[int, int, int, Below, tuple[str, ...]]] = []
    heapq.heappush(waiting, (must_move(start, wanted), 0, next(order), start, ()))
    while waiting:
        _, _, _, below, moves = heapq.heappop(waiting)
        if reached(below, wanted):
            return moves
        name = write_stacks(below)
        if name in done:
            continue
        done.add(name)
        for move in legal_moves(below):
            after = {**below, move[0]: move[1]}
            # Of equal bounds the longer plan goes first: it is nearer to the goal.
            bound = len(moves) + 1 + must_move(after, wanted)
            entry = (bound, -len(moves) - 1, next(order), after, (*moves, move))
            heapq.heappush(waiting, entry)
    raise ValueError(f"the goal {goal!r} cannot be reached from {stacks!r}")


def after_moves(below: Mapping[str, str], moves: Sequence[str]) -> Below:
    """The state that legal moves lead to; the first that is not legal ends it."""
    now = dict(below)
    for block, onto in moves:
        free = onto == TABLE or (onto != block and is_clear(now, onto))
        if not (is_clear(now, block) and free):
            break
        now[block] = onto
    return now


def read_moves(text: str) -> list[str] | None:
    """The moves that a message ends with, as in "C-BC=A/CB"; None if it holds none. What stands
    after "=" is the writer's notion of the state and does not count; nor do thoughts."""
    found = _MOVES.findall(re.sub(r"=[A-Z/]*", " ", without_thoughts(text)))
    return [found[-1][at : at + 2] for at in range(0, len(found[-1]), 2)] if found else None


def to_actions(below: Mapping[str, str], moves: Sequence[str]) -> list[Fact]:
    """The two actions of each move. Whether they can be executed is for a validator to say."""
    now = {block.lower(): under.lower() for block, under in below.items()}
    plan: list[Fact] = []
    for move in moves:
        block, onto = move.lower()
        under = now.get(block, TABLE)
        plan.append(("pick-up", block) if under == TABLE else ("unstack", block, under))
        plan.append(("put-down", block) if onto == TABLE else ("stack", block, onto))
        now[block] = onto
    return plan


def to_moves(plan: Sequence[Fact]) -> list[str]:
    """The moves of a plan of whole moves; a last action without its second half is left out."""
    return [
        (take[1] + (put[2] if put[0] == "stack" else TABLE)).upper()
        for take, put in zip(plan[::2], plan[1::2], strict=False)
    ]


def facts(stacks: str) -> list[Fact]:
    """The state in the problem's facts, the hand empty."""
    below = read_stacks(stacks)
    found: list[Fact] = [("handempty",)]
    for block, under in below.items():
        small = block.lower()
        found.append(("ontable", small) if under == TABLE else ("on", small, under.lower()))
        if is_clear(below, block):
            found.append(("clear", small))
    return found


def goal_facts(goal: str) -> list[Fact]:
    return [("on", block.lower(), under.lower()) for block, under in goal_of(goal).items()]


def short_form(instance: Instance) -> tuple[str, str]:
    """(state, goal) of a problem in short form.

    Raises PddlError for what has none: a block in the hand, a goal that is not made of "on", blocks
    that are no single letters.
    """
    below: Below = {}
    goal: Below = {}
    for predicate, *blocks in instance.init:
        if predicate == "holding":
            raise PddlError("a block in the hand has no short form")
        if predicate in ("on", "ontable"):
            below[blocks[0].upper()] = blocks[1].upper() if predicate == "on" else TABLE
    for predicate, *blocks in instance.goal:
        if predicate != "on":
            raise PddlError(f"a goal with {predicate!r} has no short form")
        goal[blocks[0].upper()] = blocks[1].upper()
    state, wanted = write_stacks(below), write_stacks(goal)
    try:
        same = read_stacks(state) == below and goal_of(wanted) == goal
    except ValueError as error:
        raise PddlError(f"it has no short form: {error}") from error
    if not same or instance.avoid or not {*goal, *goal.values()} <= set(below):
        raise PddlError("it has no short form: state or goal is impossible")
    return state, wanted


def random_stacks(blocks: Sequence[str], rng: random.Random) -> str:
    """Each block, in random order, goes on the table or on one of the stacks, equally likely."""
    stacks: list[str] = []
    for block in rng.sample(list(blocks), len(blocks)):
        at = rng.randrange(len(stacks) + 1)
        stacks[at : at + 1] = [(stacks[at] if at < len(stacks) else "") + block]
    return write_stacks(read_stacks("/".join(stacks)))
