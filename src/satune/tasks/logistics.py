"""Logistics in words: its domain, and how states, goals and plans are read and written.

In problems objects are p0, t0, a0, l0-1 and c0, in texts package_0, truck_0, airplane_0,
location_0_1 and city_0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from satune.tasks.plan_text import enumerated, read_plan, write_problem
from satune.tasks.strips import Fact, Instance, PddlError, parse_domain

DOMAIN_NAME = "logistics-strips"
DOMAIN = parse_domain(f"""
(define (domain {DOMAIN_NAME})
  (:requirements :strips)
  (:action load-truck :parameters (?o ?t ?l)
    :precondition (and (obj ?o) (truck ?t) (location ?l) (at ?t ?l) (at ?o ?l))
    :effect (and (in ?o ?t) (not (at ?o ?l))))
  (:action load-airplane :parameters (?o ?a ?l)
    :precondition (and (obj ?o) (airplane ?a) (location ?l) (at ?a ?l) (at ?o ?l))
    :effect (and (in ?o ?a) (not (at ?o ?l))))
  (:action unload-truck :parameters (?o ?t ?l)
    :precondition (and (obj ?o) (truck ?t) (location ?l) (at ?t ?l) (in ?o ?t))
    :effect (and (at ?o ?l) (not (in ?o ?t))))
  (:action unload-airplane :parameters (?o ?a ?l)
    :precondition (and (obj ?o) (airplane ?a) (location ?l) (at ?a ?l) (in ?o ?a))
    :effect (and (at ?o ?l) (not (in ?o ?a))))
  (:action drive-truck :parameters (?t ?from ?to ?c)
    :precondition (and (truck ?t) (location ?from) (location ?to) (city ?c) (at ?t ?from)
                       (in-city ?from ?c) (in-city ?to ?c))
    :effect (and (at ?t ?to) (not (at ?t ?from))))
  (:action fly-airplane :parameters (?a ?from ?to)
    :precondition (and (airplane ?a) (airport ?from) (airport ?to) (at ?a ?from))
    :effect (and (at ?a ?to) (not (at ?a ?from)))))
""")

PROMPT = """\
Packages are to be moved by trucks within cities and by airplanes between airports. Each action is \
written in these words, here with some names as an example:

load package_0 into truck_0 at location_0_1 (both are at that location; an airplane likewise)
unload package_0 from truck_0 at location_0_1 (the package is in the truck, the truck is at that \
location; an airplane likewise)
drive truck_0 from location_0_1 to location_0_0 in city_0 (both locations are in that city)
fly airplane_0 from location_0_0 to location_1_0 (both locations are airports)

At the start {init}.
In the end {goal}.

Find actions that lead from the start to the end. Write them in order between [PLAN] and \
[PLAN END], one a line, without the remarks in brackets."""

_LONG = {"p": "package", "t": "truck", "a": "airplane", "l": "location", "c": "city"}
_KINDS = {"p": "obj", "t": "truck", "a": "airplane", "l": "location", "c": "city"}
_OBJECT = re.compile(
    r"\b(?:(?:(p)ackage|(t)ruck|(a)irplane|(l)ocation|(c)ity)_|([ptalc]))"
    r"([0-9]+)(?:[_-]([0-9]+))?(?![\w-])"
)
_LINE = re.compile(r"[\W\d_]*+(?:step[\W\d_]*+)?(load|unload|drive|fly)\b")
_PDDL = re.compile(r"\( ?((?:un)?load|drive|fly)(?:[-_ ](truck|airplane))?((?: [\w-]+){3,4}) ?\)")
_STATEMENT = re.compile(r"initial conditions I have that,?(.*?)My goal is to have that(.*)", re.S)
_FACTS = re.compile(r"(\w+) is (?:(an airport)|(at) (\w+)|in the city (\w+))")


def read_logistics_plan(text: str) -> list[Fact]:
    """The plan in a message, its objects named as in the problems.

    A line is an action if it starts with a verb (after a number, a bullet or "Step 1:") and names
    objects. One that names the wrong objects stays in the plan, where it cannot be executed. So the
    official extraction has it; beyond it, bullets, steps, actions in PDDL (with the problem's names
    or the prompt's) and short names are understood.
    """
    return read_plan(text, _read_line)


def _read_line(line: str) -> list[Fact]:
    atoms = [_step(m[1], m[2], [_named(n) for n in m[3].split()]) for m in _PDDL.finditer(line)]
    if atoms:
        return atoms
    start = _LINE.match(line)
    objects = [] if start is None else list(_objects(line))
    return [_step(start[1], None, objects)] if start is not None and objects else []


def _step(verb: str, carrier: str | None, objects: list[str]) -> Fact:
    """An action; which carrier it takes is read off the objects where the verb does not say so."""
    if carrier is None:
        carried = objects[1:2] if verb.endswith("load") else objects[:1]
        carrier = {"a": "airplane", "t": "truck"}.get(carried[0][0], "") if carried else ""
    name = f"{verb}-{carrier}" if carrier else verb
    if name == "drive-truck" and len(objects) == 3:
        # The city may be left out: it is that of the first location.
        return name, *objects, "c" + objects[1][1:].partition("-")[0]
    return name, *objects


def _named(word: str) -> str:
    """An object's name in the problems, however the message has it; another word as it is."""
    found = _OBJECT.fullmatch(word)
    return next(iter(_objects(word))) if found else word


def _objects(text: str) -> Iterable[str]:
    for match in _OBJECT.finditer(text):
        *letters, number, second = match.groups()
        yield next(filter(None, letters)) + number + (f"-{second}" if second else "")


def to_objects(plan: Iterable[Fact], objects: Mapping[str, str]) -> list[Fact]:
    """The plan: its objects are named as in the problem already."""
    return list(plan)


def object_name(name: str) -> str:
    return f"{_LONG[name[0]]}_{name[1:].replace('-', '_')}" if name[0] in _LONG else name


def write_prompt(instance: Instance) -> str:
    """The problem in this project's own words, without an example."""
    init, goal = (
        enumerated([text for fact in sorted(facts) if (text := _write_fact(fact))])
        for facts in (instance.init, instance.goal)
    )
    return PROMPT.format(init=init, goal=goal)


def _write_fact(fact: Fact) -> str:
    predicate, *names = fact
    words = {"at": "is at", "in": "is in", "in-city": "is in", "airport": "is an airport"}
    if predicate not in words:
        return ""
    first, *rest = map(object_name, names)
    return " ".join([first, words[predicate], *rest])


def read_statement(text: str) -> str:
    """The problem in PDDL that the last [STATEMENT] of an official prompt describes.

    Raises PddlError for a text of another form.
    """
    found = _STATEMENT.search(text.rsplit("[STATEMENT]", 1)[-1])
    if found is None:
        raise PddlError("no [STATEMENT] with initial conditions and a goal")
    init, goal = _read_facts(found[1]), _read_facts(found[2])
    objects = sorted({name for fact in init + goal for name in fact[1:]})
    if not goal or not init:
        raise PddlError("the [STATEMENT] describes no objects or no goal")
    kinds = [(_KINDS[name[0]], name) for name in objects]
    return write_problem("statement", DOMAIN_NAME, objects, kinds + init, goal)


def _read_facts(text: str) -> list[Fact]:
    facts: list[Fact] = []
    for match in _FACTS.finditer(text):
        first, *others = (next(iter(_objects(n)), "") if n else "" for n in match.group(1, 4, 5))
        place, city = others
        if not first or (not match[2] and not place and not city):
            raise PddlError(f"the [STATEMENT] names an object of another form: {match[0]!r}")
        if match[2]:
            facts.append(("airport", first))
        else:
            facts.append(("at", first, place) if match[3] else ("in-city", first, city))
    return facts
