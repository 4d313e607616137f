from __future__ import annotations

import copy
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark_rows import fuzz, rows_of
from satune.tasks.json_answers import last_object
from satune.tasks.zebralogic import ZebraLogic, scale
from satune.types import UserError

ROW = {
    "id": "tiny",
    "size": "2*2",
    "puzzle": "Two houses. Eric owns the cat. Eric is not in the second house.",
    "solution": {
        "header": ["House", "Name", "Animal"],
        "rows": [["1", "Eric", "cat"], ["2", "Arnold", "guinea pig"]],
    },
}
GOLD = {
    "House 1": {"Name": "Eric", "Animal": "cat"},
    "House 2": {"Name": "Arnold", "Animal": "guinea pig"},
}
ANSWER = json.dumps({"reasoning": "Eric is first.", "solution": GOLD})
WRONG = json.dumps({"solution": {**GOLD, "House 2": {"Name": "Arnold", "Animal": "cat"}}})


def write(tmp_path, *given, name="z.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


@pytest.fixture
def task(tmp_path):
    return ZebraLogic(write(tmp_path, ROW), eval_fraction=1)


def grade(task, text):
    return task.grade(next(task.problems("all")), text)


def changed(**cells):
    """The solution with the first house's cells replaced."""
    return json.dumps({"solution": {**GOLD, "House 1": {**GOLD["House 1"], **cells}}})


# (message, score, right cells of four, why)
FORMATS = [
    (ANSWER, 1, 4, "plain"),
    (f"```json\n{ANSWER}\n```\nI am sure of this.", 1, 4, "a fence and a remark behind it"),
    (json.dumps(json.loads(ANSWER), indent=4), 1, 4, "indented over several lines"),
    (f"First {WRONG}, but no:\n{ANSWER}", 1, 4, "the last of several objects counts"),
    (f"{ANSWER}\nor rather\n{WRONG}", 0, 3, "the last one counts, even if it is wrong"),
    (f"{ANSWER} So {{House}} is {{x | x > 1}}.", 1, 4, "braces in prose are no object"),
    (f"{ANSWER} {{}}", 0, 0, "an empty object is the last one, and has no solution"),
    (f'A set {{1, 2 and then {ANSWER}', 1, 4, "an unclosed brace in prose"),
    (f'The screen is 5" wide. {ANSWER}', 1, 4, "a lone quotation mark in prose"),
    (f'Say {{"x and go on. {ANSWER}', 1, 4, "unclosed brace and quotation mark in prose"),
    (f'In the form {{"solution": ... as asked: {ANSWER}', 1, 4, "the form quoted, never closed"),
    (ANSWER.replace("Eric is first.", "a } b { c \\\" {{"), 1, 4, "braces in a string"),
    (ANSWER.replace("Eric is first.", "one\ntwo"), 1, 4, "a line end in a string"),
    (ANSWER.replace("}}}", "},}}"), 0, 0, "a trailing comma is not repaired"),
    (f"{ANSWER} {WRONG.replace('}}}', '},}}')}", 0, 0, "nor is the object before it taken"),
    (ANSWER.replace('"', "'"), 0, 0, "single quotation marks are no JSON"),
    (ANSWER[:-8], 0, 0, "cut off"),
    (f"{ANSWER} And now {WRONG[:-8]}", 1, 4, "the last complete one, before one cut off"),
    (json.dumps(GOLD), 0, 0, "no key solution"),
    (json.dumps({"solution": None}), 0, 0, "solution is null"),
    (json.dumps({"solution": [GOLD]}), 0, 0, "solution is a list"),
    (json.dumps({"answer": {"solution": GOLD}}), 0, 0, "solution inside another key"),
    (ANSWER.upper().replace("HOUSE", "House").replace("NAME", "Name").replace("ANIMAL", "Animal")
     .replace("SOLUTION", "solution"), 1, 4, "case of values does not matter"),
    (ANSWER.replace("House 1", "house 1"), 0, 2, "case of houses does"),
    (ANSWER.replace('"Animal": "cat"', '"animal": "cat"'), 0, 3, "case of attributes does"),
    (changed(Name="  ERIC\t"), 1, 4, "outer space does not matter"),
    (changed(Name="Er ic"), 0, 3, "inner space does"),
    (changed(Name=["eric", "Arnold"]), 1, 4, "of a list the first counts"),
    (changed(Name=[]), 0, 3, "an empty list"),
    (changed(Name=None), 0, 3, "null"),
    (changed(Name=7), 0, 3, "a number"),
    (changed(Name={"first": "Eric"}), 0, 3, "an object for a cell"),
    (changed(Height="tall"), 1, 4, "a further attribute is ignored"),
    (json.dumps({"solution": {**GOLD, "House 3": GOLD["House 1"]}}), 1, 4, "a further house too"),
    (json.dumps({"solution": {"House 1": GOLD["House 1"]}}), 0, 2, "a house is missing"),
    (json.dumps({"solution": {**GOLD, "House 1": "Eric"}}), 0, 2, "a house is no object"),
    (json.dumps({"solution": {"House 1": GOLD["House 2"], "House 2": GOLD["House 1"]}}), 0, 0,
     "houses exchanged"),
    ("", 0, 0, "nothing"),
    ("The answer is that Eric has the cat.", 0, 0, "prose"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "score", "cells", "why"), FORMATS, ids=[f[3] for f in FORMATS])
def test_formats(task, text, score, cells, why):
    found = grade(task, text)
    assert (found.score, found.components["cell_accuracy"] * 4) == (score, cells), why
    answer = task.extract(text)
    assert found.components["answered"] == (answer is not None)
    if answer is not None:
        # What was extracted is graded alike, and votes for itself.
        assert grade(task, answer).components["cell_accuracy"] * 4 == cells
        assert task.equal(answer, task.extract(answer))


def test_equal_answers_have_equal_grids_whatever_is_around_them(task):
    a, b = task.extract(ANSWER), task.extract(f"Well. {changed(Name=' ERIC ')} Done.")
    assert task.equal(a, b) and not task.equal(a, task.extract(WRONG))


def test_no_answer(task):
    assert grade(task, None).components == {"cell_accuracy": 0.0, "answered": 0.0}


def test_metadata_and_prompt(task):
    problem = next(task.problems("all"))
    assert problem.metadata == {"size": "2*2", "scale": "small", "houses": 2, "attributes": 2}
    assert ROW["puzzle"] in problem.text and '"House 2": {' in problem.text
    assert "guinea pig" not in problem.text  # the form shows no value
    assert problem.answer == GOLD
    task.validate()


@pytest.mark.parametrize(
    ("houses", "attributes", "wanted"),
    # 2!^6 = 64; 3!^3 = 216, 3!^4 = 1296; 4!^4 = 331,776, 4!^5 = 7,962,624; 5!^4 = 2.1e8,
    # 5!^5 = 2.5e10; 6!^3 = 3.7e8, 6!^4 = 2.7e11
    [(2, 6, "small"), (3, 3, "small"), (3, 4, "medium"), (4, 4, "medium"), (4, 5, "large"),
     (5, 4, "large"), (5, 5, "x-large"), (6, 3, "large"), (6, 4, "x-large")],
)  # fmt: skip
def test_scales(houses, attributes, wanted):
    assert scale(houses, attributes) == wanted


def spoilt(**changes):
    row = copy.deepcopy(ROW) | {"id": "other"}
    row.update(changes)
    return row


def solution(header=("House", "Name"), cells=(("1", "a"), ("2", "b"))):
    return {"header": list(header), "rows": [list(row) for row in cells]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x", "puzzle": "p"}, "no field 'solution'; the fields there are: id, puzzle"),
        (spoilt(id="tiny"), "id 'tiny' stands already in .*line 1"),
        (spoilt(puzzle=" "), "field 'puzzle' is empty"),
        (spoilt(size="2*3"), r"size is '2\*3' but the solution is 2\*2"),
        (spoilt(solution="Eric"), "solution is not"),
        (spoilt(solution={"header": ["House"], "rows": []}), "solution is not"),
        (spoilt(solution=solution(header=("Name", "House"))), "solution is not"),
        (spoilt(solution=solution(cells=(("1", "a"), ("2",)))), "solution is not"),
        (spoilt(solution=solution(cells=(("1", "a"), ("2", 7)))), "solution is not"),
        (spoilt(solution=solution(cells=(("1", "___"), ("2", "___")))), "solution is masked"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, row, message):
    path = write(tmp_path, ROW, row)
    with pytest.raises(UserError, match=message) as caught:
        ZebraLogic(path)
    assert f"{path}, line 2" in str(caught.value) and "\n" not in str(caught.value)


def test_no_data_and_values_that_do_not_differ(tmp_path):
    with pytest.raises(UserError, match="it needs data"):
        ZebraLogic()
    alike = spoilt(size="2*1", solution=solution(cells=(("1", "a"), ("2", "A"))))
    with pytest.raises(UserError, match="line 1: the solution of 'other' cannot be told apart"):
        ZebraLogic(write(tmp_path, alike)).validate()


def test_parquet_as_upstream_has_it(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "grid.parquet"
    parquet.write_table(pa.Table.from_pylist([ROW | {"created_at": "2024-07-11"}]), path)
    task = ZebraLogic(path)
    assert next(task.problems("all")).answer == GOLD
    task.validate()


def test_every_official_solution_scores_1_and_a_swapped_cell_0():
    task = ZebraLogic(rows_of("zebralogic"))
    task.validate()
    problems = list(task.problems("all"))
    assert len(problems) == 693
    rng = random.Random(0)
    for problem, row in zip(
        sorted(problems, key=lambda p: p.id),
        sorted((json.loads(r) for r in rows_of("zebralogic").open()), key=lambda r: r["id"]),
        strict=True,
    ):
        header = row["solution"]["header"]
        table = {
            f"House {cells[0]}": dict(zip(header[1:], cells[1:], strict=True))
            for cells in row["solution"]["rows"]
        }
        done = task.grade(problem, "```json\n" + json.dumps({"solution": table}) + "\n```")
        assert (done.score, done.components["cell_accuracy"]) == (1.0, 1.0)
        assert problem.metadata["scale"] == row["scale"]
        one, two = rng.sample(list(table), 2)
        attribute = rng.choice(header[1:])
        table[one][attribute], table[two][attribute] = table[two][attribute], table[one][attribute]
        spoilt = task.grade(problem, json.dumps({"solution": table}))
        cells = len(table) * (len(header) - 1)
        assert spoilt.score == 0.0
        assert spoilt.components["cell_accuracy"] == pytest.approx((cells - 2) / cells)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), json_values), st.text(alphabet="ab .\n"), st.text(
    alphabet="ab .\n"))  # fmt: skip
def test_an_object_is_found_between_any_prose(value, before, behind):
    text = before + json.dumps(value) + behind
    assert last_object(text, "solution") == value


def good(task):
    return [(p, json.dumps({"solution": p.answer}, indent=1)) for p in task.problems("all")]


def test_mangled_messages_never_break_the_grader(task):
    hits = fuzz(task, good(task), 2000, seed=1)
    assert 0 < hits < 1500  # some mangling is harmless, most is not


@pytest.mark.slow
def test_very_many_mangled_messages(task):
    assert fuzz(task, good(task), 100_000, seed=2) > 0
