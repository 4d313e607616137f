"""The local engine's two orders: what waits for whom, told by the order of events."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from satune.agents.policy import Policy
from satune.engines.local import LocalEngine
from satune.engines.routed import RoutedEngine
from satune.engines.rows import Rows
from satune.play.episode import converse
from satune.play.match import Match
from satune.play.rollout import rollout
from satune.protocols.independent import solo
from satune.types import Key, Problem, Prompt, Sampling, Seat, ids_of
from scripted import EntriesRenderer, Letters, ScriptedEngine
from tiny_models import tiny_policy

KEY = Key(0, "train")
LONG = 60.0
"""Seconds after which a test that hangs fails; none is ever waited for."""


class IdsRenderer:
    def view(self, seat):
        class View:
            def prompt(self, entries, max_new_tokens):
                return Prompt((), ids=ids_of(1 + i % 12 for i in range(len(entries))))

            def wrote(self, completion): ...

        return View()


def engine_of(*names: str, **settings) -> LocalEngine:
    policies = {name: tiny_policy(name, seed=i) for i, name in enumerate(names)}
    return LocalEngine(policies, {name: name for name in names}, **settings)


def seat(name: str, tokens: int = 4) -> Seat:
    return Seat(name, name, IdsRenderer(), Sampling(tokens, temperature=0.8))


class Slow(ScriptedEngine):
    """A server that answers one conversation only when ``open`` is set."""

    def __init__(self) -> None:
        super().__init__(lambda *_: "b")
        self.open = asyncio.Event()

    async def generate(self, seat, prompt, sampling, key):
        if key.problem == "p0":
            await asyncio.wait_for(self.open.wait(), LONG)
        return await super().generate(seat, prompt, sampling, key)


async def by_turns(talk):
    """The local seat, the served one, the local one again."""
    for name in ("ann", "bob", "ann"):
        turn = await talk.say(name)
    return turn.text


PROBLEMS = [Problem.of(f"p{i}", "?", "a") for i in range(4)]


def test_a_server_that_sleeps_in_one_conversation_lets_the_others_finish():
    async def script():
        slow = Slow()
        engine = RoutedEngine(engine_of("ann", order="throughput"), {"bob": slow}, {})
        seats = [seat("ann"), Seat("bob", "bob", EntriesRenderer(), Sampling(4))]
        kept: list[str] = []

        def keep(episode):
            kept.append(episode.problem.id)
            if len(kept) == 3:
                slow.open.set()

        match = Match(seats, by_turns, engine, Letters())
        episodes = await rollout(match, PROBLEMS, 1, KEY, keep=keep)
        return kept, [len(e.turns) for e in episodes]

    kept, turns = asyncio.run(script())
    assert kept[-1] == "p0" and turns == [3] * 4


@pytest.mark.parametrize("order", ["exact", "throughput"])
def test_in_exact_order_nothing_is_decoded_while_a_server_writes(order):
    local = engine_of("ann", order=order)
    meanwhile: list[int] = []

    class Server(ScriptedEngine):
        async def generate(self, seat, prompt, sampling, key):
            before = local.sampled_tokens
            for _ in range(200 if key.problem == "p0" else 0):
                await asyncio.sleep(0)
            meanwhile.append(local.sampled_tokens - before)
            return await super().generate(seat, prompt, sampling, key)

    async def script():
        engine = RoutedEngine(local, {"bob": Server(lambda *_: "b")}, {})
        seats = [seat("ann"), Seat("bob", "bob", EntriesRenderer(), Sampling(4))]
        await rollout(Match(seats, by_turns, engine, Letters()), PROBLEMS, 1, KEY)

    asyncio.run(script())
    assert (max(meanwhile) > 0) is (order == "throughput")


@pytest.mark.parametrize("order", ["exact", "throughput"])
def test_a_straggler_of_one_agent_and_the_rows_of_another(monkeypatch, order):
    """One conversation is a long message of ``ann``; the others begin with a short one of hers, in
    the seat ``ned``, and go on with many of ``bob``."""
    policies = {name: tiny_policy(name, seed=i) for i, name in enumerate(("ann", "bob"))}
    monkeypatch.setattr(Policy, "eos_ids", frozenset())
    engine = LocalEngine(policies, {"ann": "ann", "ned": "ann", "bob": "bob"}, order=order)
    ended: list[str] = []

    async def talk_of(talk):
        for name in ["ann"] if talk.problem.id == "p0" else ["ned"] + ["bob"] * 5:
            turn = await talk.say(name)
            ended.append(name)
        return turn.text

    async def script():
        ned = Seat("ned", "ann", IdsRenderer(), Sampling(3, temperature=0.8))
        match = Match([seat("ann", 100), ned, seat("bob", 3)], talk_of, engine, Letters())
        await rollout(match, PROBLEMS, 1, KEY)

    asyncio.run(script())
    straggler, others = ["ann"], ["bob"] * 15
    # Side by side: 3 + 5 x 3 steps of the others beside 100 of hers. In lock step bob's rows wait
    # until none of hers is left.
    later = others + straggler if order == "throughput" else straggler + others
    assert ended == ["ned"] * 3 + later


def played(**settings):
    engine = engine_of("ann", "bob", **settings)

    async def both(talk):
        turns = []
        for _ in range(3):
            turns += await talk.all_say(["ann", "bob"])
        return turns[-1].text

    async def script():
        match = Match([seat("ann", 8), seat("bob", 5)], both, engine, Letters())
        return await asyncio.wait_for(rollout(match, PROBLEMS, 3, KEY), LONG)

    return [[turn.completion_ids for turn in e.turns] for e in asyncio.run(script())]


@pytest.mark.parametrize("max_rows", [1, 2, 3, 256])
def test_both_orders_write_the_same(max_rows):
    # Every message is drawn from its own key; what it shares its batch with changes rounding only.
    assert played(order="throughput", max_rows=max_rows) == played(order="exact")


@pytest.mark.parametrize("max_rows", [1, 2, 5])
def test_agents_side_by_side_have_no_more_rows_together_than_one(monkeypatch, max_rows):
    batches: list[Rows] = []
    most = [0]
    step, admit = Rows.step, Rows.admit

    def noted(method):
        def call(self, *arguments):
            if self not in batches:
                batches.append(self)
            found = method(self, *arguments)
            most[0] = max(most[0], sum(len(rows.requests) for rows in batches))
            return found

        return call

    monkeypatch.setattr(Rows, "step", noted(step))
    monkeypatch.setattr(Rows, "admit", noted(admit))
    played(order="throughput", max_rows=max_rows)
    assert most[0] <= max_rows and len(batches) >= 2


def test_the_order_is_exact_on_the_cpu_unless_it_is_said():
    assert engine_of("ann").order == "exact"
    assert engine_of("ann", order="throughput").order == "throughput"


def test_an_engine_that_breaks_fails_everyone_who_waits():
    engine = engine_of("ann", "bob", order="throughput")

    def broken(*_, **__):
        raise MemoryError("no room")

    engine.policies["bob"].hidden = broken  # type: ignore[method-assign]

    async def script():
        for index in range(4):
            engine.begin(KEY.at(sample=index))
        asked = [
            engine.generate(
                name, Prompt((), ids=ids_of((1, 2))), Sampling(50), KEY.at(sample=index)
            )
            for index, name in enumerate(["ann", "bob", "ann", "bob"])
        ]
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), LONG)

    assert [type(found) for found in asyncio.run(script())] == [MemoryError] * 4


@pytest.mark.parametrize("order", ["exact", "throughput"])
def test_conversations_that_are_alike_are_told_apart_by_their_copies(order):
    def played(*keys):
        engine = engine_of("ann", order=order)
        match = Match([seat("ann", 6)], partial(solo, turns=3), engine, Letters())

        async def one(key):
            engine.begin(key)
            try:
                return await converse(match, Problem.of("p", "?"), key)
            finally:
                engine.end(key)

        async def script():
            return await asyncio.wait_for(asyncio.gather(*map(one, keys)), LONG)

        return [
            [turn.completion_ids for turn in each.conversation.turns]
            for each in asyncio.run(script())
        ]

    one, other = Key(1, "serve", problem="p"), Key(2, "serve", problem="p")
    alone = played(one), played(other)
    assert alone[0] != alone[1]
    assert played(one, one.at(copy=1)) == [*alone[0], *alone[0]]
    assert played(one, other.at(copy=1)) == [*alone[0], *alone[1]]
