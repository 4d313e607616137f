from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from satune.play.match import Match
from satune.play.rollout import rollout_sync
from satune.protocols.named import load_protocol
from satune.tasks.relay import Relay, last_expression, operations, reduce_once
from satune.types import Entry, Key, Problem, UserError
from scripted import ScriptedEngine, expert_writer, team

NAMES = ("ann", "bob", "cem")


def first(task, split, n):
    return list(itertools.islice(task.problems(split), n))


def play(protocol, error, n=100, numbers=4, seats=NAMES, seed=0, **options):
    """Mean reward of experts on the first ``n`` held-out problems, and the episodes."""
    task = Relay(numbers)
    episodes = rollout_sync(
        Match(
            team(*seats),
            load_protocol(protocol, seats, **options),
            ScriptedEngine(expert_writer(task, error)),
            task,
        ),
        first(task, "eval", n),
        1,
        Key(seed, "evaluate"),
    )
    return sum(e.reward for e in episodes) / n, episodes


@pytest.mark.parametrize("times", [False, True])
@pytest.mark.parametrize("numbers", [2, 4, 12])
def test_intermediate_results_stay_in_range_and_lead_to_the_answer(numbers, times):
    task = Relay(numbers, times)
    task.validate()
    for problem in first(task, "train", 200):
        expression = problem.text
        assert operations(expression) == numbers - 1
        for _ in range(numbers - 1):
            expression = reduce_once(expression)
            assert 0 <= int(re.match(r"-?\d+", expression)[0]) <= 99
        assert expression == problem.answer


def test_splits_are_disjoint_by_expression_whatever_the_seed():
    seen = {
        split: {p.text for seed in (0, 1) for p in first(Relay(3, seed=seed), split, 400)}
        for split in ("train", "eval", "certify")
    }
    for a, b in itertools.combinations(seen, 2):
        assert not seen[a] & seen[b]


def test_problems_are_a_function_of_seed_split_and_index():
    task = Relay()
    assert task.problem_at("train", 123).id == "relay-train-000123"
    assert first(task, "train", 9)[8] == Relay().problem_at("train", 8)
    assert first(task, "train", 9) != first(Relay(seed=1), "train", 9)
    assert len({p.id for p in first(task, "train", 300)}) == 300


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("3+4-2+1", "7-2+1"),
        ("5+1", "6"),
        ("6", "6"),
        ("2+3*4", "5*4"),  # from left to right, no precedence
        ("-1+3", "2"),  # a slip may have led below zero
        ("1-3-2", "-2-2"),
        ("-5", "-5"),
    ],
)
def test_reduction(before, after):
    assert reduce_once(before) == after


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6", "6"), (" 06\n", "6"), ("-3", "-3"), ("5+1=6", "6"), ("The answer is 6.", "6"),
        ("7-2+1", None), ("7 - 2 + 1", None), ("it is -6", "-6"), ("", None), ("none", None),
        ("6 7", "7"), ("5 + 1", None),
    ],
)  # fmt: skip
def test_extraction(text, answer):
    assert Relay().extract(text) == answer


@given(st.text() | st.text(alphabet="0123456789+-*= ", max_size=40))
@example("11000000*91")
def test_extraction_and_expert_never_raise(text):
    task = Relay()
    answer = task.extract(text)
    assert answer is None or str(int(answer)) == answer
    entries = [Entry("problem", parts=Problem.of("p", "1+2").prompt), Entry("foreign", text, "bob")]
    assert last_expression(task.expert(entries, random.Random(0), 0.5)) is not None


def test_the_grade_wants_a_finished_right_answer():
    task, problem = Relay(), Problem.of("p", "3+4", "7")
    answers = ["7", "so 7", "8", "3+4", "", None]
    assert [task.grade(problem, a).score for a in answers] == [1, 1, 0, 0, 0, 0]


def entries(*messages):
    seen = [Entry("problem", parts=Problem.of("p", "3+4-2+1").prompt)]
    return seen + [Entry("own" if s == "ann" else "foreign", t, s) for s, t in messages]


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        ([], "7-2+1"),
        ([("ann", "7-2+1")], "5+1"),  # one after the other
        ([("ann", "7-2+1"), ("bob", "5+1")], "6"),
        ([("ann", "7-2+1"), ("bob", "5+1"), ("cem", "6")], "6"),  # a lone number is repeated
        # A round of a debate: two against one, the odd one first, last, and a tie of three.
        ([("ann", "8-2+1"), ("bob", "7-2+1"), ("cem", "7-2+1")], "5+1"),
        ([("ann", "7-2+1"), ("bob", "7-2+1"), ("cem", "8-2+1")], "5+1"),
        ([("ann", "9-2+1"), ("bob", "7-2+1"), ("cem", "8-2+1")], "7+1"),
        # The second round counts, not the first.
        ([(s, "7-2+1") for s in NAMES] + [("ann", "5+1"), ("bob", "4+1"), ("cem", "4+1")], "5"),
        # Three turns of one seat are no debate; a message without an expression is passed over.
        ([("ann", "7-2+1"), ("ann", "8-2+1")], "6+1"),
        ([("ann", "7-2+1"), ("bob", "hm")], "5+1"),
    ],
)
def test_the_expert_goes_on_from_what_it_sees(seen, wanted):
    assert Relay().expert(entries(*seen), random.Random(0), 0.0) == wanted


def test_the_experts_slips_are_wrong_plausible_and_as_frequent_as_asked():
    rng = random.Random(0)
    said = [Relay().expert(entries(), rng, 0.3) for _ in range(2000)]
    slips = [s for s in said if s != "7-2+1"]
    # Off by one or two, or 3-4 = -1, which is left out for being negative.
    assert {s for s in slips} == {"5-2+1", "6-2+1", "8-2+1", "9-2+1"}
    # Standard error of the share: sqrt(.3 * .7 / 2000) = .010.
    assert abs(len(slips) / 2000 - 0.3) < 0.04


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("chain", {}),
        ("round_robin", {"turns": 3}),
        ("random_routing", {"turns": 3}),
        ("debate", {"rounds": 3}),
        ("solo", {"turns": 3}),
        ("judge", {"rounds": 2}),
        ("role_play", {}),
    ],
)
def test_faultless_experts_solve_everything_and_erring_ones_some(protocol, options):
    assert play(protocol, 0.0, **options)[0] == 1.0
    assert 0.0 < play(protocol, 0.3, **options)[0] < 1.0


def test_vote_solves_what_one_message_can():
    assert play("vote", 0.0, numbers=2)[0] == 1.0
    assert play("vote", 0.0, numbers=3)[0] == 0.0


def test_a_chains_reward_is_about_the_product_of_its_members_reliabilities():
    # .7 ** 3 = .343; a slip can be undone by a later one, so a little above. Standard error of 400
    # problems: .024.
    reward, _ = play("chain", 0.3, n=400)
    assert 0.27 < reward < 0.45
    # Three debaters agree wrongly more seldom: a majority of three is right with .784 or more.
    assert play("debate", 0.3, n=400, rounds=3)[0] > reward + 0.1


@pytest.mark.parametrize("numbers", [1, 31, 2.0, True])
def test_bad_sizes_are_named(numbers):
    with pytest.raises(UserError, match="task relay: numbers is"):
        Relay(numbers)


def test_unknown_splits_are_named():
    with pytest.raises(UserError, match="no split 'test'; there are train, eval, certify"):
        first(Relay(), "test", 1)
