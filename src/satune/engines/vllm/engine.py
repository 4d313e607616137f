"""Completions from vLLM, by token ids and with the weights that are being trained.

Each model has a server in an environment of its own. What it says of probabilities is kept beside
the tokens, and never enters a ratio: the learner scores every batch itself.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import torch

from satune.agents.policy import Policy
from satune.engines.vllm.files import check_checkpoint
from satune.engines.vllm.place import Place
from satune.engines.vllm.scratch import Scratch
from satune.engines.vllm.server import DIRECT, KEPT, interpreter
from satune.engines.vllm.settings import VLLMSettings
from satune.types import Completion, Key, Prompt, Sampling, UserError


class VLLMEngine:
    """``policies`` by agent, ``seats`` to agents. Servers are started when weights are given or
    something is asked, all at once, and end with the engine or the process.

    Raises UserError for a model that vLLM is not given: one in float64, one of several policies,
    one whose checkpoint has other names; and for another number of addresses than models."""

    def __init__(
        self, policies: Mapping[str, Policy], seats: Mapping[str, str], settings: VLLMSettings
    ) -> None:
        self.seats = dict(seats)
        self.settings = settings
        for name, policy in policies.items():
            _check(name, policy)
        if not settings.servers:
            interpreter()
        groups = places_of(policies)
        if settings.servers and len(settings.servers) != len(groups):
            raise UserError(
                f"engine.servers: {len(settings.servers)} addresses for {len(groups)} models "
                f"({'; '.join(', '.join(group) for group in groups)}); give one each"
            )
        # Weights on their way lie where TMPDIR says.
        scratch = Scratch()
        weakref.finalize(self, scratch.remove)
        self._places: dict[str, Place] = {}
        for number, group in enumerate(groups):
            directory = scratch.path / f"model-{number}"
            place = Place(group, settings, directory, number, len(groups))
            self._places |= dict.fromkeys(group, place)
        self._client: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient] | None = None
        self._confirmed: dict[int, asyncio.Future[None]] = {}
        self._starting: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    def publish(
        self, agent: str, version: int, weights: Mapping[str, Any]
    ) -> Mapping[str, Any] | None:
        """Give the agent's server its weights and see that it has them. Gives what that showed, for
        the run's events. Raises UserError where the server has other weights than these."""
        for place in self._places.values():
            place.server.uncut()
        self._launch_all()
        found = self._places[agent].publish(agent, version, weights)
        return None if found is None else found.figures

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        """Draw a completion. Raises UserError for an unknown seat or a prompt without ids, and as
        ``Place.complete``."""
        if seat not in self.seats:
            raise UserError(f"no seat {seat!r}; there are: {', '.join(self.seats)}")
        if not prompt.ids:
            raise UserError(f"seat {seat}: vLLM is given token ids, the prompt has none")
        agent = self.seats[seat]
        place = self._places[agent]
        if not place.has(agent):
            async with self._lock():
                await self._launched()
                await place.ready(agent)
        client = await self._connections(place)
        return await place.complete(client, agent, prompt.ids, sampling, key)

    def begin(self, key: Key) -> None: ...

    def end(self, key: Key) -> None: ...

    async def close(self) -> None:
        """Close the running event loop's connections. The servers stay."""
        if self._client is not None:
            await self._client[1].aclose()
            self._client = None
        self._confirmed.clear()

    def cut(self) -> None:
        """Have whoever waits for a server stop waiting, in whatever thread."""
        for place in self._places.values():
            place.server.cut()

    def stop(self) -> None:
        """End the servers that were started here."""
        for place in set(self._places.values()):
            place.server.stop()

    def _launch_all(self) -> None:
        on_gpu = bool(self.settings.devices) or torch.cuda.is_available()
        for place in dict.fromkeys(self._places.values()):
            if not place.server.started:
                place.launch()
            if on_gpu and not place.server.answered:
                place.wait()  # it measures what is free, while nobody else may take of it

    async def _launched(self) -> None:
        """``_launch_all`` in a thread, which waits for nothing when this is cancelled."""
        servers = [place.server for place in self._places.values()]
        for server in servers:
            server.uncut()
        try:
            await asyncio.to_thread(self._launch_all)
        except asyncio.CancelledError:
            for server in servers:
                server.cut()
            raise

    async def _connections(self, place: Place) -> httpx.AsyncClient:
        """The event loop's, with which this place has been asked whether it is what it was."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._client[0] is not loop:
            limits = httpx.Limits(
                max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEPT
            )
            client = httpx.AsyncClient(
                timeout=self.settings.timeout,
                limits=limits,
                trust_env=bool(self.settings.servers),
                mounts=DIRECT,
            )
            self._client = loop, client
            self._confirmed.clear()
        client = self._client[1]
        if place.server.given is not None:
            if id(place) not in self._confirmed:
                self._confirmed[id(place)] = asyncio.ensure_future(place.confirm())
            await asyncio.shield(self._confirmed[id(place)])
        return client

    def _lock(self) -> asyncio.Lock:
        loop = asyncio.get_running_loop()
        if self._starting is None or self._starting[0] is not loop:
            self._starting = loop, asyncio.Lock()
        return self._starting[1]


def places_of(policies: Mapping[str, Policy]) -> Sequence[dict[str, Policy]]:
    """The agents of each model: those whose adapters lie on one base together."""
    found: dict[int, dict[str, Policy]] = {}
    for name, policy in policies.items():
        found.setdefault(id(policy.model), {})[name] = policy
    return list(found.values())


def _check(name: str, policy: Policy) -> None:
    if len(policy.parts) > 1:
        raise UserError(
            f"agent {name}: vLLM takes no seat that two models fill together; take engine: local"
        )
    if next(policy.model.parameters()).dtype == torch.float64:
        raise UserError(f"agent {name}: vLLM does not compute in float64; take engine: local")
    check_checkpoint(policy)
