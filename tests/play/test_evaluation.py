from __future__ import annotations

import asyncio
import itertools
import math
from dataclasses import replace

import pytest

from satune.play.evaluation import (
    Evaluation,
    Scores,
    evaluate,
    evaluate_async,
    mean_estimate,
    paired_difference,
    pass_at_k,
)
from satune.play.match import Match
from satune.protocols.independent import solo
from satune.protocols.sequential import chain
from satune.types import Key, Problem, StepResult, UserError
from scripted import Letters, ScriptedEngine, team

KEY = Key(0, "evaluate")
PROBLEMS = [Problem.of(f"p{i}", "?", "a") for i in range(3)]
# Samples of each problem: two, one and none of four right.
ANSWERS = {"p0": "abac", "p1": "bbab", "p2": "bccX"}


def scripted(seat, entries, key):
    text = ANSWERS[key.problem][key.sample]
    return text if seat == "bob" else "a"


def run(protocol=chain, names=("ann", "bob"), **options):
    return evaluate(
        Match(team(*names), protocol, ScriptedEngine(scripted), Letters()),
        PROBLEMS,
        4,
        KEY,
        **options,
    )


def test_figures_by_hand():
    result = run()
    assert result.problem_ids == ("p0", "p1", "p2")
    assert result.team.scores_PK == ((1, 0, 1, 0), (0, 0, 1, 0), (0, 0, 0, 0))
    # Means by problem: 1/2, 1/4, 0. Mean 1/4, standard deviation 1/4, standard error 1/(4 sqrt 3).
    assert result.avg_at_k == pytest.approx(0.25)
    half = 1.959964 / (4 * math.sqrt(3))
    assert result.team.estimate().interval == pytest.approx(
        [max(0.0, 0.25 - half), 0.25 + half], abs=1e-6
    )
    # pass@2: 1 - C(2,2)/C(4,2) = 5/6; 1 - C(3,2)/C(4,2) = 1/2; 0. Mean 4/9.
    assert result.team.pass_at_k(2) == pytest.approx(4 / 9)
    assert result.team.pass_at_k(1) == pytest.approx(result.avg_at_k)
    assert result.team.pass_at_k(4) == pytest.approx(2 / 3)
    # Majorities: a (two votes), b (three), c (two of three answers).
    assert result.team.majority_P == (1.0, 0.0, 0.0)
    assert result.team.majority == pytest.approx(1 / 3)
    assert result.tokens == 24 and result.team.samples == 4


def test_an_evaluation_keeps_no_ids():
    result = run()
    turns = [turn for e in result.episodes for turn in e.turns]
    assert len(turns) == 24 and all(turn.completion_tokens == 1 for turn in turns)
    assert {(t.prompt_ids, t.completion_ids, t.sampled_logprobs) for t in turns} == {
        (None, None, None)
    }


def test_seats_are_graded_by_their_last_message():
    result = run(per_seat=True)
    assert result.seat("ann").mean == 1.0 and result.seat("bob").mean == result.avg_at_k
    assert run(solo, per_seat=True).seat("bob").mean == 0.0  # it said nothing
    with pytest.raises(UserError, match="'bob' was not graded"):
        run().seat("bob")


@pytest.mark.parametrize(("n", "correct"), [(5, 0), (5, 2), (5, 5), (4, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, correct):
    right = [i < correct for i in range(n)]
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for k in (0, n + 1):
        with pytest.raises(UserError, match="needs k from 1"):
            pass_at_k(n, correct, k)


def test_differences_are_paired_by_problem_not_by_place():
    before = Evaluation(("x", "y", "z"), Scores(((0.0,), (0.5,), (1.0,))))
    after = Evaluation(("z", "y", "x"), Scores(((1.0, 1.0), (0.5, 1.0), (0.0, 0.5))))
    # Differences: x 1/4, y 1/4, z 0. Mean 1/6; sd of (1/4, 1/4, 0) = sqrt(1/48); se = sd/sqrt 3.
    got = paired_difference(before, after)
    half = 1.959964 * math.sqrt(1 / 48 / 3)
    assert (got.mean, got.low, got.high, got.problems) == pytest.approx(
        (1 / 6, 1 / 6 - half, 1 / 6 + half, 3), abs=1e-6
    )
    with pytest.raises(UserError, match="1 problems are in one of the two only, first 'z'"):
        paired_difference(before, Evaluation(("x", "y"), Scores(((0.0,), (0.5,)))))


def test_one_problem_has_no_interval():
    assert mean_estimate([0.5], 0.0, 1.0).low is None
    assert Scores(((1.0,),), (1.0,)).estimate().interval is None


def test_greedy_changes_the_temperature_only():
    (seat,) = team("ann")
    (cold,) = Match([seat], solo, ScriptedEngine(scripted), Letters()).greedy().seats
    assert cold.sampling.temperature == 0.0 and seat.sampling.temperature == 0.8
    assert cold.name == seat.name and cold.sampling.max_new_tokens == seat.sampling.max_new_tokens


def test_both_forms_agree_and_bad_input_is_named():
    match = Match(team("ann", "bob"), chain, ScriptedEngine(scripted), Letters())
    assert asyncio.run(evaluate_async(match, PROBLEMS, 4, KEY)) == run()
    with pytest.raises(UserError, match="there are no problems"):
        evaluate(match, [], 1, KEY)

    class World(Letters):
        def environment(self, problem, rng, generate):
            return StepResult("", True)

    with pytest.raises(UserError, match="drop per_seat"):
        evaluate(replace(match, task=World()), PROBLEMS, 1, KEY, per_seat=True)
