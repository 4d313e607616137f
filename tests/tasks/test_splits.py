"""What is trained on and what is held out stays what it was: a run's figures rest on it."""

from __future__ import annotations

import hashlib
import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark_rows import rows_of
from satune.tasks.catalog import load_task
from satune.tasks.splits import check_integer, hold_out
from satune.types import Problem, UserError


def digest(texts) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def numbered(count: int) -> list[Problem]:
    return [Problem.of(f"row-{i}", f"{i}?") for i in range(1, count + 1)]


def test_the_smallest_hashes_are_held_out():
    problems = numbered(10)
    first = {p.id: hashlib.blake2b(p.id.encode()).hexdigest() for p in problems}
    for count in range(1, 10):
        kept, held = hold_out(problems, count / 10)
        assert {p.id for p in held} == set(sorted(first, key=first.__getitem__)[:count])
        assert len(kept) + len(held) == 10
    assert [p.id for p in hold_out(problems, 0.3)[1]] == ["row-1", "row-7", "row-9"]


@given(st.integers(1, 40), st.floats(0, 1), st.randoms())
def test_what_is_held_out_depends_on_ids_alone(count, fraction, shuffler: random.Random):
    problems = numbered(count)
    kept, held = hold_out(problems, fraction)
    assert sorted(kept + held, key=problems.index) == problems
    if 0.0 < fraction < 1.0 and count > 1:
        assert kept and held
    shuffled = problems.copy()
    shuffler.shuffle(shuffled)
    assert {p.id for p in hold_out(shuffled, fraction)[1]} == {p.id for p in held}


@given(st.integers(2, 12), st.integers(1, 5), st.floats(0.01, 0.99))
def test_rows_that_are_alike_lie_on_one_side(count, copies, fraction):
    problems = [
        Problem.of(f"row-{i}", f"{i % count}?", str(i % count)) for i in range(count * copies)
    ]
    kept, held = hold_out(problems, fraction)
    assert len(kept) + len(held) == len(problems)
    assert kept and held and not {p.text for p in kept} & {p.text for p in held}
    assert len(held) <= max(round(fraction * len(problems)), copies)


def test_the_same_question_with_another_answer_is_another_row():
    problems = [Problem.of(f"row-{i}", "Guess it.", str(i)) for i in range(10)]
    assert len(hold_out(problems, 0.3)[1]) == 3


def test_all_rows_alike_are_not_torn_apart():
    alike = [Problem.of(f"row-{i}", "?", "1") for i in range(4)]
    assert hold_out(alike, 0.5) == (alike, []) and hold_out(alike, 1.0) == ([], alike)


# Task, rows, options: how many are held out of how many, and the digest of their ids in order.
REAL = [
    # Twelve of its problems stand there more than once.
    ("maths", "deepscaler_train_2k", {}, (200, 2000), "2469ada0ef7c"),
    ("maths", "aime_1983_2023_train", {"eval_fraction": 0.25}, (244, 975), "a9d620a0e1ac"),
    ("math500", "math500", {"eval_fraction": 0.5}, (172, 343), "122c56506b38"),
    ("arbench_dc", "arbench_dc", {}, (7, 70), "6ec5190f3ee9"),
    ("arbench_gn", "arbench_gn", {}, (10, 100), "db603c8d289f"),
    ("guess_number", "arbench_gn_train", {}, (494, 4940), "e1ccd154db6c"),
    ("arbench_sp", "arbench_sp", {}, (7, 70), "bc51248d9f6a"),
    ("arbench_sp", "arbench_sp_train", {}, (40, 400), "495c48b1d20b"),
    ("autologi", "autologi_format_fixtures", {}, (2, 15), "d1ce47b2f132"),
    ("planbench_bw", "planbench_bw_nl", {}, (43, 432), "cf36192d9fc2"),
    ("planbench_bw", "planbench_bw_train", {"max_blocks": 4}, (12, 116), "058ce4bcd015"),
    ("blocksworld", "planbench_bw_nl", {"blocks": 4}, (40, 398), "961dee0e8a35"),
    ("planbench_logistics", "planbench_logistics", {}, (21, 208), "494a54743d6d"),
    ("zebralogic", "zebralogic", {}, (69, 693), "fccbce209345"),
    ("rows", "math500", {"prompt": "problem"}, (34, 343), "995c317319df"),
]


@pytest.mark.parametrize(("name", "file", "options", "counts", "ids"), REAL)
def test_the_same_real_rows_are_held_out(name, file, options, counts, ids):
    if name in ("maths", "math500"):
        pytest.importorskip("math_verify")
    task = load_task(name, rows_of(file), **options)
    held = [problem.id for problem in task.problems("eval")]
    everything = [problem.id for problem in task.problems("all")]
    assert (len(held), len(everything)) == counts
    assert digest([*held, "", *everything]) == ids
    assert list(task.problems("certify")) == list(task.problems("eval"))


GENERATED = [
    ("relay", "train", "39bf1ca9c66f"),
    ("relay", "eval", "14c52a5f8571"),
    ("relay", "certify", "aa37e6cf1de6"),
    ("guess_number", "train", "6061f7fb300a"),
    ("guess_number", "eval", "a6a7103c4b35"),
    ("guess_number", "certify", "ba59bc010cb5"),
    ("blocksworld", "train", "c3fe89ba3b21"),
    ("blocksworld", "eval", "040423cfa726"),
    ("blocksworld", "certify", "9dadb25663d8"),
]


@pytest.mark.parametrize(("name", "split", "texts"), GENERATED)
def test_the_same_problems_are_generated(name, split, texts):
    problems = list(itertools.islice(load_task(name, None, 7).problems(split), 30))
    assert digest(f"{p.id} {p.text} {p.answer}" for p in problems) == texts


def test_splits_and_ids_that_cannot_be_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": i, "secret": "0123"}) + "\n" for i in (1, 2)))
    task = load_task("guess_number", path, eval_fraction=0)
    with pytest.raises(UserError, match="no split 'test'; there are train, eval, certify, all"):
        task.problems("test")
    with pytest.raises(UserError, match="no rows for 'eval'; change eval_fraction"):
        task.problems("eval")
    path.write_text(path.read_text() * 2)
    with pytest.raises(UserError, match=r"line 3: id '1' stands already in .*line 1"):
        load_task("guess_number", path)
    for name in ("guess_number", "blocksworld", "relay"):
        with pytest.raises(UserError, match=f"task {name}: no split 'all'; there are train, eval"):
            next(iter(load_task(name).problems("all")))


def test_integers_out_of_range_are_named():
    for value in (True, 1.0, "2", 1, 5):
        with pytest.raises(UserError, match=f"x is {value!r}; give an integer from 2 to 4"):
            check_integer("x", value, 2, 4)
    with pytest.raises(UserError, match="x is 0; give an integer from 1 up"):
        check_integer("x", 0, 1)
    check_integer("x", 10**9, 1)
