"""One small problem of every task in the catalogue, with a message that answers it rightly, and the
hostile texts that every reader of messages has to bear."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from satune.tasks.catalog import TASKS, load_task
from satune.types import Problem, Task

_PEOPLE = ("Ann Lee", "Bob Stone", "Clara Dee", "Dan Fox", "Eve Moss")
_CASE = {
    "initial_information": {
        "time": "night",
        "location": "hall",
        "victim": {
            "name": "Sir X", "introduction": "Rich.", "cause_of_death": "fall",
            "murder_weapon": "none",
        },
        "suspect": [{"name": name, "introduction": "A guest."} for name in _PEOPLE],
    },
    "suspects": [{"name": name, "task": "Help.", "story": "I slept."} for name in _PEOPLE],
    "label": 3,
}  # fmt: skip
_PUZZLE = {"surface": "A man drinks and leaves.", "bottom": "The soup tasted of home."}
_CHECKED = {
    "idx": 7, "prompt": "Two rising numbers.", "lang": "en",
    "code": {
        "Inputs_Check_code": "def inputs_check(inputs):\n    return isinstance(inputs, list)",
        "Constraint_List_code": (
            "def rising(inputs):\n    return inputs[0] < inputs[1]\nconstraint_list = [rising]"
        ),
    },
}  # fmt: skip
_BLOCKS = {
    "id": "b", "ground_truth_plan": "(pick-up b)\n(stack b a)",
    "problem_pddl": (
        "(define (problem b) (:domain blocksworld-4ops) (:objects a b) (:init (handempty) (clear a)"
        " (clear b) (ontable a) (ontable b)) (:goal (and (on b a))))"
    ),
}  # fmt: skip
_LOGISTICS = {
    "id": "l", "ground_truth_plan": "(load-truck p0 t0 l0-1)\n(drive-truck t0 l0-1 l0-0 c0)",
    "problem_pddl": (
        "(define (problem l) (:domain logistics-strips) (:objects p0 t0 l0-0 l0-1 c0) (:init (obj"
        " p0) (truck t0) (location l0-0) (location l0-1) (city c0) (in-city l0-0 c0) (in-city l0-1"
        " c0) (at t0 l0-1) (at p0 l0-1)) (:goal (and (in p0 t0) (at t0 l0-0))))"
    ),
}  # fmt: skip
_ZEBRA = {
    "id": "z", "puzzle": "Eric lives before Arnold.",
    "solution": {"header": ["House", "Name"], "rows": [["1", "Eric"], ["2", "Arnold"]]},
}  # fmt: skip
_GRID = json.dumps({"solution": {"House 1": {"Name": "Eric"}, "House 2": {"Name": "Arnold"}}})
_PICKED = "pick up the blue block\nstack the blue block on top of the red block"
_DRIVEN = (
    "load package_0 into truck_0 at location_0_1\n"
    "drive truck_0 from location_0_1 to location_0_0 in city_0"
)

# task, its only row (None: it generates), its options, a right message (None: the reference)
_TASKS = (
    ("relay", None, {}, None),
    ("sums", None, {}, None),
    ("reasoning_gym", None, {"dataset": "chain_sum", "answer": "message"}, None),
    ("guess_number", {"secret": "4071"}, {}, "Guess: 4071"),
    ("arbench_gn", {"secret": "4071"}, {}, "Guess: 4071"),
    ("arbench_dc", _CASE, {}, "He lied.\nAnswer: D"),
    ("arbench_sp", _PUZZLE, {}, _PUZZLE["bottom"]),
    ("rows", {"prompt": "2+3?", "answer": "5"}, {"reward": "exact"}, "Answer: 5"),
    ("rows", {"prompt": "2+3?", "answer": "5"}, {"reward": "numeric"}, "The answer is 5."),
    ("maths", {"problem": "2+3?", "answer": "5"}, {}, "so \\boxed{5}"),
    ("aime24", {"problem": "2+3?", "answer": "5"}, {}, "so \\boxed{5}"),
    ("aime25", {"problem": "2+3?", "answer": "5"}, {}, "so \\boxed{5}"),
    ("math500", {"problem": "2+3?", "answer": "5"}, {}, "so \\boxed{5}"),
    ("autologi", _CHECKED, {}, "```python\n[1, 2]\n```"),
    ("blocksworld", None, {}, None),
    ("blocksworld", None, {"prompt": "planbench"}, None),
    ("planbench_bw", _BLOCKS, {}, _PICKED),
    ("planbench_bw", _BLOCKS, {"prompt": "short"}, "BA"),
    ("planbench_logistics", _LOGISTICS, {}, _DRIVEN),
    ("zebralogic", _ZEBRA, {}, _GRID),
)  # fmt: skip
assert {name for name, *_ in _TASKS} == set(TASKS), "every task of the catalogue stands here"
NAMES = tuple(" ".join([name, *map(str, options.values())]) for name, _, options, _ in _TASKS)


@dataclass(frozen=True)
class Case:
    task: Task
    problem: Problem
    right: str


def case(name: str, folder: Path) -> Case:
    """The case of one of ``NAMES``; its row is written into ``folder``."""
    kind, row, options, right = _TASKS[NAMES.index(name)]
    if row is None:
        task = load_task(kind, None, 0, None, **options)
        problem = next(iter(task.problems("eval")))
    else:
        data = folder / f"{kind}.jsonl"
        data.write_text(json.dumps(row) + "\n", encoding="utf-8")
        task = load_task(kind, data, 0, None, **options)
        (problem,) = task.problems("all")
    return Case(task, problem, str(problem.answer) if right is None else right)


PIECES = (
    # what surrounds words
    " ", "\t", "\n", "\r\n", "\u00a0", "\u2028", "*", "_", "`", "$", "#", "-", "\\", "\\ ", "\\_",
    ".", ",", ":", "=", "/", "'", '"', "(", ")", "[", "]", "{", "}", "<", ">", "\0", "é", "\ud800",
    # thoughts
    "<think>", "</think>", "<think> </think>",
    # numbers
    "1", "1,", "1.", "1/", "-1", "+1", "1+", "1 + ", "0.5 ", "1 2 ", "\u2212", "\uff15", "1x ",
    "12",
    # what marks an answer
    "answer", "answer ", "the answer is ", "answer is: ", "final answer: ", "#### ", "\\boxed",
    "\\boxed{", "\\boxed {", "\\fbox{", "\\boxed{}", "\\text{", "}{", "guess", "guess is ",
    "guess: 1", "guess 1 2 3 ", "guess 1,", "Answer: ", "Answer:\n", "answer*", "question for ",
    "Question for Ann Lee: why?\n", "Ann Lee: ", "Q: ", "A. ", "B", "A B ", "A-", "AB", "=AB",
    # plans
    "pick up ", "pick ", "pick", "put  down", "(stack ", "(stack a b)", "( ", "(pick-up a",
    "unstack", "the red block ", "red ", "red_block ", "block a ", "[PLAN]", "[plan", "[PLAN END]",
    "[/PLAN]", "[end", "end of plan\n", "plan end ", "[STATEMENT]", "### Plan:", "</plan>", "load ",
    "load p0", "step ", "1. load p", "drive truck_0 ", "(drive-truck t0 ", "(load a b c", "p0_",
    "p0-0", "l0-0 ", "package_", "package_0 ",
    # JSON and literals
    '{"}"}', "{}", '"{}', '{}\\"', '{"a"}', '{"\\', "{ ", '{"a":{}',
    '{"', '{"a":', '{"a":{', '{ "', '{"a":1}', '{"solution":{', '"a"', '"a\\', "\\\"", "[1,", "[[",
    "[1]", "{'a': 1}", "('", "'a' ", '"""', "'''", "```", "```\n", "```py\n[1]\n", "``` \t", "//",
    "//\n", "true", "true ", "a = ", "-", "not ", "~", "lambda:", "1j+", "1if 1else ", "\\N{",
    "\\x", "f'{", "#\n", "0x", "9", "1e9", "1_",
)  # fmt: skip
"""What the patterns of the extractors look for, and what almost is that."""

HEADS = (
    "", "The answer is", "answer", "Answer:", "\\boxed", "\\boxed{", "guess", "Guess: 1",
    "[PLAN]\n", "pick", "(stack a", "load package_0", '{"solution": {"House 1": {"Name": "',
    "```python\n", "[", "<think>", "Question for Ann", "1",
)  # fmt: skip
"""What opens something that a repeated piece may keep from ending."""


def hostile(rng: random.Random, right: str, longest: int) -> Iterator[str]:
    """Messages of up to ``longest`` characters without end: pieces repeated, nested between a head
    and a tail, mixed, or scattered through a right answer."""
    while True:
        size = int(longest ** rng.random()) + 1
        kind = rng.randrange(5)
        piece = rng.choice(PIECES)
        if kind == 0:
            text = rng.choice(HEADS) + piece * (size // len(piece) + 1)
        elif kind == 1:
            both = piece + rng.choice(PIECES)
            text = rng.choice(HEADS) + both * (size // len(both) + 1)
        elif kind == 2:
            mixed = []
            while size > 0:
                mixed.append(rng.choice(PIECES) * rng.choice((1, 1, 1, 2, 30)))
                size -= len(mixed[-1])
            text = "".join(mixed)
        elif kind == 3:
            at = rng.randrange(len(right) + 1)
            text = right[:at] + piece * (size // len(piece)) + right[at:]
        else:
            words = right.split(" ")
            text = (piece * rng.choice((1, 2, 30))).join(words) * max(1, size // (len(right) + 1))
        yield text[:longest]
