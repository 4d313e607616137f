"""The in-process engine: batched sampling with a key-value cache over all waiting requests.

It decodes only when no conversation can go on without it, takes requests in the order of their
keys and replaces finished rows by waiting ones, so that what a batch is made of depends on the
conversations alone and an interrupted run can be repeated exactly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from satune.agents.policy import Policy
from satune.engines.cache import PrefixStore
from satune.engines.probe import refuse_unservable
from satune.engines.rows import Conversation, Request, Rows, conversation_of
from satune.types import Completion, Key, Prompt, Sampling, UserError, ids_of, logprobs_of


class LocalEngine:
    """Samples from policies in this process. ``seats`` names the agent of each seat.

    ``max_rows`` bounds a batch, ``prefill_tokens`` the padded tokens of one prompt forward,
    ``cache_tokens`` what is kept an agent between the turns of a conversation.
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        seats: Mapping[str, str],
        *,
        max_rows: int = 256,
        prefill_tokens: int = 16384,
        cache_tokens: int = 1 << 20,
    ) -> None:
        self.policies = dict(policies)
        self.seats = dict(seats)
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.versions = dict.fromkeys(policies, 0)
        self.sampled_tokens = 0
        self._stores = {name: PrefixStore(cache_tokens) for name in policies}
        self._waiting: dict[str, list[Request]] = {name: [] for name in policies}
        self._pending: dict[Conversation, int] = {}
        self._open: set[Conversation] = set()
        self._driver: asyncio.Task[None] | None = None
        self._changes = 0
        self._changed: asyncio.Event | None = None
        for name, policy in self.policies.items():
            refuse_unservable(name, policy)

    # -- what rollouts call ----------------------------------------------------------------------

    def publish(self, agent: str, version: int, weights: Mapping[str, Any]) -> None:
        """Forget states of the agent's old weights. The new ones are in place: this engine shares
        the learner's parameters."""
        self.versions[agent] = version
        self._stores[agent].clear()

    def begin(self, key: Key) -> None:
        self._open.add(conversation_of(key))
        self._note()

    def end(self, key: Key) -> None:
        conversation = conversation_of(key)
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
        agent = self.seats[seat]
        loop = asyncio.get_running_loop()
        request = Request(key, prompt.ids, sampling, loop.create_future())
        conversation = request.conversation
        self._waiting[agent].append(request)
        self._pending[conversation] = self._pending.get(conversation, 0) + 1
        self._note()
        if self._driver is None or self._driver.done():
            self._changed = asyncio.Event()
            self._driver = loop.create_task(self._drive())
        try:
            return await request.future
        finally:
            if request in self._waiting[agent]:  # cancelled before it was admitted
                self._waiting[agent].remove(request)
            self._release(conversation)

    def _release(self, conversation: Conversation) -> None:
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

    # -- the driver ------------------------------------------------------------------------------

    async def _drive(self) -> None:
        agent = ""
        try:
            while True:
                await self._quiet()
                if not any(self._waiting.values()):
                    return
                agent = max(sorted(self._waiting), key=lambda name: len(self._waiting[name]))
                await self._decode(agent)
        except Exception as error:
            # The driver is nobody's child: its failure is the failure of everyone who waits for it.
            for requests in self._waiting.values():
                for request in requests:
                    if not request.future.done():
                        request.future.set_exception(error)
                requests.clear()

    async def _quiet(self) -> None:
        """Wait until every open conversation waits for this engine."""
        assert self._changed is not None
        while True:
            seen = self._changes
            for _ in range(3):  # lets gathered and woken coroutines reach their next request
                await asyncio.sleep(0)
            if self._changes != seen:
                continue
            if all(conversation in self._pending for conversation in self._open):
                return
            self._changed.clear()
            await self._changed.wait()

    async def _decode(self, agent: str) -> None:
        rows = Rows(
            self.policies[agent],
            self._stores[agent],
            self.prefill_tokens,
            lambda conversation: conversation in self._open,
        )
        waiting = self._waiting[agent]
        admitted: list[Request] = []
        try:
            while True:
                free = self.max_rows - len(rows.requests)
                # A prompt forward for one row costs almost what it costs for many.
                enough = min(len(waiting), max(1, self.max_rows // 8))
                if waiting and (not rows.requests or free >= enough):
                    waiting.sort(key=lambda request: request.key)
                    taken = rows.choose(waiting, free)
                    chosen = set(map(id, taken))
                    waiting[:] = [request for request in waiting if id(request) not in chosen]
                    taken = [request for request in taken if not request.future.done()]
                    admitted += taken
                    finished = rows.admit(taken)
                elif rows.requests:
                    finished = rows.step()
                else:
                    return
                if finished:
                    for request in finished:
                        self._finish(agent, request)
                    await self._quiet()
        except Exception as error:
            # Not only the rows: a prompt's forward may have failed before they had one.
            for request in admitted:
                if not request.future.done():
                    request.future.set_exception(error)
            raise

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
