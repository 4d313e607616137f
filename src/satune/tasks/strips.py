"""A small STRIPS interpreter: reads PDDL domains and problems, and executes plans.

It knows what Blocksworld and Logistics need and a little more: predicates, untyped and typed
parameters, constants, conjunctions of positive and negative literals. Anything else is refused
rather than ignored. Of one action, deletes come before adds, as PDDL has it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Fact = tuple[str, ...]
"""A ground atom: the predicate, then its objects. So is a step of a plan: action, then objects."""

_WORDS = re.compile(r"[()]|[^\s()]+")
_REQUIREMENTS = {":strips", ":typing", ":negative-preconditions"}
_CONNECTIVES = ("=", "not", "and", "or", "forall", "exists", "when", "imply")
_DEEPEST = 50
_KEPT = 1 << 16
"""Ground actions that a domain keeps."""


class PddlError(ValueError):
    """What cannot be read in a domain, a problem or a plan."""


@dataclass(frozen=True, slots=True)
class Action:
    """An action's schema; literals name parameters ("?x") and constants."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    """(name, type) in order; the type "object" fits every object."""
    needs: tuple[Fact, ...]
    forbids: tuple[Fact, ...]
    adds: tuple[Fact, ...]
    deletes: tuple[Fact, ...]

    def meaning(self) -> tuple[Any, ...]:
        """Equal for two actions that differ in the names of parameters and the order of literals
        only."""
        place = {name: f"?{at}" for at, (name, _) in enumerate(self.parameters)}
        return tuple(kind for _, kind in self.parameters), *(
            frozenset(tuple(place.get(word, word) for word in literal) for literal in literals)
            for literals in (self.needs, self.forbids, self.adds, self.deletes)
        )


@dataclass(frozen=True, eq=False)
class Domain:
    name: str
    actions: Mapping[str, Action]
    supertypes: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    _ground: dict[Fact, tuple[frozenset[Fact], ...]] = field(default_factory=dict, repr=False)

    def ground(self, step: Fact) -> tuple[frozenset[Fact], ...]:
        """What a step needs, forbids, deletes and adds. Kept, since instances share names."""
        found = self._ground.get(step)
        if found is None:
            action = self.actions[step[0]]
            names = [name for name, _ in action.parameters]
            bound = dict(zip(names, step[1:], strict=True))
            found = tuple(
                frozenset(tuple(bound.get(word, word) for word in literal) for literal in literals)
                for literals in (action.needs, action.forbids, action.deletes, action.adds)
            )
            if len(self._ground) < _KEPT:
                self._ground[step] = found
        return found

    def is_a(self, kind: str, wanted: str) -> bool:
        """Whether every object of one type is one of another."""
        seen: set[str] = set()
        while kind != wanted and kind in self.supertypes and kind not in seen:
            seen.add(kind)
            kind = self.supertypes[kind]
        return wanted in (kind, "object")


@dataclass(frozen=True)
class Instance:
    """A problem: objects with their types, the initial state, the goal's literals."""

    name: str
    objects: Mapping[str, str]
    init: frozenset[Fact]
    goal: frozenset[Fact]
    avoid: frozenset[Fact] = frozenset()
    """What the goal wants to be false."""

    def reached(self, state: frozenset[Fact] | set[Fact]) -> bool:
        return self.goal <= state and self.avoid.isdisjoint(state)


@dataclass(frozen=True, slots=True)
class Execution:
    """How a plan fared: ``valid`` if all its actions could be executed and the goal holds after
    them. ``executed`` counts the actions before the first that could not be; ``goal_share`` is the
    share of the goal's literals that hold in the last state reached."""

    valid: bool
    executed: int
    length: int
    goal_share: float
    detail: str


class Grounder:
    """Executes plans of one instance. Ground actions are kept, so that later plans are faster."""

    def __init__(self, domain: Domain, instance: Instance) -> None:
        self.domain = domain
        self.instance = instance
        self._objects = {**domain.constants, **instance.objects}
        self._ground = functools.lru_cache(maxsize=4096)(self._make)

    def _make(self, step: Fact) -> tuple[frozenset[Fact], ...] | str:
        """What a step needs, forbids, deletes and adds; or why it is no action here."""
        action = self.domain.actions.get(step[0]) if step else None
        if action is None:
            return f"there is no action {step[0] if step else ''!r}"
        if len(step) - 1 != len(action.parameters):
            return f"{step[0]} takes {len(action.parameters)} objects, not {len(step) - 1}"
        for (_, kind), given in zip(action.parameters, step[1:], strict=True):
            if given not in self._objects:
                return f"there is no object {given!r}"
            if not self.domain.is_a(self._objects[given], kind):
                return f"{given} is no {kind}"
        return self.domain.ground(step)

    def apply(self, state: set[Fact], step: Fact) -> str:
        """Changes ``state`` by an action; an empty text if it could be executed, else why not (and
        the state stays)."""
        ground = self._ground(step)
        if isinstance(ground, str):
            return ground
        needs, forbids, deletes, adds = ground
        if not needs <= state:
            return f"{' '.join(step)}: not {' '.join(min(needs - state))}"
        if not forbids.isdisjoint(state):
            return f"{' '.join(step)}: {' '.join(min(forbids & state))}"
        state -= deletes
        state |= adds
        return ""

    def execute(self, plan: Sequence[Fact]) -> Execution:
        """Execute a plan from the initial state."""
        state = set(self.instance.init)
        for executed, step in enumerate(plan):
            refused = self.apply(state, tuple(step))
            if refused:
                detail = f"action {executed + 1} cannot be executed: {refused}"
                return Execution(False, executed, len(plan), self._share(state), detail)
        reached = self.instance.reached(state)
        missing = sorted(" ".join(fact) for fact in self.instance.goal - state)
        detail = "reaches the goal" if reached else f"the goal fails: {', '.join(missing)}"
        return Execution(reached, len(plan), len(plan), self._share(state), detail)

    def _share(self, state: set[Fact]) -> float:
        literals = len(self.instance.goal) + len(self.instance.avoid)
        held = len(self.instance.goal & state) + len(self.instance.avoid - state)
        return held / literals if literals else 1.0


@functools.lru_cache(maxsize=64)
def parse_domain(text: str) -> Domain:
    """A domain from its PDDL. Raises PddlError for what is damaged or not known here."""
    name, sections = _sections(text, "domain")
    actions: dict[str, Action] = {}
    kinds: Mapping[str, str] = {}
    constants: Mapping[str, str] = {}
    for head, *body in sections:
        if head == ":requirements":
            unknown = sorted(set(map(str, body)) - _REQUIREMENTS)
            if unknown:
                raise PddlError(f"requirement {unknown[0]} is not supported")
        elif head == ":types":
            kinds = dict(_typed(body))
        elif head == ":constants":
            constants = dict(_typed(body))
        elif head == ":action":
            action = _action(body)
            actions[action.name] = action
        elif head != ":predicates":
            raise PddlError(f"section {head} of the domain is not supported")
    return Domain(name, actions, kinds, constants)


@functools.lru_cache(maxsize=8192)
def parse_problem(text: str) -> Instance:
    """A problem from its PDDL. Raises PddlError for what is damaged or not known here."""
    name, sections = _sections(text, "problem")
    objects: dict[str, str] = {}
    init: frozenset[Fact] = frozenset()
    goal: list[Any] | None = None
    for head, *body in sections:
        if head == ":objects":
            objects = dict(_typed(body))
        elif head == ":init":
            init = frozenset(_atom(item) for item in body)
        elif head == ":goal":
            goal = body
        elif head not in (":domain", ":requirements"):
            raise PddlError(f"section {head} of the problem is not supported")
    if goal is None or len(goal) != 1:
        raise PddlError("the problem needs one :goal")
    wanted, avoid = _literals(goal[0])
    return Instance(name, objects, init, frozenset(wanted), frozenset(avoid))


def parse_plan(text: str) -> list[Fact]:
    """The steps of a plan in PDDL: "(pick-up a)\\n(stack a b)". Raises PddlError."""
    return [_atom(item) for item in _read(text)]


def _read(text: str) -> list[Any]:
    """Nested lists of lowered words."""
    stack: list[list[Any]] = [[]]
    for word in _WORDS.findall(re.sub(r";[^\n]*", "", text.lower())):
        if word == "(":
            stack.append([])
            if len(stack) > _DEEPEST:
                raise PddlError("parentheses are nested too deep")
        elif word == ")":
            if len(stack) == 1:
                raise PddlError("a closing parenthesis too many")
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(word)
    if len(stack) > 1:
        raise PddlError("a closing parenthesis is missing")
    return stack[0]


def _sections(text: str, kind: str) -> tuple[str, list[list[Any]]]:
    read = _read(text)
    whole = read[0] if len(read) == 1 else None
    if not (isinstance(whole, list) and whole[:1] == ["define"] and len(whole) > 1):
        raise PddlError(f"not one (define ({kind} ...) ...)")
    head, *sections = whole[1:]
    if not (isinstance(head, list) and len(head) == 2 and head[0] == kind):
        raise PddlError(f"it does not start with (define ({kind} NAME)")
    if not all(isinstance(s, list) and s and isinstance(s[0], str) for s in sections):
        raise PddlError(f"a section of the {kind} is no list with a name")
    return str(head[1]), sections


def _typed(words: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """(name, type) for "a b - block c"; without a type "object"."""
    waiting: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        if not isinstance(word, str):
            raise PddlError("a list stands where a name is due (either is not supported)")
        if word == "-":
            if at + 1 == len(words) or not isinstance(words[at + 1], str):
                raise PddlError("no type's name follows a hyphen (either is not supported)")
            yield from ((name, words[at + 1]) for name in waiting)
            waiting = []
            at += 2
        else:
            waiting.append(word)
            at += 1
    yield from ((name, "object") for name in waiting)


def _atom(item: Any) -> Fact:
    if isinstance(item, list) and item and item[0] in _CONNECTIVES:
        raise PddlError(f"{item[0]} is not supported here")
    if not (isinstance(item, list) and item and all(isinstance(word, str) for word in item)):
        raise PddlError("not an atom (name object ...)")
    return tuple(item)


def _literals(item: Any) -> tuple[list[Fact], list[Fact]]:
    """(positive, negative) literals of a conjunction."""
    if isinstance(item, list) and item[:1] == ["and"]:
        parts = [_literals(part) for part in item[1:]]
        return [f for yes, _ in parts for f in yes], [f for _, no in parts for f in no]
    if isinstance(item, list) and item[:1] == ["not"] and len(item) == 2:
        return [], [_atom(item[1])]
    if item == []:
        return [], []
    return [_atom(item)], []


def _action(body: Sequence[Any]) -> Action:
    if not body or not isinstance(body[0], str) or len(body) % 2 == 0:
        raise PddlError("an :action needs a name and pairs of keyword and value")
    given = {str(key): value for key, value in zip(body[1::2], body[2::2], strict=True)}
    unknown = sorted(set(given) - {":parameters", ":precondition", ":effect"})
    if unknown:
        raise PddlError(f"action {body[0]}: {unknown[0]} is not supported")
    needs, forbids = _literals(given.get(":precondition", []))
    adds, deletes = _literals(given.get(":effect", []))
    parameters = given.get(":parameters", [])
    if not isinstance(parameters, list):
        raise PddlError(f"action {body[0]}: :parameters is no list")
    return Action(
        body[0], tuple(_typed(parameters)), tuple(needs), tuple(forbids), tuple(adds),
        tuple(deletes),
    )  # fmt: skip
