"""ZebraLogic: the last JSON object, cell by cell."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from benchmark_rows import rows_of
from satune.tasks.zebralogic import ZebraLogic
from satune.types import Problem, UserError

ROW = {
    "id": "two",
    "size": "2*2",
    "puzzle": "Two houses. Names: `Eric`, `Arnold`. Drinks: `tea`, `milk`. 1. Eric drinks tea.",
    "solution": {"header": ["House", "Name", "Drink"], "rows": [["1", "Eric", "tea"],
                                                                ["2", "Arnold", "milk"]]},
}  # fmt: skip
GOLD = {
    "House 1": {"Name": "Eric", "Drink": "tea"},
    "House 2": {"Name": "Arnold", "Drink": "milk"},
}


def task_of(tmp_path: Path, *rows: object) -> ZebraLogic:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or (ROW,)))
    return ZebraLogic(path, eval_fraction=0.0)


@pytest.fixture
def task(tmp_path: Path) -> ZebraLogic:
    return task_of(tmp_path)


@pytest.fixture
def problem(task: ZebraLogic) -> Problem:
    return next(task.problems("all"))


def said(table: object) -> str:
    return json.dumps({"solution": table})


def changed(house: str, attribute: str, value: object) -> dict[str, dict[str, object]]:
    table: dict[str, dict[str, object]] = json.loads(json.dumps(GOLD))
    table[house][attribute] = value
    return table


# (why, message, puzzle accuracy, cell accuracy)
FORMATS = [
    ("plain", said(GOLD), 1.0, 1.0),
    ("in a fence", f"```json\n{said(GOLD)}\n```", 1.0, 1.0),
    ("in a fence, a remark behind it", f"```json\n{said(GOLD)}\n```\nI am sure.", 1.0, 1.0),
    ("thoughts before it", f"Eric has house 1 {{so}}...\n{said(GOLD)}", 1.0, 1.0),
    ("with a reasoning key", json.dumps({"reasoning": "Eric: tea", "solution": GOLD}), 1.0, 1.0),
    ("capitals and spaces do not count", said(changed("House 1", "Name", " ERIC ")), 1.0, 1.0),
    ("of a list the first item", said(changed("House 1", "Name", ["Eric", "x"])), 1.0, 1.0),
    ("another key beside it", said({**GOLD, "House 3": {"Name": "Eve"}}), 1.0, 1.0),
    ("line breaks inside a string", said(GOLD).replace('"tea"', '"tea\n"'), 1.0, 1.0),
    ("the last of two objects", said(changed("House 1", "Name", "x")) + said(GOLD), 1.0, 1.0),
    ("a wrong one last", said(GOLD) + said(changed("House 1", "Name", "x")), 0.0, 0.75),
    ("one cell wrong", said(changed("House 2", "Drink", "tea")), 0.0, 0.75),
    ("two cells swapped",
     said({"House 1": {"Name": "Eric", "Drink": "milk"},
           "House 2": {"Name": "Arnold", "Drink": "tea"}}), 0.0, 0.5),
    ("houses swapped", said({"House 1": GOLD["House 2"], "House 2": GOLD["House 1"]}), 0.0, 0.0),
    ("a house missing", said({"House 1": GOLD["House 1"]}), 0.0, 0.5),
    ("an empty list in a cell", said(changed("House 1", "Name", [])), 0.0, 0.75),
    ("a number in a cell", said(changed("House 1", "Name", 3)), 0.0, 0.75),
    ("attribute names are exact", said({"House 1": {"name": "Eric", "Drink": "tea"},
                                        "House 2": GOLD["House 2"]}), 0.0, 0.75),
    ("no solution key", json.dumps(GOLD), 0.0, 0.0),
    ("cut off", said(GOLD)[:-3], 0.0, 0.0),
    ("a trailing comma is no JSON", said(GOLD)[:-1] + ",}", 0.0, 0.0),
    ("a list", "[1, 2]", 0.0, 0.0),
    ("nothing", "", 0.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("why, message, puzzle, cells", FORMATS, ids=[f[0] for f in FORMATS])
def test_formats(
    task: ZebraLogic, problem: Problem, why: str, message: str, puzzle: float, cells: float
) -> None:
    grade = task.grade(problem, message)
    assert (grade.score, grade.components["cell_accuracy"]) == (puzzle, cells)


def test_the_prompt_shows_the_table_and_not_the_answer(problem: Problem) -> None:
    assert '"House 2"' in problem.text and '"Drink": "..."' in problem.text
    form = problem.text.partition("Work out")[2]
    assert "Eric" not in form and "milk" not in form


def test_size_and_search_space(problem: Problem) -> None:
    # 2 houses: each of 2 attributes has 2! orders.
    assert problem.metadata == {"size": "2*2", "search_space": 4, "scale": "small"}


def test_votes_compare_tables(task: ZebraLogic) -> None:
    backwards = {h: dict(reversed(cells.items())) for h, cells in reversed(GOLD.items())}
    first, second = task.extract(said(GOLD)), task.extract(said(backwards))
    assert first is not None and second is not None and task.equal(first, second)


BAD = [
    ({**ROW, "size": "3*2"}, "size is '3*2', the solution has 2*2 cells"),
    ({**ROW, "solution": {"header": ["House"], "rows": []}}, "no header with rows"),
    ({**ROW, "solution": {"header": ["House", "Name"], "rows": [["1", "___"]]}}, "is masked"),
    ({k: v for k, v in ROW.items() if k != "puzzle"}, "no field 'puzzle'"),
]


@pytest.mark.parametrize("row, message", BAD)
def test_bad_rows_are_one_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1") as caught:
        task_of(tmp_path, row)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_real_rows(tmp_path: Path) -> None:
    task = ZebraLogic(rows_of("zebralogic.jsonl"))
    problems = list(task.problems("all"))
    assert len(problems) == 693
    rng = random.Random(0)
    for problem in problems:
        grade = task.grade(problem, f"So:\n```json\n{said(problem.answer)}\n```")
        assert grade.score == grade.components["cell_accuracy"] == 1.0
        # Two different cells of one attribute change places.
        houses = list(problem.answer)
        attribute = rng.choice(list(problem.answer[houses[0]]))
        one, other = rng.sample(houses, 2)
        table = json.loads(json.dumps(problem.answer))
        table[one][attribute], table[other][attribute] = (
            table[other][attribute],
            table[one][attribute],
        )
        assert task.grade(problem, said(table)).score == 0.0
    task.validate()
    scales = {p.id: p.metadata["scale"] for p in problems}
    # The file's own column says the same.
    rows = [json.loads(line) for line in rows_of("zebralogic.jsonl").read_text().splitlines()]
    assert scales == {row["id"]: row["scale"] for row in rows}


def damaged(rng: random.Random, text: str) -> str:
    pieces = [
        "{",
        "}",
        '"',
        ":",
        ",",
        "[",
        "]",
        "House 1",
        "null",
        "\\",
        "\x00",
        "é",
        "\n",
        "1e999",
    ]
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(rng.choice(pieces) for _ in range(rng.randrange(200)))
    place = rng.randrange(len(text) + 1)
    if kind == 1:
        return text[:place]
    if kind == 2:
        return text[:place] + "".join(rng.choices(pieces, k=3)) + text[place:]
    return text[:place] + text[place + rng.randrange(9) :]


@pytest.mark.parametrize(
    "count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_no_message_breaks_it(task: ZebraLogic, problem: Problem, count: int) -> None:
    rng = random.Random(count)
    for _ in range(count):
        message = damaged(rng, said(GOLD))
        grade = task.grade(problem, message)
        assert 0.0 <= grade.score <= 1.0 and 0.0 <= grade.components["cell_accuracy"] <= 1.0
        task.extract(message)


HUGE = ["{" * 1_000_000, '{"solution": ' * 100_000 + "1" + "}" * 100_000, '{"a":1}' * 200_000,
        '{"solution": {"House 1": "' + "x" * 1_000_000 + '"}}', "}" * 1_000_000]  # fmt: skip


@pytest.mark.parametrize("message", HUGE, ids=range(len(HUGE)))
def test_a_huge_message_takes_less_than_a_second(
    task: ZebraLogic, problem: Problem, message: str
) -> None:
    started = time.perf_counter()
    assert task.grade(problem, message).score == 0.0
    assert time.perf_counter() - started < 1.0
