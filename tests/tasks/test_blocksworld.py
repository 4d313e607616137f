from __future__ import annotations

import itertools
import json
import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark_rows import fuzz, rows_of
from satune.play.match import Match
from satune.play.rollout import rollout_sync
from satune.protocols.named import load_protocol
from satune.tasks import block_stacks as stacks
from satune.tasks.blocks import DOMAIN, blocks_problem
from satune.tasks.blocksworld import Blocksworld
from satune.tasks.strips import Grounder, PddlError, parse_problem
from satune.types import Entry, Key, Problem, UserError
from scripted import ScriptedEngine, expert_writer, team

NAMES = ("ann", "bob")


def first(task, split, n):
    return list(itertools.islice(task.problems(split), n))


@pytest.mark.parametrize(
    ("text", "below"),
    [
        ("AB/C", {"A": "-", "B": "A", "C": "-"}),
        ("C", {"C": "-"}),
        ("CBA", {"C": "-", "B": "C", "A": "B"}),
    ],
)
def test_stacks_are_read_and_written(text, below):
    assert stacks.read_stacks(text) == below and stacks.write_stacks(below) == text


@pytest.mark.parametrize("text", ["", "A/", "a", "AB/A", "A-B", "A B"])
def test_stacks_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match=r"not of the form|twice"):
        stacks.read_stacks(text)


def test_goals_and_moves():
    assert stacks.goal_of("CBA/DE") == {"B": "C", "A": "B", "E": "D"}
    assert stacks.write_stacks({"B": "C", "A": "B", "E": "D"}) == "CBA/DE"
    # Only B and C have nothing on them; A is under B, and C stands on the table already.
    assert stacks.legal_moves(stacks.read_stacks("AB/C")) == ["BC", "B-", "CB"]
    start = stacks.read_stacks("AB/C")
    assert stacks.to_actions(start, ["B-", "AC"]) == [
        ("unstack", "b", "a"), ("put-down", "b"), ("pick-up", "a"), ("stack", "a", "c"),
    ]  # fmt: skip
    # The second move is not legal: A is under C then.
    assert stacks.write_stacks(stacks.after_moves(start, ["B-", "CA", "A-"])) == "AC/B"


def breadth_first(state, goal):
    """How many moves a shortest way takes, by trying everything."""
    wanted = stacks.goal_of(goal)
    waiting, seen = deque([(stacks.read_stacks(state), 0)]), {state}
    while waiting:
        below, steps = waiting.popleft()
        if stacks.reached(below, wanted):
            return steps
        for block, onto in stacks.legal_moves(below):
            after = {**below, block: onto}
            if stacks.write_stacks(after) not in seen:
                seen.add(stacks.write_stacks(after))
                waiting.append((after, steps + 1))
    raise AssertionError


@given(st.integers(2, 5), st.integers(0, 10**6))
def test_plans_are_shortest_and_reach_the_goal(count, seed):
    rng = random.Random(seed)
    names = stacks.LETTERS[:count]
    state, other = stacks.random_stacks(names, rng), stacks.random_stacks(names, rng)
    goal = stacks.write_stacks(stacks.goal_of(other)) or "A"
    moves = stacks.shortest_moves(state, goal)
    start = stacks.read_stacks(state)
    assert len(moves) == breadth_first(state, goal)
    assert len(moves) >= stacks.must_move(start, stacks.goal_of(goal))
    assert stacks.reached(stacks.after_moves(start, moves), stacks.goal_of(goal))
    # The same by the STRIPS rules, and the pairs of actions give the moves back.
    plan = stacks.to_actions(start, moves)
    objects = [name.lower() for name in names]
    goals = stacks.goal_facts(goal) or [("ontable", plan[0][1] if plan else objects[0])]
    pddl = blocks_problem("p", objects, stacks.facts(state), goals)
    assert Grounder(DOMAIN, parse_problem(pddl)).execute(plan).executed == len(plan)
    assert stacks.to_moves(plan) == list(moves)


def test_a_goal_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="cannot be reached"):
        stacks.shortest_moves("AB", "CA")


@pytest.mark.parametrize(
    ("init", "goal"),
    [
        ([("holding", "a"), ("ontable", "b")], [("on", "a", "b")]),
        ([("ontable", "a"), ("ontable", "b")], [("clear", "a")]),
        ([("ontable", "aa"), ("ontable", "b")], [("on", "aa", "b")]),
        ([("ontable", "a"), ("ontable", "b")], [("on", "a", "b"), ("on", "b", "a")]),
        ([("ontable", "a"), ("ontable", "b")], [("on", "a", "c")]),
        ([("ontable", "a"), ("on", "b", "a"), ("on", "c", "a")], [("on", "a", "b")]),
    ],
)
def test_what_has_no_short_form_is_refused(init, goal):
    objects = sorted({name for fact in init + goal for name in fact[1:]})
    with pytest.raises(PddlError, match="short form"):
        stacks.short_form(parse_problem(blocks_problem("p", objects, init, goal)))


@pytest.mark.parametrize(
    ("text", "moves"),
    [
        ("B-BC=A/CB", "B-BC"), ("B-", "B-"), ("=A/CB", ""), ("B-=", "B-"), ("I say B-BC.", "B-BC"),
        ("B-=A/B then B-AC=B/CA", "B-AC"), ("ABC", ""), ("b-", ""), ("", ""), ("xB-", ""),
        ("-B", ""), ("A/BC", ""),
    ],
)  # fmt: skip
def test_moves_are_read(text, moves):
    assert "".join(stacks.read_moves(text) or ()) == moves
    assert Blocksworld().extract(text) == (moves or None)


@pytest.mark.parametrize("options", [{}, {"prompt": "planbench"}, {"blocks": 5, "letters": 5}])
def test_generated_problems(options):
    task = Blocksworld(**options)
    task.validate()
    problems = first(task, "train", 200)
    assert problems[7] == Blocksworld(**options).problem_at("train", 7)
    assert problems[:9] != first(Blocksworld(seed=1, **options), "train", 9)
    for problem in problems:
        state, goal = problem.metadata["short"].split(":")
        assert len(stacks.read_stacks(state)) == task.blocks
        assert set(problem.metadata["short"]) <= set(Blocksworld.alphabet)
        assert problem.metadata["plan_length"] == 2 * breadth_first(state, goal) > 0
        assert task.grade(problem, problem.answer).components["optimal"] == 1.0
    json.dumps([dict(p.metadata) for p in problems])


def test_splits_are_disjoint_whatever_the_seed():
    seen = {
        split: {p.text for seed in (0, 1) for p in first(Blocksworld(seed=seed), split, 400)}
        for split in ("train", "eval", "certify")
    }
    for a, b in itertools.combinations(seen, 2):
        assert not seen[a] & seen[b]
    assert min(map(len, seen.values())) > 150


def test_both_forms_are_the_same_instances():
    short, words = (Blocksworld(prompt=p) for p in ("short", "planbench"))
    for a, b in zip(first(short, "eval", 30), first(words, "eval", 30), strict=True):
        assert a.metadata == b.metadata
        # A plan in one form scores there what its translation scores in the other.
        for moves in (a.answer.split("=")[0], a.answer[:2], "AB"):
            below = stacks.read_stacks(a.text.split(":")[0])
            pairs = [moves[i : i + 2] for i in range(0, len(moves), 2)]
            plan = "\n".join(f"({' '.join(s)})" for s in stacks.to_actions(below, pairs))
            assert short.grade(a, moves).score == words.grade(b, plan).score


def seen(*messages, prompt="AB/C:CBA"):
    entries = [Entry("problem", parts=Problem.of("p", prompt).prompt)]
    return entries + [Entry("own" if s == "ann" else "foreign", t, s) for s, t in messages]


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        (seen(), "BC=A/CB"),  # to have B on C and A on B
        (seen(("ann", "BC=A/CB")), "BCAB=CBA"),
        (seen(("bob", "BC=A/CB"), ("ann", "BCAB=CBA")), "BCAB=CBA"),  # reached: repeated
        (seen(("bob", "B-=A/B/C")), "B-BC=A/CB"),  # a detour is gone on from
        (seen(("bob", "B-=CBA")), "B-BC=A/CB"),  # a wrong state is not believed
        (seen(("bob", "what?")), "BC=A/CB"),  # passed over
        # A round of a debate: most voices, then the earliest.
        (seen(("ann", "B-="), ("bob", "BC="), ("cem", "BC=")), "BCAB=CBA"),
        (seen(("ann", "B-="), ("bob", "BC="), ("cem", "CB=")), "B-BC=A/CB"),
        # A seat has one voice, its last: two for BC, one for CB.
        (seen(("ann", "CB="), ("cem", "CB="), ("ann", "BC="), ("bob", "BC=")), "BCAB=CBA"),
    ],
)
def test_the_expert_adds_a_move_of_a_shortest_way(entries, wanted):
    assert Blocksworld().expert(entries, random.Random(0), 0.0) == wanted


def test_an_error_is_another_legal_move():
    task = Blocksworld()
    said = {task.expert(seen(), random.Random(seed), 1.0) for seed in range(40)}
    assert said == {"B-=A/B/C", "CB=ABC"}


def play(error, prompt="short", n=100, **options):
    task = Blocksworld(prompt=prompt)
    episodes = rollout_sync(
        Match(
            team(*NAMES),
            load_protocol("chain", NAMES, **options),
            ScriptedEngine(expert_writer(task, error)),
            task,
        ),
        first(task, "eval", n),
        1,
        Key(0, "evaluate"),
    )
    return sum(e.reward for e in episodes) / n


def test_faultless_experts_solve_what_their_turns_allow_and_erring_ones_less():
    assert play(0.0, rounds=2) == 1.0  # three blocks never need more than four moves
    assert 0.3 < play(0.3, rounds=2) < 0.9
    assert play(0.0, rounds=1) < 1.0
    assert play(0.0, "planbench", 30, rounds=2) == 1.0


def test_planbench_rows_in_short_form():
    task = Blocksworld(rows_of("planbench_bw_nl"), eval_fraction=1)
    task.validate()
    problems = list(task.problems("all"))
    assert len(problems) == 69 and {p.metadata["subset"] for p in problems} == {"bw3"}
    assert all(set(p.text) <= set("ABC/:") for p in problems)
    episodes = rollout_sync(
        Match(
            team(*NAMES),
            load_protocol("chain", NAMES, rounds=2),
            ScriptedEngine(expert_writer(task, 0.0)),
            task,
        ),
        problems,
        1,
        Key(0, "evaluate"),
    )
    assert all(e.reward == 1.0 and e.grade.components["optimal"] == 1.0 for e in episodes)
    assert (
        len(list(Blocksworld(rows_of("planbench_bw_nl"), blocks=4, subset="bw4").problems("all")))
        > 300
    )
    words = Blocksworld(rows_of("planbench_bw_nl"), prompt="planbench")
    words.validate()
    assert "on top of the" in next(words.problems("all")).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 2}, "blocks is 2; give an integer from 3 to"),
        ({"blocks": True}, "blocks is True"),
        ({"blocks": 5, "letters": 4}, "letters is 4; give an integer from 5 to 12"),
        ({"prompt": "long"}, "prompt is 'long'"),
        ({"subset": "bw3"}, "subset is for rows"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Blocksworld(**options)
    with pytest.raises(UserError, match="no split 'test'"):
        Blocksworld().problem_at("test", 0)


@given(st.text(alphabet="ABC-/=: ", max_size=40))
def test_expert_and_grader_take_any_message(text):
    task = Blocksworld()
    problem = task.problem_at("train", 0)
    said = task.expert(seen(("bob", text), prompt=problem.text), random.Random(0), 0.5)
    assert task.extract(said) is not None
    assert 0.0 <= task.grade(problem, text).score <= 1.0


@pytest.mark.parametrize("prompt", ["short", "planbench"])
def test_mangled_messages_never_break_the_grader(prompt):
    task = Blocksworld(prompt=prompt)
    cases = [(p, p.answer) for p in first(task, "train", 50)]
    assert 0 < fuzz(task, cases, 1000, seed=1) < 900


@pytest.mark.slow
def test_very_many_mangled_messages():
    task = Blocksworld()
    cases = [(p, p.answer) for p in first(task, "train", 200)]
    assert fuzz(task, cases, 100_000, seed=2) > 0
