"""Blocksworld in words: its domain, and how states, goals and plans are read and written.

In problems the blocks are letters, in texts colours: a is red, b is blue. A block that has no
colour is "block m".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from satune.tasks.plan_text import enumerated, read_plan, write_problem
from satune.tasks.strips import Fact, Instance, PddlError, parse_domain, parse_problem

COLOURS = {
    "a": "red", "b": "blue", "c": "orange", "d": "yellow", "e": "white", "f": "magenta",
    "g": "black", "h": "cyan", "i": "green", "j": "violet", "k": "silver", "l": "gold",
}  # fmt: skip
"""The benchmark's colours, by the name of the block in its problems."""
LETTERS = {colour: letter for letter, colour in COLOURS.items()}

DOMAIN_NAME = "blocksworld-4ops"
DOMAIN = parse_domain(f"""
(define (domain {DOMAIN_NAME})
  (:requirements :strips)
  (:predicates (clear ?x) (ontable ?x) (handempty) (holding ?x) (on ?x ?y))
  (:action pick-up :parameters (?x)
    :precondition (and (clear ?x) (ontable ?x) (handempty))
    :effect (and (holding ?x) (not (clear ?x)) (not (ontable ?x)) (not (handempty))))
  (:action put-down :parameters (?x)
    :precondition (holding ?x)
    :effect (and (clear ?x) (ontable ?x) (handempty) (not (holding ?x))))
  (:action stack :parameters (?x ?y)
    :precondition (and (holding ?x) (clear ?y))
    :effect (and (on ?x ?y) (clear ?x) (handempty) (not (holding ?x)) (not (clear ?y))))
  (:action unstack :parameters (?x ?y)
    :precondition (and (on ?x ?y) (clear ?x) (handempty))
    :effect (and (holding ?x) (clear ?y) (not (on ?x ?y)) (not (clear ?x)) (not (handempty)))))
""")

PROMPT = """\
Blocks stand on a table, some on top of others, and you move them with one hand. Each action is \
written in these words, here with two colours as an example:

pick up the red block (nothing is on top of it, it is on the table, the hand is empty)
put down the red block (the hand holds it; it is then on the table)
stack the red block on top of the blue block (the hand holds the red block, nothing is on top of \
the blue one)
unstack the red block from on top of the blue block (it is directly on the blue block, nothing is \
on top of it, the hand is empty; the hand then holds it)

At the start {init}.
In the end {goal}.

Find actions that lead from the start to the end. Write them in order between [PLAN] and \
[PLAN END], one a line, without the remarks in brackets."""

_VERBS = ("pick-up", "put-down", "stack", "unstack")
_COLOUR = "|".join(LETTERS)
_VERB = re.compile(r"\b(?:(pick)(?: +|[_-])?up|(put)(?: +|[_-])?down|(stack)|(unstack))\b")
_BLOCK = re.compile(rf"\b(?:({_COLOUR})[ _-]?block|block[ _-]([a-z]))\b")
_LOOSE = re.compile(rf"\b(?:({_COLOUR})|block ([a-z]))\b")
_PDDL = re.compile(
    r"\( ?(?:(pick|put)[-_ ]?(?:up|down) ([\w-]+)|(stack|unstack) ([\w-]+) ([\w-]+)) ?\)"
)
_COLOURED = re.compile(rf"(?:the[_-])?({_COLOUR})[_-]?block")
_LETTERED = re.compile(r"(?:the[_-])?block[_-]?([a-z])")
_ATOMS = {"pick": "pick-up", "put": "put-down"}
_TAKES = {"pick-up": 1, "put-down": 1, "stack": 2, "unstack": 2}
_NAME = rf"(?:the ({_COLOUR}) block|block ([a-z]))"
_FACTS = re.compile(rf"{_NAME} is (?:(clear)|on the (table)|on top of {_NAME})|the hand is (empty)")
_STATEMENT = re.compile(r"initial conditions I have that,?(.*?)My goal is to have that(.*)", re.S)
_OWN = re.compile(r"At the start (.*?)\.\nIn the end (.*?)\.\n", re.S)


def read_blocks_plan(text: str) -> list[Fact]:
    """The plan in a message, its blocks named as the message does (colours or letters).

    A line is an action if it holds a verb and as many different blocks as the verb takes, in
    order; other lines are passed over. So the official extraction has it. Beyond it, actions in
    PDDL (with the problem's names or the prompt's: c, orange, orange_block), "block m" and, where
    the blocks named in full do not suit the verb, "red" are understood.
    """
    return read_plan(text, _read_line)


def _read_line(line: str) -> list[Fact]:
    verbs = {index for match in _VERB.finditer(line) if (index := match.lastindex) is not None}
    if not verbs:
        return []
    atoms = [
        (_ATOMS[m[1]], _bare(m[2])) if m[1] else (m[3], _bare(m[4]), _bare(m[5]))
        for m in _PDDL.finditer(line)
    ]
    if atoms:
        return atoms
    verb = _VERBS[min(verbs) - 1]
    for names in (_BLOCK, _LOOSE):
        blocks = dict.fromkeys(colour or letter for colour, letter in names.findall(line))
        if len(blocks) == _TAKES[verb]:
            return [(verb, *blocks)]
    return []


def to_objects(plan: Iterable[Fact], objects: Mapping[str, str]) -> list[Fact]:
    """A plan whose blocks are named as in the problem: a colour that is no object there becomes
    its letter, and so does "block_m"."""

    def named(block: str) -> str:
        lettered = _LETTERED.fullmatch(block)
        return lettered[1] if lettered else LETTERS.get(block, block)

    return [(step[0], *(b if b in objects else named(b) for b in step[1:])) for step in plan]


def _bare(block: str) -> str:
    coloured = _COLOURED.fullmatch(block)
    return coloured[1] if coloured else block


def block_name(block: str) -> str:
    return f"the {COLOURS[block]} block" if block in COLOURS else f"block {block}"


def write_step(step: Fact) -> str:
    """A step in the benchmark's words."""
    verb, block, *under = step
    text = f"{verb.replace('-', ' ')} {block_name(block)}"
    if under:
        text += f" {'from on top of' if verb == 'unstack' else 'on top of'} {block_name(under[0])}"
    return text


def write_steps(plan: Sequence[Fact]) -> str:
    """A plan in the benchmark's words, a step a line."""
    return "\n".join(write_step(step) for step in plan)


def write_fact(fact: Fact) -> str:
    predicate, *blocks = fact
    if predicate == "on":
        return f"{block_name(blocks[0])} is on top of {block_name(blocks[1])}"
    words = {"clear": "is clear", "ontable": "is on the table", "holding": "is in the hand"}
    return f"{block_name(blocks[0])} {words[predicate]}" if blocks else "the hand is empty"


def write_prompt(instance: Instance) -> str:
    """The problem in this project's own words, without an example."""
    init, goal = (
        enumerated([write_fact(fact) for fact in sorted(facts)])
        for facts in (instance.init, instance.goal)
    )
    return PROMPT.format(init=init, goal=goal)


def read_statement(text: str) -> str:
    """The problem in PDDL that the last [STATEMENT] of an official prompt describes, or one of
    ``write_prompt``.

    Raises PddlError for a text of another form.
    """
    found = _STATEMENT.search(text.rsplit("[STATEMENT]", 1)[-1]) or _OWN.search(text)
    if found is None:
        raise PddlError("no [STATEMENT] with initial conditions and a goal")
    init, goal = _read_facts(found[1]), _read_facts(found[2])
    objects = sorted({block for fact in init for block in fact[1:]})
    if not goal or not objects:
        raise PddlError("the [STATEMENT] describes no blocks or no goal")
    return blocks_problem("statement", objects, init, goal)


def blocks_problem(
    name: str, objects: Sequence[str], init: Sequence[Fact], goal: Sequence[Fact]
) -> str:
    """A problem of this domain in PDDL. Raises PddlError if it cannot be read back."""
    text = write_problem(name, DOMAIN_NAME, objects, init, goal)
    parse_problem(text)
    return text


def _read_facts(text: str) -> list[Fact]:
    facts: list[Fact] = []
    for match in _FACTS.finditer(text):
        colour, letter, clear, table, on_colour, on_letter, hand = match.groups()
        block = LETTERS[colour] if colour else letter
        under = LETTERS[on_colour] if on_colour else on_letter
        if hand:
            facts.append(("handempty",))
        elif clear or table:
            facts.append(("clear" if clear else "ontable", block))
        else:
            facts.append(("on", block, under))
    return facts
