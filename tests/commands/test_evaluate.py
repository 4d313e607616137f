"""The rows of a matched sample budget by hand, and who and what is evaluated."""

from __future__ import annotations

import asyncio

import pytest

from satune.commands.contestant import _seat_names
from satune.commands.evaluate import SAMPLES, Wanted
from satune.play.evaluation import report, summarise
from satune.play.match import Match
from satune.play.rollout import rollout
from satune.protocols.independent import vote
from satune.protocols.sequential import chain
from satune.types import Grade, Key, Problem, UserError, no_progress
from scripted import Letters, ScriptedEngine, team

KEY = Key(0, "evaluate")
PROBLEMS = [Problem.of("p0", "?", "a"), Problem.of("p1", "?", "a")]
# Messages by problem and seat, a letter a conversation; upper case is no answer.
SAID = {
    "p0": {"ann": "aabb", "bob": "bacX", "cid": "cXbb"},
    "p1": {"ann": "bbcc", "bob": "bacc", "cid": "Xbac"},
}


NAMES = ("ann", "bob", "cid")


def match_of(protocol=vote, task=None, said=SAID, names=NAMES, **options):
    engine = ScriptedEngine(lambda seat, entries, key: said[key.problem][seat][key.sample])
    return Match(team(*names), protocol, engine, task or Letters(), **options)


def play(protocol=vote, samples=4, progress=no_progress, **options):
    match = match_of(protocol, progress=progress)
    return asyncio.run(rollout(match, PROBLEMS, samples, KEY, **options))


def summary(episodes, seats=NAMES, task=None, samples=4):
    return asyncio.run(summarise(episodes, samples, match_of(task=task), seats))


def test_the_rows_by_hand():
    found = report(summary(play()))
    # The team votes, a tie goes to the first seat. p0: a|b|c -> a; a|a -> a; b|c|b -> b; b|b -> b.
    # p1: b|b -> b; b|a|b -> b; c|c|a -> c; c|c|c -> c. Right: 2 of 4 and 0 of 4.
    team_row = found["team"]
    assert team_row["avg_at_k"] == pytest.approx(0.25)
    assert team_row["pass_at_k"] == pytest.approx(0.5)
    # Its majorities: a twice, b twice, tie to a; b before c. Right, wrong.
    assert team_row["majority"] == pytest.approx(0.5)
    # ann is right in 2 and 0 of 4, ties a before b, b before c; bob in 1 and 1 of 4, ties
    # b before a, c; p1: c twice; cid in 0 and 1 of 4, b twice; b before a before c.
    rows = {
        name: (r["avg_at_k"], r["pass_at_k"], r["majority"]) for name, r in found["seats"].items()
    }
    assert rows == {"ann": (0.25, 0.5, 0.5), "bob": (0.25, 1.0, 0.0), "cid": (0.125, 0.5, 0.0)}
    # The best seat of each conversation. p0: abc a, aaX a, bcb -, bXb -: 2. p1: bbX -, bab a,
    # cca a, ccc -: 2.
    assert found["oracle"]["avg_at_k"] == pytest.approx(0.5)
    assert found["oracle"]["pass_at_k"] == pytest.approx(1.0)
    assert "majority" not in found["oracle"]
    # All twelve messages: p0 has 3 a, 5 b, 2 c; p1 has 2 a, 4 b, 5 c. 5 of 24 are right.
    pooled = found["pooled"]
    assert (pooled["avg_at_k"], pooled["majority"]) == (pytest.approx(5 / 24), 0.0)
    budget = found["budget"]
    answers = {n: budget[n]["answers"] for n in ("team", "pooled", "oracle")}
    assert answers == {"team": 4, "pooled": 12, "oracle": 12}
    assert all(budget[n]["conversations"] == 4 for n in answers)
    # Every message is one token, written after the problem alone: 2 problems, 4 conversations.
    assert budget["team"]["completion_tokens"] == found["tokens"] == 24
    assert budget["seats"]["bob"] == {
        "answers": 4, "conversations": 4, "prompt_tokens": 8, "completion_tokens": 8,
    }  # fmt: skip
    assert (found["problems"], found["k"]) == (2, 4)
    assert found["per_problem"][0] == {"id": "p0", "scores": [1, 1, 0, 0], "majority": 1.0}


def test_a_tie_of_all_messages_goes_to_the_earliest_conversation():
    said = {"p0": {"ann": "caa", "bob": "bbX"}}
    match = match_of(said=said, names=("ann", "bob"))
    episodes = asyncio.run(rollout(match, PROBLEMS[:1], 3, KEY))
    # Two a, two b, one c; conversation by conversation b comes first: c b | a b | a X.
    pooled = asyncio.run(summarise(episodes, 3, match, ["ann", "bob"])).pooled
    assert pooled is not None
    assert pooled.majority == 0.0 and pooled.avg_at_k == pytest.approx(2 / 6)


def test_a_text_is_graded_once_a_problem():
    graded: list[tuple[str, str | None]] = []

    class Slow(Letters):
        def grade(self, problem, answer) -> Grade:
            graded.append((problem.id, answer))
            return super().grade(problem, answer)

    episodes = play()
    summary(episodes, task=Slow())
    # Beside the team's answers (graded when played): p0: a and b were graded then; c and X.
    # p1: b and c; a and X.
    assert sorted(graded) == [("p0", "X"), ("p0", "c"), ("p1", "X"), ("p1", "a")]


def test_finished_episodes_are_not_played_again():
    whole, kept, seen = play(chain), [], []
    finished = {(e.problem.id, e.sample): e for e in whole[1:6]}
    again = play(
        chain, finished=finished, keep=kept.append, progress=lambda *told: seen.append(told)
    )
    assert again == whole
    assert kept == [whole[0], *whole[6:]]
    assert [told[:2] for told in seen] == [(done, 8) for done in (6, 7, 8)]
    # Of those that are not played again too.
    mean = sum(e.reward for e in whole) / 8
    assert seen[-1][2] == f"rollout, reward {mean:.3f}"


def test_tokens_that_no_server_counted_are_not_zero():
    import dataclasses

    episodes = [
        dataclasses.replace(
            e, turns=tuple(dataclasses.replace(t, completion_tokens=0) for t in e.turns)
        )
        for e in play()
    ]
    found = report(summary(episodes, []))
    assert found["tokens"] is None and found["budget"]["team"]["prompt_tokens"] is None
    assert found["seats"] == {} and "pooled" not in found


def test_seats_of_models():
    assert _seat_names(["org/Some-3B"], 1) == {"Some-3B": "org/Some-3B"}
    assert list(_seat_names(["m"], 3)) == ["m-1", "m-2", "m-3"]
    assert _seat_names(["x/a", "b", "y/a"], 1) == {"a-1": "x/a", "b": "b", "a-2": "y/a"}
    with pytest.raises(UserError, match="copies are made of one model"):
        _seat_names(["a", "b"], 2)


def test_the_papers_samples_and_wrong_ones():
    assert (SAMPLES["aime25"], SAMPLES["arbench_gn"], SAMPLES["math500"]) == (64, 25, 4)
    with pytest.raises(UserError, match="-k: is 0; give at least 1"):
        Wanted(samples=0)
    with pytest.raises(UserError, match="--max-new-tokens: is 0"):
        Wanted(max_new_tokens=0)
