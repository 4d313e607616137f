from __future__ import annotations

import json

import pytest

from satune.tasks.catalog import TASKS, draw, load_task, take
from satune.types import Problem, UserError
from scripted import Letters


class Five(Letters):
    seed = 4

    def problems(self, split):
        return [Problem.of(f"p{i}", "?", "a") for i in range(5)]


def test_tasks_are_built_with_data_seed_and_options(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"secret": "1234"}) + "\n")
    assert load_task("relay", None, 3).seed == 3
    assert load_task("relay", None, 3, numbers=5).numbers == 5
    assert load_task("guess_number", data, 1, eval_fraction=1, prompt="short").prompt == "short"
    assert {"relay", "guess_number", "rows", "maths"} <= set(TASKS)


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("relai", None, {}, "unknown task 'relai' .nearest: relay"),
        ("relay", None, {"number": 5}, "task relay: unknown option 'number' .nearest: numbers"),
        ("relay", "x.jsonl", {}, "task relay: it reads no data; drop data: x.jsonl"),
        ("fractions:Fraction", None, {}, "it has no 'name'"),
        ("no.such:Task", None, {}, "no module no"),
    ],
)
def test_bad_input_is_named(name, data, options, message):
    with pytest.raises(UserError, match=message):
        load_task(name, data, **options)


def test_a_users_task_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n"
        "    name = 'mine'\n"
        "    def __init__(self, size=3): self.size = size\n"
        "    def problems(self, split): return []\n"
        "    def extract(self, text): return text\n"
        "    def equal(self, a, b): return a == b\n"
        "    def grade(self, problem, answer): return None\n"
    )
    task = load_task("mine.py:Mine", None, 0, tmp_path, size=4)
    assert task.size == 4
    with pytest.raises(UserError, match="holds no problems"):
        take(task, "train", 1)


def test_takes_of_a_stream_are_its_stretches():
    task = load_task("relay")
    whole = take(task, "train", 10)
    assert take(task, "train", 4, 3) == whole[3:7]
    assert whole[7].id == "relay-train-000007"


def test_a_finite_split_is_cycled_in_shuffled_epochs():
    task = Five()
    epochs = [[p.id for p in take(task, "train", 5, 5 * e)] for e in range(8)]
    for ids in epochs:
        assert sorted(ids) == [f"p{i}" for i in range(5)]
    assert len({tuple(ids) for ids in epochs}) > 1
    # Positions are stable: any way of cutting the stream gives the same problems.
    one_by_one = [take(task, "train", 1, i)[0].id for i in range(40)]
    assert one_by_one == [i for ids in epochs for i in ids]
    again = [p.id for p in take(task, "train", 12)]
    assert len(set(again)) == 12
    assert [i.partition("#")[0] for i in again] == one_by_one[:12]
    assert sum(i.endswith("#3") for i in again) == 2


class Marked(Five):
    """Ids that look like those of repetitions."""

    def problems(self, split):
        return [Problem.of(name, "?", "a") for name in ("p", "p#2", "p#2#2", "p#4")]


def test_repetitions_take_no_id_that_a_row_has():
    task = Marked()
    for problems in (take(task, "train", 20), draw(task, "train", 60)):
        ids = [problem.id for problem in problems]
        assert len(set(ids)) == len(ids)
    # Five epochs: p comes up five times, and #2 and #4 are rows of their own.
    ids = {problem.id for problem in take(task, "train", 20)}
    assert {"p", "p#3", "p#5", "p#6", "p#7", "p#2", "p#2#3"} <= ids
