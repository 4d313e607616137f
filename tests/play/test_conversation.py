"""What a protocol can do and what a seat sees. The rules are those of satune.play.conversation."""

from __future__ import annotations

import asyncio

import pytest

from satune.play.conversation import Conversation, plurality, together
from satune.types import Entry, Key, Problem, UserError, ids_of
from scripted import EntriesRenderer, Letters, ScriptedEngine, by_seat, team

PROBLEM = Problem.of("p0", "which letter?", "a")
KEY = Key(7, "train", stage=1, step=2, problem="p0", sample=3)
ASKED = Entry("problem", parts=PROBLEM.prompt)


def make(write, names=("ann", "bob", "cem"), delays=None, renderer=None, acting=False):
    engine = ScriptedEngine(write, delays)
    seats = team(*names, renderer=renderer)
    talk = Conversation(PROBLEM, KEY, seats=seats, engine=engine, task=Letters(), acting=acting)
    return talk, engine


def echo(seat, entries, key):
    return f"{seat}{key.own_index}"


def test_rules_1_and_2_problem_first_own_and_foreign_in_order():
    talk, engine = make(echo)

    async def script():
        await talk.say("ann")
        await talk.say("bob")
        await talk.say("ann")

    asyncio.run(script())
    assert engine.calls[0][1] == [ASKED]
    assert engine.calls[1][1] == [ASKED, Entry("foreign", "ann0", "ann")]
    assert engine.calls[2][1] == [
        ASKED,
        Entry("own", "ann0", "ann"),
        Entry("foreign", "bob0", "bob"),
    ]


def test_rule_3_a_moment_is_blind_and_afterwards_in_the_protocols_order():
    # ann is the slowest, so the order of arrival is cem, bob, ann; the transcript keeps the order
    # in which the protocol named them.
    talk, engine = make(echo, delays={"ann": 3, "bob": 2, "cem": 1})

    async def script():
        await talk.all_say(("ann", "bob", "cem"))
        await talk.all_say(("cem", "ann"))

    asyncio.run(script())
    for _, entries, _ in engine.calls[:3]:
        assert entries == [ASKED]
    said = [Entry("foreign", f"{name}0", name) for name in ("ann", "bob", "cem")]
    seen = {seat: entries for seat, entries, _ in engine.calls[3:]}
    assert seen["cem"] == [ASKED, said[0], said[1], Entry("own", "cem0", "cem")]
    assert seen["ann"] == [ASKED, Entry("own", "ann0", "ann"), said[1], said[2]]
    assert [(t.seat, t.moment, t.own_index) for t in talk.turns] == [
        ("ann", 0, 0), ("bob", 0, 0), ("cem", 0, 0), ("cem", 1, 1), ("ann", 1, 1),
    ]  # fmt: skip


def test_rule_4_an_instruction_is_private_and_stays_where_it_was_given():
    talk, engine = make(echo, names=("ann", "bob"))

    async def script():
        await talk.say("ann", "plan")
        await talk.all_say(("ann", "bob"), {"bob": "check"})
        await talk.all_say(("ann", "bob"), "end")

    asyncio.run(script())
    assert talk.entries("ann") == [
        ASKED,
        Entry("instruction", "plan"),
        Entry("own", "ann0", "ann"),
        Entry("own", "ann1", "ann"),
        Entry("foreign", "bob0", "bob"),
        Entry("instruction", "end"),
        Entry("own", "ann2", "ann"),
        Entry("foreign", "bob1", "bob"),
    ]
    assert talk.entries("bob")[2] == Entry("instruction", "check")
    assert [e.text for e in talk.entries("bob") if e.kind == "instruction"] == ["check", "end"]
    # The instruction stood before the message it asked for.
    assert engine.calls[0][1][-1] == Entry("instruction", "plan")


def test_rule_5_observations_reach_those_addressed():
    talk, _ = make(echo, names=("ann", "bob"))

    async def script():
        talk.observe("to all")
        await talk.say("ann")
        talk.observe("to bob", to=["bob"])
        talk.observe("")

    asyncio.run(script())
    assert [e.text for e in talk.entries("ann")[1:]] == ["to all", "ann0"]
    assert [e.text for e in talk.entries("bob")[1:]] == ["to all", "ann0", "to bob"]
    assert talk.observations == [(0, "to all"), (1, "to bob")]


def test_turns_carry_what_the_engine_and_the_view_gave():
    renderer = EntriesRenderer()
    talk, engine = make(echo, renderer=renderer)

    async def script():
        await talk.say("bob")
        return await talk.say("bob")

    turn = asyncio.run(script())
    assert (turn.seat, turn.agent, turn.moment, turn.own_index) == ("bob", "agent-bob", 1, 1)
    assert turn.prompt_ids == ids_of([2]) and turn.completion_ids == ids_of(b"bob1")
    assert turn.sampled_logprobs is not None and len(turn.sampled_logprobs) == 4
    # One view a seat, told of both completions; keys name the seat and its own turns.
    assert [seat for seat, _ in renderer.views] == ["bob"]
    assert [c.text for c in renderer.views[0][1].written] == ["bob0", "bob1"]
    assert [key for *_, key in engine.calls] == [
        KEY.at(seat="bob", own_index=0),
        KEY.at(seat="bob", own_index=1),
    ]


def test_the_protocols_generator_is_keyed():
    draws = [make(echo)[0].rng.random() for _ in range(2)]
    assert draws[0] == draws[1] == KEY.rng("protocol").random()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.say("dan"), "no seat 'dan'; the seats are ann, bob, cem"),
        (lambda t: t.all_say(["ann", "ann"]), "named twice"),
        (
            lambda t: t.all_say(["ann"], {"bob": "x"}),
            "no seat 'bob'; the seats speaking here are ann",
        ),
        (lambda t: together([t.say("ann"), t.say("bob")]), "use all_say"),
    ],
)
def test_misuse_is_named(call, message):
    talk, _ = make(echo, delays={"ann": 2})

    async def script():
        await call(talk)

    with pytest.raises(UserError, match=message):
        asyncio.run(script())
    with pytest.raises(UserError, match="no seat 'zoe'"):
        talk.observe("x", to=["zoe"])


@pytest.mark.parametrize(
    ("texts", "winner"),
    [
        (["b", "a", "a"], 1),  # two votes against one
        (["b", "a"], 0),  # a tie goes to the class that came first
        (["c", "a", "b", "b", "a"], 1),  # tie of a and b, two votes each: a was first at index 1
        (["X", "Y", "a"], 2),  # no answer, no vote
        (["X", "Y"], None),
        ([], None),
    ],
)
def test_majority(texts, winner):
    assert plurality(texts, Letters()) == winner
    names = tuple(f"s{i}" for i in range(len(texts))) or ("s0",)
    talk, _ = make(by_seat(**{n: [t] for n, t in zip(names, texts, strict=False)}), names)
    turns = asyncio.run(talk.all_say(names)) if texts else []
    # The whole message of the winner is what is graded.
    assert talk.majority(turns) == (None if winner is None else texts[winner])


def test_together_raises_the_original_and_stops_the_rest():
    stopped = []

    async def slow(name):
        try:
            await asyncio.sleep(60)
        finally:
            stopped.append(name)

    async def bad():
        await asyncio.sleep(0)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        asyncio.run(together([slow("x"), bad(), slow("y")]))
    assert stopped == ["x", "y"]
