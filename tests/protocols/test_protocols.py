"""Who speaks when, in which moment, and what the answer is, for every protocol."""

from __future__ import annotations

import asyncio

import pytest

from satune.play.conversation import Conversation
from satune.protocols.discussion import JUDGE, REVISION, ROLES
from satune.protocols.named import PROTOCOLS, UNREAD, load_protocol
from satune.types import Key, Problem, UserError
from scripted import Letters, ScriptedEngine, by_seat, team

NAMES = ("ann", "bob", "cem")
PROBLEM = Problem.of("p0", "which letter?", "a")


def run(name, seats=NAMES, write=None, calls=1, acting=False, seed=0, **options):
    """The turns as (moment, seat), the answers of ``calls`` calls, and the engine."""
    engine = ScriptedEngine(write or (lambda seat, entries, key: f"{seat}{key.own_index}"))
    key = Key(seed, "train", problem="p0")
    talk = Conversation(
        PROBLEM, key, seats=team(*seats), engine=engine, task=Letters(), acting=acting
    )
    protocol = load_protocol(name, seats, **options)

    async def script():
        return [await protocol(talk) for _ in range(calls)]

    answers = asyncio.run(script())
    return [(t.moment, t.seat) for t in talk.turns], answers, engine


def test_solo_is_the_first_seat():
    assert run("solo", turns=2)[:2] == ([(0, "ann"), (1, "ann")], ["ann1"])


def test_vote_is_one_moment_and_the_majoritys_whole_message():
    write = by_seat(ann=["is b"], bob=["is a"], cem=["so a"])
    assert run("vote", write=write)[:2] == ([(0, "ann"), (0, "bob"), (0, "cem")], ["is a"])


def test_chain_goes_seat_after_seat():
    order = [(i, NAMES[i % 3]) for i in range(6)]
    assert run("chain", rounds=2)[:2] == (order, ["cem1"])


def test_round_robin_goes_on_where_it_stopped():
    turns, answers, _ = run("round_robin", calls=4)
    assert turns == [(i, NAMES[i % 3]) for i in range(4)]
    assert answers == ["ann0", "bob0", "cem0", "ann1"]
    assert run("round_robin", turns=2)[1] == ["bob0"]


def test_random_routing_is_drawn_from_the_key_alone():
    first = run("random_routing", turns=12)[0]
    # What is said changes nothing, nor does splitting the route into actions.
    assert run("random_routing", turns=12, write=lambda *_: "zzz")[0] == first
    assert run("random_routing", calls=12, acting=True)[0] == first
    assert run("random_routing", calls=4, turns=3)[0] == first
    assert run("random_routing", turns=12, seed=1)[0] != first
    assert {seat for _, seat in first} == set(NAMES)
    assert len(run("random_routing")[0]) == 3


def test_debate_is_all_at_once_and_the_last_round_decides():
    write = by_seat(ann=["a", "b"], bob=["a", "c"], cem=["a", "c"])
    turns, answers, engine = run("debate", write=write)
    assert turns == [(m, s) for m in (0, 1) for s in NAMES]
    assert answers == ["c"]
    assert [len(entries) for _, entries, _ in engine.calls] == [1, 1, 1, 4, 4, 4]


def test_judge_decides_after_the_others_debate():
    turns, answers, engine = run("judge", rounds=2)
    assert turns == [(0, "ann"), (0, "bob"), (1, "ann"), (1, "bob"), (2, "cem")]
    assert answers == ["cem0"]
    assert engine.calls[-1][1][-1].text == JUDGE
    turns, answers, _ = run("judge", judge="ann")
    assert turns == [(0, "bob"), (0, "cem"), (1, "ann")] and answers == ["ann0"]


def test_role_play_ends_with_the_solvers_revision():
    turns, answers, engine = run("role_play")
    assert [seat for _, seat in turns] == ["ann", "bob", "cem", "bob"]
    assert answers == ["bob1"]
    told = [entries[-1].text for _, entries, _ in engine.calls]
    assert told == [ROLES["planner"], ROLES["solver"], ROLES["critic"], REVISION]
    roles = {"cem": "planner", "ann": "solver", "bob": "critic"}
    turns, _, _ = run("role_play", roles=roles, rounds=2)
    assert [seat for _, seat in turns] == ["cem", "ann", "bob", "ann", "bob", "ann"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("debat", {}, "unknown protocol 'debat' .nearest: debate"),
        ("debate", {"round": 3}, "protocol debate: unknown option 'round' .nearest: rounds"),
        ("debate", {"talk": 3}, "unknown option 'talk'"),
        ("judge", {"judge": "amn"}, "protocol judge: no seat 'amn' .nearest: ann"),
        ("role_play", {"roles": {"dan": "solver"}}, "no seat 'dan'"),
        ("role_play", {"roles": {"ann": "boss"}}, "unknown role 'boss'; the roles are planner"),
        ("role_play", {"roles": {"ann": "solver"}}, "no seat is the planner"),
        ("fractions:Fraction", {}, "not an async function"),
        ("chain", {"rounds": 0}, "protocol chain: rounds is 0"),
        ("debate", {"rounds": 1.5}, "rounds is 1.5"),
        ("solo", {"turns": True}, "turns is True"),
    ],
)
def test_bad_input_is_named(name, options, message):
    with pytest.raises(UserError, match=message):
        run(name, **options)


def test_teams_that_are_too_small_are_refused():
    with pytest.raises(UserError, match="at least two seats"):
        run("judge", seats=("ann",))
    with pytest.raises(UserError, match="no seat is the critic"):
        run("role_play", seats=("ann", "bob"))


def test_every_protocol_plays_actions_one_after_the_other():
    for name in PROTOCOLS:
        turns, answers, _ = run(name, calls=3, acting=True)
        assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers), name
        assert [m for m, _ in turns] == sorted(m for m, _ in turns)


def test_a_users_protocol_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "async def last_first(talk, loops=1):\n"
        "    for _ in range(loops):\n"
        "        for seat in reversed(talk.seats):\n"
        "            turn = await talk.say(seat)\n"
        "    return turn.text\n"
    )
    turns, answers, _ = run(f"{tmp_path}/mine.py:last_first", loops=1)
    assert [seat for _, seat in turns] == ["cem", "bob", "ann"] and answers == ["ann0"]
    with pytest.raises(UserError, match="unknown option 'loop'"):
        run(f"{tmp_path}/mine.py:last_first", loop=1)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_who_asks_what_answer_a_message_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Letters, "extract", lambda self, text: asked.append(text))
    run(name)
    assert bool(asked) is (name not in UNREAD)
