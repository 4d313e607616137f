from __future__ import annotations

import inspect

import pytest

from benchmark_rows import rows_of
from every_task import NAMES, case
from satune.task_parts import PARTS, is_fresh
from satune.tasks.catalog import load_task
from satune.tasks.contamination import (
    BEGINNING,
    Overlap,
    Without,
    normalised,
    note,
    overlaps,
    training_overlaps,
)
from satune.types import Problem

LONG = "Let ABC be a triangle with sides thirteen, fourteen and fifteen. " * 3
assert len(normalised(LONG)) > BEGINNING


def problems(*texts: str, answer: str = "1", prefix: str = "t") -> list[Problem]:
    return [Problem.of(f"{prefix}{i}", text, answer) for i, text in enumerate(texts)]


def found(train, held_out):
    return [(o.train, o.held_out, o.by) for o in overlaps(train, held_out)]


def test_layout_case_and_form_do_not_matter():
    held = problems("Find $x^2 + 1$.", "Find y.", prefix="e")
    assert found(problems("find  X^2+1", "FIND\nZ", "", "$+$"), held) == [("t0", "e0", "text")]
    assert normalised("Find x² – Ω!") == "findx2ω"


def test_a_changed_ending_is_found_by_its_beginning():
    held = problems(LONG + "Find its area.", prefix="e")
    train = problems(LONG + "What is the area?", LONG[:60])
    assert found(train, held) == [("t0", "e0", "beginning")]


@pytest.mark.parametrize("side", ["train", "held out"])
def test_a_beginning_that_several_problems_share_says_nothing(side):
    one, two = LONG + "Find its area.", [LONG + "Find its height.", LONG + "Find its angle."]
    train, held = (two, [one]) if side == "train" else ([one], two)
    assert found(problems(*train), problems(*held, prefix="e")) == []
    # The whole text still counts.
    same = found(problems(*train), problems(*held, train[0], prefix="e"))
    assert same == [("t0", f"e{len(held)}", "text")]


def test_where_all_prompts_are_the_same_the_answers_decide():
    train = [Problem.of(f"t{i}", "Find the number.", str(i)) for i in range(5)]
    held = [Problem.of(f"e{i}", "Find the number.", str(i)) for i in range(4, 8)]
    assert found(train, held) == [("t4", "e4", "text")]


def test_one_problem_with_its_answer_written_twice_is_one_problem():
    train = [Problem.of("t0", "Half of one?", r"\frac12")]
    assert found(train, [Problem.of("e0", "Half of one?", "1/2")]) == [("t0", "e0", "text")]


def test_the_instruction_is_not_compared():
    train = [Problem.of("t0", "A?\n\nBe brief.", "1", statement="A?")]
    held = [Problem.of("e0", "A?\n\nThink long.", "1", statement="A?")]
    assert found(train, held) == [("t0", "e0", "text")]


def test_the_line_counts_and_names():
    three = [Overlap(f"t{i}", f"e{i}", "text") for i in range(5)]
    assert note([], dropped=False) == ""
    assert note(three[:1], dropped=True) == (
        "overlap: 1 training problem is also in evaluate.data: t0 (there e0); left out"
    )
    line = note(three, dropped=False)
    assert line.startswith("overlap: 5 training problems are") and "and 2 more" in line
    assert "evaluate.drop_overlap=true" in line


REAL = {
    # aime-2006-2-5 stands in the whole of MATH-500 but not in the part of it that is at hand.
    ("aime_1983_2023_train", "math500"): [
        "aime-1983-1-2",
        "aime-1994-1-13",
        "aime-2001-2-3",
        "aime-2006-2-5",
        "aime-2010-1-6",
        "aime-2015-2-6",
        "aime-2017-2-7",
    ],
    ("aime_1983_2023_train", "aime24"): [],
    ("aime_1983_2023_train", "aime25"): [],
    ("deepscaler_train_2k", "math500"): [],
    ("deepscaler_train_2k", "aime24"): [],
    ("deepscaler_train_2k", "aime25"): [],
}


@pytest.mark.parametrize(("train", "held_out"), REAL)
def test_the_known_overlaps_and_no_others(train, held_out):
    pytest.importorskip("math_verify")
    ours = load_task("maths", rows_of(train), eval_fraction=0.0)
    theirs = load_task("maths", rows_of(held_out))
    expected = REAL[train, held_out]
    if len(list(theirs.problems("all"))) == 343:
        expected = [identity for identity in expected if identity != "aime-2006-2-5"]
    left_out = training_overlaps(ours, theirs)
    assert [overlap.train for overlap in left_out] == expected
    rest = list(Without(ours, left_out).problems("train"))
    assert len(rest) == len(list(ours.problems("train"))) - len(expected)
    assert overlaps(rest, theirs.problems("all")) == []
    assert Without(ours, left_out).name == "maths"


@pytest.mark.parametrize("name", NAMES)
def test_a_task_without_some_problems_has_the_parts_that_it_had(name, tmp_path):
    given = case(name, tmp_path)
    rest = Without(given.task, [Overlap(given.problem.id, "e", "text")])
    for part in PARTS:
        # The attribute as it stands, which is what isinstance asks for on newer versions of Python.
        found = inspect.getattr_static(rest, part, None)
        assert found == getattr(given.task, part, None), part
    assert rest.grade(given.problem, given.right).score == 1.0
    if not is_fresh(given.task):
        assert list(given.task.problems("all")) == [given.problem]
        assert list(rest.problems("all")) == []


def test_a_real_game_whose_prompts_are_all_the_same_has_no_overlap():
    """The secrets of the two files are disjoint."""
    names = ("arbench_gn_train", "arbench_gn")
    assert training_overlaps(*(load_task("guess_number", rows_of(name)) for name in names)) == []


def test_generated_problems_are_not_compared():
    relay = load_task("relay")
    assert training_overlaps(relay, relay) == []
