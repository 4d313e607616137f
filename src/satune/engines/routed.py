"""Several engines behind one: each seat's completions are drawn by the engine it was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from satune.engines.base import MayWait
from satune.types import Completion, Engine, Key, Prompt, Sampling


class RoutedEngine:
    """``engine`` for every seat but those of ``seats``, which have one of their own.

    ``agents`` names the agents that a seat's own engine serves; news of weights goes to the engine
    that has them.
    """

    def __init__(
        self, engine: Engine, seats: Mapping[str, Engine], agents: Mapping[str, Engine]
    ) -> None:
        self.engine = engine
        self.seats = dict(seats)
        self.agents = dict(agents)

    @property
    def engines(self) -> list[Engine]:
        """Each engine once."""
        return list({id(each): each for each in (self.engine, *self.seats.values())}.values())

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        return await self.seats.get(seat, self.engine).generate(seat, prompt, sampling, key)

    def publish(self, agent: str, version: int, weights: Mapping[str, Any]) -> Any:
        return self.agents.get(agent, self.engine).publish(agent, version, weights)

    def begin(self, key: Key) -> None:
        for engine in self.engines:
            engine.begin(key)

    def end(self, key: Key) -> None:
        for engine in self.engines:
            engine.end(key)

    def cut(self) -> None:
        """As ``engines.base.MayWait``, for those of them that may wait."""
        for engine in self.engines:
            if isinstance(engine, MayWait):
                engine.cut()

    async def close(self) -> None:
        for engine in self.engines:
            await engine.close()
