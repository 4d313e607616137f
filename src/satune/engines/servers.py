"""The servers that an evaluation asks: an engine an address, so that each is asked at one pace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from satune.engines.openai import Answers, OpenAIEngine, ServerSettings, address_of
from satune.types import Completion, Key, Prompt, Sampling, UserError


class Servers:
    """Engines by address, each opened when it is first asked for. ``settings`` hold for every one,
    the pace included; what they answer lies together in ``answers``.

    An address is sent the key in its own environment variable, and no other's; ``key_variable`` is
    that of an address for which none is named.
    """

    def __init__(
        self, settings: ServerSettings, key_variable: str, answers: Path | None = None
    ) -> None:
        self._settings = settings
        self._key_variable = key_variable
        self._path = answers
        self._answers: Answers | None = None
        self._engines: dict[str, OpenAIEngine] = {}

    @property
    def engines(self) -> list[OpenAIEngine]:
        return list(self._engines.values())

    def at(self, url: str, key_variable: str | None = None) -> OpenAIEngine:
        """The engine of an address, the same one each time.

        Raises UserError for what is no address, and for one whose key was said to be elsewhere.
        """
        address = str(address_of(url)).rstrip("/")
        if address not in self._engines:
            if self._answers is None:
                self._answers = Answers(self._path)
            self._engines[address] = OpenAIEngine(
                url,
                {},
                self._settings,
                key_variable=key_variable or self._key_variable,
                answers=self._answers,
            )
        engine = self._engines[address]
        if key_variable not in (None, engine.key_variable):
            raise UserError(
                f"{engine.base_url}: its key is in ${engine.key_variable} and in ${key_variable}; "
                "name one of them"
            )
        return engine

    async def close(self) -> None:
        for engine in self.engines:
            await engine.close()


class ServedRole:
    """A model at a server that plays the roles of an environment; others may use the server too."""

    def __init__(self, server: OpenAIEngine, model: str) -> None:
        self._server = server
        self._model = model

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        return await self._server.complete(self._model, prompt, sampling, key)

    def publish(self, agent: str, version: int, weights: Mapping[str, Any] | None = None) -> None:
        raise AssertionError("a role is not trained")

    def begin(self, key: Key) -> None: ...

    def end(self, key: Key) -> None: ...
