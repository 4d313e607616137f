"""PlanBench: plans in natural language for Blocksworld and logistics, checked by carrying them out.

Text becomes a plan the way the benchmark's own evaluation does it (karthikv792/LLMs-Planning): line
by line, an action's words and the objects in the order in which they stand; a line that is no
action is passed over. Beyond that, punctuation and articles do not matter, plans in PDDL are read,
and where a message holds [PLAN] or [PLAN END] only what lies between the last of them counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from satune.tasks.sources import (
    Row,
    check_fraction,
    check_unique,
    choose_split,
    field,
    hold_out,
    read_rows,
)
from satune.tasks.strips import Planning, Step, execute, parse_problem
from satune.types import Grade, Problem, UserError

COLOURS = {
    "a": "red", "b": "blue", "c": "orange", "d": "yellow", "e": "white", "f": "magenta",
    "g": "black", "h": "cyan", "i": "green", "j": "violet", "k": "silver", "l": "gold",
}  # fmt: skip
"""What the benchmark calls its blocks."""
LONGEST = 50_000
"""Characters of a message that are read, from its end."""

_PDDL = re.compile(r"\(\s*([a-z][\w-]*(?:\s+[\w-]+)*)\s*\)")
_BLOCK = re.compile(r"\b([a-z]+) block\b|\bblock ([a-z])\b")
_WORD = re.compile(r"[a-z][\w-]*")
_LOGISTICS = {"package": "p", "airplane": "a", "truck": "t", "location": "l", "city": "c"}
_OBJECT = re.compile(r"\b(package|airplane|truck|location|city)[ _-]?(\d+(?:[_-]\d+)?)\b")
_THOUGHT_ENDS = "</think>"

_FORM = """

Write the plan between [PLAN] and [PLAN END], one action a line, in these words:
{actions}"""


class PlanBench:
    """The rows of ``data`` (``problem_pddl``, ``domain_pddl``, ``ground_truth_plan_pddl``;
    ``query``, or ``statement`` and ``domain_intro``). ``prompt`` "official" asks with the row's own
    ``query``, an example included; "own" states the problem and the form of the answer without an
    example, and serves rows that have no query.

    A grade's components: ``executable`` the share of the plan's steps that could be carried out,
    ``plan_length`` its steps and, for a valid plan, ``optimal``: 1 if it has no more steps than the
    row's reference plan, which is a shortest one where the benchmark made it so.
    ``eval_fraction`` of the rows, chosen by the hash of their ids, form the split "eval", the rest
    "train", everything "all".

    Raises UserError for a bad option or a bad row (file and line).
    """

    name = "planbench"
    fresh = False
    actions: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        eval_fraction: float = 0.1,
        prompt: str = "official",
    ) -> None:
        if data is None:
            raise UserError(f"task {self.name}: it needs data: a JSONL file of PlanBench's rows")
        if prompt not in ("official", "own"):
            raise UserError(f"task {self.name}: prompt is {prompt!r}; give 'official' or 'own'")
        self.seed = seed
        self.prompt = prompt
        fraction = check_fraction(self.name, eval_fraction)
        self._planning: dict[str, Planning] = {}
        named = [(place, self._problem(place, row)) for place, row in read_rows(data)]
        check_unique([(place, problem.id) for place, problem in named])
        self._places = {problem.id: place for place, problem in named}
        problems = [problem for _, problem in named]
        self._kept, self._held = hold_out(problems, [p.id for p in problems], fraction)

    def problems(self, split: str) -> Iterator[Problem]:
        """The rows of "train", "eval" (also "certify": the held-out rows) or "all"."""
        return iter(choose_split(self.name, split, self._kept, self._held))

    def extract(self, text: str) -> str | None:
        """The plan in PDDL, a step a line; None if there is no step."""
        plan = self._plan(text)
        return "\n".join(f"({' '.join(step)})" for step in plan) or None

    def equal(self, a: str, b: str) -> bool:
        return a == b

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """1 if the plan can be carried out and reaches the goal, else 0. No answer is no plan."""
        if answer is None:
            return Grade(0.0, {"executable": 0.0, "plan_length": 0.0}, "no answer")
        plan = self._plan(answer)
        outcome = execute(self._planning_of(problem), plan)
        components = {
            "executable": outcome.ran / len(plan) if plan else 0.0,
            "plan_length": float(len(plan)),
        }
        if outcome.valid:
            components["optimal"] = float(len(plan) <= len(problem.answer.splitlines()))
        detail = outcome.reason if plan else f"no action found; {outcome.reason}"
        return Grade(float(outcome.valid), components, detail)

    def validate(self) -> None:
        """Check that each row's reference plan scores 1, in PDDL and in words, and 0 without its
        last step.

        Raises UserError naming file and line of the row that fails.
        """
        for problem in (*self._kept, *self._held):
            steps = problem.answer.splitlines()
            forms = [problem.answer, self.in_words(problem.answer)]
            scores = [self.grade(problem, form).score for form in (*forms, "\n".join(steps[:-1]))]
            if scores != [1.0, 1.0, 0.0]:
                raise UserError(f"{self._places[problem.id]}: grades its own plan wrongly")

    def in_words(self, plan: str) -> str:
        """A plan in PDDL in the benchmark's words."""
        return "\n".join(self._sentence(step) for step in _pddl_steps(plan))

    def _sentence(self, step: Step) -> str:
        raise NotImplementedError

    def _step(self, line: str) -> Step | None:
        """The action of one line in lower case, None if it is none."""
        raise NotImplementedError

    def _statement(self, planning: Planning) -> str:
        """Start and goal in words."""
        raise NotImplementedError

    def _plan(self, text: str) -> list[Step]:
        spoken = text[-LONGEST:].rpartition(_THOUGHT_ENDS)[2].lower()
        lines = _marked(spoken).splitlines()
        plan: list[Step] = []
        for line in lines:
            steps = _pddl_steps(line, self._known)
            plan += steps if steps else filter(None, [self._step(line)])
        return plan

    @property
    def _known(self) -> frozenset[str]:
        return frozenset(self.actions)

    def _planning_of(self, problem: Problem) -> Planning:
        if problem.id not in self._planning:  # an id that take() numbered, or another process's
            metadata = problem.metadata
            return parse_problem(metadata["domain_pddl"], metadata["problem_pddl"])
        return self._planning[problem.id]

    def _problem(self, place: str, row: Row) -> Problem:
        texts = {name: field(place, row, name) for name in ("problem_pddl", "domain_pddl")}
        try:
            planning = parse_problem(texts["domain_pddl"], texts["problem_pddl"])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{place}: its PDDL cannot be read: {error}") from error
        unknown = set(self.actions) ^ set(planning.actions)
        if unknown:
            raise UserError(
                f"{place}: the domain's actions are {', '.join(planning.actions)}; task "
                f"{self.name} has {', '.join(self.actions)}"
            )
        reference = str(field(place, row, "ground_truth_plan_pddl")).strip()
        query = row.get("query")
        if self.prompt == "own" or not query:
            statement = str(row.get("statement") or "").partition("My plan is")[0].strip()
            intro = str(row.get("domain_intro") or "").strip()
            parts = [intro, statement or self._statement(planning)]
            query = "\n\n".join(part for part in parts if part) + self._form(planning)
        identity = str(field(place, row, "id"))
        self._planning[identity] = planning
        subset = row.get("subset")
        return Problem.of(identity, str(query), reference, subset=subset, **texts)

    def _form(self, planning: Planning) -> str:
        return _FORM.format(actions="\n".join(self.examples(planning)))

    def examples(self, planning: Planning) -> list[str]:
        """One sentence an action, to show the form."""
        raise NotImplementedError


class Blocks(PlanBench):
    """Blocksworld in natural language (``planbench_bw``)."""

    name = "planbench_bw"
    # In the order of the domain: where a line holds several, the first of these counts.
    actions = ("pick-up", "put-down", "stack", "unstack")

    def _sentence(self, step: Step) -> str:
        name, *blocks = step
        blocks = [f"the {_called(block)} block" for block in blocks]
        return {
            "pick-up": "pick up {}",
            "put-down": "put down {}",
            "stack": "stack {} on top of {}",
            "unstack": "unstack {} from on top of {}",
        }[name].format(*blocks)

    def _step(self, line: str) -> Step | None:
        line = line.replace("pick up", "pick-up").replace("put down", "put-down")
        words = set(_WORD.findall(line))
        name = next((name for name in self.actions if name in words), None)
        blocks = list(dict.fromkeys(_letters(line)))
        if name is None or len(blocks) != (1 if name in ("pick-up", "put-down") else 2):
            return None
        return (name, *blocks)

    def _statement(self, planning: Planning) -> str:
        return (
            f"As initial conditions I have that {_facts(sorted(planning.start))}.\n"
            f"My goal is to have that {_facts(sorted(planning.goal))}."
        )

    def examples(self, planning: Planning) -> list[str]:
        a, b = (*planning.objects, *planning.objects)[:2]
        return [self._sentence((n, a, b) if "stack" in n else (n, a)) for n in self.actions]


class Logistics(PlanBench):
    """Logistics in natural language (``planbench_logistics``)."""

    name = "planbench_logistics"
    actions = (
        "load-truck", "load-airplane", "unload-truck", "unload-airplane",
        "drive-truck", "fly-airplane",
    )  # fmt: skip

    def _sentence(self, step: Step) -> str:
        name, *objects = step
        objects = [_named(each) for each in objects]
        if name.startswith("load"):
            return "load {} into {} at {}".format(*objects)
        if name.startswith("unload"):
            return "unload {} from {} at {}".format(*objects)
        if name == "drive-truck":
            return "drive {} from {} to {} in {}".format(*objects)
        return "fly {} from {} to {}".format(*objects)

    def _step(self, line: str) -> Step | None:
        words = _WORD.findall(line)
        verb = words[0] if words else ""
        objects = [
            _LOGISTICS[kind] + re.sub("_", "-", number) for kind, number in _OBJECT.findall(line)
        ]
        if verb in ("load", "unload") and len(objects) >= 2:
            kind = {"a": "airplane", "t": "truck"}.get(objects[1][0])
            return (f"{verb}-{kind}", *objects) if kind else None
        if verb == "fly":
            return ("fly-airplane", *objects)
        if verb == "drive":
            if len(objects) == 3 and objects[1][0] == "l":
                # A location's name begins with its city's number.
                objects.append("c" + objects[1][1:].partition("-")[0])
            return ("drive-truck", *objects)
        return None

    def _statement(self, planning: Planning) -> str:
        def said(facts: Sequence[tuple[str, ...]]) -> str:
            words = {"at": "{} is at {}", "in": "{} is in {}", "in-city": "{} is in the city {}",
                     "airport": "{} is an airport"}  # fmt: skip
            return ", ".join(
                words[name].format(*map(_named, objects))
                for name, *objects in facts
                if name in words
            )

        return (
            f"As initial conditions I have that, {said(sorted(planning.start))}.\n"
            f"My goal is to have that {said(sorted(planning.goal))}."
        )

    def examples(self, planning: Planning) -> list[str]:
        return [
            "load package_0 into truck_0 at location_0_0",
            "unload package_0 from airplane_0 at location_1_0",
            "drive truck_0 from location_0_0 to location_0_1 in city_0",
            "fly airplane_0 from location_0_0 to location_1_0",
        ]


def _marked(text: str) -> str:
    """What lies between the last [plan] and the [plan end] behind it; all of it without either."""
    before, _, after = text.rpartition("[plan]")
    if before.strip() and not after.strip("\n []"):
        after = before.rpartition("[plan]")[2]
    return after.partition("[plan end]")[0].partition("[statement]")[0]


def _pddl_steps(text: str, known: frozenset[str] | None = None) -> list[Step]:
    steps = [tuple(found.split()) for found in _PDDL.findall(text)]
    return [step for step in steps if known is None or step[0] in known]


def _called(block: str) -> str:
    return COLOURS.get(block, block)


_LETTERS = {colour: letter for letter, colour in COLOURS.items()}


def _letters(line: str) -> list[str]:
    """The blocks that a line names, as letters, in their order."""
    found = (colour or letter for colour, letter in _BLOCK.findall(line))
    names = ((_LETTERS.get(name), name) for name in found)
    return [letter or name for letter, name in names if letter or len(name) == 1]


def _facts(facts: Sequence[tuple[str, ...]]) -> str:
    words = {
        "clear": "the {} block is clear", "ontable": "the {} block is on the table",
        "on": "the {} block is on top of the {} block", "handempty": "the hand is empty",
        "holding": "the {} block is in the hand",
    }  # fmt: skip
    return ", ".join(words[name].format(*map(_called, blocks)) for name, *blocks in facts)


def _named(symbol: str) -> str:
    """``l0-1`` as location_0_1."""
    kinds = {short: long for long, short in _LOGISTICS.items()}
    return f"{kinds[symbol[0]]}_{symbol[1:].replace('-', '_')}"
