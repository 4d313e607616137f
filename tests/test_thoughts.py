from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from every_task import NAMES, Case, case
from satune.play.match import Match
from satune.play.rollout import rollout_sync
from satune.protocols.independent import solo, vote
from satune.thoughts import CLOSING, OPENING, answer_part, opened_by, without_thoughts
from satune.types import Completion, Entry, Grade, Key, Problem, Prompt
from scripted import Letters, ScriptedEngine, by_seat, team

TAGS = st.lists(st.sampled_from([OPENING, CLOSING, "a", " ", "\n", "<think", ">"]), max_size=12)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ""),  # no thought: as it is
        (" a ", " a "),
        ("<think>x</think>a", "a"),
        ("<think>x</think>\n\na <think>y</think> b", "a b"),  # each thought with the space after it
        ("x</think> a", "a"),  # opened by the prompt
        ("x</think>y</think>a", "a"),
        ("a<think>x", "a"),  # cut: what was said before it was said
        ("<think>x", None),  # cut, and nothing said
        ("<think>x</think>", None),
        ("<think>x</think> \n", None),
        ("<think>x<think>y</think>a", "a"),  # a model repeats the opening of its prompt
        ("<think>x</think>a<think>y", "a"),
        ("<think></think></think>a", "a"),
    ],
)
def test_what_a_message_says(text, said):
    assert answer_part(text) == said
    assert without_thoughts(text) == (said or "")


@given(TAGS)
def test_what_is_said_holds_no_thought(pieces):
    text = "".join(pieces)
    said = answer_part(text)
    if said is not None:
        assert OPENING not in said and CLOSING not in said
        assert answer_part(said) == said
    # A whole thought before a message changes nothing but the space around it.
    before = answer_part(f"<think>{text.replace(CLOSING, '')}</think>b")
    assert before == "b"


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("<|Assistant|><think>\n", "<think>\n"),
        ("assistant\n<think>", "<think>"),
        ("assistant\n<think>\n\n</think>\n\n", ""),  # thinking switched off
        ("say <think>!", ""),
        ("", ""),
    ],
)
def test_the_thought_that_a_prompt_opens(prompt, opening):
    assert opened_by(prompt) == opening


@pytest.fixture(scope="module", params=NAMES)
def given_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(request.param, tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize(
    ("form", "right"),
    [
        ("{}", True),
        ("<think>let me see</think>{}", True),
        ("let me see</think>\n{}", True),
        ("<think>{}</think>", False),
        ("<think>{}", False),
        ("<think>\n{}\nWait, is that so?", False),
        ("<think>{}</think>\nI cannot say.", False),
        ("{}</think>\nI cannot say.", False),
    ],
)
def test_no_task_reads_an_answer_in_a_thought(given_case: Case, form: str, right: bool) -> None:
    task, problem = given_case.task, given_case.problem
    text = form.format(given_case.right)
    grade = task.grade(problem, text)
    if task.name == "arbench_sp":  # its score is the overlap with whatever was said
        assert grade.score == 1.0 if right else grade.score < 0.6
    else:
        assert grade.score == float(right), grade.detail
    if not right and "cannot" not in form:
        assert task.extract(text) is None and grade.score == 0.0
    elif right:
        answer = task.extract(text)
        assert answer is not None and answer == task.extract(given_case.right)


def test_the_shared_cases(tmp_path):
    """The lines of cases/10_thoughts.txt.jsonl, where they are."""
    path = Path(__file__).resolve().parents[2] / "shared" / "cases" / "10_thoughts.txt.jsonl"
    if not path.is_file():
        pytest.skip(f"no cases at {path}")
    named = {"rows numeric, answer 5": "rows numeric", "rows exact, answer 5": "rows exact"}
    tried = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name = named.get(row["task"], row["task"])
        if name not in NAMES:
            continue
        found = case(name, tmp_path)
        text = row["response"]
        for mark in ('{"solution": GOLD}', "GOLD-LITERAL", "Guess: SECRET"):
            text = text.replace(mark, found.right)
        assert found.task.grade(found.problem, text).score == row["expected"], row
        tried += 1
    assert tried >= 7


class Thinker:
    """A renderer whose prompts end inside a thought."""

    def view(self, seat: str) -> Thinker:
        return self

    def prompt(self, entries: Sequence[Entry], max_new_tokens: int) -> Prompt:
        return Prompt(tuple({"entry": entry} for entry in entries), opening="<think>\n")

    def wrote(self, completion: Completion) -> None: ...


def test_a_completion_cut_inside_the_prompts_thought_is_no_answer(tmp_path):
    """First in two cut messages, then in whole ones: what was only thought scores 0, has no vote,
    and the answer that a protocol makes of it is none."""
    found = case("rows numeric", tmp_path)
    for texts, answer, score in (
        (("maybe 6, or 5", "so it is 5"), None, 0.0),
        (("5?", "6? no.</think>It is 5."), "<think>\n6? no.</think>It is 5.", 1.0),
        (("it is 5</think>So 6.", "6"), "<think>\nit is 5</think>So 6.", 0.0),
    ):
        seats = [replace(seat, renderer=Thinker()) for seat in team("ann", "bob")]
        engine = ScriptedEngine(by_seat(ann=texts[:1], bob=texts[1:]))
        match = Match(seats, vote, engine, found.task)
        (episode,) = rollout_sync(match, [found.problem], 1, Key(0, "train"))
        assert [turn.text for turn in episode.turns] == [f"<think>\n{text}" for text in texts]
        assert (episode.answer, episode.reward) == (answer, score)


class Whole(Letters):
    """A task of somebody's own that does not know what a thought is."""

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        return Grade(float(answer is not None and "a" in answer))


def test_no_task_is_shown_a_message_that_is_nothing_but_thought():
    for text, score in (("<think>a", 0.0), ("<think>b</think>a", 1.0), ("a", 1.0)):
        engine = ScriptedEngine(by_seat(ann=[text]))
        match = Match(team("ann"), solo, engine, Whole())
        (episode,) = rollout_sync(match, list(Whole().problems("train")), 1, Key(0, "train"))
        assert episode.reward == score
