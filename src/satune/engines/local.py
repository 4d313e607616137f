"""The in-process engine: batched sampling with a key-value cache over all waiting requests.

It decodes only when no conversation can go on without it, takes requests in the order of their
keys and replaces finished rows by waiting ones, so that what a batch is made of depends on the
conversations alone and an interrupted run can be repeated exactly.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from satune.agents.policy import Policy
from satune.engines.cache import PrefixStore, RowCache
from satune.engines.sampling import sample_tokens
from satune.types import Completion, Key, Prompt, Sampling, UserError


@dataclass(slots=True)
class _Request:
    key: Key
    ids: tuple[int, ...]
    sampling: Sampling
    future: asyncio.Future[Completion]
    rng: random.Random = field(init=False)
    written: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = self.key.rng("tokens")

    @property
    def conversation(self) -> tuple[object, ...]:
        return _conversation(self.key)

    @property
    def owner(self) -> tuple[object, ...]:
        return (*self.conversation, self.key.seat)


def _conversation(key: Key) -> tuple[object, ...]:
    return (key.stage, key.step, key.draw, key.problem, key.sample)


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
        self._waiting: dict[str, list[_Request]] = {name: [] for name in policies}
        self._pending: dict[tuple[object, ...], int] = {}
        self._open: set[tuple[object, ...]] = set()
        self._driver: asyncio.Task[None] | None = None
        self._changes = 0
        self._changed: asyncio.Event | None = None
        for name, policy in self.policies.items():
            _refuse_recurrent(name, policy.config)

    # -- what rollouts call ----------------------------------------------------------------------

    def publish(self, agent: str, version: int, weights: Mapping[str, Any] | None = None) -> None:
        """The agent's weights (the learner's own) changed: forget states of the old ones."""
        self.versions[agent] = version
        self._stores[agent].clear()

    def begin(self, key: Key) -> None:
        self._open.add(_conversation(key))
        self._note()

    def end(self, key: Key) -> None:
        conversation = _conversation(key)
        self._open.discard(conversation)
        for agent, store in self._stores.items():
            for seat in self.seats:
                if self.seats[seat] == agent:
                    store.forget((*conversation, seat))
        self._note()

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        """Draw a completion. Raises UserError for an unknown seat or a prompt without ids."""
        if seat not in self.seats:
            raise UserError(f"no seat {seat!r}; there are: {', '.join(self.seats)}")
        if not prompt.ids:
            raise UserError(f"seat {seat}: the local engine needs token ids, the prompt has none")
        agent = self.seats[seat]
        loop = asyncio.get_running_loop()
        request = _Request(key, tuple(prompt.ids), sampling, loop.create_future())
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

    def _release(self, conversation: tuple[object, ...]) -> None:
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
        rows = _Rows(self.policies[agent], self._stores[agent], self.prefill_tokens)
        waiting = self._waiting[agent]
        admitted: list[_Request] = []
        try:
            while True:
                free = self.max_rows - len(rows.requests)
                # A prompt forward for one row costs almost what it costs for many.
                enough = min(len(waiting), max(1, self.max_rows // 8))
                if waiting and (not rows.requests or free >= enough):
                    waiting.sort(key=lambda request: request.key)
                    taken, waiting[:] = waiting[:free], waiting[free:]
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

    def _finish(self, agent: str, request: _Request) -> None:
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
                ids=tuple(request.written),
                logprobs=tuple(request.logprobs),
                prompt_tokens=len(request.ids),
                completion_tokens=len(request.written),
            )
        )


class _Rows:
    """The rows being decoded: a request and a row of the cache each."""

    def __init__(self, policy: Policy, store: PrefixStore, prefill_tokens: int) -> None:
        self.policy = policy
        self.store = store
        self.prefill_tokens = prefill_tokens
        self.requests: list[_Request] = []
        self.cache = RowCache()
        self._row_of: list[int] = []
        self._eos = policy.eos_ids

    @torch.inference_mode()
    def admit(self, requests: Sequence[_Request]) -> list[_Request]:
        """Feed the prompts (equal ones once), sample each request's first token."""
        cached = [self.store.match(request.owner, request.ids) for request in requests]
        first: dict[object, int] = {}
        source: list[int] = []
        distinct: list[int] = []
        for index, request in enumerate(requests):
            name: object = request.ids if cached[index] == 0 else index
            if name not in first:
                first[name] = len(distinct)
                distinct.append(index)
            source.append(first[name])
        order = sorted(
            range(len(distinct)),
            key=lambda d: (len(requests[distinct[d]].ids) - cached[distinct[d]], d),
        )
        finished: list[_Request] = []
        for chunk in self._chunks(order, distinct, requests, cached):
            cache, last_RH = self._prefill([distinct[d] for d in chunk], requests, cached)
            place = {d: row for row, d in enumerate(chunk)}
            members = [i for i in range(len(requests)) if source[i] in place]
            take = torch.tensor([place[source[i]] for i in members], device=last_RH.device)
            self._drop_finished_rows()
            length = max(len(requests[i].ids) for i in members)
            self.cache.append(cache, take, length)
            start = len(self.requests)
            self.requests.extend(requests[i] for i in members)
            self._row_of.extend(range(start, start + len(members)))
            logits_RV = self.policy.project(last_RH).index_select(0, take)
            finished += self._sampled(logits_RV, self.requests[start:])
        return finished

    def _chunks(
        self,
        order: Sequence[int],
        distinct: Sequence[int],
        requests: Sequence[_Request],
        cached: Sequence[int],
    ) -> list[list[int]]:
        chunks: list[list[int]] = []
        for d in order:
            width = len(requests[distinct[d]].ids) - cached[distinct[d]]
            if chunks and (len(chunks[-1]) + 1) * width <= self.prefill_tokens:
                chunks[-1].append(d)
            else:
                chunks.append([d])
        return chunks

    def _prefill(
        self, indices: Sequence[int], requests: Sequence[_Request], cached: Sequence[int]
    ) -> tuple[RowCache, Tensor]:
        starts = [cached[i] for i in indices]
        fresh = [requests[i].ids[start:] for i, start in zip(indices, starts, strict=True)]
        width = max(len(ids) for ids in fresh)
        ids_RS = torch.tensor([list(ids) + [0] * (width - len(ids)) for ids in fresh])
        cache = RowCache()
        cache.used = cache.capacity = max(starts) + width
        if any(starts):
            owners = [
                requests[i].owner if start else None
                for i, start in zip(indices, starts, strict=True)
            ]
            self.store.load(owners, max(starts), cache)
        device = self.policy.device
        positions_RS = torch.tensor(starts)[:, None] + torch.arange(width)
        hidden_RSH = _extend(self.policy, ids_RS.to(device), positions_RS.to(device), cache)
        last = torch.tensor([len(ids) - 1 for ids in fresh], device=device)
        return cache, hidden_RSH[torch.arange(len(fresh), device=device), last]

    @torch.inference_mode()
    def step(self) -> list[_Request]:
        """Feed every row's newest token and sample the next."""
        self._drop_finished_rows()
        lengths = [len(r.ids) + len(r.written) for r in self.requests]
        longest = max(lengths)
        self.cache.reserve(longest)
        self.cache.used = longest
        device = self.policy.device
        ids_R1 = torch.tensor([r.written[-1] for r in self.requests], device=device)[:, None]
        positions_R1 = torch.tensor(lengths, device=device)[:, None] - 1
        hidden_R1H = _extend(self.policy, ids_R1, positions_R1, self.cache)
        return self._sampled(self.policy.project(hidden_R1H[:, 0]), self.requests)

    def _sampled(self, logits_RV: Tensor, requests: Sequence[_Request]) -> list[_Request]:
        tokens_R, logprobs_R = sample_tokens(
            logits_RV, [r.sampling for r in requests], [r.rng.random() for r in requests]
        )
        finished: list[_Request] = []
        limit = self.policy.context_limit
        for request, token, logprob in zip(
            requests, tokens_R.tolist(), logprobs_R.tolist(), strict=True
        ):
            request.written.append(token)
            request.logprobs.append(logprob)
            count = len(request.written)
            if (
                token in self._eos
                or count >= request.sampling.max_new_tokens
                or len(request.ids) + count >= limit
            ):
                finished.append(request)
        if finished:
            self._retire(finished)
        return finished

    def _retire(self, finished: Sequence[_Request]) -> None:
        gone = {id(request) for request in finished}
        rows = [
            row
            for request, row in zip(self.requests, self._row_of, strict=True)
            if id(request) in gone
        ]
        ordered = [request for request in self.requests if id(request) in gone]
        self.store.keep(
            [request.owner for request in ordered],
            [(*request.ids, *request.written) for request in ordered],
            self.cache,
            rows,
        )
        left = [
            (request, row)
            for request, row in zip(self.requests, self._row_of, strict=True)
            if id(request) not in gone
        ]
        self.requests = [request for request, _ in left]
        self._row_of = [row for _, row in left]

    def _drop_finished_rows(self) -> None:
        if len(self._row_of) == self.cache.rows:
            return
        device = self.policy.device
        self.cache.select(torch.tensor(self._row_of, dtype=torch.long, device=device))
        self._row_of = list(range(len(self.requests)))


def _extend(policy: Policy, ids_RS: Tensor, positions_RS: Tensor, cache: RowCache) -> Tensor:
    """Hidden states [R, S, H] of new tokens at their positions, over what the cache holds."""
    cache.positions = positions_RS
    places_C = torch.arange(cache.used, device=ids_RS.device)
    mask = (places_C <= positions_RS[..., None])[:, None]
    return policy.hidden(
        ids_RS,
        attention_mask=_masks_by_layer(policy.config, mask, places_C, positions_RS),
        position_ids=positions_RS,
        past_key_values=cache,
        use_cache=True,
    )


def _masks_by_layer(config: Any, mask: Tensor, places_C: Tensor, positions_RS: Tensor) -> Any:
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if window is None or (kinds and "sliding_attention" not in kinds):
        return mask
    near = mask & (places_C > positions_RS[..., None] - window)[:, None]
    if not kinds:
        return near
    return {"full_attention": mask, "sliding_attention": near}


def _refuse_recurrent(agent: str, config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or [])
    other = kinds - {"full_attention", "sliding_attention"}
    if other or getattr(config, "ssm_cfg", None) or hasattr(config, "state_size"):
        found = ", ".join(sorted(other)) or type(config).__name__
        raise UserError(
            f"agent {agent}: the local engine serves attention layers only, it has {found}; "
            "choose another model"
        )
