"""STRIPS planning: PDDL domains and problems, and whether a plan runs and reaches the goal.

Conjunctions of positive and negative facts, with or without types. What goes beyond (quantifiers,
conditional effects, numbers) is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

Fact = tuple[str, ...]
Step = tuple[str, ...]
"""An action's name and its arguments."""

Get = Callable[[Sequence[str]], Fact]

_TOKEN = re.compile(r"[()]|[^\s()]+")
_COMMENT = re.compile(r";[^\n]*")


@dataclass(frozen=True, slots=True)
class Action:
    """An action's schema. Each ``Get`` picks a fact's words out of ``constants`` followed by the
    ``arguments`` that a step gives."""

    arguments: int
    constants: tuple[str, ...]
    needs: tuple[Get, ...]
    forbids: tuple[Get, ...]
    adds: tuple[Get, ...]
    deletes: tuple[Get, ...]

    @staticmethod
    def of(parameters: Sequence[str], *conditions: Sequence[Fact]) -> Action:
        """From facts that need, forbid, add and delete, in terms of ``?`` parameters."""
        words = {word for facts in conditions for fact in facts for word in fact}
        constants = tuple(sorted(words - set(parameters)))
        places = {word: place for place, word in enumerate((*constants, *parameters))}

        def getter(fact: Fact) -> Get:
            if len(fact) == 1:  # itemgetter would give the word itself
                return lambda _: fact
            return itemgetter(*(places[word] for word in fact))

        needs, forbids, adds, deletes = (tuple(map(getter, facts)) for facts in conditions)
        return Action(len(parameters), constants, needs, forbids, adds, deletes)


@dataclass(frozen=True, slots=True)
class Planning:
    """A problem in its domain."""

    actions: dict[str, Action]
    objects: tuple[str, ...]
    start: frozenset[Fact]
    goal: frozenset[Fact]


@dataclass(frozen=True, slots=True)
class Outcome:
    """``ran`` steps were carried out; ``valid``: all of them, and the goal is reached."""

    ran: int
    valid: bool
    reason: str


def execute(planning: Planning, plan: Sequence[Step]) -> Outcome:
    """Carry out ``plan`` from the start; the first step that cannot be taken ends it."""

    def failed(number: int, why: str) -> Outcome:
        return Outcome(number, False, f"step {number + 1} ({' '.join(plan[number])}): {why}")

    state = set(planning.start)
    for number, (name, *arguments) in enumerate(plan):
        action = planning.actions.get(name)
        if action is None:
            return failed(number, "no such action")
        if len(arguments) != action.arguments:
            return failed(number, f"takes {action.arguments} objects")
        words = (*action.constants, *arguments)
        for fact in [get(words) for get in action.needs]:
            if fact not in state:
                return failed(number, f"needs {' '.join(fact)}")
        for fact in [get(words) for get in action.forbids]:
            if fact in state:
                return failed(number, f"forbids {' '.join(fact)}")
        state.difference_update([get(words) for get in action.deletes])
        state.update([get(words) for get in action.adds])
    left = sorted(planning.goal - state)
    if left:
        return Outcome(len(plan), False, f"the goal lacks {' '.join(left[0])}")
    return Outcome(len(plan), True, "the goal is reached")


@functools.lru_cache(maxsize=8192)
def parse_problem(domain: str, problem: str) -> Planning:
    """Read two PDDL texts. Raises ValueError saying what is wrong or goes beyond STRIPS."""
    actions, supertypes = _parse_domain(domain)
    sections = _sections(problem, "problem")
    objects = _typed(sections.get(":objects", []))
    start = {_fact(item) for item in sections.get(":init", [])}
    for name, kind in objects:
        start |= {(each, name) for each in _kinds(kind, supertypes)}
    needs, forbids = _condition(sections.get(":goal", [[]])[0])
    if forbids:
        raise ValueError("a goal with 'not' goes beyond what is read here")
    names = tuple(name for name, _ in objects)
    return Planning(actions, names, frozenset(start), frozenset(needs))


@functools.lru_cache(maxsize=64)
def _parse_domain(text: str) -> tuple[dict[str, Action], dict[str, str]]:
    root = _read(text)
    supertypes: dict[str, str] = {}
    actions: dict[str, Action] = {}
    if root[:1] != ["define"]:
        raise ValueError("a domain begins with (define (domain ...))")
    for item in root[1:]:
        if item[:1] == [":types"]:
            supertypes |= dict(_typed(item[1:]))
        elif item[:1] == [":action"]:
            parts = dict(zip(item[2::2], item[3::2], strict=False))
            typed = _typed(parts.get(":parameters", []))
            needs, forbids = _condition(parts.get(":precondition", []))
            adds, deletes = _condition(parts.get(":effect", []))
            kinds = [(kind, name) for name, kind in typed if kind != "object"]
            actions[item[1]] = Action.of(
                [name for name, _ in typed], (*kinds, *needs), forbids, adds, deletes
            )
    return actions, supertypes


def _sections(text: str, what: str) -> dict[str, list[Any]]:
    root = _read(text)
    if root[:1] != ["define"] or not all(isinstance(item, list) and item for item in root[1:]):
        raise ValueError(f"a {what} begins with (define ({what} ...))")
    return {item[0]: item[1:] for item in root[1:]}


def _read(text: str) -> list[Any]:
    """The s-expression of a text, in lower case."""
    stack: list[list[Any]] = [[]]
    for token in _TOKEN.findall(_COMMENT.sub("", text).lower()):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise ValueError("a bracket closes that was never opened")
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    if len(stack) != 1 or len(stack[0]) != 1 or not isinstance(stack[0][0], list):
        raise ValueError("the brackets do not match")
    return stack[0][0]


def _typed(words: Sequence[Any]) -> list[tuple[str, str]]:
    """``a b - kind c`` as (a, kind), (b, kind), (c, object)."""
    found: list[tuple[str, str]] = []
    waiting: list[str] = []
    tokens = iter(words)
    for word in tokens:
        if word == "-":
            kind = next(tokens, None)
            if not isinstance(kind, str):
                raise ValueError("a type must be one name")
            found += [(name, kind) for name in waiting]
            waiting = []
        elif isinstance(word, str):
            waiting.append(word)
        else:
            raise ValueError("brackets where names are listed")
    return found + [(name, "object") for name in waiting]


def _kinds(kind: str, supertypes: dict[str, str]) -> Iterator[str]:
    seen: set[str] = set()
    while kind != "object" and kind not in seen:
        seen.add(kind)
        yield kind
        kind = supertypes.get(kind, "object")


def _condition(item: Any) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """The facts of a conjunction that hold, and those that do not."""
    if not item:
        return (), ()
    parts = item[1:] if item[0] == "and" else [item]
    positive = tuple(_fact(part) for part in parts if part[:1] != ["not"])
    negative = tuple(_fact(part[1]) for part in parts if part[:1] == ["not"])
    return positive, negative


def _fact(item: Any) -> Fact:
    if not isinstance(item, list) or not item:
        raise ValueError(f"{item!r} is no plain fact")
    if item[0] in ("or", "imply", "forall", "exists", "when", "=", "increase"):
        raise ValueError(f"'{item[0]}' goes beyond what is read here")
    if not all(isinstance(word, str) for word in item):
        raise ValueError(f"{item!r} is no plain fact")
    return tuple(item)
