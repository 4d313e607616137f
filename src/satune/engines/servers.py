"""Models at servers: an engine an address, so that each has one pace, and who plays there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from satune.agents.pretrained import AgentSpec
from satune.engines.answers import Answers
from satune.engines.routed import RoutedEngine
from satune.engines.settings import ServerSettings
from satune.loading import KEY_VARIABLE
from satune.types import Completion, Engine, Key, Prompt, Sampling, ServedModel, UserError

if TYPE_CHECKING:  # httpx is an extra
    from satune.engines.openai import OpenAIEngine


class Servers:
    """Engines by address, each opened when it is first asked for. What they answer lies together in
    the file ``answers`` (None: nothing is written).

    ``given`` are options of ``team.agents.*.server`` that hold for every server, whatever an agent
    says. An address is sent the key in its own environment variable, and no other's;
    ``key_variable`` is that of an address for which none is named.
    """

    def __init__(
        self,
        given: Mapping[str, Any] | None = None,
        key_variable: str = KEY_VARIABLE,
        answers: Path | None = None,
    ) -> None:
        self._given = dict(given or {})
        self._key_variable = key_variable
        self._path = answers
        self._answers: Answers | None = None
        self._engines: dict[str, OpenAIEngine] = {}

    @property
    def engines(self) -> list[OpenAIEngine]:
        return list(self._engines.values())

    def at(
        self, url: str, key_variable: str | None = None, options: Mapping[str, Any] | None = None
    ) -> OpenAIEngine:
        """The engine of an address, the same one each time. ``options`` None: asked as it is
        already, or as every other.

        Raises UserError for what is no address, for options out of range, for an address whose key
        or options were said to be others, and without the package that asks.
        """
        try:
            from satune.engines.client import address_of
            from satune.engines.openai import OpenAIEngine
        except ModuleNotFoundError as error:
            raise UserError(
                f"{url}: to ask a server needs {error.name}; pip install 'satune[openai]'"
            ) from None
        address = str(address_of(url)).rstrip("/")
        known = self._engines.get(address)
        variable = key_variable or (known.settings.api_key_env if known else self._key_variable)
        try:
            settings = ServerSettings(variable, **{**(options or {}), **self._given})
        except ValueError as error:
            raise UserError(str(error)) from None
        if known is None:
            if self._answers is None:
                self._answers = Answers(self._path)
            known = OpenAIEngine(url, {}, settings, answers=self._answers)
            self._engines[address] = known
        if variable != known.settings.api_key_env:
            raise UserError(
                f"{known.base_url}: its key is in ${known.settings.api_key_env} and in "
                f"${variable}; name one of them"
            )
        if options is not None and settings != known.settings:
            raise UserError(
                f"{known.base_url}: is to be asked in two ways; give every agent there the same "
                "server section"
            )
        return known

    def model(self, model: ServedModel, key_variable: str | None = None) -> ServedEngine:
        """What asks this model. Raises UserError as ``at``."""
        return ServedEngine(self.at(model.address, key_variable), model.name)

    async def close(self) -> None:
        for engine in self.engines:
            await engine.close()


class ServedEngine:
    """Asks one model at a server, for whoever it plays; others may use the server too. ``thinking``
    is passed to its chat template where it is given."""

    def __init__(self, server: OpenAIEngine, model: str, thinking: bool | None = None) -> None:
        self._server = server
        self._model = model
        self._extra = (
            {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}
        )

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        # Two teams that play with equal keys may have models of one name at two servers.
        place = self._server.base_url
        return await self._server.complete(
            self._model, prompt, sampling, key, place=place, extra=self._extra
        )

    def publish(self, agent: str, version: int, weights: Mapping[str, Any]) -> None:
        raise AssertionError("a served model is not trained")

    def begin(self, key: Key) -> None: ...

    def end(self, key: Key) -> None: ...

    async def close(self) -> None:
        await self._server.close()


def with_served(
    local: Engine, specs: Mapping[str, AgentSpec], seats: Mapping[str, str], servers: Servers
) -> Engine:
    """``local``, and the models of the served agents in ``specs`` for the seats that they fill."""
    there: dict[str, Engine] = {}
    for name, spec in specs.items():
        model = spec.served
        assert model is not None
        options = dict(spec.server)
        variable = options.pop("api_key_env", KEY_VARIABLE)
        server = servers.at(model.address, variable, options)
        there[name] = ServedEngine(server, model.name, spec.template.enable_thinking)
    if not there:
        return local
    of_seats = {seat: there[agent] for seat, agent in seats.items() if agent in there}
    return RoutedEngine(local, of_seats, there)
