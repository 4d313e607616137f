"""What training and evaluation files share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark_rows import rows_of
from satune.assembly import load_tasks, overlap_note
from satune.config.load import load_recipe
from satune.tasks.contamination import note, overlaps, training_overlaps
from satune.tasks.maths import Maths
from satune.types import Problem

LONG = "A train leaves the station at noon and travels at a steady forty miles an hour towards " * 2


def of(*texts: str) -> list[Problem]:
    return [Problem.of(f"p{i}", text) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "ours, theirs, how",
    [
        ("What is 2+2?", "what is   2 + 2", "text"),
        ("What is 2+2?", "What is 2+3?", None),
        (LONG + "When does it arrive?", LONG + "Where does it arrive?", "beginning"),
        ("Short", "Short and more", None),
        ("Ｗｈａｔ is 2²", "what IS 22", "text"),
        ("?!", "...", None),
    ],
)
def test_texts(ours: str, theirs: str, how: str | None) -> None:
    found = overlaps(of(ours), of(theirs))
    assert [overlap.by for overlap in found] == ([] if how is None else [how])


def test_one_text_for_many_problems_needs_the_answer_as_well() -> None:
    ours = [Problem.of("a", "guess", "1"), Problem.of("b", "guess", "2")]
    theirs = [Problem.of("c", "guess", "2"), Problem.of("d", "guess", "3")]
    assert [(o.train, o.held_out) for o in overlaps(ours, theirs)] == [("b", "c")]


def test_the_problems_that_are_also_in_math500() -> None:
    """Seven of the whole MATH-500; the file beside the repository lacks the row of 2006-2-5."""
    train = Maths(rows_of("aime_1983_2023_train.jsonl"), eval_fraction=0.0)
    held_out = Maths(rows_of("math500.jsonl"))
    found = training_overlaps(train, held_out)
    assert sorted(overlap.train for overlap in found) == [
        "aime-1983-1-2", "aime-1994-1-13", "aime-2001-2-3", "aime-2010-1-6", "aime-2015-2-6",
        "aime-2017-2-7",
    ]  # fmt: skip
    for name in ("aime24.jsonl", "aime25.jsonl", "math500.jsonl"):
        rows = Maths(rows_of("deepscaler_train_2k.jsonl"), eval_fraction=0.0)
        assert training_overlaps(rows, Maths(rows_of(name))) == []


def test_a_recipe_says_it_or_leaves_them_out(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": f"{i}+{i}", "answer": str(2 * i)} for i in range(4)]
    for name, part in (("train", rows[:3]), ("held", rows[2:])):
        (tmp_path / name).with_suffix(".jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in part)
        )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"team: {{agents: {{a: {{model: m}}}}}}\nprotocol: solo\n"
        f"task: {{name: rows, data: {tmp_path / 'train.jsonl'}, reward: exact, eval_fraction: 0.0}}"
        f"\nevaluate: {{data: {tmp_path / 'held.jsonl'}}}\n"
    )
    task, held_out = load_tasks(load_recipe(recipe))
    assert overlap_note(task, held_out) == (
        "overlap: 1 training problem is also in evaluate.data: r2 (there r2); "
        "evaluate.drop_overlap=true leaves them out"
    )
    task, held_out = load_tasks(load_recipe(recipe, ["evaluate.drop_overlap=true"]))
    assert [p.id for p in task.problems("train")] == ["r0", "r1"]
    assert "left out" in overlap_note(task, held_out)
    assert note([], dropped=False) == ""
