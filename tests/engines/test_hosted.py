"""The engine of a team some of whose agents decode at their hosts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from satune.engines.hosted import Answer, HostedEngine, HostedRequest, Turned
from satune.types import Completion, Key, Prompt, Sampling

KEY = Key(0, "train", 1, 1, 0)


class Host:
    """It ends one request a call, the oldest, and gives up those whose conversation is over."""

    def __init__(self) -> None:
        self.calls = 0
        self.held: list[HostedRequest] = []

    def decode(
        self, news: Sequence[Turned], requests: Sequence[HostedRequest], *, decode: bool
    ) -> list[Answer]:
        self.calls += 1
        turned = {each.conversation for each in news}
        self.held = [each for each in self.held if each.conversation not in turned]
        self.held += requests
        if not decode or not self.held:
            return []
        number = self.held.pop(0).number
        return [(number, Completion(f"{number}", "stop", 0, completion_tokens=1))]

    def publish(self, version: int) -> None: ...

    def cut(self) -> None: ...


def test_what_a_host_has_given_up_is_not_waited_for() -> None:
    host = Host()
    engine = HostedEngine({}, {"a": "ann"}, {"ann": host})

    def ask(sample: int) -> asyncio.Task[Completion]:
        key = KEY.at(problem="p", sample=sample, seat="a")
        engine.begin(key)
        return asyncio.create_task(engine.generate("a", Prompt(()), Sampling(4), key))

    async def some() -> str:
        first, second = ask(0), ask(1)
        assert (await first).text == "1"
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        for sample in (0, 1):
            engine.end(KEY.at(problem="p", sample=sample))
        third = await asyncio.wait_for(ask(2), 5)
        engine.end(KEY.at(problem="p", sample=2))
        assert engine._driver is not None
        await asyncio.wait_for(engine._driver, 5)
        return third.text

    assert asyncio.run(some()) == "3"
    assert host.calls <= 4


def test_a_host_is_not_told_of_conversations_in_which_it_was_asked_for_nothing() -> None:
    """Or what is to be told of them would grow for as long as nobody asks it."""
    engine = HostedEngine({}, {"a": "ann"}, {"ann": Host()})
    for sample in range(100):
        engine.begin(KEY.at(problem="p", sample=sample))
    for sample in range(99):
        engine.end(KEY.at(problem="p", sample=sample))
    assert [(each.conversation[-2], each.begun) for each in engine._news["ann"]] == [(99, True)]
