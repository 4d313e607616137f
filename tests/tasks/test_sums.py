from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from satune.tasks.catalog import load_task, take
from satune.tasks.sums import NAMES, SEEN, UNSEEN, WORDINGS, Sums
from satune.types import Problem, UserError

SPLITS = ("train", "eval", "certify")

# What is asked, and how its numbers make the answer, written down apart from the task.
FORMS = {
    r"What is (\d+) \+ (\d+)\?": lambda a, b: a + b,
    r"What is (\d+) - (\d+)\?": lambda a, b: a - b,
    r"Add (\d+) and (\d+)\.": lambda a, b: a + b,
    r"Take (\d+) away from (\d+)\.": lambda a, b: b - a,
    r"\w+ has (\d+) (\w+) and gets (\d+) more. How many \2 now\?": lambda a, b: a + b,
    r"\w+ has (\d+) \w+ and gives (\d+) away. How many are left\?": lambda a, b: a - b,
    r"(\w+) has (\d+) (\w+), (?!\1)\w+ has (\d+). How many \3 are there together\?": (
        lambda a, b: a + b
    ),
    r"There are (\d+) boxes with (\d+) (\w+) each. How many \3 in all\?": lambda a, b: a * b,
    r"(\w+) has (\d+) \w+, gets (\d+) more and gives (\d+) to (?!\1)\w+. How many are left\?": (
        lambda a, b, c: a + b - c
    ),
    r"\w+ has (\d+) boxes of (\d+) (\w+) and (\d+) loose ones. How many \3 in all\?": (
        lambda a, b, c: a * b + c
    ),
    r"Find the sum of (\d+) and (\d+)\.": lambda a, b: a + b,
    r"How much is (\d+) minus (\d+)\?": lambda a, b: a - b,
    r"(\w+) owns (\d+) (\w+). After finding (\d+) more, how many \3 does \1 own\?": (
        lambda a, b: a + b
    ),
    r"There were (\d+) \w+ on a table. \w+ took (\d+) of them. How many remain\?": (
        lambda a, b: a - b
    ),
    r"\w+ collects (\d+) (\w+) on Monday, (\d+) on Tuesday and (\d+) on Wednesday. "
    r"How many \2 is that\?": lambda a, b, c: a + b + c,
}


def form_of(problem: Problem) -> str:
    (form,) = (form for form in FORMS if re.fullmatch(form, problem.text))
    return form


@given(st.integers(5, 99), st.integers(0, 99), st.sampled_from(SPLITS), st.integers(0, 10**6))
def test_the_answer_is_that_of_the_arithmetic_on_small_positive_numbers(
    largest, seed, split, index
):
    problem = Sums(largest, seed).problem_at(split, index)
    numbers = [int(number) for number in re.findall(r"\d+", problem.text)]
    answer = FORMS[form_of(problem)](*numbers)
    assert problem.answer == str(answer)
    assert answer >= 1 and all(2 <= number <= max(9, largest) for number in numbers)
    # Nothing is larger than two numbers of the largest kind, or a product and one, come to.
    assert answer <= max(3 * largest, 81 + largest)


@given(st.integers(0, 99), st.sampled_from(SPLITS), st.integers(0, 10**6))
def test_no_person_is_named_for_two(seed, split, index):
    problem = Sums(seed=seed).problem_at(split, index)
    template = WORDINGS[problem.metadata["wording"]].text
    named = [word for word in re.findall(r"[A-Z]\w+", problem.text) if word in NAMES]
    assert len(set(named)) == ("{name}" in template) + ("{other}" in template)


def first(split, n, **options):
    return take(load_task("sums", None, options.pop("seed", 0), **options), split, n)


def test_wordings_and_texts_of_the_splits():
    asked = {
        split: [p for seed in (0, 1) for p in first(split, 400, seed=seed)] for split in SPLITS
    }
    wordings = {split: {form_of(p) for p in problems} for split, problems in asked.items()}
    groups = {split: {p.metadata["group"] for p in problems} for split, problems in asked.items()}
    assert groups == {"train": {"seen"}, "eval": {"seen", "unseen"}, "certify": {"seen"}}
    unseen = {form_of(p) for p in asked["eval"] if p.metadata["group"] == "unseen"}
    seen = {form_of(p) for p in asked["eval"] if p.metadata["group"] == "seen"}
    assert (len(seen), len(unseen)) == (len(SEEN), len(UNSEEN)) == (10, 5)
    assert wordings["train"] == wordings["certify"] == seen and not seen & unseen
    for a, b in itertools.combinations(SPLITS, 2):
        assert not {p.text for p in asked[a]} & {p.text for p in asked[b]}


def test_every_second_problem_of_an_evaluation_is_in_an_unseen_wording():
    groups = [problem.metadata["group"] for problem in first("eval", 8)]
    assert groups == ["seen", "unseen"] * 4


def test_problems_are_a_function_of_seed_split_and_number():
    task = Sums()
    assert task.problem_at("train", 123).id == "sums-train-000123"
    assert first("train", 9)[8] == Sums().problem_at("train", 8)
    assert first("train", 9) != first("train", 9, seed=1)
    assert len({p.id for p in first("train", 300)}) == 300


def test_it_checks_itself():
    Sums().validate()
    Sums(99, 7).validate()


def test_a_wrong_answer_does_not_pass_the_check(monkeypatch):
    monkeypatch.setattr(Sums, "equal", lambda self, a, b: True)
    with pytest.raises(ValueError, match="sums-train-000000 grades its own answer wrongly"):
        Sums().validate()


def test_the_grade_reads_the_number_of_a_message():
    task, problem = Sums(), Problem.of("p", "What is 3 + 4?", "7")
    right = ["7", "3 + 4 = 7", "The answer is 7.", "7.0", "<think>8</think> 7"]
    wrong = ["8", "7 + 1 = 8", "-7", "77", "seven", "", None, "<think>7"]
    assert [task.grade(problem, a).score for a in right] == [1.0] * len(right)
    assert [task.grade(problem, a).score for a in wrong] == [0.0] * len(wrong)
    assert task.equal("7", "7.0") and not task.equal("7", "8")


@pytest.mark.parametrize("largest", [4, 100, 5.0, True])
def test_bad_sizes_are_named(largest):
    with pytest.raises(UserError, match="task sums: largest is"):
        Sums(largest)


def test_unknown_splits_are_named():
    with pytest.raises(UserError, match="no split 'unseen'; there are train, eval, certify"):
        first("unseen", 1)
