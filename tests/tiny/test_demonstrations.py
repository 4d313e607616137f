"""Conversations that an expert plays, from which tiny agents learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest

from satune.protocols.named import load_protocol
from satune.protocols.sequential import chain, round_robin
from satune.tasks.catalog import take
from satune.tasks.guess_number import GuessNumber
from satune.tasks.relay import Relay, reduce_once
from satune.tiny.demonstrations import demonstrate
from satune.types import Entry, Problem, UserError

SEATS = ["first", "second", "third"]


def played(error: float, count: int = 300, seed: int = 0) -> list[list[Entry]]:
    task = Relay(numbers=4, seed=5)
    return demonstrate(task, chain, SEATS, lambda n: take(task, "train", n, 0), count, error, seed)


def read(entry: Entry) -> str:
    return entry.text or "".join(str(part.get("text", "")) for part in entry.parts)


def test_each_seats_conversation_is_in_the_order_it_saw_and_wrote() -> None:
    found = played(0.0, count=3)
    assert len(found) == 3
    seen = [[(entry.kind, entry.seat) for entry in conversation] for conversation in found]
    assert seen[0] == [("problem", ""), ("own", "first")]
    assert seen[1] == [("problem", ""), ("foreign", "first"), ("own", "second")]
    assert seen[2][-1] == ("own", "third") and len(seen[2]) == 4
    # One conversation, so one problem, and each reduces what the one before it wrote.
    chain_of = [read(found[0][0]), *(read(c[-1]) for c in found)]
    for before, after in pairwise(chain_of):
        assert after.strip().endswith(reduce_once(before.strip().splitlines()[-1]))


@pytest.mark.parametrize("error", [0.0, 0.3, 1.0])
def test_the_share_of_wrong_messages_is_the_error(error: float) -> None:
    wrong = Counter[bool]()
    for conversation in played(error):
        before = read(conversation[-2]).strip().splitlines()[-1]
        wrong[not read(conversation[-1]).strip().endswith(reduce_once(before))] += 1
    assert sum(wrong.values()) == 300
    # Binomial with 300 messages: .3 ± 4 · .0265. A wrong message may look right by chance.
    assert wrong[True] / 300 == pytest.approx(error, abs=0.11 if 0 < error < 1 else 0.03)


def test_they_follow_the_seed() -> None:
    texts = [[read(c[-1]) for c in played(0.3, 60, seed)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_only_training_problems_are_played() -> None:
    held_out = {p.text for p in take(Relay(numbers=4, seed=5), "eval", 500, 0)}
    assert not held_out & {read(conversation[0]) for conversation in played(0.0)}


def test_an_environment_is_played_to_its_end() -> None:
    task = GuessNumber(prompt="short", max_turns=4)
    found = demonstrate(task, round_robin, SEATS, lambda n: take(task, "train", n, 0), 6, 0.0, 0)
    assert len(found) == 6
    for conversation in found:
        kinds = Counter(entry.kind for entry in conversation)
        assert kinds["observation"] >= 1 and kinds["own"] >= 1
        assert kinds["own"] + kinds["foreign"] <= 5  # four guesses and the final one


def test_a_task_without_an_expert_is_refused() -> None:
    class Plain:
        name = "plain"

    def none(count: int) -> Sequence[Problem]:
        return []

    with pytest.raises(UserError, match="task plain: has no expert") as caught:
        demonstrate(Plain(), chain, SEATS, none, 3, 0.0, 0)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_debater_has_not_seen_the_messages_of_its_own_moment() -> None:
    seats = ["a", "b", "c"]
    task = Relay()
    seen = demonstrate(
        task, load_protocol("debate", seats, rounds=2), seats,
        lambda n: take(task, "train", n, 0), 3, 0.0, 0,
    )  # fmt: skip
    for conversation in seen:
        kinds = [entry.kind for entry in conversation]
        assert kinds == ["problem", "own", "foreign", "foreign", "own"]
