"""What a task may have beside, and how it is asked whether it has it."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import pytest

from every_task import NAMES, case
from satune import task_parts
from satune.play.match import Match
from satune.task_parts import (
    PARTS,
    HasEnvironment,
    HasExpert,
    HasRolePlayer,
    Indexed,
    Procedural,
    Seeded,
    Validated,
    is_fresh,
    role_player_of,
    seed_of,
)
from satune.tasks.catalog import draw, take
from satune.tiny.demonstrations import demonstrate
from satune.types import Problem, Sampling, Seat, UserError
from scripted import EntriesRenderer, ScriptedEngine

PROTOCOLS = [
    each
    for _, each in inspect.getmembers(task_parts, inspect.isclass)
    if each.__module__ == task_parts.__name__ and Protocol in each.__bases__
]


class Bare:
    """A task with the parts of ``types.Task`` and no other: rows "0" to "8"."""

    name = "bare"

    def problems(self, split):
        return [Problem.of(str(i), f"{split}?", "a") for i in range(9)]

    def extract(self, text):
        return text

    def equal(self, a, b):
        return a == b

    def grade(self, problem, answer):
        raise AssertionError("nothing here is graded")


def with_part(**members: Any) -> Any:
    """A bare task that has these members, and of the class nothing else."""
    return type("Mine", (Bare,), members)()


def test_every_protocol_asks_for_one_member_and_all_are_listed() -> None:
    members = [
        {n for n in {**vars(p), **p.__annotations__} if not n.startswith("_")} for p in PROTOCOLS
    ]
    assert sorted(members, key=str) == sorted(({part} for part in PARTS), key=str)


def test_a_bare_task_has_no_part() -> None:
    bare: Any = Bare()
    assert not any(isinstance(bare, protocol) for protocol in PROTOCOLS)
    assert (is_fresh(bare), seed_of(bare), role_player_of(bare)) == (False, 0, None)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda each: each.__name__)
def test_a_members_name_is_all_it_takes(protocol: type) -> None:
    (member,) = (n for n in {**vars(protocol), **protocol.__annotations__} if n in PARTS)
    method = member in vars(protocol)
    task = with_part(**{member: (lambda self, *given: None) if method else 3})
    assert [each for each in PROTOCOLS if isinstance(task, each)] == [protocol]
    if method:  # as a class says that it does not have what its base has
        assert not isinstance(with_part(**{member: None}), protocol)


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_of_the_tasks_of_the_catalogue(name: str, tmp_path) -> None:
    task = case(name, tmp_path).task
    kind = name.split()[0]
    generates = ("relay", "sums", "reasoning_gym", "guess_number", "blocksworld")
    plays = ("guess_number", "arbench_gn", "arbench_dc", "arbench_sp")
    assert isinstance(task, Procedural) and isinstance(task, Seeded)
    assert isinstance(task, Validated)
    assert is_fresh(task) == (kind in ("relay", "sums", "reasoning_gym", "blocksworld"))
    teaches = isinstance(task, Indexed) and kind not in ("sums", "reasoning_gym")
    assert isinstance(task, HasExpert) == teaches
    assert isinstance(task, Indexed) == (kind in (*generates, "arbench_gn"))
    assert isinstance(task, HasEnvironment) == (kind in plays)
    assert isinstance(task, HasRolePlayer) == (kind in ("arbench_dc", "arbench_sp"))


def test_a_stream_is_asked_by_index_where_it_can_be() -> None:
    def endless(self, split):
        index = 0
        while True:
            yield Problem.of(f"stream-{index}", "?", "a")
            index += 1

    def problem_at(self, split, index):
        return Problem.of(f"{split}-{index}", "?", "a")

    stream = with_part(fresh=True, problems=endless)
    assert [p.id for p in take(stream, "train", 2, 3)] == ["stream-3", "stream-4"]
    indexed = with_part(fresh=True, problems=endless, problem_at=problem_at)
    for drawn in (take, draw):
        assert [p.id for p in drawn(indexed, "train", 2, 3)] == ["train-3", "train-4"]
    # Rows stay rows, whatever else the task could generate.
    rows = with_part(fresh=False, problem_at=problem_at)
    assert {p.id for p in take(rows, "train", 9)} == {str(i) for i in range(9)}


def test_a_seed_of_its_own_orders_the_rows() -> None:
    orders = {
        tuple(p.id for p in take(task, "train", 9))
        for task in (Bare(), with_part(seed=0), with_part(seed=1), with_part(seed=2))
    }
    assert len(orders) == 3  # without one it is 0


def test_a_match_is_acted_where_the_task_has_an_environment() -> None:
    async def alone(talk):
        return (await talk.say(talk.seats[0])).text

    def match(task):
        seats = [Seat("a", "a", EntriesRenderer(), Sampling(4))]
        return Match(seats, alone, ScriptedEngine(lambda *_: ""), task)

    world = with_part(environment=lambda self, problem, rng, generate: None)
    assert match(world).acting and not match(Bare()).acting


def test_without_an_expert_nobody_is_taught() -> None:
    async def silent(talk):
        return None

    with pytest.raises(UserError, match="task bare: has no expert"):
        demonstrate(Bare(), silent, ["a"], lambda n: [], 1, 0.0, 0)
