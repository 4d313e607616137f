"""What a recipe's training and evaluation data share: said by train and describe, or left out."""

from __future__ import annotations

import json

import pytest

from satune.commands.assemble import load_tasks, overlap_note
from satune.commands.describe import describe_recipe
from satune.config.load import load_recipe
from satune.tasks.catalog import take
from satune.types import UserError


def overlapping(tmp_path, *overrides):
    rows = [{"id": f"t{i}", "prompt": f"Double of {i}?", "answer": str(2 * i)} for i in range(9)]
    files = {"train": rows, "held": [{**row, "id": f"e{row['id']}"} for row in rows[7:]]}
    for name, content in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "r.yaml").write_text(
        '{team: {agents: {a: {model: "tiny:llama-s"}}}, task: rows, protocol: solo}'
    )
    given = [f"task.data={tmp_path}/train.jsonl", f"evaluate.data={tmp_path}/held.jsonl"]
    return load_recipe(tmp_path / "r.yaml", [*given, "task.eval_fraction=0", *overrides])


def test_overlap_is_said_and_kept(tmp_path):
    recipe = overlapping(tmp_path)
    task, held_out = load_tasks(recipe)
    assert len(list(task.problems("train"))) == 9
    line = "overlap: 2 training problems are also in evaluate.data: "
    line += "t7 (there et7), t8 (there et8); "
    assert overlap_note(task, held_out) == line + "evaluate.drop_overlap=true leaves them out"
    assert describe_recipe(recipe)["overlap"].startswith(line)


def test_overlap_is_left_out_on_request(tmp_path):
    recipe = overlapping(tmp_path, "evaluate.drop_overlap=true")
    task, held_out = load_tasks(recipe)
    assert {p.id for p in take(task, "train", 7, 0)} == {f"t{i}" for i in range(7)}
    assert overlap_note(task, held_out).endswith("; left out")
    assert len(list(held_out[0].problems(held_out[1]))) == 2


def test_without_two_files_nothing_is_said(tmp_path):
    recipe = overlapping(tmp_path, "evaluate.data=null")
    assert overlap_note(*load_tasks(recipe)) == ""
    assert "overlap" not in describe_recipe(recipe)
    with pytest.raises(UserError, match=r"drop_overlap: needs task\.data and evaluate\.data"):
        overlapping(tmp_path, "evaluate.data=null", "evaluate.drop_overlap=true")
