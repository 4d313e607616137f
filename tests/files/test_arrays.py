"""Arrays of episodes on disk: what lies where, what is stored once, what a kill leaves."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from satune.files.arrays import append_rows, arrays_beside, merge, read_rows, shared_prefix
from satune.files.writing import strict_json
from satune.types import UserError, ids_of, logprobs_of
from yardstick import at_most


def turn(prompt: Any, completion: Any, logprobs: Any = None) -> dict[str, Any]:
    return {
        "text": "é",
        "prompt_ids": None if prompt is None else ids_of(prompt),
        "completion_ids": None if completion is None else ids_of(completion),
        "sampled_logprobs": None if logprobs is None else logprobs_of(logprobs),
    }


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shared_prefix() -> None:
    assert shared_prefix(ids_of([1, 2, 3]), ids_of([1, 2, 4, 5])) == 2
    assert shared_prefix(ids_of([1, 2]), ids_of([1, 2, 4])) == 2
    assert shared_prefix(ids_of([9]), ids_of([1])) == shared_prefix(ids_of(), ids_of([1])) == 0


def test_merge_goes_on_with_what_a_prompt_begins_with() -> None:
    sequences = [ids_of([1, 2, 3])]
    assert merge(sequences, ids_of([1, 2]), ids_of([4])) == 1  # stops short of 3
    assert merge(sequences, ids_of([1, 2, 3, 5]), ids_of([6])) == 0
    assert sequences == [ids_of([1, 2, 3, 5, 6]), ids_of([1, 2, 4])]


def test_what_lies_in_the_two_files(tmp_path: Path) -> None:
    path = tmp_path / "stage-0001.jsonl"
    first = turn([1, 2], [3, 4], [-0.5, -1.0])
    second = turn([1, 2, 3, 4, 5], [6], [-2.0])
    append_rows(path, [{"id": "x", "turns": [first, second]}])
    # One sequence 1 2 3 4 5 6 at 0, then the log-probabilities of each turn, four bytes each.
    assert arrays_beside(path).read_bytes() == struct.pack("<6i3f", *range(1, 7), -0.5, -1, -2)
    (row,) = lines(path)
    one, two = row["turns"]
    assert one == {
        "text": "é",
        "prompt_ids": {"int32": [[0, 2]]},
        "completion_ids": {"int32": [[2, 2]]},
        "sampled_logprobs": {"float32": [[6, 2]]},
    }
    assert two["prompt_ids"] == {"int32": [[0, 5]]} and two["completion_ids"] == {"int32": [[5, 1]]}
    assert two["sampled_logprobs"] == {"float32": [[8, 1]]}


def test_the_samples_of_a_problem_store_its_prompt_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"turns": [turn([7, 8, 9], [s]), turn([7, 8, 9, s, 1], [2])]} for s in (4, 5)]
    append_rows(path, rows)
    # 7 8 9 4 1 2 and, behind the prompt that it shares, 5 1 2.
    assert arrays_beside(path).read_bytes() == struct.pack("<9i", 7, 8, 9, 4, 1, 2, 5, 1, 2)
    assert lines(path)[1]["turns"][1]["prompt_ids"] == {"int32": [[0, 3], [6, 2]]}
    assert read_rows(path) == rows


arrays = st.none() | st.lists(st.integers(0, 2), max_size=4)
rows_of_turns = st.lists(
    st.lists(
        st.builds(
            turn,
            arrays,
            arrays,
            st.none() | st.lists(st.floats(width=32, allow_nan=False), max_size=4),
        ),
        max_size=5,
    ).map(lambda turns: {"turns": turns}),
    max_size=5,
)


@settings(max_examples=40)
@given(st.lists(rows_of_turns, max_size=3))
def test_rows_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, calls: Any) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    before = repr(calls)
    for rows in calls:
        append_rows(path, rows)
    assert repr(calls) == before  # what is written is left as it is
    again = read_rows(path)
    assert repr(again) == repr([row for rows in calls for row in rows])


def test_rows_without_arrays_make_no_second_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_rows(path, [{"turns": [turn(None, None)]}, {"turns": []}])
    assert not arrays_beside(path).exists()
    assert read_rows(path) == [{"turns": [turn(None, None)]}, {"turns": []}]
    assert read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("torn", range(8))
def test_a_writer_killed_among_the_numbers_loses_nothing(tmp_path: Path, torn: int) -> None:
    path = tmp_path / "a.jsonl"
    first, second = {"turns": [turn([1], [2], [-1.0])]}, {"turns": [turn([3], [4], [-2.0])]}
    append_rows(path, [first])
    with open(arrays_beside(path), "ab") as file:  # numbers of a row whose line was never written
        file.write(b"\xff" * torn)
    assert read_rows(path) == [first]
    append_rows(path, [second])
    assert read_rows(path) == [first, second]


def test_numbers_that_are_missing_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_rows(path, [{"turns": [turn([1], [2])]}, {"turns": [turn([5], [6, 7])]}])
    data = arrays_beside(path).read_bytes()
    arrays_beside(path).write_bytes(data[:-1])
    with pytest.raises(
        UserError, match=r"a\.jsonl, line 2: names 2 numbers from number 3 on, .*a\.arrays does"
    ):
        read_rows(path)
    arrays_beside(path).unlink()
    with pytest.raises(UserError, match=r"line 1: names 1 numbers from number 0 on"):
        read_rows(path)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    arrays_beside(path).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"a\.arrays: cannot be written: the disk is full"):
        append_rows(path, [{"turns": [turn([1], [2])]}])
    assert not path.exists()  # no line without its numbers


def test_json_takes_no_array() -> None:
    with pytest.raises(TypeError):
        strict_json({"ids": ids_of([1])})


@pytest.mark.slow
def test_a_stage_is_written_and_read_in_no_time(tmp_path: Path) -> None:
    rows = []
    for number in range(256):
        prompt, turns = list(range(number, number + 200)), []
        for _ in range(4):
            completion = list(range(450))
            turns.append(turn(prompt, completion, [-0.5] * 450))
            prompt = [*prompt, *completion, 7]
        rows.append({"turns": turns})
    with at_most(20):  # about 2 where nothing else runs
        append_rows(tmp_path / "a.jsonl", rows)
        again = read_rows(tmp_path / "a.jsonl")
    assert again == rows
    assert arrays_beside(tmp_path / "a.jsonl").stat().st_size < 256 * 4 * (2003 + 1800) + 1
