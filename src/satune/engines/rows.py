"""The rows of one batch: prompts in, a token a row and step, states kept for the next turn."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from satune.agents.packing import padded
from satune.agents.policy import Policy
from satune.engines.cache import PrefixStore, RowCache, rounded
from satune.engines.sampling import sample_tokens
from satune.types import Completion, Ids, Key, Sampling, ids_of

ConversationId = tuple[object, ...]

# Places a cache holds free for tokens to come; it grows beyond when they do.
_ROOM_AHEAD = 256


@dataclass(slots=True, eq=False)
class Request:
    """A completion that is waited for, and what of it is written."""

    key: Key
    ids: Ids
    sampling: Sampling
    future: asyncio.Future[Completion]
    rng: random.Random = field(init=False)
    written: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = self.key.rng("tokens")

    @property
    def conversation(self) -> ConversationId:
        return conversation_id(self.key)

    @property
    def owner(self) -> ConversationId:
        return (*self.conversation, self.key.seat)


def conversation_id(key: Key) -> ConversationId:
    """What the keys of all turns of one conversation have in common."""
    return (key.stage, key.step, key.draw, key.problem, key.sample)


class Rows:
    """The rows being decoded: request i has row i of the cache.

    Behind them lie the rows of finished requests until they are given to the store: moving a few
    rows as they finish is cheap, moving all of them would cost more than the step itself.
    """

    def __init__(
        self,
        policy: Policy,
        store: PrefixStore,
        prefill_tokens: int,
        is_open: Callable[[ConversationId], bool],
    ) -> None:
        self.policy = policy
        self.store = store
        self.prefill_tokens = prefill_tokens
        self.is_open = is_open
        self.requests: list[Request] = []
        self.cache = RowCache()
        self._done: list[tuple[Request, int]] = []
        self._eos = policy.eos_ids

    def choose(self, waiting: Sequence[Request], free: int) -> list[Request]:
        """The first ``free`` of those waiting; for an empty batch rather those who were together in
        the batch of the first of them, since their states can then stay in place."""
        if not self.requests and waiting:
            companions = self.store.companions(waiting[0].owner)
            together = [request for request in waiting if request.owner in companions]
            if len(together) * 4 >= min(len(waiting), free) * 3:
                return together[:free]
        return list(waiting[:free])

    @torch.inference_mode()
    def admit(self, requests: Sequence[Request]) -> list[Request]:
        """Feed the prompts (equal ones once), sample each request's first token."""
        if not self.requests:
            logits_RV = self._go_on(requests)
            if logits_RV is not None:
                return self._sampled(logits_RV, 0)
        # What was finished since the last admission may be what these requests go on with.
        self._hand_over(whole=False)
        cached = [self.store.match(request.owner, request.ids) for request in requests]
        first: dict[object, int] = {}
        source: list[int] = []
        distinct: list[int] = []
        for index, request in enumerate(requests):
            name: object = request.ids.tobytes() if cached[index] == 0 else index
            if name not in first:
                first[name] = len(distinct)
                distinct.append(index)
            source.append(first[name])
        order = sorted(
            range(len(distinct)),
            key=lambda d: (len(requests[distinct[d]].ids) - cached[distinct[d]], d),
        )
        finished: list[Request] = []
        for chunk in self._chunks(order, distinct, requests, cached):
            place = {d: row for row, d in enumerate(chunk)}
            members = [i for i in range(len(requests)) if source[i] in place]
            # Requests with a prompt of their own stand in the order of the prefill's rows.
            members.sort(key=lambda i: (place[source[i]], i))
            cache, last_RH = self._prefill(
                [distinct[d] for d in chunk], requests, cached, shared=len(members) > len(chunk)
            )
            take = torch.tensor([place[source[i]] for i in members], device=last_RH.device)
            # A request that its first token has ended already lies where the next rows go.
            self._hand_over(whole=False)
            length = max(len(requests[i].ids) for i in members)
            start = len(self.requests)
            self.cache.append(cache, take, length, held=start)
            self.requests.extend(requests[i] for i in members)
            logits_RV = self.policy.project(last_RH).index_select(0, take)
            finished += self._sampled(logits_RV, start)
        return finished

    def _go_on(self, requests: Sequence[Request]) -> Tensor | None:
        """Feed what is new in prompts whose states lie in one block of the store, in place; logits
        of their last tokens, or None where it cannot be done."""
        cached = [self.store.match(request.owner, request.ids) for request in requests]
        fresh = [r.ids[start:] for r, start in zip(requests, cached, strict=True)]
        width = max(map(len, fresh), default=0)
        if not all(cached) or len(requests) * width > self.prefill_tokens:
            return None
        found = self.store.take([request.owner for request in requests])
        if found is None:
            return None
        self.cache, rows = found
        count = len(requests)
        free = sorted(set(range(count)) - set(rows))
        place = dict(zip(sorted(row for row in rows if row >= count), free, strict=True))
        self.cache.exchange(list(place.items()))
        order = sorted(range(count), key=lambda index: place.get(rows[index], rows[index]))
        self.requests, self._done = [requests[index] for index in order], []
        ids_RS = padded([fresh[i] for i in order], width)
        room = max(r.sampling.max_new_tokens for r in requests)
        self.cache.used = max(cached) + width
        self.cache.reserve(self.cache.used + min(room, _ROOM_AHEAD))
        device = self.policy.device
        positions_RS = torch.tensor([cached[i] for i in order])[:, None] + torch.arange(width)
        hidden_RSH = _extend(self.policy, ids_RS.to(device), positions_RS.to(device), self.cache)
        last = torch.tensor([len(fresh[i]) - 1 for i in order], device=device)
        return self.policy.project(hidden_RSH[torch.arange(count, device=device), last])

    def _chunks(
        self,
        order: Sequence[int],
        distinct: Sequence[int],
        requests: Sequence[Request],
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
        self,
        indices: Sequence[int],
        requests: Sequence[Request],
        cached: Sequence[int],
        *,
        shared: bool,
    ) -> tuple[RowCache, Tensor]:
        starts = [cached[i] for i in indices]
        fresh = [requests[i].ids[start:] for i, start in zip(indices, starts, strict=True)]
        width = max(len(ids) for ids in fresh)
        ids_RS = padded(fresh, width)
        cache = RowCache()
        cache.used = cache.capacity = max(starts) + width
        if not self.requests:
            # These rows become the batch, as they are unless several requests share one.
            room = max(requests[i].sampling.max_new_tokens for i in indices)
            cache.room = rounded(cache.used + min(room, _ROOM_AHEAD))
            if not shared:
                cache.capacity = cache.room
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
    def step(self) -> list[Request]:
        """Feed every row's newest token and sample the next."""
        lengths = [len(r.ids) + len(r.written) for r in self.requests]
        longest = max(lengths)
        self.cache.reserve(longest)
        self.cache.used = longest
        device = self.policy.device
        ids_R1 = torch.tensor([r.written[-1] for r in self.requests], device=device)[:, None]
        positions_R1 = torch.tensor(lengths, device=device)[:, None] - 1
        hidden_R1H = _extend(self.policy, ids_R1, positions_R1, self.cache)
        return self._sampled(self.policy.project(hidden_R1H[:, 0]), 0)

    def _sampled(self, logits_RV: Tensor, start: int) -> list[Request]:
        """Give the requests from ``start`` on their next token; returns those that have ended."""
        requests = self.requests[start:]
        tokens_R, logprobs_R = sample_tokens(
            logits_RV, [r.sampling for r in requests], [r.rng.random() for r in requests]
        )
        finished: list[int] = []
        limit = self.policy.context_limit
        for row, (request, token, logprob) in enumerate(
            zip(requests, tokens_R.tolist(), logprobs_R.tolist(), strict=True), start
        ):
            request.written.append(token)
            request.logprobs.append(logprob)
            count = len(request.written)
            if (
                token in self._eos
                or count >= request.sampling.max_new_tokens
                or len(request.ids) + count >= limit
            ):
                finished.append(row)
        ended = [self.requests[row] for row in finished]
        if finished:
            self._retire(finished)
        return ended

    def _retire(self, finished: Sequence[int]) -> None:
        """Move these rows behind those that go on."""
        left = len(self.requests) - len(finished)
        gone = set(finished)
        last = [row for row in range(left, len(self.requests)) if row not in gone]
        first = [row for row in finished if row < left]
        pairs = list(zip(first, last, strict=True))
        self.cache.exchange(pairs)
        for here, there in pairs:
            self.requests[here], self.requests[there] = self.requests[there], self.requests[here]
        self._done += [(self.requests[row], row) for row in range(left, len(self.requests))]
        del self.requests[left:]
        if not self.requests:
            self._hand_over(whole=True)
            self.cache = RowCache()

    def _hand_over(self, *, whole: bool) -> None:
        """Give the states of finished requests to the store, where the conversation goes on."""
        done = [(r, row) for r, row in self._done if self.is_open(r.conversation)]
        self._done = []
        if done:
            self.store.keep(
                [request.owner for request, _ in done],
                [request.ids + ids_of(request.written) for request, _ in done],
                self.cache,
                [row for _, row in done],
                whole=whole,
            )


def _extend(policy: Policy, ids_RS: Tensor, positions_RS: Tensor, cache: RowCache) -> Tensor:
    """Hidden states [R, S, H] of new tokens at their positions, over what the cache holds."""
    cache.positions = positions_RS
    return policy.hidden(
        ids_RS,
        attention_mask=policy.masks(positions_RS, cache.used),
        position_ids=positions_RS,
        cache=cache,
    )
