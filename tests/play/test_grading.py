"""Grading beside decoding, by the order of events: what waits, and what goes on meanwhile."""

from __future__ import annotations

import asyncio
import threading

import pytest

from satune.engines.local import LocalEngine
from satune.play.evaluation import evaluate
from satune.play.grading import Graders
from satune.play.match import Match
from satune.play.rollout import rollout_sync
from satune.protocols.independent import solo
from satune.protocols.sequential import chain
from satune.types import Grade, Key, Problem, Prompt, Sampling, Seat, ids_of
from scripted import Letters, ScriptedEngine, team
from tiny_models import tiny_policy

KEY = Key(0, "train")
PROBLEMS = [Problem.of(f"p{i}", "?", "a") for i in range(4)]
LONG = 60.0
"""Seconds after which a test that hangs fails; none is ever waited for."""


class Waiting(Letters):
    """Grades what ``ready(problem, answer)`` lets through: it blocks its thread until then."""

    def __init__(self, ready):
        self.ready = ready

    def grade(self, problem, answer):
        self.ready(problem, answer)
        return super().grade(problem, answer)


def together(count: int):
    barrier = threading.Barrier(count)
    return lambda problem, answer: barrier.wait(LONG)


def test_grades_come_in_parallel():
    match = Match(team("ann"), solo, ScriptedEngine(lambda *_: "a"), Waiting(together(4)))
    # Each grade waits for the three others.
    assert [e.reward for e in rollout_sync(match, PROBLEMS, 1, KEY)] == [1.0] * 4


def test_the_last_messages_of_seats_are_graded_in_parallel():
    three = together(3)
    writer = {"ann": "xb", "bob": "yb", "cid": "zb", "dan": "a"}
    task = Waiting(lambda problem, answer: three(problem, answer) if answer != "a" else None)
    engine = ScriptedEngine(lambda seat, entries, key: writer[seat])
    match = Match(team(*writer), chain, engine, task)
    # The team's answer is dan's; the other three wait for each other.
    found = evaluate(match, PROBLEMS[:1], 1, KEY, per_seat=True)
    assert {name: s.avg_at_k for name, s in found.seats.items()} == {
        "ann": 0.0, "bob": 0.0, "cid": 0.0, "dan": 1.0,
    }  # fmt: skip


class LettersRenderer:
    """Prompts of ids that grow by one a turn."""

    def view(self, seat):
        class View:
            def prompt(self, entries, max_new_tokens):
                return Prompt((), ids=ids_of(1 + i % 12 for i in range(len(entries))))

            def wrote(self, completion): ...

        return View()


@pytest.mark.parametrize("order", ["exact", "throughput"])
def test_decoding_goes_on_while_a_grader_waits(order):
    written: list[Key] = []
    later = threading.Event()
    policy = tiny_policy("ann")

    class Watched(LocalEngine):
        async def generate(self, seat, prompt, sampling, key):
            completion = await super().generate(seat, prompt, sampling, key)
            written.append(key)
            if key.own_index == 4:
                later.set()
            return completion

    async def long_or_short(talk):
        for _ in range(5 if talk.problem.id != "p0" else 1):
            turn = await talk.say("ann")
        return turn.text

    graded: list[tuple[str, bool]] = []

    def ready(problem, answer):
        if problem.id == "p0":  # its conversation ends first
            assert later.wait(LONG)
        graded.append((problem.id, later.is_set()))

    engine = Watched({"ann": policy}, {"ann": "ann"}, order=order)
    seats = [Seat("ann", "ann", LettersRenderer(), Sampling(6, temperature=0.8))]
    match = Match(seats, long_or_short, engine, Waiting(ready))
    episodes = rollout_sync(match, PROBLEMS, 1, KEY)
    assert [len(e.turns) for e in episodes] == [1, 5, 5, 5]
    assert ("p0", True) in graded and len(written) == 16


def test_a_new_conversation_does_not_wait_for_a_grade():
    # One conversation at a time; the first one's grade waits for the last one's message.
    last = threading.Event()

    def write(seat, entries, key):
        if key.problem == "p3":
            last.set()
        return "a"

    task = Waiting(lambda problem, answer: last.wait(LONG) if problem.id == "p0" else None)
    match = Match(team("ann"), solo, ScriptedEngine(write), task, concurrency=1)
    assert [e.reward for e in rollout_sync(match, PROBLEMS, 1, KEY)] == [1.0] * 4
    assert last.is_set()


def test_the_engine_is_told_of_the_end_before_the_grade():
    engine = ScriptedEngine(lambda *_: "a")
    ended: list[bool] = []
    task = Waiting(lambda problem, answer: ended.append(KEY.at(problem="p0") in engine.ended))
    rollout_sync(Match(team("ann"), solo, engine, task), PROBLEMS[:1], 1, KEY)
    assert ended == [True]


def test_a_limit_bounds_how_many_are_graded_at_a_time():
    now, most, lock = [0], [0], threading.Lock()
    pairs = threading.Barrier(2)

    def ready(problem, answer):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        pairs.wait(LONG)  # two are there together, or it hangs
        with lock:
            now[0] -= 1

    async def script():
        graders = Graders(Waiting(ready), LONG, limit=2)
        await asyncio.gather(*(graders.grade(PROBLEMS[0], "a", ()) for _ in range(8)))

    asyncio.run(script())
    assert most == [2]


def test_a_plain_grader_has_a_thread_and_a_coroutine_the_event_loop():
    seen: dict[str, int] = {}

    class Plain(Letters):
        def grade(self, problem, answer):
            seen["plain"] = threading.get_ident()
            return Grade(1.0)

    class Awaited(Letters):
        async def grade(self, problem, answer):  # type: ignore[override]
            await asyncio.sleep(0)
            seen["awaited"] = threading.get_ident()
            return Grade(0.5)

    for task, reward in ((Plain(), 1.0), (Awaited(), 0.5)):
        match = Match(team("ann"), solo, ScriptedEngine(lambda *_: "a"), task)
        assert rollout_sync(match, PROBLEMS[:1], 1, KEY)[0].reward == reward
    assert seen["awaited"] == threading.get_ident() != seen["plain"]
