"""Blocksworld in a short form: a team rearranges stacks of blocks, one move a message.

"A/CB>ABC" is a problem: A stands on the table alone, B on C; the goal is the tower with A at the
bottom, B on it, C on top. Stacks and towers are written from the bottom up. A message holds all
moves so far and the state they lead to: "BA;AB/C", then "BACB;ABC". A move names the block and
where it goes, "-" being the table. What counts in the end are the moves.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from satune.tasks.sources import (
    Row,
    check_fraction,
    check_unique,
    choose_split,
    field,
    hold_out,
    read_rows,
)
from satune.tasks.strips import Fact, parse_problem
from satune.types import Entry, Grade, Key, Problem, UserError

NAMES = "ABCDEF"
TABLE = "-"
LONGEST = 2000
"""Characters of a message that are read, from its end."""
DRAWS = 20_000
"""Draws without a problem of the split after which it is taken to be empty."""

State = tuple[str, ...]
"""Stacks from the bottom up, in alphabetical order."""

_MOVES = re.compile(r"(?<![\w-])(?:[A-Z][A-Z-])+(?![\w-])")
_STEP = re.compile(r"\(\s*(put-down|stack)\s+([^()]*?)\s*\)")

# Tenths of all problems, chosen by the hash of their text. The salt is one that leaves no split
# empty even with two blocks, where there are four problems.
_TENTHS = {"train": range(8), "eval": range(8, 9), "certify": range(9, 10)}
_SALT = "blocksworld 2 "


def read_problem(text: str) -> tuple[State, State]:
    """(stacks, towers of the goal) of a problem in short form."""
    state, _, goal = text.partition(">")
    return _state(state.split("/")), _state(goal.split("/"))


def reached(state: State, goal: State) -> bool:
    """Whether each of the goal's towers stands somewhere in the state, whatever is under or on
    it."""
    return all(any(tower in stack for stack in state) for tower in goal)


@functools.lru_cache(maxsize=65536)
def following(state: State) -> dict[str, State]:
    """The state after each move that can be made, in the moves' alphabetical order ("-", the table,
    first)."""
    found: dict[str, State] = {}
    for block in sorted(stack[-1] for stack in state):
        lifted = [stack.removesuffix(block) for stack in state]
        if "" not in lifted:
            found[block + TABLE] = _state([*lifted, block])
        for target in sorted(stack[-1] for stack in lifted if stack and stack in state):
            onto = (each + block if each.endswith(target) else each for each in lifted)
            found[block + target] = _state(onto)
    return found


@functools.lru_cache(maxsize=65536)
def shortest(state: State, goal: State) -> tuple[str, ...] | None:
    """A plan with the fewest moves, the first of them in alphabetical order; None if there is none.

    Breadth first, so that the plans found first are the shortest ones.
    """
    before: dict[State, tuple[State, str] | None] = {state: None}
    layer = [state]
    while layer:
        for at in layer:
            if reached(at, goal):
                return _way(before, at)
        further: list[State] = []
        for at in layer:
            for step, after in following(at).items():
                if after not in before:
                    before[after] = (at, step)
                    further.append(after)
        layer = further
    return None


@functools.cache
def states(blocks: int) -> tuple[State, ...]:
    """All states of the first ``blocks`` blocks: 3, 13, 73, 501, 4051 from two to six blocks."""
    if blocks == 0:
        return ((),)
    block, found = NAMES[blocks - 1], []
    for state in states(blocks - 1):
        found.append(_state([*state, block]))
        for at, stack in enumerate(state):
            others = [*state[:at], *state[at + 1 :]]
            for cut in range(len(stack) + 1):
                found.append(_state([*others, stack[:cut] + block + stack[cut:]]))
    return tuple(sorted(found))


def stacks(facts: Iterable[Fact]) -> State:
    """The stacks that the facts (on x y), x on y, make up, and the blocks of (ontable x).

    Raises ValueError if they are none.
    """
    facts = list(facts)
    on = [(fact[1], fact[2]) for fact in facts if fact[0] == "on"]
    above = {under: block for block, under in on}
    below = dict(on)
    if len(above) != len(on) or len(below) != len(on):
        raise ValueError("a block stands in two places, or two on one")
    bottoms = {under for _, under in on if under not in below}
    bottoms |= {fact[1] for fact in facts if fact[0] == "ontable"}
    found = []
    for block in bottoms:
        stack = [block]
        while stack[-1] in above:
            stack.append(above[stack[-1]])
        found.append("".join(stack))
    if sum(map(len, found)) != len({*above, *below, *bottoms}):
        raise ValueError("blocks stand on each other in a circle")
    return _state(found)


class Blocksworld:
    """Problems of ``blocks`` blocks (2 to 6), generated without end or read from PlanBench's rows.

    Generated ones start from any state with equal chance; the goal is one tower of two or more of
    the blocks that does not stand yet. They are a function of (seed, split, index); "train", "eval"
    and "certify" are disjoint by problem whatever the seed. With three blocks there are only 132
    problems in all, so that the three splits together hold every one that a benchmark may ask:
    ``exclude`` names a file of PlanBench's rows whose problems are in no split.

    ``data`` are PlanBench's rows (``problem_pddl``, ``domain_pddl``); those with ``blocks`` blocks
    are kept, their blocks called A, B, C in alphabetical order. ``eval_fraction`` of them, chosen
    by the hash of the ids, form "eval" and "certify", the rest "train", everything "all".

    With three blocks four moves are enough, with n blocks 2n - 2.

    Raises UserError for a bad option or a bad row (file and line).
    """

    name = "blocksworld"
    alphabet = NAMES + "-;/>"
    """Every character that prompts and a player's messages may hold."""

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        blocks: int = 3,
        eval_fraction: float = 0.1,
        exclude: str | Path | None = None,
    ) -> None:
        if isinstance(blocks, bool) or not isinstance(blocks, int) or not 2 <= blocks <= 6:
            raise UserError(f"task blocksworld: blocks is {blocks!r}; give an integer from 2 to 6")
        self.blocks = blocks
        self.seed = seed
        self.fresh = data is None
        """Whether problems can be generated without end, see ``problem_at``."""
        self._excluded = {p.text for _, p in self._rows(exclude)} if exclude else set[str]()
        self._kept: list[Problem] = []
        self._held: list[Problem] = []
        if data is not None:
            rows = self._rows(data)
            check_unique([(place, problem.id) for place, problem in rows])
            problems = [problem for _, problem in rows]
            fraction = check_fraction(self.name, eval_fraction)
            self._kept, self._held = hold_out(problems, [p.id for p in problems], fraction)

    def problem_at(self, split: str, index: int) -> Problem:
        """Problem ``index`` (from 0) of a generated split's stream."""
        if not self.fresh:
            raise UserError("task blocksworld: its problems come from a file; use problems(split)")
        if split not in _TENTHS:
            raise UserError(f"task blocksworld: no split {split!r}; there are {', '.join(_TENTHS)}")
        rng = Key(self.seed, "blocksworld", problem=split, sample=index).rng()
        for _ in range(DRAWS):
            state = rng.choice(states(self.blocks))
            tower = rng.sample(NAMES[: self.blocks], rng.randint(2, self.blocks))
            goal = ("".join(tower),)
            text = _text(state, goal)
            if reached(state, goal) or text in self._excluded or _tenth(text) not in _TENTHS[split]:
                continue
            return self._problem(f"blocksworld-{split}-{index:06d}", text, split=split, fresh=True)
        raise UserError(f"task blocksworld: no problem is left for {split!r}; exclude fewer")

    def problems(self, split: str) -> Iterator[Problem]:
        """A file's rows of that split, or an endless stream of generated problems."""
        if self.fresh:
            return (self.problem_at(split, index) for index in itertools.count())
        return iter(choose_split(self.name, split, self._kept, self._held))

    def extract(self, text: str) -> str | None:
        """The moves of a message, those before its last ";" if there is one; None without any."""
        spoken = text[-LONGEST:]
        before, mark, _ = spoken.rpartition(";")
        found = _MOVES.findall(before if mark else spoken)
        return found[-1] if found else None

    def equal(self, a: str, b: str) -> bool:
        return a == b

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """1 if the moves can be made from the problem's state and reach its goal, else 0.

        Components: ``plan_length`` in moves (each is two of PlanBench's actions), ``executable``
        the share of them that could be made and, for a plan that works, ``optimal``: 1 if none is
        shorter.
        """
        plan = None if answer is None else self.extract(answer)
        if plan is None:
            return Grade(0.0, {"executable": 0.0, "plan_length": 0.0}, "no moves")
        state, goal = read_problem(problem.text)
        length = len(plan) // 2
        after, ran = _carried_out(state, plan)
        right = ran == length and reached(after, goal)
        components = {"executable": ran / length, "plan_length": float(length)}
        if right:
            components["optimal"] = float(length <= len(problem.answer) // 2)
            return Grade(1.0, components, "the goal is reached")
        why = "the goal is not reached" if ran == length else f"move {ran + 1} cannot be made"
        return Grade(0.0, components, f"{plan}: {why}")

    def validate(self) -> None:
        """Check, on every row or on the first problems of each split, that the gold plan scores 1,
        alone and in a message, and that it scores 0 without its last move.

        Raises ValueError naming the problem that fails.
        """
        found = [*self._kept, *self._held]
        if self.fresh:
            found = [p for s in _TENTHS for p in itertools.islice(self.problems(s), 50)]
        for problem in found:
            plan = problem.answer
            message = self._message(read_problem(problem.text)[0], plan)
            gold = [self.grade(problem, a).score for a in (plan, message)]
            spoilt = [self.grade(problem, a).score for a in (plan[:-2], plan + "AA", "", None)]
            if gold != [1.0, 1.0] or spoilt != [0.0] * 4:
                raise ValueError(f"task blocksworld: {problem.id} grades its own plan wrongly")

    def expert(self, entries: Sequence[Entry], rng: random.Random, error: float) -> str:
        """What a player who errs with probability ``error`` writes after seeing ``entries``.

        It goes on from the latest message with moves, as far as these can be made, by the first
        move of a shortest plan. An error is another move that can be made, one that brings the goal
        no nearer. A plan that reaches the goal is repeated.
        """
        text, plan = self._seen(entries)
        state, goal = read_problem(text)
        after, ran = _carried_out(state, plan)
        plan = plan[: 2 * ran]
        way = shortest(after, goal)
        if not way:
            return self._message(state, plan)
        step = way[0]
        if rng.random() < error:
            step = rng.choice(_detours(after, goal) or [step])
        return self._message(state, plan + step)

    def _seen(self, entries: Sequence[Entry]) -> tuple[str, str]:
        """The problem and the moves so far."""
        plan = None
        for entry in reversed(entries):
            if entry.kind == "problem":
                parts = (part["text"] for part in entry.parts if part.get("type") == "text")
                return "".join(parts) or entry.text, plan or ""
            if plan is None and entry.kind in ("own", "foreign"):
                plan = self.extract(entry.text)
        raise ValueError("there is no problem among the entries")

    def _message(self, state: State, plan: str) -> str:
        return f"{plan};{'/'.join(_carried_out(state, plan)[0])}"

    def _problem(self, identity: str, text: str, **metadata: object) -> Problem:
        plan = shortest(*read_problem(text))
        assert plan is not None  # every state can be reached from every other
        return Problem.of(identity, text, "".join(plan), **metadata)

    def _rows(self, source: str | Path) -> list[tuple[str, Problem]]:
        """(place, problem) of the rows that have ``blocks`` blocks."""
        found = [
            (place, problem)
            for number, (place, row) in enumerate(read_rows(source), 1)
            for problem in self._from_row(number, place, row)
        ]
        if not found:
            raise UserError(f"{source}: no row has {self.blocks} blocks; change blocks")
        return found

    def _from_row(self, number: int, place: str, row: Row) -> list[Problem]:
        texts = {name: field(place, row, name) for name in ("domain_pddl", "problem_pddl")}
        try:
            planning = parse_problem(texts["domain_pddl"], texts["problem_pddl"])
            if len(planning.objects) != self.blocks:
                return []
            short = dict(zip(sorted(planning.objects), NAMES, strict=False))
            state, goal = (
                stacks((name, *(short[each] for each in objects)) for name, *objects in facts)
                for facts in (planning.start, planning.goal)
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{place}: its PDDL cannot be read: {error}") from error
        if any(fact[0] != "on" for fact in planning.goal) or reached(state, goal):
            raise UserError(f"{place}: a goal must be (on x y) facts that do not all hold already")
        if sum(map(len, state)) != self.blocks:
            raise UserError(f"{place}: the start does not say where every block stands")
        identity = str(row.get("id") or f"blocksworld-{number:06d}")
        return [self._problem(identity, _text(state, goal), names="".join(sorted(short)))]


def plan_moves(pddl: str, names: Sequence[str]) -> str:
    """A plan of pick-up, unstack, put-down and stack as moves; ``names`` are the plan's blocks in
    the order in which they are called A, B, C."""
    short = dict(zip(names, NAMES, strict=False))
    found = ((name, words.split()) for name, words in _STEP.findall(pddl.lower()))
    return "".join(
        short[words[0]] + (short[words[1]] if name == "stack" else TABLE) for name, words in found
    )


def _state(parts: Iterable[str]) -> State:
    return tuple(sorted(part for part in parts if part))


def _text(state: State, goal: State) -> str:
    return f"{'/'.join(state)}>{'/'.join(goal)}"


def _tenth(text: str) -> int:
    return hashlib.blake2b((_SALT + text).encode(), digest_size=8).digest()[0] * 10 // 256


def _way(before: dict[State, tuple[State, str] | None], at: State) -> tuple[str, ...]:
    steps: list[str] = []
    while (came := before[at]) is not None:
        at, step = came
        steps.append(step)
    return tuple(reversed(steps))


def _carried_out(state: State, plan: str) -> tuple[State, int]:
    """The state after as many moves of a plan as can be made, and how many these are."""
    for made in range(len(plan) // 2):
        after = following(state).get(plan[2 * made : 2 * made + 2])
        if after is None:
            return state, made
        state = after
    return state, len(plan) // 2


@functools.lru_cache(maxsize=65536)
def _detours(state: State, goal: State) -> list[str]:
    """The moves after which the goal is no nearer than before."""
    left = len(shortest(state, goal) or ())
    after = following(state).items()
    return [step for step, each in after if len(shortest(each, goal) or ()) >= left]
