from __future__ import annotations

import asyncio
import functools
import itertools
import json
import random
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark_rows import rows_of
from satune.play.match import Match
from satune.play.rollout import play
from satune.protocols.named import load_protocol
from satune.tasks.arbench import f1_score, parse_host, without_thoughts
from satune.tasks.arbench_dc import DetectiveCases
from satune.tasks.arbench_sp import SituationPuzzles
from satune.tasks.catalog import load_task
from satune.tasks.guess_number import GuessNumber, feedback
from satune.types import Completion, Key, ServedModel, UserError
from scripted import ScriptedEngine, team
from yardstick import at_most

KEY = Key(0, "evaluate")
NAMES = ("Dr. Ann Lee", "Bob Stone", "Clara Dee", "Dan Fox", "Eve Moss")


def case(label=2, **changes):
    people = [{"name": n, "introduction": f"{n} was there."} for n in NAMES]
    roles = [
        {"name": n, "task": "Help.", "story": f"{n} slept. {n} saw the knife. The horse ran."}
        for n in reversed(NAMES)
    ]
    victim = {"name": "Sir X", "introduction": "Rich.", "cause_of_death": "stabbed",
              "murder_weapon": "knife"}  # fmt: skip
    known = {"time": "night", "location": "hall", "victim": victim, "suspect": people}
    return {"initial_information": known, "suspects": roles, "label": label, **changes}


PUZZLE = {
    "surface": "A man drinks soup and leaves.",
    "bottom": "The soup tasted of home.",
    "key_question": ["Did the soup taste of home?"],
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def cases(tmp_path):
    return DetectiveCases(write(tmp_path / "dc.jsonl", case()), eval_fraction=0.0)


@pytest.fixture
def puzzles(tmp_path):
    return SituationPuzzles(write(tmp_path / "sp.jsonl", PUZZLE), eval_fraction=0.0)


def played(task, messages, problem=None, engine=None):
    """The episode in which one seat writes these messages, the last one again and again."""
    script = itertools.chain(messages, itertools.repeat(messages[-1]))
    problem = problem or next(iter(task.problems("all")))
    return asyncio.run(
        play(
            Match(
                team("ann"),
                load_protocol("round_robin", ["ann"]),
                engine or ScriptedEngine(lambda *_: next(script)),
                task,
            ),
            problem,
            KEY,
        )
    )


# Detective cases: what counts as the final choice, and why (the murderer is C, Clara Dee)
@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Reason: she lied.\nAnswer: C", 1.0),  # the form that is asked for
        ("Answer: [C]", 1.0),
        ("**Answer:** C", 1.0),
        ("Answer:\nC", 1.0),  # the benchmark skips white space, line ends included
        ("Answer: A or C", 1.0),  # the last letter, as there
        ("Answer: C or A", 0.0),
        ("Answer: C\nAnswer: A", 1.0),  # the first "Answer:", as there
        ("my answer: hm\nAnswer: C", 1.0),  # a spelling of another kind comes second
        ("answer: C", 1.0),
        ("Answer: C. Clara Dee", 1.0),  # there the D of Dee would be read
        ("Answer: C) A liar", 1.0),
        ("Answer: Clara Dee", 1.0),  # there too the D of Dee
        ("Answer: clara dee.", 1.0),
        ("Answer: Clara", 0.0),  # no whole name
        ("Answer: 2", 0.0),  # no index
        ("Answer: c", 0.0),  # capitals only, as there
        ("Answer: F", 0.0),
        ("Answer:", 0.0),
        ("C", 1.0),  # the whole message: not there
        ("**C.**", 1.0),
        ("Clara Dee", 1.0),
        ("C is the one", 0.0),
        ("I accuse Clara Dee of the murder", 0.0),  # neither form
        ("<think>Answer: A</think>Answer: C", 1.0),  # thoughts are left out
        ("<think>Answer: C", 0.0),
        ("Answer: ABC", 0.0),  # no letter by itself
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_the_final_choice(cases, text, score):
    problem = next(iter(cases.problems("all")))
    assert cases.grade(problem, text).score == score


def test_a_case_is_played_turn_by_turn(tmp_path):
    task = DetectiveCases(write(tmp_path / "dc.jsonl", case()), max_turns=5)
    episode = played(
        task,
        [
            "Question for Clara Dee: Who saw the knife?",
            "I ask.\n**Question to dr. ann lee:** What about the horse?",
            "Question for Clara: Who?",
            "Bob Stone: where did you sleep?",
            "Who did it?",
            "Answer: C",
        ],
    )
    shown = [text for _, text in episode.observations]
    assert shown[0] == "Clara Dee: Clara Dee saw the knife."
    assert shown[1] == "Dr. Ann Lee: The horse ran."
    assert shown[2].startswith("No suspect has that name") and "Eve Moss" in shown[2]
    assert shown[3].startswith("Bob Stone: ")
    assert shown[4].startswith("No question found: the turn is lost.")
    assert "A. Dr. Ann Lee, B. Bob Stone, C. Clara Dee" in shown[4] and len(shown) == 5
    assert episode.reward == 1.0
    assert episode.grade.components == {"final": 1.0, "malformed": 0.4}
    assert episode.grade.detail == "read C, expected C; host scripted"


@pytest.mark.parametrize("make", ["dc", "sp"])
def test_a_game_lasts_25_turns_whatever_is_said(make, cases, puzzles):
    for message in (
        "",
        "?",
        "Question for : ?",
        "Q:",
        ":" * 99,
        "Question for Bob Stone:",
    ):
        episode = played(cases if make == "dc" else puzzles, [message])
        assert len(episode.turns) == 26 and len(episode.observations) == 25
        assert episode.reward == 0.0 or make == "sp"


def test_the_prompt_shows_what_the_detective_knows_and_no_more(cases):
    problem = next(iter(cases.problems("all")))
    assert "25 turns" in problem.text and "- weapon: knife" in problem.text
    assert "- Dan Fox: Dan Fox was there." in problem.text and "slept" not in problem.text
    assert "story" not in json.dumps(dict(problem.metadata)) and problem.answer == "C"


class Speaker(ScriptedEngine):
    """Plays the seat by a script and the roles by ``say``; keeps what the roles were told."""

    def __init__(self, script, say):
        super().__init__(lambda *_: next(script))
        self.say, self.told = say, []

    async def generate(self, seat, prompt, sampling, key):
        if key.purpose != "environment":
            return await super().generate(seat, prompt, sampling, key)
        self.told.append((prompt.messages, sampling))
        return Completion(self.say, "stop", 0, prompt_tokens=7, completion_tokens=3)


def test_suspects_played_by_a_model_remember_what_was_said(tmp_path):
    data = write(tmp_path / "dc.jsonl", case())
    task = DetectiveCases(data, max_turns=3, host="model:x", host_temperature=0.3)
    asked = [
        "Question for Bob Stone: a?",
        "Question for Eve Moss: b?",
        "Question for Bob Stone: c?",
    ]
    engine = Speaker(iter([*asked, "C"]), "<think>hm</think>I slept.")
    episode = played(task, asked, engine=engine)
    assert [t for _, t in episode.observations][:2] == ["Bob Stone: I slept.", "Eve Moss: I slept."]
    third, sampling = engine.told[2]
    assert [m["role"] for m in third] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in third[1:]] == ["a?", "I slept.", "c?"]
    assert "Bob Stone saw the knife." in third[0]["content"] and "Help." in third[0]["content"]
    assert (sampling.temperature, sampling.top_p) == (0.3, 0.7)
    assert episode.environment_tokens == 30 and episode.reward == 1.0
    assert episode.grade.detail.endswith("host model:x")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Yes.", "Yes"), ("no", "No"), ("**Unknown**", "Unknown"),
        ("No, because the soup tasted of home.", "No"),
        ("Not a question", "That is no question"),
        ("This is not a question, please go on.", "That is no question"),
        ("The soup tasted of home.", "Unknown"), ("", "Unknown"),
        ("<think>Yes</think>No", "No"), ("Nothing", "Unknown"),
    ],
)  # fmt: skip
def test_a_hosts_answers_give_nothing_away(tmp_path, said, shown):
    task = SituationPuzzles(write(tmp_path / "sp.jsonl", PUZZLE), max_turns=2, host="model:x")
    engine = Speaker(iter(["Q: Is it?", "Q: It is?", "soup"]), said)
    episode = played(task, ["x"], engine=engine)
    assert episode.observations[0][1].startswith(shown)
    assert len(engine.told) == 2
    # Each question stands alone: the host sees instructions and question, nothing of before.
    assert all(len(messages) == 2 for messages, _ in engine.told)
    assert engine.told[1][0][1]["content"] == "It is?"


def test_a_puzzle_is_played_turn_by_turn(tmp_path):
    task = SituationPuzzles(write(tmp_path / "sp.jsonl", PUZZLE), max_turns=4)
    episode = played(
        task, ["Q: Did the soup taste of home?", "Is he sad?", "the soup", "Q: tasted soup", "A: x"]
    )
    shown = [text for _, text in episode.observations]
    assert shown[:2] == ["Yes", "Unknown"] and shown[2].startswith("That is no question")
    assert shown[3].startswith("Yes\n\nThat was the last question.") and len(shown) == 4
    assert episode.grade.components["malformed"] == 0.25


# F1, worked out by hand
@pytest.mark.parametrize(
    ("prediction", "reference", "by_character", "by_word"),
    [
        ("abc", "abc", 1.0, 1.0),
        ("abc", "xyz", 0.0, 0.0),
        ("", "abc", 0.0, 0.0),
        # common a, b: precision 2/4, recall 2/2, F1 = 2·(1/2)·1 / (3/2) = 2/3; one word, another
        ("abab", "ab", 2 / 3, 0.0),
        # characters: a a b ' ' of 7 and c a: "aab" and " " in common; 1 word of 2 against 1 of 2
        ("aa bb", "aa cc", 2 * 3 / 10, 1 / 2),
        # the order of characters is no matter; that of words neither
        ("one two", "two one", 1.0, 1.0),
        # words: a twice and once -> 1 common of 2 and 1; characters "a a" (3) and "a" (1): 1 common
        ("a a", "a", 2 * 1 / 4, 2 / 3),
        # spaces are characters: "a  b" has 4, "a b" 3, common 3
        ("a  b", "a b", 6 / 7, 1.0),
        # case and punctuation count: "A." and "a." share the point alone
        ("A.", "a.", 1 / 2, 0.0),
        # the prefix that the final prompt asks for counts as well: 3 extra of 6 against 3
        ("A: abc", "abc", 2 * 3 / 9, 2 * 1 / 3),
    ],
)
def test_f1(tmp_path, prediction, reference, by_character, by_word):
    task = SituationPuzzles(write(tmp_path / "sp.jsonl", {**PUZZLE, "bottom": reference}))
    grade = task.grade(next(iter(task.problems("all"))), prediction)
    assert grade.score == pytest.approx(by_character, abs=1e-15)
    assert grade.components == {
        "f1_score_char": pytest.approx(by_character, abs=1e-15),
        "f1_score_word": pytest.approx(by_word, abs=1e-15),
    }


@given(st.text(max_size=30), st.text(max_size=30))
def test_f1_is_that_of_precision_and_recall(a, b):
    value = f1_score(a, b)
    common = sum(min(a.count(c), b.count(c)) for c in set(a))
    if common:
        precision, recall = common / len(a), common / len(b)
        assert value == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-12)
    else:
        assert value == 0.0
    assert value == f1_score(b, a) and 0.0 <= value <= 1.0
    assert (value == 1.0) == (Counter(a) == Counter(b) and bool(a))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a", "a"), (" a ", " a "), ("<think>x</think>a", "a"), ("a<think>x</think>b", "ab"),
        ("x</think>a", "a"), ("a<think>x", "a"), ("<think>x", ""),
        ("<think>x</think>a<think>y</think>b", "ab"),
    ],
)  # fmt: skip
def test_thoughts_are_left_out(text, left):
    assert without_thoughts(text) == left


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("scripted", None),
        ("model:org/name", "org/name"),
        ("http://localhost:8000/v1#m", ServedModel("http://localhost:8000/v1", "m")),
        ("https://a/v1#org/name", ServedModel("https://a/v1", "org/name")),
    ],
)
def test_hosts(host, wanted):
    assert parse_host("t", host) == wanted


@pytest.mark.parametrize("name", ["arbench_dc", "arbench_sp"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "gpt"}, "host is 'gpt'; give scripted, model:PATH_OR_ID or http"),
        ({"host": "http://a/v1"}, "host: a model at a: give http://ADDRESS/v1#MODEL"),
        ({"host": "http://u:pw@a/v1#m"}, "host: a model at a: its address holds a key"),
        ({"host": "model:"}, "host is 'model:'"),
        ({"host": 3}, "host is 3"),
        ({"max_turns": 0}, "max_turns is 0; give an integer from 1 up"),
        ({"host_temperature": -1}, "host_temperature is -1; give a number from 0 to 2"),
        ({}, "it needs data"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(UserError, match=f"task {name}: {message}"):
        load_task(name, None, 0, None, **options)


SHOWN = case()["initial_information"]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("dc", {}, "line 1: no field 'initial_information'"),
        ("dc", case(label=5), "line 1: label is 5; give an index from 0 to 4"),
        ("dc", case(label=True), "line 1: label is True"),
        ("dc", case(suspects=[]), "line 1: suspects and initial_information name different people"),
        ("dc", case(suspects=3), "line 1: suspects is no list"),
        ("dc", case(suspects=[{"name": "x"}]), "line 1, suspects: no field 'task'"),
        ("dc", case(initial_information=3), "line 1: initial_information is a int"),
        ("dc", case(initial_information={**SHOWN, "suspect": []}), "suspect is no list of 5"),
        ("dc", case(initial_information={**SHOWN, "time": ""}), "field 'time' is ''"),
        (
            "dc",
            case(
                suspects=[{**s, "is_murderer": s["name"] == "Dan Fox"} for s in case()["suspects"]]
            ),
            "line 1: label points to Clara Dee, who is not the murderer",
        ),
        ("sp", {}, "line 1: no field 'surface'"),
        ("sp", {**PUZZLE, "bottom": " "}, "line 1: field 'bottom' is no text"),
        ("sp", {**PUZZLE, "key_question": "x"}, "line 1: field 'key_question' is no list"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, name, row, message):
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(UserError, match=message) as caught:
        load_task(f"arbench_{name}", path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_upstreams_json_lists_are_read(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([case(index=7), case(index=9)], indent=1))
    assert {p.id for p in DetectiveCases(path).problems("all")} == {"arbench_dc-7", "arbench_dc-9"}
    path.write_text(json.dumps(["0123", "9876"]))
    assert {p.answer for p in load_task("arbench_gn", path).problems("all")} == {"0123", "9876"}
    with pytest.raises(UserError, match=r"test\.json, row 1: it is no JSON object"):
        DetectiveCases(path)
    path.write_text('["0123",\n "12')
    with pytest.raises(UserError, match=r"test\.json, line 2: not a whole JSON list"):
        load_task("arbench_gn", path)


# The real rows


def test_an_oracle_solves_every_case_and_no_other_letter_does():
    task = load_task("arbench_dc", rows_of("arbench_dc"))
    task.validate()
    problems = list(task.problems("all"))
    assert len(problems) == 70
    for problem in problems:
        murderer = problem.metadata["suspects"]["ABCDE".index(problem.answer)]
        scores = {x: task.grade(problem, f"Answer: {x}").score for x in "ABCDE"}
        assert scores == {x: float(x == problem.answer) for x in "ABCDE"}
        episode = played(task, [f"Question for {murderer}: Why?"] * 25 + [murderer], problem)
        assert episode.reward == 1.0 and episode.grade.components["malformed"] == 0.0


def test_every_true_story_scores_one():
    for name in ("arbench_sp", "arbench_sp_train"):
        task = load_task("arbench_sp", rows_of(name))
        task.validate()
    problem = next(iter(load_task("arbench_sp", rows_of("arbench_sp")).problems("all")))
    task = load_task("arbench_sp", rows_of("arbench_sp"))
    episode = played(task, [f"Q: {k}" for k in task._secrets[problem.id][:25]] * 25, problem)
    assert episode.observations[0][1] == "Yes"


def test_a_consistent_player_finds_every_official_secret():
    task = load_task("arbench_gn", rows_of("arbench_gn"))
    task.validate()
    problems = list(task.problems("all"))
    assert len(problems) == 100 and task.name == "arbench_gn"
    assert all(p.metadata["max_turns"] == 25 for p in problems)
    everything = tuple("".join(p) for p in itertools.permutations("0123456789", 4))

    @functools.cache
    def agreeing(left, guess, told):
        return tuple(s for s in left if feedback(s, guess) == told)

    def player():
        """Guesses what agrees with all it was told; the feedback comes by ``send``."""
        left, told = everything, None
        while True:
            guess = left[0]
            told = yield guess
            left = agreeing(left, guess, told)

    for problem in problems:
        mind = player()
        guess = next(mind)

        def write(seat, entries, key, mind=mind):
            nonlocal guess
            shown = entries[-1].text if entries[-1].kind == "observation" else ""
            if shown:
                right, wrong = shown.split(": ")[1][0], shown.split(": ")[1][2]
                guess = mind.send((int(right), int(wrong)))
            return f"Guess: {guess}"

        episode = played(task, ["x"], problem, ScriptedEngine(write))
        assert episode.reward == 1.0, problem
        assert len(episode.turns) == 26


# Fuzzing: extraction and grading in process

PIECES = [
    "Answer:", "answer", ":", "A", "B.", "C)", " ", "\n", "Question for ", "Question to",
    "Bob Stone", "Dr. Ann Lee", "?", "Q:", "Guess: ", "1234", "12 34", "[1,2,3,4]", "<think>",
    "</think>", "**",
    "é", "\ud800", "\0", "١٢٣٤", "x" * 200, "0" * 30, "[", "]", "\r", "\u2028", "E", "'",
]  # fmt: skip


def grade_many(tasks, count):
    rng = random.Random(count)
    loop = asyncio.new_event_loop()
    games = []
    for task in tasks:
        problem = next(iter(task.problems("all")))
        games.append((task, problem, task.environment(problem, random.Random(0), None)))
    for number in range(count):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(25)))
        text = text * rng.choice((1, 1, 1, 1, 200)) if number % 50 == 0 else text
        with at_most(60, text):
            for task, problem, game in games:
                found = task.extract(text)
                assert found is None or task.equal(found, found)
                assert 0.0 <= task.grade(problem, text).score <= 1.0
                if getattr(game, "_turns", 0) < 24:
                    game._turns = 0
                    loop.run_until_complete(game.step(text))
    loop.close()


def test_no_message_breaks_a_game(cases, puzzles, tmp_path):
    secrets = GuessNumber(write(tmp_path / "gn.jsonl", {"secret": "1234"}), eval_fraction=0.0)
    grade_many([cases, puzzles, secrets], 2_000)


@pytest.mark.slow
def test_no_message_of_many_breaks_a_game(cases, puzzles, tmp_path):
    secrets = GuessNumber(write(tmp_path / "gn.jsonl", {"secret": "1234"}), eval_fraction=0.0)
    grade_many([cases, puzzles, secrets], 100_000)


@pytest.mark.parametrize("piece", [*PIECES, "Question for a: ", "Answer: A\n", string.printable])
@pytest.mark.timeout(60)
def test_long_messages_take_their_length_in_time(cases, puzzles, piece):
    text = piece * (300_000 // len(piece))
    for task in (cases, puzzles):
        problem = next(iter(task.problems("all")))
        with at_most(60):
            task.extract(text)
            task.grade(problem, text)
