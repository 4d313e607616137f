"""Grading files of responses: figures by hand, every kind of bad input, graders that misbehave."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from satune.cli.main import main
from satune.commands.grade import grade_file, read_responses
from satune.play.statistics import mean_components, score_interval
from satune.types import UserError

ROWS = [{"id": f"q{i}", "prompt": f"{i} + {i}?", "answer": str(2 * i)} for i in range(4)]

TASK = '''
import os, time
from satune.types import Grade, Problem

class Odd:
    """Grades as the response says; components by name."""
    name = "odd"

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def problems(self, split):
        return iter({"train": [Problem.of("a", "?", "1")],
                     "eval": [Problem.of("b", "?", "1"), Problem.of("c", "?", "1")]}[split])

    def extract(self, text):
        return text.split()[0] if text.split() else None

    def equal(self, a, b):
        if a == "die" or b == "die":
            os._exit(1)
        return a == b

    def grade(self, problem, answer):
        if answer == "hang":
            while True:
                pass
        if answer == "die":
            os._exit(7)
        if answer == "raise":
            raise RuntimeError("odd")
        if answer == "two":
            return Grade(2.0)
        if answer == "none":
            return None
        score = float(answer.split()[0]) * self.scale
        parts = {"cells": score / 2} | ({"length": 4.0} if "long" in answer else {})
        return Grade(score, parts, f"was {answer}")
'''


def write(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", ROWS)


@pytest.fixture
def odd(tmp_path):
    (tmp_path / "odd.py").write_text(TASK)
    return f"{tmp_path}/odd.py:Odd"


@pytest.fixture
def satune(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["satune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


# -- figures -------------------------------------------------------------------------------------


def test_figures_of_single_responses(tmp_path, data):
    responses = write(
        tmp_path / "r.jsonl",
        [
            {"id": "q1", "response": "answer: 2"},
            {"id": "q0", "response": "1"},
            {"id": "q3", "response": "6"},
        ],
    )
    result = grade_file("rows", responses, data)
    assert (result["benchmark"], result["rows"], result["responses"]) == ("rows", 3, 3)
    assert result["score"] == pytest.approx(2 / 3)
    assert result["missing"] == 1 and result["score_with_missing"] == pytest.approx(2 / 4)
    assert [(r["id"], r["score"], r["extracted"]) for r in result["per_row"]] == [
        ("q1", 1.0, "2"),
        ("q0", 0.0, "1"),
        ("q3", 1.0, "6"),
    ]
    assert result["per_row"][1]["detail"] == "read 1, expected 0"
    assert "pass_at" not in result and "majority" not in result


def test_figures_of_several_responses(tmp_path, data):
    # q0: 1 of 3 right, q1: 2 of 3. pass@2 = 1 - C(wrong, 2) / C(3, 2): 1 - 1/3 and 1 - 0.
    responses = write(
        tmp_path / "r.jsonl",
        [
            {"id": "q0", "responses": ["5", "0", "5"]},
            {"id": "q1", "responses": ["2", "7", "2"]},
        ],
    )
    result = grade_file("rows", responses, data, workers=2)
    assert result["score"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert result["pass_at"] == {
        "1": pytest.approx(0.5),
        "2": pytest.approx((2 / 3 + 1) / 2),
        "3": 1.0,
    }
    assert result["majority"] == 0.5
    first, second = result["per_row"]
    assert (first["majority"], first["extracted"]) == (0.0, "5")
    assert (second["majority"], second["extracted"]) == (1.0, "2")
    assert [r["score"] for r in second["responses"]] == [1.0, 0.0, 1.0]
    # By problem: 1/3 and 2/3 have the standard deviation sqrt(1/18).
    half = 1.959964 * math.sqrt(1 / 18) / math.sqrt(2)
    assert result["interval"] == [pytest.approx(0.5 - half, abs=1e-6), pytest.approx(0.5 + half)]


@pytest.mark.parametrize(
    ("scores", "interval"),
    [
        # Wilson by hand with z = 1.959964: all of n right reaches down to n / (n + z²).
        ([1.0] * 10, [10 / (10 + 3.841459), 1.0]),
        ([0.0] * 10, [0.0, 3.841459 / (10 + 3.841459)]),
        ([1.0], [1 / (1 + 3.841459), 1.0]),
        # Half of 4: centre 1/2, half width z sqrt(1/16 + z²/64) / (1 + z²/4).
        ([1.0, 0.0, 1.0, 0.0], [0.5 - 0.3499602, 0.5 + 0.3499602]),
        ([0.5], None),
        ([0.25, 0.25, 0.25], None),
    ],
)
def test_intervals(scores, interval):
    assert score_interval(scores) == (interval and pytest.approx(interval, abs=1e-6))


def test_components_are_averaged_over_those_who_have_them(tmp_path, odd):
    responses = write(
        tmp_path / "r.jsonl",
        [{"id": "a", "response": "1 long"}, {"id": "b", "response": "0.5"}],
    )
    result = grade_file(odd, responses)
    assert result["components"] == {"cells": pytest.approx(0.375), "length": 4.0}
    assert result["per_row"][0]["components"] == {"cells": 0.5, "length": 4.0}
    assert result["missing"] == 1
    assert mean_components([]) == {}
    halved = grade_file(odd, responses, options={"scale": 0.5})
    assert halved["score"] == result["score"] / 2


def test_half_a_score_passes_nothing(tmp_path, odd):
    responses = write(tmp_path / "r.jsonl", [{"id": "a", "responses": ["0.5", "1", "0.5"]}])
    result = grade_file(odd, responses)
    assert result["score"] == pytest.approx(2 / 3)
    assert result["pass_at"]["1"] == pytest.approx(1 / 3)
    assert result["majority"] == 0.5


def test_graders_that_misbehave_cost_their_own_responses(tmp_path, odd):
    responses = write(
        tmp_path / "r.jsonl",
        [
            {"id": "a", "responses": ["1", "hang", "1"]},
            {"id": "b", "responses": ["die", "1", "none"]},
            {"id": "c", "responses": ["raise", "two", "1"]},
        ],
    )
    seen = []
    result = grade_file(
        odd, responses, workers=2, seconds=5.0, progress=lambda *now: seen.append(now)
    )
    scores = [[r["score"] for r in row["responses"]] for row in result["per_row"]]
    assert scores == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert result["failed"] == 5
    details = [r["detail"] for row in result["per_row"] for r in row["responses"]]
    assert details[1] == "not graded (timeout): no result within 5 s"
    assert details[3] == "not graded (died): the worker process ended (exit code 7)"
    assert details[6] == "not graded (exception): RuntimeError: odd"
    assert "return a Grade with score 0 to 1" in details[7]
    # The vote of "b" ended its process as well: it has no winner.
    assert [row["majority"] for row in result["per_row"]] == [1.0, 0.0, 0.0]
    assert seen[-1] == (12, 12, "grading")


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(tmp_path, data, workers):
    rows = [{"id": f"q{i}", "responses": [str(i), str(2 * i)]} for i in range(4)]
    responses = write(tmp_path / "r.jsonl", rows)
    assert grade_file("rows", responses, data, workers=workers) == grade_file(
        "rows", responses, data
    )


def test_generated_problems_and_environments(tmp_path):
    from satune.tasks.catalog import load_task

    for name in ("relay", "guess_number"):
        problem = load_task(name).problem_at("eval", 3)
        row = {"id": problem.id, "response": f"Guess: {problem.answer}"}
        result = grade_file(name, write(tmp_path / "r.jsonl", [row]))
        assert (result["score"], result["missing"]) == (1.0, 0)
    assert result["components"] == {"final": 1.0}


def test_maths_inside_the_workers(tmp_path):
    pytest.importorskip("math_verify")
    rows = [{"id": "h", "problem": "half?", "answer": r"\frac{1}{2}"}]
    responses = write(
        tmp_path / "r.jsonl",
        [{"id": "h", "responses": [r"\boxed{\dfrac{2}{4}}", r"\boxed{2}", r"\boxed{0.5}", "1/2"]}],
    )
    result = grade_file("math500", responses, write(tmp_path / "d.jsonl", rows))
    assert [r["score"] for r in result["per_row"][0]["responses"]] == [1.0, 0.0, 1.0, 0.0]
    assert result["majority"] == 1.0
    assert result["per_row"][0]["responses"][3]["extracted"] is None


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"response": "1"}], "line 1: no id; give the problem's id as a text"),
        ([{"id": None, "response": "1"}], "line 1: no id"),
        ([{"id": ["q0"], "response": "1"}], r"line 1: the id is \['q0'\]"),
        ([{"id": "q0"}], 'line 1: no response; give "response"'),
        ([{"id": "q0", "response": "1", "responses": ["1"]}], "both response and responses"),
        ([{"id": "q0", "response": 5}], "line 1: the response is 5; give a text"),
        ([{"id": "q0", "response": None}], "line 1: the response is None; give a text"),
        ([{"id": "q0", "responses": ["1", 2]}], "line 1: response 2 is 2; give a text"),
        ([{"id": "q0", "responses": []}], r"line 1: responses is \[\]; give a list"),
        ([{"id": "q0", "responses": "1"}], "line 1: responses is '1'; give a list"),
        (
            [{"id": "q0", "response": "1"}, "", {"id": "q0", "response": "2"}],
            "line 3: id 'q0' stands already in .*line 1",
        ),
        (['{"id": "q0", '], "line 1: damaged row"),
        (["[" * 100_000], "line 1: damaged row"),
        (["[" * 500 + "]" * 500], r"line 1: damaged row \(nested too deeply\); mend or delete it"),
        (
            ['{"id": ' + "7" * 5000 + "}"],
            r"line 1: damaged row \(an integer of more than 4300 digits",
        ),
        (["[1]"], "line 1: the row is no object"),
        ([], "it holds no responses"),
        ([{"id": "q9", "response": "1"}], "line 1: no problem 'q9' in the data .nearest: q"),
    ],
)
def test_bad_responses_are_one_line(satune, tmp_path, data, rows, message):
    responses = write(tmp_path / "r.jsonl", rows)
    code, out, err = satune("grade", "rows", responses, "--data", data)
    assert (code, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(UserError, match=message):
        grade_file("rows", responses, data)


def test_many_ids_are_not_all_listed(tmp_path):
    data = write(tmp_path / "d.jsonl", [{**ROWS[0], "id": f"row-{i}"} for i in range(100)])
    responses = write(tmp_path / "r.jsonl", [{"id": "row-100", "response": "1"}])
    with pytest.raises(UserError, match=r"no problem 'row-100' in the data \(nearest: row-\d+\)$"):
        grade_file("rows", responses, data)
    responses = write(tmp_path / "r.jsonl", [{"id": "zzz", "response": "1"}])
    with pytest.raises(UserError, match=r"no problem 'zzz' in the data \(100 ids, first row-0\)"):
        grade_file("rows", responses, data)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ("x", "'x' is not the id of one; write relay-eval-000000"),
        ("relay-evil-000003", "no split 'evil'"),
        ("relay-eval-3", "no problem 'relay-eval-3' .nearest: relay-eval-000003"),
    ],
)
def test_bad_ids_of_generated_problems(tmp_path, identity, message):
    responses = write(tmp_path / "r.jsonl", [{"id": identity, "response": "1"}])
    with pytest.raises(UserError, match=message):
        grade_file("relay", responses)


def test_a_missing_file_names_the_nearest(tmp_path, data):
    with pytest.raises(UserError, match=r"dat\.jsonl: no such file; did you mean data\.jsonl"):
        read_responses(tmp_path / "dat.jsonl")


# -- the command ---------------------------------------------------------------------------------


def test_the_command(satune, tmp_path, data):
    rows = [{"id": "q0", "response": "0"}, {"id": "q1", "response": "3"}]
    responses = write(tmp_path / "r.jsonl", rows)
    out_file = tmp_path / "grades.jsonl"
    code, out, err = satune(
        "grade", "rows", responses, "reward=numeric", "--data", data, "--json",
        "--workers", 1, "--out", out_file,
    )  # fmt: skip
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert {"benchmark", "rows", "score", "interval", "per_row"} <= set(result)
    assert result["score"] == 0.5 and result["missing"] == 2
    assert "2 problems of the data have no response" in err and "0.2500" in err
    assert [json.loads(line) for line in out_file.read_text().splitlines()] == result["per_row"]

    code, out, err = satune("grade", "rows", responses, "--data", data)
    assert code == 0 and "0.5000" in out and "95% interval" in out


def test_responses_that_go_on_from_an_opened_thought(satune, tmp_path, data):
    """The prompt ended with <think>: up to </think> nothing is an answer, and q1's thought was
    cut. Read as it stands, q1's response says 3 and is right."""
    rows = [
        {"id": "q0", "response": "maybe 1? no.</think> The answer is 0"},
        {"id": "q1", "response": "maybe 2, or 3. Wait, I should check: 3"},
    ]
    responses = write(tmp_path / "r.jsonl", rows)
    cut = grade_file("rows", responses, data, options={"reward": "numeric"}, thinking="open")
    assert [(row["score"], row["extracted"]) for row in cut["per_row"]] == [(1.0, "0"), (0.0, None)]
    told = ["grade", "rows", responses, "reward=numeric", "thinking=open", "--data", data, "--json"]
    code, out, _ = satune(*told)
    assert code == 0 and json.loads(out)["score"] == 0.5
    whole = grade_file("rows", responses, data, options={"reward": "numeric"})
    assert [row["extracted"] for row in whole["per_row"]] == ["0", "3"]
    code, out, err = satune(*told[:4], "thinking=shut", "--data", data)
    assert (code, out) == (2, "") and "thinking is 'shut'; give open" in err


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path, data):
    responses = tmp_path / "r.jsonl"
    responses.write_bytes(b"\xef\xbb\xbf" + b'{"id": "q0", "response": "0"}\n')
    listed = tmp_path / "listed.json"
    listed.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    for source in (data, listed):
        assert grade_file("rows", responses, source)["score"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["row"], "unknown task 'row' (nearest: rows"),
        (["rows", "rewards=numeric"], "unknown option 'rewards' (nearest: reward"),
        (["rows", "numeric"], "'numeric' is not an option; write it as key=value"),
    ],
)
def test_bad_arguments(satune, tmp_path, data, arguments, message):
    responses = write(tmp_path / "r.jsonl", [{"id": "q0", "response": "0"}])
    name, *options = arguments
    code, out, err = satune("grade", name, responses, *options, "--data", data)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
