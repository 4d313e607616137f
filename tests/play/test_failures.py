"""A failed conversation is an episode: whose failure it was, what is kept, when the run stops."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from satune.files.events import count_failures
from satune.play.episode import REDRAWN
from satune.play.grading import REGRADED
from satune.play.match import Match
from satune.play.rollout import rollout_sync
from satune.protocols.independent import solo, vote
from satune.protocols.sequential import chain
from satune.types import (
    EpisodeFailure,
    Grade,
    Key,
    Problem,
    Prompt,
    Sampling,
    StepResult,
    UserError,
)
from scripted import EntriesRenderer, EntriesView, Letters, ScriptedEngine, team

KEY = Key(3, "train", stage=2, step=1)
PROBLEMS = [Problem.of("p0", "?", "a"), Problem.of("p1", "?", "b")]
SAMPLES = 4
CHOSEN = ("p0", 1)
"""The one conversation of eight that something happens to."""


def keyed(seat, entries, key):
    return key.rng("text").choice("ab")


def chosen(key: Key) -> bool:
    return (key.problem, key.sample) == CHOSEN


def run(write=keyed, task=None, protocol=chain, seats=None, failures=0.2, **options):
    engine = ScriptedEngine(write)
    match = Match(
        seats or team("ann", "bob"), protocol, engine, task or Letters(), failures=failures,
        **options,
    )  # fmt: skip
    episodes = rollout_sync(match, PROBLEMS, SAMPLES, KEY)
    return {(e.problem.id, e.sample): e for e in episodes}, engine


PLAIN, _ = run()


def others_are_as_ever(episodes) -> bool:
    return all(episodes[at] == PLAIN[at] for at in PLAIN if at != CHOSEN)


# The policy's own: reward 0, what was written stays


class Full(EntriesRenderer):
    """The second seat's context is full in one conversation."""

    def view(self, seat):
        class View(EntriesView):
            def prompt(self, entries, max_new_tokens):
                if entries[-1].text == "too long":
                    raise EpisodeFailure("context: it is full", policy=True)
                return super().prompt(entries, max_new_tokens)

        return View()


def test_a_context_that_overflows_keeps_the_turns_before():
    def write(seat, entries, key):
        return "too long" if chosen(key) else keyed(seat, entries, key)

    episodes, engine = run(write, seats=team("ann", "bob", renderer=Full()))
    failed = episodes[CHOSEN]
    assert (failed.status, failed.masked, failed.reward) == ("failed", False, 0.0)
    assert failed.failure.reason == "context: it is full" and failed.failure.kind == "context"
    assert [turn.text for turn in failed.turns] == ["too long"] and failed.answer is None
    assert failed.turns[0].completion_ids is not None  # it can be trained on
    assert others_are_as_ever(episodes)
    assert sorted(engine.begun) == sorted(engine.ended)


@pytest.mark.parametrize("policy", [True, False])
def test_what_a_server_refuses_for_its_text_is_not_asked_again(policy):
    asked = Counter()

    def write(seat, entries, key):
        if chosen(key) and seat == "bob":
            asked[key] += 1
            raise EpisodeFailure("content filter: refused", policy=policy)
        return keyed(seat, entries, key)

    episodes, _ = run(write)
    assert set(asked.values()) == {1 if policy else 1 + REDRAWN}
    assert episodes[CHOSEN].masked is not policy
    assert [turn.seat for turn in episodes[CHOSEN].turns] == ["ann"]
    assert others_are_as_ever(episodes)


class Grading(Letters):
    """A task that grades by a function."""

    def __init__(self, grade):
        self.by = grade

    def grade(self, problem, answer):
        return self.by(problem, answer) or super().grade(problem, answer)


@pytest.mark.parametrize("error", [ValueError("odd\ntext"), StopIteration(), SystemExit(3)])
def test_a_grader_that_raises_costs_its_own_conversation(error):
    def grade(problem, answer):
        if answer == "no number":
            raise error

    def write(seat, entries, key):
        return "no number" if chosen(key) else keyed(seat, entries, key)

    episodes, _ = run(write, Grading(grade))
    failed = episodes[CHOSEN]
    assert (failed.status, failed.masked, failed.reward) == ("failed", False, 0.0)
    assert failed.failure.kind == "grader" and type(error).__name__ in failed.failure.reason
    assert "\n" not in failed.failure.reason
    # The conversation itself is whole.
    assert failed.answer == "no number" and len(failed.turns) == 2
    assert others_are_as_ever(episodes)


def test_a_grader_that_never_ends_is_given_up():
    never = threading.Event()
    # All of them, so that no grade depends on how fast it is given.
    episodes, _ = run(
        task=Grading(lambda *_: never.wait()), failures=1.0, grading_seconds=0.05
    )  # fmt: skip
    never.set()
    reasons = {e.failure.reason for e in episodes.values()}
    assert reasons == {"grader: TimeoutError: no result within 0.05 s"}
    assert not any(e.masked for e in episodes.values())


def test_a_vote_that_cannot_be_counted_is_a_graders_error():
    class Incomparable(Letters):
        def extract(self, text):
            return str(int(text)) if text == "one" else super().extract(text)

    def write(seat, entries, key):
        return "one" if chosen(key) else keyed(seat, entries, key)

    episodes, _ = run(write, Incomparable(), vote)
    failure = episodes[CHOSEN].failure
    assert failure.policy and failure.reason.startswith("grader: ValueError")
    assert len(episodes[CHOSEN].turns) == 2


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("<think>a", True),
        ("<think>b</think> a", False),
        ("it is a <think>b", False),  # it said something before
        ("b</think>a", False),
    ],
)
def test_a_thought_that_never_ends_is_no_answer(text, fails):
    def write(seat, entries, key):
        return text if chosen(key) else keyed(seat, entries, key)

    episodes, _ = run(write, protocol=solo)
    failure = episodes[CHOSEN].failure
    assert (failure is not None) is fails
    assert not fails or (failure.policy and failure.kind == "unfinished thought")


class Acting(Letters):
    """An environment of one action that some actions break."""

    def environment(self, problem, rng, generate):
        class World:
            async def step(self, action):
                if action == "q":
                    raise KeyError(action)
                if action == "ask":
                    await generate([{"role": "user", "content": "?"}], Sampling(4))
                return StepResult("", True)

        return World()


def test_an_action_that_breaks_the_environment_is_the_policys_failure():
    def write(seat, entries, key):
        return "q" if chosen(key) else keyed(seat, entries, key)

    episodes, _ = run(write, Acting())
    failure = episodes[CHOSEN].failure
    assert failure.policy and failure.reason == "action: KeyError: 'q'"
    assert episodes[CHOSEN].reward == 0.0 and len(episodes[CHOSEN].turns) == 2


def test_an_engine_that_breaks_inside_an_environment_stops_the_run():
    def write(seat, entries, key):
        if seat == "environment":
            raise MemoryError("no room")
        return "ask"

    with pytest.raises(MemoryError, match="no room"):
        run(write, Acting())


# The world's: drawn anew with the same key, then masked


def test_what_the_world_ended_is_played_again_with_the_same_key():
    fails = {2: True}

    def write(seat, entries, key):
        if chosen(key) and seat == "bob" and fails[2]:
            fails[2] = False
            raise EpisodeFailure("unreachable: no answer", policy=False)
        return keyed(seat, entries, key)

    episodes, engine = run(write)
    assert episodes == PLAIN
    whole = KEY.at(problem=CHOSEN[0], sample=CHOSEN[1])
    about = [(name, k.seat) for name, k in engine.events if k.at(seat="", own_index=0) == whole]
    once = [("begin", ""), ("generate", "ann"), ("generate", "bob"), ("end", "")]
    assert about == once * 2


def test_what_the_world_ends_again_and_again_is_masked():
    def write(seat, entries, key):
        if chosen(key):
            raise EpisodeFailure("unreachable: no answer", policy=False)
        return keyed(seat, entries, key)

    episodes, engine = run(write)
    failed = episodes[CHOSEN]
    assert (failed.status, failed.masked, failed.reward) == ("failed", True, 0.0)
    whole = KEY.at(problem=CHOSEN[0], sample=CHOSEN[1])
    assert engine.begun.count(whole) == engine.ended.count(whole) == 1 + REDRAWN
    assert others_are_as_ever(episodes)
    counts = count_failures(episodes.values())
    assert counts == {"policy": {}, "world": {"unreachable": 1}}


@pytest.mark.parametrize("deaths", [REGRADED, REGRADED + 1])
def test_a_graders_process_that_dies_is_asked_again_about_the_same_text(deaths):
    left = [deaths]

    def grade(problem, answer):
        if answer == "ab" and left[0]:
            left[0] -= 1
            raise EpisodeFailure("worker: it ended", policy=False)

    def write(seat, entries, key):
        return "ab" if chosen(key) else keyed(seat, entries, key)

    episodes, engine = run(write, Grading(grade), solo)
    assert episodes[CHOSEN].masked is (deaths > REGRADED)
    assert engine.begun.count(KEY.at(problem=CHOSEN[0], sample=CHOSEN[1])) == 1


# Mistakes, and too many failures


@pytest.mark.parametrize("where", ["engine", "grader"])
def test_a_mistake_of_the_user_stops_at_once(where):
    def refuse(*_):
        raise UserError("the key is wrong; set it anew")

    task = Grading(refuse) if where == "grader" else Letters()
    with pytest.raises(UserError, match="the key is wrong"):
        run(refuse if where == "engine" else keyed, task, failures=1.0)


def failing(count, total=8):
    """A writer whose first ``count`` conversations fail, each for a reason of its own but one."""
    names = [(p.id, s) for p in PROBLEMS for s in range(SAMPLES)][:count]

    def write(seat, entries, key):
        at = (key.problem, key.sample)
        if at in names:
            kind = "overflow" if names.index(at) < 2 else f"odd {at}"
            raise EpisodeFailure(f"{kind}: too much", policy=True)
        return keyed(seat, entries, key)

    return write


@pytest.mark.parametrize(
    # Of 8: one alone is always borne, unless none is to be; 3/8 = .375 bears three.
    ("failures", "borne"), [(0.0, 0), (0.01, 1), (0.2, 1), (0.375, 3), (1.0, 8)],
)  # fmt: skip
def test_beyond_a_share_of_failures_the_rollout_stops_and_says_why(failures, borne):
    episodes, _ = run(failing(borne), failures=failures)
    assert sum(e.failure is not None for e in episodes.values()) == borne
    if borne < 8:
        with pytest.raises(UserError) as stopped:
            run(failing(borne + 1), failures=failures)
        line = str(stopped.value)
        assert line.startswith(f"rollout: {borne + 1} of 8 conversations failed, more than ")
        assert f"rollout.failures ({failures:g}) allows: overflow: too much" in line
        assert ("(2 times)" in line) is (borne + 1 >= 2) and "\n" not in line


def test_thoughts_that_never_end_do_not_stop_a_rollout():
    """A policy that has not learnt to end them would else never get the chance."""
    episodes, _ = run(lambda *_: "<think>on and on", protocol=solo, failures=0.0)
    assert all(e.failure is not None and e.reward == 0.0 for e in episodes.values())


def test_prompts_are_not_what_fails():
    # A plain exception of a renderer is a mistake in the code, not the policy's.
    class Broken(EntriesRenderer):
        def view(self, seat):
            class View(EntriesView):
                def prompt(self, entries, max_new_tokens) -> Prompt:
                    raise ZeroDivisionError

            return View()

    with pytest.raises(ZeroDivisionError):
        run(seats=team("ann", renderer=Broken()), protocol=solo)


# Seats that are graded like the team


def test_each_seats_last_message_may_be_graded_too():
    asked = Counter()

    def grade(problem, answer):
        asked[answer] += 1
        if answer == "c" and problem.id == "p1":
            raise ValueError("cannot be read")

    def write(seat, entries, key):
        return {"ann": "a", "bob": "b", "cy": "c"}[seat]

    options = {"task": Grading(grade), "protocol": vote, "seats": team("ann", "bob", "cy")}
    plain, _ = run(write, **options)
    assert all(e.grade.seats is None for e in plain.values())
    assert asked == {"a": 2 * SAMPLES}  # ann's message is the team's
    episodes, _ = run(write, **options, grade_seats=True)
    for (problem, _), episode in episodes.items():
        right = {"p0": "ann", "p1": "bob"}[problem]
        seats = {seat: float(seat == right) for seat in ("ann", "bob", "cy")}
        # What cannot be graded is worth nothing, and costs its own seat alone.
        assert episode.grade.seats == seats and episode.failure is None
        assert episode.reward == seats["ann"]


def test_a_task_that_credits_seats_is_not_asked_about_them():
    def grade(problem, answer):
        return Grade(1.0, seats={"ann": 0.25})

    episodes, _ = run(task=Grading(grade), grade_seats=True)
    assert all(e.grade.seats == {"ann": 0.25} for e in episodes.values())
