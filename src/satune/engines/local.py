"""The in-process engine: batched sampling with a key-value cache over all waiting requests.

In ``exact`` order it decodes one agent's rows at a time, and only when no conversation can go on
without it, takes requests in the order of their keys and replaces finished rows by waiting ones, so
that what a batch is made of depends on the conversations alone and an interrupted run can be
repeated exactly. In ``throughput`` order it waits for nobody: it decodes whatever is there, first
come, first served, a step of each agent in turn, so that batches depend on how fast servers and
graders were. A request that nobody waits for any more loses its row before the next step.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from satune.agents.merging import merged
from satune.agents.policy import Policy
from satune.engines.cache import PrefixStore
from satune.engines.probe import token_bytes
from satune.engines.request import ConversationId, Request, conversation_id
from satune.engines.room import rooms
from satune.engines.rows import Rows
from satune.types import Completion, Key, Prompt, Sampling, UserError, ids_of, logprobs_of

Order = Literal["exact", "throughput"]


class LocalEngine:
    """Samples from policies in this process. ``seats`` names the agent of each seat.

    ``max_rows`` bounds a batch, ``prefill_tokens`` the padded tokens of one prompt forward,
    ``cache_tokens`` what is kept an agent between the turns of a conversation. ``memory`` bounds
    the keys and values of both together, of the agents on one device: up to 1 a share of what is
    free there when the engine is made, above 1 bytes. ``order`` is exact or throughput (see the
    module; None: exact on the CPU, throughput on any other device).
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        seats: Mapping[str, str],
        *,
        max_rows: int = 256,
        prefill_tokens: int = 16384,
        cache_tokens: int = 1 << 20,
        memory: float = 0.5,
        order: Order | None = None,
    ) -> None:
        self.policies = dict(policies)
        self.seats = dict(seats)
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        on_cpu = all(policy.device.type == "cpu" for policy in self.policies.values())
        self.order: Order = order or ("exact" if on_cpu else "throughput")
        self.versions = dict.fromkeys(policies, 0)
        self.sampled_tokens = 0
        self._stores = {name: PrefixStore(cache_tokens) for name in policies}
        self._waiting: dict[str, list[Request]] = {name: [] for name in policies}
        self._pending: dict[ConversationId, int] = {}
        self._open: set[ConversationId] = set()
        self._driver: asyncio.Task[None] | None = None
        self._changes = 0
        self._came = itertools.count()
        self._changed: asyncio.Event | None = None
        self._decoding: list[Request] = []
        self._called: dict[str, tuple[Rows, int]] = {}
        self._token_bytes = {name: token_bytes(name, p) for name, p in self.policies.items()}
        waiting = self._waiting if self.order == "throughput" else {}
        self._rooms = rooms(memory, self.policies, self._stores, waiting)

    # -- what rollouts call ----------------------------------------------------------------------

    def publish(self, agent: str, version: int, weights: Mapping[str, Any]) -> None:
        """Forget states of the agent's old weights. The new ones are in place: this engine shares
        the learner's parameters."""
        self.versions[agent] = version
        self._stores[agent].clear()

    def begin(self, key: Key) -> None:
        self._open.add(conversation_id(key))
        self._note()

    def end(self, key: Key) -> None:
        conversation = conversation_id(key)
        self._open.discard(conversation)
        for agent, store in self._stores.items():
            for seat in self.seats:
                if self.seats[seat] == agent:
                    store.forget((*conversation, seat))
        self._note()

    async def close(self) -> None: ...

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        """Draw a completion. Raises UserError for an unknown seat or a prompt without ids."""
        if seat not in self.seats:
            raise UserError(f"no seat {seat!r}; there are: {', '.join(self.seats)}")
        if not prompt.ids:
            raise UserError(f"seat {seat}: the local engine needs token ids, the prompt has none")
        future = asyncio.get_running_loop().create_future()
        place = key if self.order == "exact" else next(self._came)
        request = Request(key, prompt.ids, sampling, future, place)
        return await self._written(self.seats[seat], request)

    async def _written(self, agent: str, request: Request) -> Completion:
        """What is written in answer to a request of this event loop."""
        conversation, loop = request.conversation, asyncio.get_running_loop()
        assert isinstance(request.future, asyncio.Future)
        self._waiting[agent].append(request)
        self._pending[conversation] = self._pending.get(conversation, 0) + 1
        self._note()
        if self._driver is None or self._driver.done():
            self._changed = asyncio.Event()
            self._driver = loop.create_task(self._drive())
            # A ctrl-C ends it here and whoever waits for it alike: nobody is left to ask what for.
            self._driver.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            return await request.future
        finally:
            if request in self._waiting[agent]:  # cancelled before it was admitted
                self._waiting[agent].remove(request)
            self._release(conversation)

    def _release(self, conversation: ConversationId) -> None:
        left = self._pending.get(conversation, 0) - 1
        if left > 0:
            self._pending[conversation] = left
        else:
            self._pending.pop(conversation, None)
        self._note()

    def _note(self) -> None:
        self._changes += 1
        if self._changed is not None:
            self._changed.set()

    def decode(self, agent: str, requests: Sequence[Request]) -> None:
        """Let these requests wait as well, and decode until some of the agent's have their result:
        for a caller who keeps the order of agents himself and has no event loop. Nothing happens
        where none waits. What the engine was told of the end of a conversation counts from the next
        call on."""
        waiting = self._waiting[agent]
        waiting += requests
        if not waiting and agent not in self._called:
            return
        if agent not in self._called:
            self._called[agent] = self._rows(agent), _to_feed(waiting)
        rows, tokens = self._called[agent]
        with merged(self.policies[agent], tokens):
            while waiting or rows.requests:
                if self._advance(agent, rows, self.max_rows):
                    break
        if not waiting and not rows.requests:
            del self._called[agent]

    def drop(self) -> None:
        """Forget every conversation and what is being decoded."""
        for waiting in self._waiting.values():
            waiting.clear()
        for store in self._stores.values():
            store.clear()
        for remembered in (self._called, self._open, self._pending, self._decoding):
            remembered.clear()
        self._clear_rooms()

    def _clear_rooms(self) -> None:
        for room in self._rooms.values():
            room.clear()

    # -- the driver ------------------------------------------------------------------------------

    async def _drive(self) -> None:
        self._decoding.clear()  # an earlier driver may have been cut off
        self._clear_rooms()
        try:
            await (self._in_lock_step() if self.order == "exact" else self._side_by_side())
        except Exception as error:
            # The driver is nobody's child: its failure is the failure of everyone who waits for it.
            waiting = [request for requests in self._waiting.values() for request in requests]
            for request in (*self._decoding, *waiting):
                if not request.future.done():
                    request.future.set_exception(error)
            for requests in (self._decoding, *self._waiting.values()):
                requests.clear()

    async def _in_lock_step(self) -> None:
        while True:
            await self._quiet()
            agent = await self._next()
            if agent is None:
                return
            await self._serve(agent)

    async def _next(self) -> str | None:
        """The agent for which most requests wait; None where none does."""
        agent = max(sorted(self._waiting), key=lambda name: len(self._waiting[name]))
        return agent if self._waiting[agent] else None

    async def _serve(self, agent: str) -> None:
        """Decode an agent's rows until nobody waits for it."""
        rows = self._rows(agent)
        with merged(self.policies[agent], _to_feed(self._waiting[agent])):
            while self._waiting[agent] or rows.requests:
                if self._advance(agent, rows, self.max_rows):
                    await self._quiet()
                else:
                    # Grades come in meanwhile. No request can: all conversations wait for this
                    # engine.
                    await asyncio.sleep(0)

    async def _side_by_side(self) -> None:
        batches = {agent: self._rows(agent) for agent in self.policies}
        while True:
            await _settle()
            busy = [name for name in batches if self._waiting[name] or batches[name].requests]
            if not busy:
                return
            for agent in busy:
                limit = self._share(agent, batches)
                if batches[agent].requests or limit > 0:
                    self._advance(agent, batches[agent], limit)
                    await asyncio.sleep(0)

    def _share(self, agent: str, batches: Mapping[str, Rows]) -> int:
        """The most rows that an agent may have now: what the others leave, who keep an equal share
        where they wait for it. Together the agents never have more than ``max_rows``."""
        equal = self.max_rows // len(batches)
        left = self.max_rows
        for name, rows in batches.items():
            if name != agent:
                held = len(rows.requests)
                left -= max(held, equal) if self._waiting[name] else held
        if any(rows.requests for rows in batches.values()):
            return left
        return max(1, left)  # more agents than rows: somebody has to begin

    def _rows(self, agent: str) -> Rows:
        return Rows(
            agent,
            self.policies[agent],
            self._stores[agent],
            self._rooms[agent],
            self._token_bytes[agent],
            self.prefill_tokens,
            lambda conversation: conversation in self._open,
        )

    async def _quiet(self) -> None:
        """Wait until every open conversation waits for this engine."""
        assert self._changed is not None
        while True:
            seen = self._changes
            await _settle()
            if self._changes != seen:
                continue
            if all(conversation in self._pending for conversation in self._open):
                return
            self._changed.clear()
            await self._changed.wait()

    def _advance(self, agent: str, rows: Rows, limit: int) -> bool:
        """Let waiting requests in where up to ``limit`` rows leave room, or decode a token of each
        row; tells whether a request was finished."""
        waiting = self._waiting[agent]
        for request in rows.abandon():
            self._decoding.remove(request)
        free = limit - len(rows.requests)
        # A prompt forward for one row costs almost what it costs for many.
        enough = min(len(waiting), max(1, self.max_rows // 8))
        taken: list[Request] = []
        if waiting and (not rows.requests or free >= enough):
            waiting.sort(key=lambda request: request.place)
            taken = rows.choose(waiting, free)
        if taken:
            chosen = set(map(id, taken))
            waiting[:] = [request for request in waiting if id(request) not in chosen]
            taken = [request for request in taken if not request.future.done()]
            # A prompt's forward may fail before they have a row.
            self._decoding += taken
            finished = rows.admit(taken)
        elif rows.requests:
            finished = rows.step()
        else:
            return False  # another agent's rows have all the room
        for request in finished:
            self._decoding.remove(request)
            self._finish(agent, request)
        for request in rows.given_up:
            self._decoding.remove(request)
        waiting += rows.given_up
        rows.given_up.clear()
        return bool(finished)

    def _finish(self, agent: str, request: Request) -> None:
        policy = self.policies[agent]
        self.sampled_tokens += len(request.written)
        if request.future.done():
            return
        stopped = request.written[-1] in policy.eos_ids
        request.future.set_result(
            Completion(
                text=policy.tokenizer.decode(request.written, skip_special_tokens=True),
                finish_reason="stop" if stopped else "length",
                version=self.versions[agent],
                ids=ids_of(request.written),
                logprobs=logprobs_of(request.logprobs),
                prompt_tokens=len(request.ids),
                completion_tokens=len(request.written),
            )
        )


def _to_feed(requests: Sequence[Request]) -> int:
    """The most tokens that these may have fed."""
    return sum(len(request.fed) + request.remaining for request in requests)


async def _settle() -> None:
    """Lets gathered and woken coroutines reach their next request."""
    for _ in range(3):
        await asyncio.sleep(0)
