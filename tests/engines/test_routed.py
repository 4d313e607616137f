"""Seats of one team in several engines, and a hand-over to a seat that is served elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from satune.core.confidence import Spending
from satune.engines.local import LocalEngine
from satune.engines.routed import RoutedEngine
from satune.play.match import Match
from satune.play.rollout import rollout
from satune.protocols.sequential import chain
from satune.swap.handover import hand_over_between
from satune.swap.settings import HandOverSettings
from satune.tasks.catalog import draw
from satune.types import Completion, Entry, Grade, Key, Problem, Prompt, Sampling, Seat, ids_of
from scripted import EntriesRenderer, ScriptedEngine
from tiny_models import tiny_policy

KEY = Key(0, "swap")


class Served(ScriptedEngine):
    """Answers by what it is asked, late, and takes news of its own agents' weights."""

    def __init__(self, says: str, delay: int = 0) -> None:
        super().__init__(lambda seat, entries, key: says, {"bob": delay})
        self.news: list[str] = []

    def publish(self, agent: str, version: int, weights: object) -> None:
        self.news.append(agent)


class OneLetter:
    """1 for the letter b."""

    name = "one letter"
    fresh = True

    def problem_at(self, split: str, index: int) -> Problem:
        return Problem.of(f"{split}-{index}", "say b", "b")

    def problems(self, split: str) -> Sequence[Problem]:
        return [self.problem_at(split, index) for index in range(4)]

    def extract(self, text: str) -> str | None:
        return text or None

    def equal(self, a: str, b: str) -> bool:
        return a == b

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        return Grade(float(answer == "b"))


class IdsView:
    """A view for tests of the local engine: any entries make a prompt of two ids."""

    def prompt(self, entries: Sequence[Entry], max_new_tokens: int) -> Prompt:
        return Prompt((), ids=ids_of((1 + len(entries), 2)))

    def wrote(self, completion: Completion) -> None: ...


class IdsRenderer:
    def view(self, seat: str) -> IdsView:
        return IdsView()


def seats() -> list[Seat]:
    ann = Seat("ann", "ann", IdsRenderer(), Sampling(4, temperature=0.8))
    return [ann, Seat("bob", "bob", EntriesRenderer(), Sampling(4))]


def test_each_seat_is_written_by_its_own_engine_beside_a_local_one() -> None:
    local = LocalEngine({"ann": tiny_policy("ann")}, {"ann": "ann"})
    served = Served("b", delay=5)
    engine = RoutedEngine(local, {"bob": served}, {"bob": served})

    async def play(with_engine: RoutedEngine) -> list:
        problems = OneLetter().problems("eval")
        jobs = rollout(Match(seats(), chain, with_engine, OneLetter()), problems, 3, KEY)
        return await asyncio.wait_for(jobs, 600)

    episodes = asyncio.run(play(engine))
    assert [[turn.seat for turn in e.turns] for e in episodes] == [["ann", "bob"]] * 12
    assert all(e.turns[1].text == "b" and e.reward == 1.0 for e in episodes)
    # What the local engine wrote does not hang on how long the other one took.
    local_again = LocalEngine({"ann": tiny_policy("ann")}, {"ann": "ann"})
    quick = Served("b")
    again = asyncio.run(play(RoutedEngine(local_again, {"bob": quick}, {})))
    assert [e.turns[0].completion_ids for e in again] == [
        e.turns[0].completion_ids for e in episodes
    ]
    assert len(served.begun) == len(served.ended) == 12
    engine.publish("bob", 1, {})
    engine.publish("ann", 3, {})
    assert served.news == ["bob"] and local.versions["ann"] == 3


def test_a_served_model_takes_a_seat_by_hand_over() -> None:
    # No log-probabilities and no tokenizer of its own are asked for.
    incumbent = ScriptedEngine(lambda seat, entries, key: "ab"[key.rng("x").random() < 0.5])
    entries = EntriesRenderer()
    places = [Seat(name, name, entries, Sampling(4)) for name in ("ann", "bob")]
    old = Match(places, chain, incumbent, OneLetter())
    settings = HandOverSettings(tolerance=0.1, problems=64, samples=4, looks=3)
    verdicts = {}
    for says in ("b", "a"):
        engine = RoutedEngine(incumbent, {"bob": Served(says)}, {})
        new = replace(old, engine=engine)
        found = hand_over_between(
            old,
            new,
            lambda count, start: draw(old.task, "certify", count, start),
            settings,
            KEY,
            Spending(0.05, 3),
        )
        verdicts[says] = found.verdict
        assert found.looks[0]["new"] == float(says == "b")
    assert verdicts == {"b": "accepted", "a": "refused"}
