"""PlanBench: from text to a plan, and whether the plan does it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmark_rows import rows_of
from satune.tasks.planbench import Blocks, Logistics, PlanBench
from satune.tasks.strips import Step, execute, parse_problem
from satune.types import Problem, UserError

DOMAIN = """
(define (domain blocksworld-4ops) (:requirements :strips)
 (:predicates (clear ?x) (ontable ?x) (handempty) (holding ?x) (on ?x ?y))
 (:action pick-up :parameters (?ob) :precondition (and (clear ?ob) (ontable ?ob) (handempty))
  :effect (and (holding ?ob) (not (clear ?ob)) (not (ontable ?ob)) (not (handempty))))
 (:action put-down :parameters (?ob) :precondition (holding ?ob)
  :effect (and (clear ?ob) (handempty) (ontable ?ob) (not (holding ?ob))))
 (:action stack :parameters (?ob ?underob) :precondition (and (clear ?underob) (holding ?ob))
  :effect (and (handempty) (clear ?ob) (on ?ob ?underob) (not (clear ?underob))
               (not (holding ?ob))))
 (:action unstack :parameters (?ob ?underob)
  :precondition (and (on ?ob ?underob) (clear ?ob) (handempty))
  :effect (and (holding ?ob) (clear ?underob) (not (on ?ob ?underob)) (not (clear ?ob))
               (not (handempty)))))
"""
# Blue (b) stands on red (a), orange (c) beside them; orange is wanted on blue, where it is free.
PROBLEM = """
(define (problem p) (:domain blocksworld-4ops) (:objects a b c)
 (:init (handempty) (ontable a) (on b a) (ontable c) (clear b) (clear c))
 (:goal (and (on b c))))
"""
ROW = {
    "id": "one", "problem_pddl": PROBLEM, "domain_pddl": DOMAIN, "query": "...",
    "ground_truth_plan_pddl": "(unstack b a)\n(stack b c)",
}  # fmt: skip
GOLD = "unstack the blue block from on top of the red block\nstack the blue block on top of the "
GOLD += "orange block"


def task_of(tmp_path: Path, *rows: object, **options: Any) -> Blocks:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or (ROW,)))
    return Blocks(path, eval_fraction=0.0, **options)


@pytest.fixture
def task(tmp_path: Path) -> Blocks:
    return task_of(tmp_path)


@pytest.fixture
def problem(task: Blocks) -> Problem:
    return next(task.problems("all"))


# (why, message, score)
FORMATS = [
    ("the reference in words", GOLD, 1),
    ("with the end mark", GOLD + "\n[PLAN END]", 1),
    ("between marks, talk before", f"Let me pick up the red block.\n[PLAN]\n{GOLD}\n[PLAN END]", 1),
    ("talk after the end mark", GOLD + "\n[PLAN END]\nNow pick up the red block.", 1),
    ("a second problem made up behind it", GOLD + "\n[STATEMENT]\npick up the red block", 1),
    ("numbered lines", "1. " + GOLD.replace("\n", "\n2. "), 1),
    ("bullets and full stops", "- " + GOLD.replace("\n", ".\n- ") + ".", 1),
    ("capitals", GOLD.upper(), 1),
    ("bold", "**" + GOLD.replace("\n", "**\n**") + "**", 1),
    ("without articles", GOLD.replace("the ", ""), 1),
    ("short words", "unstack the blue block from the red block\nstack the blue block on the "
     "orange block", 1),
    ("hyphens", "put-down the red block".replace("put-down the red block", GOLD), 1),
    ("PDDL", "(unstack b a)\n(stack b c)", 1),
    ("PDDL on one line", "(unstack b a) (stack b c)", 1),
    ("PDDL in a fence", "```\n(unstack b a)\n(stack b c)\n```", 1),
    ("a thought that plans otherwise", f"<think>pick up the red block</think>\n{GOLD}", 1),
    ("a line that is no action is passed over", GOLD.replace("\n", "\nThen, carefully:\n"), 1),
    ("a longer plan that works", GOLD.replace("\nstack", "\nput down the blue block\npick up the "
     "blue block\nstack"), 1),
    ("last action dropped", GOLD.split("\n")[0], 0),
    ("first action dropped", GOLD.split("\n")[1], 0),
    ("swapped", "\n".join(reversed(GOLD.split("\n"))), 0),
    ("an action more than can be done", GOLD + "\nput down the blue block", 0),
    ("objects swapped", GOLD.replace("blue", "x").replace("red", "blue").replace("x", "red"), 0),
    ("a block that is not there", GOLD.replace("orange", "purple"), 0),
    ("the goal undone at the end", GOLD + "\nunstack the blue block from on top of the orange block"
     "\nput down the blue block", 0),
    ("PDDL with a block too many", "(unstack b a c)\n(stack b c)", 0),
    ("an end mark first", "[PLAN END]\n" + GOLD, 0),
    ("no plan", "It cannot be done.", 0),
    ("nothing", "", 0),
]  # fmt: skip


@pytest.mark.parametrize("why, message, score", FORMATS, ids=[f[0] for f in FORMATS])
def test_formats(task: Blocks, problem: Problem, why: str, message: str, score: int) -> None:
    assert task.grade(problem, message).score == score


def test_components(task: Blocks, problem: Problem) -> None:
    longer = GOLD.replace("\nstack", "\nput down the blue block\npick up the blue block\nstack")
    assert task.grade(problem, GOLD).components == {
        "executable": 1.0, "plan_length": 2.0, "optimal": 1.0,
    }  # fmt: skip
    assert task.grade(problem, longer).components == {
        "executable": 1.0, "plan_length": 4.0, "optimal": 0.0,
    }  # fmt: skip
    halfway = task.grade(problem, GOLD + "\nput down the blue block")
    assert halfway.components == {"executable": pytest.approx(2 / 3), "plan_length": 3.0}
    assert "step 3 (put-down b): needs holding b" in halfway.detail


def test_an_empty_plan_does_where_the_goal_holds_already(tmp_path: Path) -> None:
    reached = PROBLEM.replace("(on b c)", "(on b a)")
    task = task_of(tmp_path, {**ROW, "problem_pddl": reached, "ground_truth_plan_pddl": ""})
    problem = next(task.problems("all"))
    assert task.grade(problem, "Nothing to do.").score == 1.0
    assert task.grade(problem, None).score == 0.0


def test_own_words_state_the_problem(tmp_path: Path) -> None:
    problem = next(task_of(tmp_path, prompt="own").problems("all"))
    assert "the blue block is on top of the red block" in problem.text
    assert "My goal is to have that the blue block is on top of the orange block." in problem.text
    assert "[PLAN END]" in problem.text


LOGISTICS_WORDS = [
    ("load package_0 into airplane_1 at location_1_0", ("load-airplane", "p0", "a1", "l1-0")),
    ("2. Unload package_0 from truck_1 at location_1_0.", ("unload-truck", "p0", "t1", "l1-0")),
    ("fly airplane_1 from location_1_0 to location_0_0", ("fly-airplane", "a1", "l1-0", "l0-0")),
    ("drive truck_0 from location_0_0 to location_0_1 in city_0",
     ("drive-truck", "t0", "l0-0", "l0-1", "c0")),
    ("drive truck_0 from location_0_0 to location_0_1",
     ("drive-truck", "t0", "l0-0", "l0-1", "c0")),
    ("load the package 0 into truck 0 at location 0-0", ("load-truck", "p0", "t0", "l0-0")),
    ("load package_0", None),
    ("then load package_0 into truck_0 at location_0_0", None),
    ("load package_0 into location_0_0 at truck_0", None),
]  # fmt: skip


@pytest.mark.parametrize("line, step", LOGISTICS_WORDS)
def test_logistics_words(line: str, step: Step | None) -> None:
    assert Logistics._step(Logistics.__new__(Logistics), line.lower()) == step


def test_types_and_forbidden_facts() -> None:
    """A typed domain whose action needs its type and forbids a fact, by hand."""
    domain = """(define (domain d) (:types truck plane - vehicle)
      (:action go :parameters (?v - vehicle) :precondition (and (not (gone ?v)))
       :effect (and (gone ?v)))
      (:action fly :parameters (?p - plane) :effect (and (flown ?p))))"""
    problem = """(define (problem p) (:objects t - truck p - plane x) (:init)
      (:goal (and (gone t) (flown p))))"""
    planning = parse_problem(domain, problem)
    assert execute(planning, [("go", "t"), ("fly", "p")]).valid
    assert execute(planning, [("go", "t"), ("go", "t")]).reason == "step 2 (go t): forbids gone t"
    assert execute(planning, [("fly", "t")]).reason == "step 1 (fly t): needs plane t"
    assert execute(planning, [("go", "x")]).reason == "step 1 (go x): needs vehicle x"
    assert execute(planning, [("go", "t")]).reason == "the goal lacks flown p"


BAD = [
    ({**ROW, "problem_pddl": PROBLEM + ")"}, "a bracket closes that was never opened"),
    ({**ROW, "problem_pddl": "(define"}, "the brackets do not match"),
    ({**ROW, "domain_pddl": DOMAIN.replace("pick-up", "grab")}, "the domain's actions are grab"),
    ({**ROW, "domain_pddl": DOMAIN.replace("(clear ?ob) (ont", "(or (clear ?ob)) (ont")},
     "'or' goes beyond"),
    ({k: v for k, v in ROW.items() if k != "problem_pddl"}, "no field 'problem_pddl'"),
]  # fmt: skip


@pytest.mark.parametrize("row, message", BAD, ids=range(len(BAD)))
def test_bad_rows_are_one_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1") as caught:
        task_of(tmp_path, row)
    assert message in str(caught.value) and "\n" not in str(caught.value)


FILES = [
    ("planbench_bw_nl.jsonl", Blocks, 432),
    ("planbench_bw_train.jsonl", Blocks, 610),
    ("planbench_logistics.jsonl", Logistics, 208),
]


def loaded(name: str, kind: type[PlanBench]) -> tuple[PlanBench, list[tuple[Problem, Any]]]:
    task = kind(rows_of(name))
    problems = list(task.problems("all"))
    rows = {r["id"]: r for r in map(json.loads, rows_of(name).read_text().splitlines())}
    return task, [(problem, rows[problem.id]) for problem in problems]


@pytest.mark.parametrize("name, kind, count", FILES, ids=[f[0] for f in FILES])
def test_real_plans_score_1_and_damaged_ones_0(
    name: str, kind: type[PlanBench], count: int
) -> None:
    task, pairs = loaded(name, kind)
    assert len(pairs) == count
    swaps = 0
    for problem, row in pairs:
        gold = problem.answer.splitlines()
        forms = [problem.answer, row["ground_truth_plan_nl"], task.in_words(problem.answer)]
        for form in filter(None, forms):
            grade = task.grade(problem, form)
            assert grade.score == grade.components["optimal"] == 1.0, (problem.id, grade.detail)
        assert task.grade(problem, task.in_words("\n".join(gold[:-1]))).score == 0.0
        for i in range(len(gold) - 1):
            swapped = [*gold[:i], gold[i + 1], gold[i], *gold[i + 2 :]]
            score = task.grade(problem, "\n".join(swapped)).score
            if kind is Blocks:
                # What is picked up must be put somewhere before the next: order always matters.
                assert score == 0.0
                swaps += 1
    assert swaps or kind is Logistics


def test_every_query_asks_for_what_the_row_holds() -> None:
    for name, kind, _ in FILES:
        for problem, row in loaded(name, kind)[1]:
            assert problem.text == row["query"] if row["query"] else "[PLAN END]" in problem.text


def steps_of(plan: str) -> list[list[str]]:
    return [line.strip("() ").split() for line in plan.splitlines()]


def variants(plan: str, rng: random.Random) -> list[str]:
    """The plan, and ways in which it may be damaged; some of them may still work."""
    lines = plan.splitlines()
    i, j = sorted(rng.sample(range(len(lines)), 2)) if len(lines) > 1 else (0, 0)
    exchanged = list(lines)
    exchanged[i], exchanged[j] = exchanged[j], exchanged[i]
    dropped = lines[:i] + lines[i + 1 :]
    return [plan, "\n".join(lines[:-1]), "\n".join(exchanged), "\n".join(dropped),
            "\n".join([*lines, lines[i]])]  # fmt: skip


def judged_by_unified_planning(row: Any, plans: Sequence[str]) -> list[bool]:
    pytest.importorskip("unified_planning")
    from unified_planning.engines import ValidationResultStatus
    from unified_planning.engines.plan_validator import SequentialPlanValidator
    from unified_planning.io import PDDLReader
    from unified_planning.plans import ActionInstance, SequentialPlan

    problem = PDDLReader().parse_problem_string(row["domain_pddl"], row["problem_pddl"])
    verdicts = []
    with SequentialPlanValidator() as validator:
        for plan in plans:
            actions = [
                ActionInstance(problem.action(name), tuple(map(problem.object, arguments)))
                for name, *arguments in steps_of(plan)
            ]
            result = validator.validate(problem, SequentialPlan(actions, problem.environment))
            verdicts.append(result.status == ValidationResultStatus.VALID)
    return verdicts


def test_verdicts_are_those_of_unified_planning() -> None:
    """60 plans of each of Blocksworld and logistics, whole and damaged."""
    rng = random.Random(0)
    seen = set()
    for name, kind in (("planbench_bw_nl.jsonl", Blocks), ("planbench_logistics.jsonl", Logistics)):
        task, pairs = loaded(name, kind)
        for problem, row in rng.sample(pairs, 12):
            plans = variants(problem.answer, rng)
            ours = [task.grade(problem, plan).score == 1.0 for plan in plans]
            assert ours == judged_by_unified_planning(row, plans), problem.id
            seen.update(ours)
    assert seen == {True, False}


def damaged(rng: random.Random, text: str) -> str:
    pieces = ["pick up", "the red block", "(stack", ")", "[PLAN]", "[plan end]", "\n", "1.", "\x00",
              "block", "é", "unstack", "on top of", "location_0_0", "drive truck_0"]  # fmt: skip
    kind = rng.randrange(3)
    if kind == 0:
        return " ".join(rng.choice(pieces) for _ in range(rng.randrange(60)))
    place = rng.randrange(len(text) + 1)
    if kind == 1:
        return text[:place] + rng.choice(pieces) + text[place + rng.randrange(12) :]
    return text[:place]


@pytest.mark.parametrize(
    "count", [1_000, pytest.param(50_000, marks=pytest.mark.slow)], ids=["some", "many"]
)
@pytest.mark.parametrize("name, kind, _", FILES[::2], ids=["blocks", "logistics"])
def test_no_message_breaks_it(name: str, kind: type[PlanBench], _: int, count: int) -> None:
    rng = random.Random(count)
    task, pairs = loaded(name, kind)
    for _ in range(count):
        problem, row = rng.choice(pairs)
        grade = task.grade(problem, damaged(rng, row["ground_truth_plan_nl"]))
        assert grade.score in (0.0, 1.0)
        assert all(grade.components[c] >= 0.0 for c in grade.components)
        assert grade.components["executable"] <= 1.0


HUGE = ["(" * 1_000_000, "(stack b a) " * 100_000, "stack the red block " * 60_000,
        "[plan]" * 200_000, "pick up the red block\n" * 50_000, "block " * 200_000]  # fmt: skip


@pytest.mark.parametrize("message", HUGE, ids=range(len(HUGE)))
def test_a_huge_message_takes_less_than_a_second(
    task: Blocks, problem: Problem, message: str
) -> None:
    started = time.perf_counter()
    assert task.grade(problem, message).score == 0.0
    assert time.perf_counter() - started < 1.0
