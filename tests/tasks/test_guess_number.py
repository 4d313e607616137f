from __future__ import annotations

import asyncio
import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from satune.play.match import Match
from satune.play.rollout import play, rollout_sync
from satune.protocols.named import load_protocol
from satune.tasks.guess_number import GuessNumber, feedback
from satune.tasks.sweep import neighbours, sweep
from satune.types import Entry, Key, UserError
from scripted import ScriptedEngine, expert_writer, team

KEY = Key(0, "evaluate")
NAMES = ("ann", "bob", "cem")
ALL = ["".join(p) for p in itertools.permutations("0123456789", 4)]
secrets = st.sampled_from(ALL)
guesses = st.text(alphabet="0123456789", min_size=4, max_size=4)


def game(guesses_made, secret="1234", seats=("ann",), **options):
    """The episode in which the seats say these messages in turn; and the engine."""
    task = GuessNumber(**options)
    problem = task._problem("p0", secret, task.max_turns)
    script = iter(guesses_made)
    engine = ScriptedEngine(lambda *_: next(script))
    protocol = load_protocol("round_robin", seats)
    episode = asyncio.run(play(Match(team(*seats), protocol, engine, task), problem, KEY))
    return episode, engine


@pytest.mark.parametrize(
    ("secret", "guess", "wanted"),
    [
        ("1234", "1234", (4, 0)),
        ("1234", "4321", (0, 4)),
        ("1234", "1243", (2, 2)),
        ("1234", "5678", (0, 0)),
        ("1234", "1111", (1, 0)),  # the secret has one 1, and it is in its place
        ("1234", "5111", (0, 1)),  # one 1 again, none in its place
        ("1234", "2211", (1, 1)),
        ("1234", "2122", (0, 2)),  # the second 2 finds no partner
        ("0123", "0000", (1, 0)),
    ],
)
def test_feedback(secret, guess, wanted):
    assert feedback(secret, guess) == wanted


@given(secrets, guesses)
def test_feedback_bounds_and_agreement_with_a_count_by_digit(secret, guess):
    right, wrong = feedback(secret, guess)
    # The secret's digits differ, so each digit in common counts once.
    assert right + wrong == len(set(secret) & set(guess))
    assert (right == 4) == (secret == guess)


@given(secrets, secrets, st.permutations(range(4)))
def test_feedback_is_symmetric_and_blind_to_the_order_of_positions(a, b, order):
    assert feedback(a, b) == feedback(b, a)
    move = lambda s: "".join(s[i] for i in order)  # noqa: E731
    assert feedback(move(a), move(b)) == feedback(a, b)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1234", "1234"),
        ("Guess: 1234", "1234"),
        ("guess:[1, 2, 3, 4]", "1234"),
        ("**Guess: 1 2 3 4**", "1234"),
        ("My GUESS is 0123.", "0123"),
        ("Guess: 1234, then guess: 5678", "5678"),
        ("Guess: 1234. The year 2024 is no guess", "1234"),  # named guesses go first
        ("first 1111 then 2222", "2222"),
        ("12345", None),
        ("123", None),
        ("Guess: 12345", None),
        ("", None),
        ("١٢٣٤", None),  # other scripts' digits are not what is asked for
    ],
)
def test_extraction(text, answer):
    assert GuessNumber().extract(text) == answer


@given(st.text() | st.text(alphabet="guess: 0123456789,[]", max_size=60))
def test_extraction_never_raises(text):
    answer = GuessNumber().extract(text)
    assert answer is None or (len(answer) == 4 and set(answer) <= set("0123456789"))


def test_the_official_game_plays_all_turns_and_counts_the_final_guess_only():
    # A hit in turn 2 does not end the game; the wrong final guess loses it.
    episode, _ = game(["5678", "1234", "1243", "9999"], max_turns=3)
    assert [text for _, text in episode.observations][:2] == [
        "Guess 1 was 5678: 0A0B",
        "Guess 2 was 1234: 4A0B",
    ]
    assert "last guess" in episode.observations[2][1] and len(episode.observations) == 3
    assert len(episode.turns) == 4 and episode.reward == 0.0
    assert episode.grade.components == {
        "final": 0.0, "hit": 1.0, "malformed": 0.0, "turns_to_hit": 2.0,
    }  # fmt: skip
    won, _ = game(["5678", "5678", "5678", "Guess: [1,2,3,4]"], max_turns=3)
    assert won.reward == 1.0 and won.grade.components["hit"] == 0.0
    assert "turns_to_hit" not in won.grade.components


def test_a_message_without_a_guess_costs_the_turn():
    episode, _ = game(["hello", "1234", "", "no idea"], max_turns=3, prompt="short")
    assert [text for _, text in episode.observations] == ["-", "4A0B", "-?"]
    assert episode.reward == 0.0
    assert episode.grade.components["malformed"] == pytest.approx(2 / 3)


def test_short_form_is_short_and_within_the_alphabet():
    episode, engine = game(["0000"] * 26, prompt="short")
    shown = [text for _, text in episode.observations]
    assert shown == ["0A0B"] * 24 + ["0A0B?"]
    assert episode.problem.text == "G" and len(episode.turns) == 26
    assert set("".join(shown) + episode.problem.text + "0") <= set(GuessNumber.alphabet)
    assert engine.calls[-1][1][-1] == Entry("observation", "0A0B?")


def test_stop_on_hit_asks_at_once():
    episode, _ = game(["5678", "1234", "1234"], prompt="short", stop_on_hit=True)
    assert [text for _, text in episode.observations] == ["0A0B", "4A0B?"]
    assert episode.reward == 1.0 and episode.grade.components["turns_to_hit"] == 2.0


def expert_team(protocol, error, n=100, seats=NAMES, prompt="short", **options):
    task = GuessNumber(prompt=prompt)
    problems = list(itertools.islice(task.problems("eval"), n))
    return rollout_sync(
        Match(
            team(*seats),
            load_protocol(protocol, seats, **options),
            ScriptedEngine(expert_writer(task, error)),
            task,
        ),
        problems,
        1,
        KEY,
    )


def sweep_turns(secret):
    """Guesses the faultless sweep needs: 0000, then each position's digit counted up from 0, one
    guess to learn that a 0 is right; the last position needs none for that."""
    total = 1
    for place, digit in enumerate(secret):
        last = place == 3 or set(secret[place:]) <= {"0"}
        total += int(digit) if digit != "0" else int(not last)
    return total


@given(secrets)
def test_the_sweep_finds_every_secret_in_the_counted_number_of_turns(secret):
    history = []
    while not history or history[-1][0] != secret:
        guess = sweep(history)[1]
        history.append((guess, feedback(secret, guess)[0]))
        assert len(history) <= 31  # 1 + 9 + 8 + 7 + 6
    assert len(history) == sweep_turns(secret)
    assert sweep(history) == (secret, secret)


@given(secrets, st.integers(0, 10**6))
def test_no_wasted_guess_misleads_the_sweep(secret, seed):
    rng, history = random.Random(seed), []
    while not history or history[-1][0] != secret:
        best, guess = sweep(history)
        guess = rng.choice(neighbours(best)) if rng.random() < 0.3 else guess
        history.append((guess, feedback(secret, guess)[0]))
        assert len(history) < 400
    assert sweep(history) == (secret, secret)


def test_neighbours_are_one_step_away_in_one_digit():
    assert sorted(neighbours("0009")) == sorted(
        ["1009", "9009", "0109", "0909", "0019", "0099", "0000", "0008"]
    )


@pytest.mark.parametrize(
    ("protocol", "options"),
    [("round_robin", {}), ("random_routing", {}), ("solo", {}), ("chain", {}), ("vote", {}),
     ("debate", {"rounds": 1})],
)  # fmt: skip
def test_faultless_experts_hit_what_25_turns_allow(protocol, options):
    for episode in expert_team(protocol, 0.0, n=40, **options):
        within = sweep_turns(episode.problem.answer) <= 25
        assert episode.grade.components["hit"] == float(within)
        # The final guess is the best known one: right if the 25 guesses held the secret.
        assert episode.reward == float(within)


def test_erring_experts_hit_some_and_full_form_plays_alike():
    for prompt in ("short", "full"):
        share = sum(e.reward for e in expert_team("round_robin", 0.15, 60, prompt=prompt)) / 60
        assert 0.1 < share < 0.9


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "secrets.jsonl"
    rows = [{"id": f"s{i}", "secret": s, "max_turns": 25} for i, s in enumerate(ALL[::50])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_secrets_from_a_file_and_a_held_out_share(file):
    task = GuessNumber(file, eval_fraction=0.2)
    kept, held, everything = (list(task.problems(s)) for s in ("train", "eval", "all"))
    assert (len(kept), len(held), len(everything)) == (81, 20, 101)
    assert not {p.id for p in kept} & {p.id for p in held}
    assert {p.answer for p in everything} == set(ALL[::50])
    assert [p.id for p in GuessNumber(file, seed=9, eval_fraction=0.2).problems("eval")] == [
        p.id for p in held
    ]
    task.validate()
    assert len(list(GuessNumber(file, eval_fraction=1).problems("eval"))) == 101
    with pytest.raises(UserError, match="no rows for 'train'; change eval_fraction"):
        GuessNumber(file, eval_fraction=1).problems("train")


def test_generated_splits_are_disjoint_and_reproducible():
    task = GuessNumber()
    task.validate()
    seen = {
        s: {p.answer for p in itertools.islice(task.problems(s), 800)}
        for s in ("train", "eval", "certify")
    }
    for a, b in itertools.combinations(seen, 2):
        assert not seen[a] & seen[b]
    assert task.problem_at("train", 5) == GuessNumber().problem_at("train", 5)
    assert task.problem_at("train", 5).id == "guess_number-train-000005"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"secret": "1233"}', "line 2: secret '1233' repeats a digit"),
        ('{"secret": 1234}', "line 2: secret is 1234; write four digits as a string"),
        ('{"secrets": "1234"}', "line 2: no field 'secret'; the fields there are: secrets"),
        ('{"secret": "1234", "max_turns": 0}', "line 2: max_turns is 0"),
        ('{"id": "a", "secret": "1234"}', "line 2: id 'a' stands already in .*line 1"),
        ('{"secret": "12', "line 2: damaged row"),
        ("[1]", "line 2: the row is no JSON object"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, row, message):
    path = tmp_path / "secrets.jsonl"
    path.write_text('{"id": "a", "secret": "5678"}\n' + row + "\n")
    with pytest.raises(UserError, match=message) as caught:
        GuessNumber(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "long"}, "prompt is 'long'"),
        ({"max_turns": 0}, "max_turns is 0"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        GuessNumber(**options)
