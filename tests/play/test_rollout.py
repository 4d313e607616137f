"""Whole conversations: order, brackets, environments, failures, rows."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from satune.engines.request import conversation_id
from satune.files.arrays import append_rows, read_rows
from satune.play.keys import text_digest, text_key
from satune.play.match import Match
from satune.play.rollout import play, rollout, rollout_sync, run_alone
from satune.play.rows import episode_from_row, episode_to_row
from satune.protocols.discussion import debate
from satune.protocols.independent import solo
from satune.protocols.sequential import chain, round_robin
from satune.types import (
    Episode,
    Grade,
    Key,
    Problem,
    Sampling,
    StepResult,
    Turn,
    UserError,
    ids_of,
    logprobs_of,
)
from scripted import EntriesRenderer, Letters, ScriptedEngine, team

KEY = Key(3, "train", stage=2, step=1)
PROBLEMS = [Problem.of("p0", "?", "a"), Problem.of("p1", "?", "b")]


def keyed(seat, entries, key):
    """A message that depends on its key only, as a sampled one does."""
    return key.rng("text").choice("ab")


def test_groups_come_ordered_by_problem_then_sample_with_their_keys():
    engine = ScriptedEngine(keyed)
    progress = []
    episodes = rollout_sync(
        Match(
            team("ann", "bob"),
            chain,
            engine,
            Letters(),
            progress=lambda *told: progress.append(told),
        ),
        PROBLEMS,
        3,
        KEY,
    )
    assert [(e.problem.id, e.sample) for e in episodes] == [
        (p, i) for p in ("p0", "p1") for i in range(3)
    ]
    assert sorted(told[:2] for told in progress) == [(i, 6) for i in range(1, 7)]
    mean = sum(e.reward for e in episodes) / 6
    assert progress[-1][2] == f"rollout, reward {mean:.3f}" and 0 < mean < 1
    wanted = {KEY.at(problem=p, sample=i) for p in ("p0", "p1") for i in range(3)}
    assert set(engine.begun) == set(engine.ended) == wanted and len(engine.begun) == 6
    assert engine.calls[0][2] == KEY.at(problem="p0", sample=0, seat="ann", own_index=0)
    for episode in episodes:
        assert episode.answer == episode.turns[-1].text
        assert episode.reward == float(episode.answer == episode.problem.answer)


def test_every_conversation_has_begun_before_any_speaks():
    engine = ScriptedEngine(keyed)
    rollout_sync(Match(team("ann"), solo, engine, Letters()), PROBLEMS, 2, KEY)
    assert [name for name, _ in engine.events[:5]] == ["begin"] * 4 + ["generate"]


def test_concurrency_bounds_what_is_open_and_changes_nothing_else():
    def run(concurrency):
        engine = ScriptedEngine(keyed, delays={"ann": 2, "bob": 1})
        episodes = rollout_sync(
            Match(team("ann", "bob"), debate, engine, Letters(), concurrency=concurrency),
            PROBLEMS,
            4,
            KEY,
        )
        opened = most = 0
        for name, _ in engine.events:
            opened += {"begin": 1, "end": -1}.get(name, 0)
            most = max(most, opened)
        return episodes, most

    free, most_free = run(None)
    bounded, most_bounded = run(3)
    assert (most_free, most_bounded) == (8, 3)
    assert free == bounded


@pytest.mark.parametrize("concurrency", [None, 1, 2])
def test_the_first_failure_is_raised_as_it_is_and_every_begun_conversation_ends(concurrency):
    class Broken(RuntimeError):
        pass

    def write(seat, entries, key):
        if (key.problem, key.sample) == ("p0", 1):
            raise Broken("engine lost")
        return "a"

    # The others take longer, so that they are still under way when one fails.
    engine = ScriptedEngine(write, delays={"ann": 5})
    with pytest.raises(Broken, match="engine lost"):
        rollout_sync(
            Match(team("ann"), solo, engine, Letters(), concurrency=concurrency), PROBLEMS, 3, KEY
        )
    assert sorted(engine.begun) == sorted(engine.ended)


def test_cancelling_a_rollout_ends_its_conversations():
    engine = ScriptedEngine(keyed, delays={"ann": 10**6})

    async def script():
        job = asyncio.ensure_future(
            rollout(Match(team("ann"), solo, engine, Letters()), PROBLEMS, 2, KEY)
        )
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job

    asyncio.run(script())
    assert len(engine.begun) == 4 and sorted(engine.begun) == sorted(engine.ended)


def test_conversations_that_never_started_end_too():
    class Full(ScriptedEngine):
        def begin(self, key):
            if len(self.begun) == 3:
                raise MemoryError("no room")
            super().begin(key)

    engine = Full(keyed)
    with pytest.raises(MemoryError, match="no room"):
        rollout_sync(Match(team("ann"), solo, engine, Letters()), PROBLEMS, 3, KEY)
    assert len(engine.begun) == 3 and engine.begun == engine.ended


def test_play_brackets_one_conversation():
    engine = ScriptedEngine(lambda *_: "a")
    episode = asyncio.run(
        play(Match(team("ann"), solo, engine, Letters()), PROBLEMS[0], KEY.at(sample=5))
    )  # fmt: skip
    assert engine.begun == engine.ended == [KEY.at(problem="p0", sample=5)]
    assert episode.sample == 5 and episode.reward == 1.0


class Counting(Letters):
    """An environment that is done after three actions and asks its own role once an action."""

    def __init__(self, own_grade=False):
        self.own_grade = own_grade

    def environment(self, problem, rng, generate):
        task, draws = self, [rng.random() for _ in range(2)]

        class World:
            def __init__(self):
                self.actions = []

            async def step(self, action):
                self.actions.append(action)
                reply = await generate([{"role": "user", "content": action}], Sampling(4))
                done = len(self.actions) == 3
                grade = Grade(0.25, {"draw": draws[0]}) if done and task.own_grade else None
                return StepResult(f"saw {reply.text}", done, ("bob",), grade)

        return World()


def test_an_environment_is_played_action_by_action():
    def write(seat, entries, key):
        return "w" if seat == "environment" else f"{seat[0]}{key.own_index}"

    engine = ScriptedEngine(write)
    task = Counting()
    episode = asyncio.run(
        play(Match(team("ann", "bob"), round_robin, engine, task), PROBLEMS[1], KEY)
    )  # fmt: skip
    assert [t.seat for t in episode.turns] == ["ann", "bob", "ann"]
    assert episode.observations == ((1, "saw w"), (2, "saw w"), (3, "saw w"))
    # Observations went to bob alone: his prompt holds ann's message and one observation.
    bob = next(entries for seat, entries, _ in engine.calls if seat == "bob")
    assert [e.kind for e in bob] == ["problem", "foreign", "observation"]
    assert [e.kind for e in engine.calls[-2][1]] == ["problem", "own", "foreign"]
    # No grade came with the last reply: the task grades the last action, "a1" (answer "b").
    assert episode.answer == "a1" and episode.reward == 0.0
    # Three calls of the environment's role, each one prompt message and one byte.
    assert episode.environment_tokens == 6
    own = [key for seat, _, key in engine.calls if seat == "environment"]
    assert [k.own_index for k in own] == [0, 1, 2]
    assert {k.purpose for k in own} == {"environment"} and len(engine.begun) == 1


def test_an_environments_own_grade_counts_and_its_generator_is_keyed():
    def run():
        return asyncio.run(
            play(
                Match(
                    team("ann", "bob"),
                    chain,
                    ScriptedEngine(lambda *_: "b"),
                    Counting(own_grade=True),
                ),
                PROBLEMS[1],
                KEY,
            )
        )

    first, second = run(), run()
    assert first.reward == 0.25 and len(first.turns) == 6
    assert first.grade.components == second.grade.components


async def silent(talk):
    return "a"


async def number(talk):
    return 5


@pytest.mark.parametrize("score", [math.nan, -0.01, 1.01, math.inf])
def test_a_grade_outside_the_unit_interval_is_refused(score):
    class Odd(Letters):
        def grade(self, problem, answer):
            return Grade(score)

    with pytest.raises(UserError, match=r"task letters: its grade of 'p0' is .*\[0, 1\]"):
        asyncio.run(
            play(Match(team("ann"), solo, ScriptedEngine(keyed), Odd()), PROBLEMS[0], KEY)
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problems": [PROBLEMS[0]] * 2}, "two problems have the id 'p0'"),
        ({"samples": 0}, "samples is 0"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"failures": 1.5}, "rollout.failures: is 1.5; give a share from 0 to 1"),
        ({"grading_seconds": 0}, "rollout.grading_seconds: is 0; give more than 0"),
        ({"seats": []}, "no seats"),
        ({"seats": team("ann", "ann")}, "two seats are named 'ann'"),
        ({"protocol": number}, "its answer is a int"),
        ({"protocol": silent, "task": Counting()}, "no seat spoke"),
    ],
)
def test_bad_input_is_named(changes, message):
    match = {
        "seats": team("ann"), "protocol": solo, "engine": ScriptedEngine(keyed), "task": Letters(),
    }  # fmt: skip
    what = {"problems": PROBLEMS, "samples": 1, "key": KEY}
    match |= {name: value for name, value in changes.items() if name not in what}
    what |= {name: value for name, value in changes.items() if name in what}
    with pytest.raises(UserError, match=message):
        rollout_sync(Match(**match), **what)


def test_credits_go_to_seats_that_exist():
    class Crediting(Letters):
        def grade(self, problem, answer):
            return Grade(1.0, seats={"dan": 1.0})

    with pytest.raises(UserError, match="credits the seat 'dan'; the seats are ann"):
        rollout_sync(Match(team("ann"), solo, ScriptedEngine(keyed), Crediting()), PROBLEMS, 1, KEY)


def test_turns_without_ids_are_else_the_same():
    """The view is told of the whole completion all the same: the next prompt goes on from it."""
    renderer = EntriesRenderer()

    def played(**options):
        match = Match(
            team("ann", renderer=renderer), solo, ScriptedEngine(keyed), Letters(), **options
        )
        return asyncio.run(rollout(match, PROBLEMS, 2, KEY))

    with_ids, without = played(), played(keep_ids=False)
    assert all(t.completion_ids and t.sampled_logprobs for e in with_ids for t in e.turns)
    none = {"prompt_ids": None, "completion_ids": None, "sampled_logprobs": None}
    assert without == [
        replace(e, turns=tuple(replace(t, **none) for t in e.turns)) for e in with_ids
    ]
    assert all(c.ids for _, view in renderer.views for c in view.written)


def test_no_problems_no_episodes():
    assert (
        rollout_sync(Match(team("ann"), solo, ScriptedEngine(keyed), Letters()), [], 2, KEY) == []
    )


texts = st.text(max_size=20)
floats = st.floats(allow_nan=False, allow_infinity=False)
singles = st.floats(allow_nan=False, width=32)
turns = st.builds(
    Turn, seat=texts, agent=texts, moment=st.integers(0, 9), own_index=st.integers(0, 9),
    text=texts, finish_reason=st.sampled_from(["stop", "length"]), version=st.integers(0, 9),
    prompt_ids=st.none() | st.lists(st.integers(0, 10**6), max_size=4).map(ids_of),
    completion_ids=st.none() | st.lists(st.integers(0, 10**6), max_size=4).map(ids_of),
    sampled_logprobs=st.none() | st.lists(singles, max_size=4).map(logprobs_of),
    dropped=st.integers(0, 9), prompt_tokens=st.integers(0, 9), completion_tokens=st.integers(0, 9),
)  # fmt: skip
episodes = st.builds(
    Episode,
    problem=st.builds(
        Problem, id=texts,
        prompt=st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=3)
        .map(tuple),
        answer=st.none() | texts | st.integers() | st.lists(floats, max_size=3),
        metadata=st.dictionaries(texts, texts | floats | st.lists(texts, max_size=2), max_size=3),
    ),
    sample=st.integers(0, 9), turns=st.lists(turns, max_size=3).map(tuple),
    answer=st.none() | texts,
    grade=st.builds(
        Grade, score=floats, components=st.dictionaries(texts, floats, max_size=2), detail=texts,
        seats=st.none() | st.dictionaries(texts, floats, max_size=2),
    ),
    observations=st.lists(st.tuples(st.integers(0, 9), texts), max_size=3).map(tuple),
    environment_tokens=st.integers(0, 99),
)  # fmt: skip


@settings(max_examples=50)
@given(episodes)
def test_rows_give_episodes_back_exactly(tmp_path_factory, episode):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    append_rows(path, [episode_to_row(episode)])
    (row,) = read_rows(path)
    again = episode_from_row(row)
    assert again == episode
    assert repr(again) == repr(episode)  # types too: tuples stay tuples, 1.0 stays a float


def test_a_row_of_another_version_is_refused():
    episode = Episode(PROBLEMS[0], 0, (), None, Grade(1.0))
    row = episode_to_row(episode)
    with pytest.raises(UserError, match="episode row: an unknown field 'colour'"):
        episode_from_row({**row, "colour": 1})
    with pytest.raises(UserError, match="grade row: no field 'detail'"):
        episode_from_row({**row, "grade": {k: v for k, v in row["grade"].items() if k != "detail"}})


LOOPS = """
import sys
from satune.play.rollout import run_alone

async def nothing():
    return []

try:
    print("on", flush=True)
    while True:
        run_alone(nothing, [])
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_never_finds_an_event_loop_half_made() -> None:
    # Most of the time goes into making and closing loops, so that a few of twelve would be found.
    for number in range(12):
        going = subprocess.Popen(
            [sys.executable, "-c", LOOPS], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")},
        )  # fmt: skip
        assert going.stdout is not None
        going.stdout.readline()
        time.sleep(0.02 + 0.0007 * number)
        going.send_signal(signal.SIGINT)
        _, err = going.communicate(timeout=30)
        assert (going.returncode, err) == (130, "")


def test_what_is_played_can_be_ended_from_another_thread() -> None:
    ends: list[Callable[[], None]] = []
    started, caught, engine = threading.Event(), list[BaseException](), ScriptedEngine(keyed)

    async def forever() -> None:
        started.set()
        await asyncio.Event().wait()

    def play_on() -> None:
        try:
            run_alone(forever, [engine], ends.append)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=play_on, daemon=True)
    thread.start()
    assert started.wait(60)
    ends[0]()
    thread.join(60)
    assert [type(error) for error in caught] == [KeyboardInterrupt] and engine.closed == 1


def test_a_problem_has_the_name_in_its_keys_that_it_is_given():
    engine = ScriptedEngine(keyed)
    match = Match(team("ann"), solo, engine, Letters())
    problems = [Problem.of("p0", "one"), Problem.of("p1", "two")]
    key = Key(7, "serve")
    named = asyncio.run(rollout(match, problems, 2, key, name=text_digest))
    expected = [text_key(7, problem, sample) for problem in problems for sample in range(2)]
    assert sorted(engine.begun) == sorted(expected)
    assert [episode.problem.id for episode in named] == ["p0", "p0", "p1", "p1"]
    # SHA-256 of "one", by sha256sum.
    assert expected[0].problem == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    same = [Problem.of("p0", "one"), Problem.of("p1", "one")]
    with pytest.raises(UserError, match="'p0' and 'p1' have the same text"):
        asyncio.run(rollout(match, same, 2, key, name=text_digest))


def test_no_draw_depends_on_a_keys_copy():
    key = text_key(7, Problem.of("p0", "one \ud800"))
    assert key.rng("x").random() == key.at(copy=5).rng("x").random()
    assert conversation_id(key) != conversation_id(key.at(copy=5))


def test_turns_are_told_of_at_the_end_of_their_moment():
    told: list[tuple[int, str, int]] = []
    said: list[int] = []

    async def script(talk):
        await talk.all_say(["ann", "bob"])
        said.append(len(told))
        return (await talk.say("ann")).text

    match = Match(
        team("ann", "bob"),
        script,
        ScriptedEngine(keyed, delays={"ann": 9}),
        Letters(),
        on_turn=lambda turn: told.append((turn.moment, turn.seat, turn.own_index)),
    )
    asyncio.run(play(match, PROBLEMS[0], KEY))
    assert said == [2] and told == [(0, "ann", 0), (0, "bob", 0), (1, "ann", 1)]
