"""Ids that lie with an owner: their handles in the run's files, and what the owner remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from satune.files.arrays import append_rows, read_rows
from satune.hosts.speaker import Speaker
from satune.hosts.written import Written
from satune.play.rows import episode_from_row, episode_to_row
from satune.types import (
    Completion,
    Episode,
    Grade,
    Key,
    Problem,
    Prompt,
    Turn,
    UserError,
    ids_of,
    logprobs_of,
)

PROMPT, SAID = ids_of([1, 2, 3]), ids_of([4, 5])


def written(version: int = 0) -> Completion:
    return Completion("x", "stop", version, SAID, logprobs_of([-0.1, -0.2]))


def key(
    stage: int = 1, step: int = 1, draw: int = 0, purpose: str = "train", seat: str = "a"
) -> Key:
    return Key(0, purpose, stage, step, draw, "p", 0, seat)


def episode(handle: str | None) -> Episode:
    turns = (
        Turn("a", "ann", 0, 0, "x", "stop", 0, handle=handle),
        Turn("b", "bob", 1, 0, "y", "stop", 0),
    )
    return Episode(Problem.of("p", "?"), 0, turns, None, Grade(1.0))


def test_a_turn_keeps_its_handle_on_the_disk_and_others_have_none(tmp_path: Path) -> None:
    append_rows(tmp_path / "rows.jsonl", [episode_to_row(episode("train-1"))])
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert episode_from_row(row) == episode("train-1")
    # As it was before there were any: rows of earlier runs can be read.
    assert "handle" in row["turns"][0] and "handle" not in row["turns"][1]


def test_handles_name_a_message_and_the_weights_that_wrote_it() -> None:
    memory = Written()
    handles = [
        memory.add(key(), PROMPT, written()),
        memory.add(key(draw=1), PROMPT, written()),
        memory.add(key(seat="b"), PROMPT, written()),
        memory.add(key(purpose="certify"), PROMPT, written()),
        memory.add(key(purpose="certify"), PROMPT, written(version=1)),
    ]
    assert len({*handles}) == 5 and None not in handles
    for handle in handles:
        (turn, other) = memory.fill("ann", [episode(handle)])[0].turns
        assert (turn.prompt_ids, turn.completion_ids) == (PROMPT, SAID)
        assert other.completion_ids is None
    # Nobody is asked about evaluations afterwards.
    assert memory.add(key(purpose="evaluate"), PROMPT, written()) is None


def test_what_a_later_rollout_drives_out() -> None:
    memory = Written()
    first = memory.add(key(), PROMPT, written())
    test = memory.add(key(purpose="certify"), PROMPT, written())
    # The self-check of a resume is drawn before the first stage, while the batch is in use.
    checked = memory.add(key(stage=0, step=0), PROMPT, written())
    memory.add(key(purpose="certify", seat="b"), PROMPT, written(version=7))
    for handle in (first, test, checked):
        memory.fill("ann", [episode(handle)])
    memory.add(key(step=2), PROMPT, written())
    memory.add(key(purpose="certify", draw=1), PROMPT, written())
    for handle in (first, test, checked, None, "train-", "evaluate-1"):
        with pytest.raises(UserError, match="has no ids of a message of seat a"):
            memory.fill("ann", [episode(handle)])


def test_a_checkpoint_has_what_training_needs(tmp_path: Path) -> None:
    memory, again = Written(), Written()
    assert list(memory.rows()) == []
    handle = memory.add(key(stage=3), PROMPT, written())
    test = memory.add(key(stage=3, purpose="certify"), PROMPT, written())
    append_rows(tmp_path / "written.jsonl", memory.rows())
    again.add(key(stage=9), PROMPT, written())
    again.take(read_rows(tmp_path / "written.jsonl"))
    assert again.fill("ann", [episode(handle)]) == memory.fill("ann", [episode(handle)])
    with pytest.raises(UserError):
        again.fill("ann", [episode(test)])
    # It goes on in the same rollout.
    again.add(key(stage=3, draw=1), PROMPT, written())
    assert again.fill("ann", [episode(handle)])


class Engine:
    """It has the seat a of ann, and ends nothing by itself."""

    seats = {"a": "ann"}  # noqa: RUF012

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def begin(self, key: Key) -> None: ...

    end = begin

    def decode(self, agent: str, requests: list[Any]) -> None:
        self.asked += requests


class Renderer:
    """Whatever a seat has seen, it reads as the same ids."""

    def view(self, seat: str) -> Renderer:
        return self

    def prompt(self, entries: Any, max_new_tokens: int) -> Prompt:
        return Prompt((), PROMPT)

    def wrote(self, completion: Completion) -> None: ...


@pytest.mark.parametrize("decoding", [True, False])
def test_a_conversation_that_is_played_anew_has_the_ids_of_its_last_time(decoding: bool) -> None:
    """What was asked for the first time has the same key, and would end after it."""
    engine: Any = Engine()
    renderer: Any = Renderer()
    speaker = Speaker("ann", engine, renderer, 6)

    def asked(number: int) -> dict[str, Any]:
        said = {"seed": 0, "purpose": "train", "stage": 1, "step": 1, "problem": "p", "seat": "a"}
        sampling = {"max_new_tokens": 6}
        return {"number": number, "key": said, "sampling": sampling, "at": 0, "entries": []}

    place = [1, 1, 0, "p", 0, 0]
    assert speaker.decode([[*place, True]], [asked(1)], decode=decoding) == []
    first = engine.asked[:]
    assert speaker.decode([[*place, False], [*place, True]], [asked(2)], decode=True) == []
    assert [request.future.cancelled() for request in first] == [True] * decoding
    (second,) = engine.asked[decoding:]
    second.future.set_result(written())
    (answer,) = speaker.decode([], [], decode=False)
    assert answer["number"] == 2
    (filled,) = speaker.written.fill("ann", [episode(answer["said"]["handle"])])
    assert filled.turns[0].completion_ids == SAID
