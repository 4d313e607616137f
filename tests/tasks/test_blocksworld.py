from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark_rows import rows_of
from satune.config.load import load_recipe
from satune.protocols.catalog import load_protocol
from satune.rollout import rollout_sync
from satune.tasks.blocksworld import (
    NAMES,
    Blocksworld,
    State,
    following,
    plan_moves,
    reached,
    read_problem,
    shortest,
    stacks,
    states,
)
from satune.types import Entry, Key, Problem, UserError
from scripted import ScriptedEngine, expert_writer, team

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "blocksworld.yaml"
SEATS = ("ann", "bob", "cem")
DOMAIN = """
(define (domain d) (:requirements :strips)
 (:predicates (clear ?x) (ontable ?x) (handempty) (holding ?x) (on ?x ?y))
 (:action pick-up :parameters (?a)
  :precondition (and (clear ?a) (ontable ?a) (handempty)) :effect (holding ?a)))
"""


def first(task: Blocksworld, split: str, n: int) -> list[Problem]:
    return list(itertools.islice(task.problems(split), n))


def all_goals(blocks: int) -> list[State]:
    sizes = range(2, blocks + 1)
    return [("".join(t),) for k in sizes for t in itertools.permutations(NAMES[:blocks], k)]


ALL_OF_THREE = [(s, g) for s in states(3) for g in all_goals(3) if not reached(s, g)]


def row(init: str, goal: str, objects: str = "a b c", **more: str) -> str:
    problem = f"(define (problem p) (:objects {objects}) (:init (handempty) {init}) (:goal {goal}))"
    return json.dumps({"domain_pddl": DOMAIN, "problem_pddl": problem, **more}) + "\n"


def write(tmp_path: Path, *rows: str) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(rows))
    return path


def entries(problem: str, *messages: str) -> list[Entry]:
    seen = [Entry("problem", parts=Problem.of("p", problem).prompt)]
    return seen + [Entry("foreign", text, "bob") for text in messages]


@pytest.mark.parametrize(
    ("problem", "plan"),
    [
        ("A/B/C>AB", "BA"),
        ("AB/C>BA", "B-AB"),  # B is in A's way
        ("AB/C>BC", "CB"),  # on top of B, which stands on A, C is as good as anywhere
        ("ABC>CBA", "C-BCAB"),  # turned over: C down, B onto it, A onto B
        ("ABC>ACB", "C-B-CABC"),  # C must go under B: neither can take its place at once
        ("A/CB>ABC", "BACB"),
        ("AC/B>AB", "C-BA"),
        ("A/B/C/D>AB/CD", "BADC"),
    ],
)
def test_shortest_plans_by_hand(problem: str, plan: str) -> None:
    found = shortest(*read_problem(problem))
    assert found is not None
    assert "".join(found) == plan


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        ("A/B/C", "AB", "BA/C"),
        ("A/CB", "BA", "AB/C"),
        ("A/CB", "B-", "A/B/C"),
        ("ABC", "CB", None),  # onto what it stands on: no move
        ("ABC", "BC", None),  # B is covered
        ("AB/C", "CA", None),  # A is covered
        ("AB/C", "C-", None),  # C stands on the table
        ("A/B", "AA", None),
        ("A/B", "AD", None),
        ("A/B", "-A", None),
    ],
)
def test_moves_by_hand(before: str, step: str, after: str | None) -> None:
    found = following(tuple(before.split("/"))).get(step)
    assert (None if found is None else "/".join(found)) == after


def test_moves_of_a_state() -> None:
    assert list(following(("A", "CB"))) == ["AB", "B-", "BA"]
    assert list(following(("A", "B"))) == ["AB", "BA"]
    assert list(following(("ABC",))) == ["C-"]


def test_there_are_as_many_states_as_sets_of_lists() -> None:
    # Sets of lists of n things, OEIS A000262.
    assert [len(set(states(n))) for n in range(2, 6)] == [3, 13, 73, 501]


def test_no_plan_is_shorter_whatever_the_problem_of_three_blocks() -> None:
    # Goals of two blocks: 6 in each of 13 states, of which the 18 facts that hold in some state are
    # reached already; of three: 6 * 13 - 6. Together 60 + 72.
    assert len(ALL_OF_THREE) == 132
    for state, goal in ALL_OF_THREE:
        # All sequences of moves, layer by layer, without a memory of states.
        layer, length = [state], 0
        while not any(reached(each, goal) for each in layer):
            layer = [after for each in layer for after in following(each).values()]
            length += 1
        plan = shortest(state, goal)
        assert plan is not None and len(plan) == length <= 4
        for step in plan:
            state = following(state)[step]
        assert reached(state, goal)


@pytest.mark.parametrize("blocks", [2, 3, 4, 6])
def test_generated_problems_grade_their_own_plans(blocks: int) -> None:
    task = Blocksworld(blocks=blocks)
    task.validate()
    for split in ("train", "eval", "certify"):
        for problem in first(task, split, 20):
            state, goal = read_problem(problem.text)
            assert sorted("".join(state)) == list(NAMES[:blocks])
            assert len(goal) == 1 and len(goal[0]) >= 2 and not reached(state, goal)
            assert set(problem.text) <= set(task.alphabet)


def test_splits_are_disjoint_whatever_the_seed_and_hold_every_problem() -> None:
    seen = {
        split: {p.text for seed in (0, 1) for p in first(Blocksworld(seed=seed), split, 600)}
        for split in ("train", "eval", "certify")
    }
    for a, b in itertools.combinations(seen, 2):
        assert not seen[a] & seen[b]
    assert sum(map(len, seen.values())) == 132


def test_problems_are_a_function_of_seed_split_and_index() -> None:
    task = Blocksworld()
    assert task.problem_at("train", 123).id == "blocksworld-train-000123"
    assert first(task, "train", 9)[8] == Blocksworld().problem_at("train", 8)
    assert first(task, "train", 9) != first(Blocksworld(seed=1), "train", 9)


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("B-BA;AB/C", "B-BA"),
        ("B-BA", "B-BA"),
        ("The plan is B-BA.", "B-BA"),
        ("B-;A/B/C\nB-BA;AB/C", "B-BA"),
        (";AB/C", None),
        ("B", None),
        ("B-B", None),
        ("", None),
        ("none", None),
    ],
)
def test_extraction(text: str, plan: str | None) -> None:
    assert Blocksworld().extract(text) == plan


def test_the_grade_carries_the_moves_out_from_the_problems_state() -> None:
    task, problem = Blocksworld(), Problem.of("p", "AB/C>BA", "B-AB")

    def components(answer: str | None) -> tuple[float, ...]:
        grade = task.grade(problem, answer)
        found = dict(grade.components)
        return (
            grade.score, found["executable"], found["plan_length"], found.get("optimal", -1),
        )  # fmt: skip

    assert components("B-AB;BA/C") == (1, 1, 2, 1)
    assert components("B-AB;nonsense") == (1, 1, 2, 1)  # the state is the players' own affair
    assert components("BCB-AB;BA/C") == (1, 1, 3, 0)
    assert components("B-;BA/C") == (0, 1, 1, -1)
    assert components("AB;BA/C") == (0, 0, 1, -1)
    assert components("B-ABAB") == (0, 2 / 3, 3, -1)
    assert components(";BA/C") == (0, 0, 0, -1)
    assert components(None) == (0, 0, 0, -1)


@settings(max_examples=2000, deadline=None)
@given(st.text() | st.text(alphabet=Blocksworld.alphabet + " ", max_size=40))
def test_no_text_makes_grade_or_expert_stumble(text: str) -> None:
    task, problem = Blocksworld(), Problem.of("p", "AB/C>BA", "B-AB")
    grade = task.grade(problem, text)
    assert grade.score in (0, 1) and 0 <= grade.components["executable"] <= 1
    said = task.expert(entries(problem.text, text), random.Random(0), 0.5)
    # Whatever was said, the expert writes moves that can be made and the state they lead to.
    written = task.grade(problem, said)
    assert written.components["executable"] == 1
    assert reached(read_problem(said.partition(";")[2])[0], ("BA",)) == (written.score == 1)


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        ([], "BA;AB/C"),
        (["B-;A/B/C"], "B-BA;AB/C"),
        (["B-;A/B/C", "B-BA;AB/C"], "B-BACB;ABC"),
        (["B-BACB;ABC"], "B-BACB;ABC"),  # the goal is reached
        (["B-CA;AC/B"], "B-CAC-;A/B/C"),  # a detour is undone
        (["B-BC;wrong", "hm"], "B-BCBA;AB/C"),  # what the moves lead to counts
        (["B-CBAB;ABC"], "B-CBC-;A/B/C"),  # what cannot be made is dropped
    ],
)
def test_the_expert_goes_on_from_the_latest_moves(seen: list[str], wanted: str) -> None:
    assert Blocksworld().expert(entries("A/CB>ABC", *seen), random.Random(0), 0.0) == wanted


def test_the_experts_slips_lead_no_nearer_and_are_as_frequent_as_asked() -> None:
    rng = random.Random(0)
    said = [Blocksworld().expert(entries("A/CB>ABC"), rng, 0.3) for _ in range(2000)]
    # Of AB, B- and BA: after BA, C goes onto B in one more move. B- takes two more, AB three.
    assert set(said) == {"BA;AB/C", "B-;A/B/C", "AB;CBA"}
    # Standard error of the share: sqrt(.3 * .7 / 2000) = .010.
    assert abs(sum(s != "BA;AB/C" for s in said) / 2000 - 0.3) < 0.04


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_faultless_experts_solve_everything_under_the_recipe(error: float) -> None:
    recipe = load_recipe(RECIPE)
    task = Blocksworld(**recipe.task.options)
    seats = list(recipe.team.agents)
    protocol = load_protocol(recipe.protocol.name, seats, **recipe.protocol.options)
    problems = [p for split in ("train", "eval", "certify") for p in first(task, split, 150)]
    episodes = rollout_sync(
        problems, 1, Key(0, "evaluate"), seats=team(*seats), protocol=protocol,
        engine=ScriptedEngine(expert_writer(task, error)), task=task,
    )  # fmt: skip
    mean = sum(e.reward for e in episodes) / len(problems)
    assert mean == 1.0 if error == 0 else 0.4 < mean < 0.95
    longest = max(len(turn.text) for e in episodes for turn in e.turns)
    assert longest < recipe.rollout.max_new_tokens  # a character is a token, and EOS is one


def test_facts_become_stacks() -> None:
    assert stacks([("on", "b", "a"), ("on", "c", "b"), ("ontable", "d")]) == ("abc", "d")
    for wrong, why in (
        ([("on", "a", "b"), ("on", "b", "a")], "in a circle"),
        ([("on", "a", "b"), ("on", "a", "c")], "in two places, or two on one"),
        ([("on", "a", "b"), ("on", "c", "b")], "in two places, or two on one"),
    ):
        with pytest.raises(ValueError, match=why):
            stacks(wrong)


OPEN = "(ontable a) (ontable b) (on c b) (clear a) (clear c)"


def test_rows_are_read_in_short_form(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        row(OPEN, "(and (on a b))", id="one"),
        row("(ontable a) (ontable b)", "(on a b)", objects="a b"),
        row("(ontable k) (ontable b) (on c b)", "(and (on b c) (on c k))", objects="k b c"),
    )
    task = Blocksworld(path)
    task.validate()
    (one, three) = task.problems("all")
    assert (one.id, one.text, one.answer) == ("one", "A/BC>BA", "C-AB")
    # b, c, k are called A, B, C.
    assert (three.id, three.text) == ("blocksworld-000003", "AB/C>CBA")
    assert three.answer == "BCAB"
    with pytest.raises(UserError, match="come from a file"):
        task.problem_at("train", 0)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row(OPEN, "(and (on c b))"), "line 1: a goal must be .* not all hold already"),
        (row(OPEN, "(and (on a b) (clear a))"), "line 1: a goal must be"),
        (row(OPEN, "(and (on a b) (on b a))"), "line 1: its PDDL cannot be read: .*circle"),
        (row("(ontable a)", "(on a b)"), "line 1: the start does not say"),
        (row(OPEN, "(and (on a b)"), "line 1: its PDDL cannot be read"),
        (row("(ontable a)", "(on a b)", objects="a b"), "no row has 3 blocks"),
        (json.dumps({"domain_pddl": DOMAIN}), "line 1: no field 'problem_pddl'"),
    ],
)
def test_bad_rows_are_named(bad: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        Blocksworld(write(tmp_path, bad))


def test_bad_options_are_named() -> None:
    for blocks in (1, 7, 3.0, True):
        with pytest.raises(UserError, match="task blocksworld: blocks is"):
            Blocksworld(blocks=blocks)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no split 'test'; there are train, eval, certify"):
        first(Blocksworld(), "test", 1)


def test_excluded_problems_are_in_no_split(tmp_path: Path) -> None:
    path = write(tmp_path, row(OPEN, "(and (on a b))"))
    task = Blocksworld(exclude=path)
    found = {p.text for split in ("train", "eval", "certify") for p in first(task, split, 600)}
    assert len(found) == 131 and "A/BC>BA" not in found


def test_the_benchmarks_rows_of_three_blocks() -> None:
    path = rows_of("planbench_bw_nl.jsonl")
    task = Blocksworld(path)
    task.validate()
    plans = {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}
    problems = list(task.problems("all"))
    assert {p.id for p in problems} == {i for i, r in plans.items() if r["subset"] == "bw3"}
    for problem in problems:
        official = plans[problem.id]
        plan = plan_moves(official["ground_truth_plan_pddl"], problem.metadata["names"])
        grade = task.grade(problem, plan)
        assert grade.score == 1 and grade.components["optimal"] == 1
        assert 2 * grade.components["plan_length"] == official["plan_length"]
        assert task.grade(problem, plan[:-2]).score == 0
    excluded = Blocksworld(exclude=path)
    left = {p.text for split in ("train", "eval", "certify") for p in first(excluded, split, 300)}
    assert len(left) == 132 - len({p.text for p in problems})
    assert not left & {p.text for p in problems}


def test_the_benchmarks_rows_of_four_blocks() -> None:
    task = Blocksworld(rows_of("planbench_bw_nl.jsonl"), blocks=4)
    task.validate()
    assert len(list(task.problems("all"))) > 300
