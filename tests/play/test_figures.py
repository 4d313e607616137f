"""Figures are computed in one place: one entry there is shown by every report, event and table."""

from __future__ import annotations

import asyncio
import json
from statistics import fmean

import pytest

from satune.cli.eval import show_report
from satune.commands.grade import grade_file
from satune.play.evaluation import FIGURES, evaluate_async, report
from satune.play.match import Match
from satune.play.progress import progress_of
from satune.protocols.sequential import chain
from satune.types import EpisodeFailure, Key, Problem
from scripted import Letters, ScriptedEngine, team

KEY = Key(0, "evaluate")
PROBLEMS = [Problem.of(f"p{i}", "?", "a") for i in range(3)]
ANSWERS = {"p0": "aaaa", "p1": "bbab", "p2": "bccX"}


def evaluated(write=None, task=None, **options):
    write = write or (
        lambda seat, entries, key: ANSWERS[key.problem][key.sample] if seat == "bob" else "a"
    )
    match = Match(team("ann", "bob"), chain, ScriptedEngine(write), task or Letters(), **options)
    return asyncio.run(evaluate_async(match, PROBLEMS, 4, KEY, per_seat=True))


def test_a_new_figure_is_one_entry(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(
        FIGURES, "worst_at_k", lambda scores: fmean(min(row) for row in scores.scores_PK)
    )
    found = report(evaluated())
    # One of three problems is right in all its samples.
    assert (
        found["team"]["worst_at_k"] == found["seats"]["bob"]["worst_at_k"] == pytest.approx(1 / 3)
    )
    assert found["seats"]["ann"]["worst_at_k"] == found["oracle"]["worst_at_k"] == 1.0
    assert found["pooled"]["worst_at_k"] == pytest.approx(1 / 3)
    event = progress_of(evaluated(), None)
    assert event["figures"]["worst_at_k"] == pytest.approx(1 / 3)
    show_report(
        {**found, "benchmark": "letters", "protocol": {"name": "chain"}, "out": str(tmp_path)}
    )
    shown = capsys.readouterr().out
    assert "worst_at_k" in shown and "0.333" in shown
    responses = tmp_path / "responses.jsonl"
    rows = [{"id": f"relay-eval-{i:06d}", "responses": ["1", "2"]} for i in range(2)]
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert grade_file("relay", responses)["worst_at_k"] == 0.0


class Picky(Letters):
    """Cannot grade what bob says in one conversation."""

    def grade(self, problem, answer):
        if answer == "q":
            raise ValueError("unreadable")
        return super().grade(problem, answer)


def test_what_failed_scores_0_and_the_count_stands_beside_it(capsys):
    def write(seat, entries, key):
        at = (key.problem, key.sample)
        if at == ("p0", 0) and seat == "bob":
            raise EpisodeFailure("content filter: refused", policy=True)
        if at == ("p0", 1):
            raise EpisodeFailure("unreachable: no answer", policy=False)
        return "q" if at == ("p1", 2) and seat == "bob" else "a"

    found = report(evaluated(write, Picky(), failures=0.3))
    # Three of twelve: without them the team would be always right.
    assert found["team"]["avg_at_k"] == pytest.approx((2 + 3 + 4) / 12)
    assert found["team"]["failed"] == 3 and found["per_problem"][0]["scores"] == [0, 0, 1, 1]
    assert found["failures"] == {
        "policy": {"content filter": 1, "grader": 1},
        "world": {"unreachable": 1},
    }
    # ann spoke in all but the one that the world ended (she said nothing there: 0, and no failure);
    # of bob's last messages one cannot be graded.
    assert "failed" not in found["seats"]["ann"] and found["seats"]["bob"]["failed"] == 1
    event = progress_of(evaluated(write, Picky(), failures=0.3), None)
    assert event["failures"] == found["failures"] and event["figures"]["failed"] == 3
    show_report({**found, "benchmark": "letters", "protocol": {"name": "chain"}, "out": "there"})
    shown = capsys.readouterr().out
    assert "failed" in shown.splitlines()[0]
    assert "3 conversations failed and score 0 (1 content filter, 1 grader, 1 unreachable)" in shown


def test_groups_that_problems_name_are_told_apart(capsys):
    problems = [
        Problem.of("p0", "?", "a", group="old"),
        Problem.of("p1", "?", "a", group="new"),
        Problem.of("p2", "?", "a", group="old"),
        Problem.of("p3", "?", "a"),
    ]
    answers = {"p0": "aa", "p1": "ab", "p2": "bb", "p3": "aa"}
    match = Match(
        team("ann"),
        chain,
        ScriptedEngine(lambda seat, entries, key: answers[key.problem][key.sample]),
        Letters(),
    )
    evaluation = asyncio.run(evaluate_async(match, problems, 2, KEY))
    event = progress_of(evaluation, [0.0, 1.0, 0.5, 1.0])
    # old: 1 and 0, before 0 and 1/2; new: 1/2, before 1. What names no group is in the whole alone.
    assert event["reward"] == 2.5 / 4 and event["problems"] == 4
    assert {name: of["reward"] for name, of in event["groups"].items()} == {"old": 0.5, "new": 0.5}
    assert event["groups"]["old"]["problems"] == 2
    assert event["groups"]["old"]["difference"][0] == pytest.approx(0.25)
    assert event["groups"]["new"]["difference"] == [-0.5, None, None]
    assert event["difference"][0] == pytest.approx(0.0)
    assert "difference" not in progress_of(evaluation, None)["groups"]["old"]
    found = report(evaluation)
    assert found["groups"]["old"]["avg_at_k"] == 0.5 and found["groups"]["old"]["problems"] == 2
    assert found["groups"]["old"]["majority"] == 0.5
    show_report({**found, "benchmark": "letters", "protocol": {"name": "chain"}, "out": "there"})
    assert "old: 0.500, 2 problems" in capsys.readouterr().out


def test_without_groups_nothing_is_said_of_them():
    assert "groups" not in progress_of(evaluated(), None)
    assert "groups" not in report(evaluated())


def test_where_nothing_failed_no_row_counts_failures():
    found = report(evaluated())
    assert found["failures"] == {"policy": {}, "world": {}}
    assert set(found["team"]) == {"avg_at_k", "pass_at_k", "majority", "interval"}


def test_a_vote_that_cannot_be_counted_elects_nobody():
    class Incomparable(Letters):
        def equal(self, a, b):
            raise ValueError("cannot compare")

    found = report(evaluated(task=Incomparable()))
    # p0's samples all say a, and equal texts are not compared.
    assert [row["majority"] for row in found["per_problem"]] == [1.0, 0.0, 0.0]
    assert found["team"]["avg_at_k"] == pytest.approx(5 / 12)
