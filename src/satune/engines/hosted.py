"""The local engine of a team some of whose agents live elsewhere: each decodes at its host.

All hosts and this process decode in one order, as if they were one: an agent at a time, when no
conversation can go on without it, and each time until one of its requests has ended. What a batch
is made of then depends on the conversations alone, not on who was faster, and is what it would be
if every agent lived here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from satune.agents.policy import Policy
from satune.engines.local import LocalEngine
from satune.engines.request import ConversationId, Request, conversation_id
from satune.types import Completion, EpisodeFailure, Key, Prompt, Sampling, UserError, ids_of


@dataclass(slots=True, eq=False)
class HostedRequest(Request):
    """A completion that a host is asked for, under its ``number``; ``prompt`` is what the seat has
    seen since its last one (``agents.messages.EntryRenderer``). ``told``: the host knows of it."""

    number: int = 0
    prompt: Prompt = field(default_factory=lambda: Prompt(()))
    told: bool = False


@dataclass(frozen=True, slots=True)
class Turned:
    """A conversation that has ``begun``, or else is over."""

    conversation: ConversationId
    begun: bool


Answer = tuple[int, Completion | EpisodeFailure]
"""The number of a request and what came of it."""


class Decoder(Protocol):
    """What draws an agent's completions at its host: ``hosts.agent.HostedAgent`` for the run that
    trains it, ``hosts.visit.VisitedAgent`` for whoever only asks it."""

    def decode(
        self, news: Sequence[Turned], requests: Sequence[HostedRequest], *, decode: bool
    ) -> list[Answer]:
        """Tell of conversations and then of requests. Those whose prompt has no place in the
        context come back as failures, and then nothing else happens; else, where ``decode`` is
        true, the host decodes until some requests have ended, and these come back in that order.
        Called from a thread of its own."""
        ...

    def publish(self, version: int) -> None:
        """The weights that the agent has in place have this number."""
        ...

    def cut(self) -> None:
        """Have a call that is under way in another thread end, with whatever error."""
        ...

    def leave(self) -> None:
        """Nothing is asked for now; whoever only visits may be forgotten."""
        ...


class HostedEngine(LocalEngine):
    """``policies`` of the agents that live here, ``hosts`` of those that do not; ``seats`` and the
    options are those of a ``LocalEngine``. Raises UserError for the order throughput, in which
    nobody's batches depend on the conversations alone."""

    def __init__(
        self,
        policies: Mapping[str, Policy],
        seats: Mapping[str, str],
        hosts: Mapping[str, Decoder],
        **options: Any,
    ) -> None:
        if options.get("order") == "throughput":
            raise UserError(
                "engine.order: agents that live elsewhere are decoded in the order exact; set that "
                "or remove the key"
            )
        super().__init__(policies, seats, **{**options, "order": "exact"})
        self.hosts = dict(hosts)
        self._news: dict[str, list[Turned]] = {name: [] for name in hosts}
        self._count = 0
        for name in hosts:
            self._waiting[name] = []
            self.versions[name] = 0

    def begin(self, key: Key) -> None:
        self._tell(key, begun=True)
        super().begin(key)

    def end(self, key: Key) -> None:
        self._tell(key, begun=False)
        super().end(key)

    def _tell(self, key: Key, *, begun: bool) -> None:
        conversation = conversation_id(key)
        begin = Turned(conversation, True)
        for news in self._news.values():
            if not begun and begin in news:
                news.remove(begin)  # the host was never told of it, and asked for nothing in it
            else:
                news.append(Turned(conversation, begun))

    def publish(self, agent: str, version: int, weights: Mapping[str, Any]) -> None:
        """A host has its agent's weights in place and is told their number."""
        host = self.hosts.get(agent)
        if host is None:
            super().publish(agent, version, weights)
        else:
            self.versions[agent] = version
            host.publish(version)

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        """Draw a completion. Raises as ``LocalEngine.generate``, and EpisodeFailure where a host
        finds no place for the prompt."""
        agent = self.seats.get(seat)
        if agent not in self.hosts:
            return await super().generate(seat, prompt, sampling, key)
        self._count += 1
        future = asyncio.get_running_loop().create_future()
        request = HostedRequest(
            key, ids_of(), sampling, future, key, number=self._count, prompt=prompt
        )
        return await self._written(agent, request)

    async def close(self) -> None:
        await super().close()
        for host in self.hosts.values():
            await asyncio.to_thread(host.leave)

    async def _next(self) -> str | None:
        # Which agent is next depends on how many wait for it, and a prompt without a place never
        # waits: where there is a choice the hosts look at all of them first.
        while sum(map(bool, self._waiting.values())) > 1 and await self._look():
            await self._quiet()
        return await super()._next()

    async def _look(self) -> bool:
        """Show the hosts the requests that are new to them; tells whether any has failed."""
        failed = False
        for agent in self.hosts:
            fresh = [r for r in self._hosted(agent) if not r.told]
            if fresh:
                failed |= self._deliver(agent, await self._ask(agent, fresh, decode=False))
        return failed

    async def _serve(self, agent: str) -> None:
        if agent not in self.hosts:
            return await super()._serve(agent)
        waiting = self._waiting[agent]
        while waiting or self._decoding:
            fresh = [request for request in self._hosted(agent) if not request.told]
            self._decoding += waiting
            waiting.clear()
            over = [request for request in self._decoding if request.future.done()]
            self._deliver(agent, await self._ask(agent, fresh, decode=True))
            # Nobody waits for these; the host was told that their conversation is over, and may
            # have given them up.
            self._decoding = [request for request in self._decoding if request not in over]
            await self._quiet()

    def _hosted(self, agent: str) -> list[HostedRequest]:
        return [each for each in self._waiting[agent] if isinstance(each, HostedRequest)]

    async def _ask(
        self, agent: str, requests: Sequence[HostedRequest], *, decode: bool
    ) -> list[Answer]:
        host, news = self.hosts[agent], self._news[agent]
        told, self._news[agent] = news, []
        for request in requests:
            request.told = True
        try:
            return await asyncio.to_thread(host.decode, told, requests, decode=decode)
        except asyncio.CancelledError:
            host.cut()
            raise

    def _deliver(self, agent: str, answers: Sequence[Answer]) -> bool:
        """Give the requests what came of them; tells whether any has failed."""
        waiting, failed = self._waiting[agent], False
        known = {r.number: r for r in (*waiting, *self._decoding) if isinstance(r, HostedRequest)}
        for number, answer in answers:
            request = known.get(number)
            if request is None:
                continue  # nobody waits for it any more
            for requests in (waiting, self._decoding):
                if request in requests:
                    requests.remove(request)
            if isinstance(answer, EpisodeFailure):
                failed = True
            else:
                self.sampled_tokens += answer.completion_tokens
            if request.future.done():
                continue
            if isinstance(answer, EpisodeFailure):
                request.future.set_exception(answer)
            else:
                request.future.set_result(answer)
        return failed
