"""The rows of one batch: prompts in, a token a row and step, states kept for the next turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from satune.agents.packing import padded
from satune.agents.policy import Policy
from satune.agents.prefixes import SHORTEST_OPENING, WORTH_SAVING
from satune.engines.cache import PrefixStore, RowCache, rounded
from satune.engines.request import ConversationId, Request
from satune.engines.room import Room
from satune.engines.sampling import sample_tokens
from satune.files.arrays import shared_prefix
from satune.types import Ids, ids_of


class Rows:
    """The rows being decoded: request i has row i of the cache.

    Behind them lie the rows of finished requests until they are given to the store: moving a few
    rows as they finish is cheap, moving all of them would cost more than the step itself.

    All stays inside ``room``, in which a token takes ``token_bytes``, as long as one row does.
    Where rows outgrow it, the last by their places are given up: their requests are then in
    ``given_up``, to be admitted again, when prompt and what is written are fed anew.
    """

    def __init__(
        self,
        agent: str,
        policy: Policy,
        store: PrefixStore,
        room: Room,
        token_bytes: int,
        prefill_tokens: int,
        is_open: Callable[[ConversationId], bool],
    ) -> None:
        self.agent = agent
        self.policy = policy
        self.store = store
        self.room = room
        self.token_bytes = token_bytes
        self.prefill_tokens = prefill_tokens
        self.is_open = is_open
        self.requests: list[Request] = []
        self.given_up: list[Request] = []
        self._begin(self._empty())
        self._done: list[tuple[Request, int]] = []
        self._eos = policy.eos_ids

    def _empty(self) -> RowCache:
        return RowCache(self.policy.parts[0].autocast)

    def _begin(self, cache: RowCache) -> None:
        self.cache = cache
        self.room.decodes(self.agent, cache)

    def choose(self, waiting: Sequence[Request], free: int) -> list[Request]:
        """The first ``free`` of those waiting, as many as there is room for; for an empty batch
        rather those who were together in the batch of the first of them, since their states can
        then stay in place. None only while other rows have the room."""
        if not self.requests and waiting:
            companions = self.store.companions(waiting[0].owner)
            together = [request for request in waiting if request.owner in companions][:free]
            if len(together) * 4 >= min(len(waiting), free) * 3 and self._stay(together):
                return together
        first = waiting[:free]
        tokens = self._places_for(first)
        if not self.requests and tokens:
            self.room.make(self.agent, tokens[-1] * self.token_bytes, keep=self.room.limit // 2)
        fitting = self._fitting(tokens)
        if tokens and not self.requests and not fitting and self.room.alone(self.agent):
            self.room.make(self.agent, tokens[0] * self.token_bytes)
            fitting = max(1, self._fitting(tokens))
        return list(first[:fitting])

    def _stay(self, requests: Sequence[Request]) -> bool:
        """Whether the block of the store in which the states of all of these lie may become the
        batch: what is new in their prompts is one forward, and there is room for the places that
        it takes and for what they will write."""
        block = self.store.block_of([request.owner for request in requests])
        cached = [self.store.match(request.owner, request.fed) for request in requests]
        if block is None or not all(cached):
            return False
        width = max(len(r.fed) - start for r, start in zip(requests, cached, strict=True))
        if len(requests) * width > self.prefill_tokens:
            return False
        places = max(block.capacity, self._reach(requests, max(cached) + width))
        return block.rows * places * self.token_bytes <= self.room.left(self.agent) + block.nbytes

    def _reach(self, requests: Sequence[Request], used: int) -> int:
        """Places of a row where a forward writes to ``used`` of them, and then these go on."""
        return max(rounded(used), *(request.ahead for request in requests))

    def _places_for(self, requests: Sequence[Request]) -> list[int]:
        """How many tokens' places are taken once the first k of ``requests`` are admitted, for each
        k from 1; with those of a prompt that is fed beside the rows."""
        held, capacity, widest = len(self.requests), self.cache.capacity, 0
        found: list[int] = []
        for count, request in enumerate(requests, held + 1):
            widest = max(widest, request.ahead)
            capacity = max(capacity, widest)
            beside = widest if held or count * capacity > self.prefill_tokens else 0
            found.append(max(count, self.cache.rows) * capacity + beside)
        return found

    def _fitting(self, tokens: Sequence[int]) -> int:
        left = self.room.left(self.agent) // self.token_bytes
        return sum(each <= left for each in tokens)

    @torch.inference_mode()
    def admit(self, requests: Sequence[Request]) -> list[Request]:
        """Feed the prompts (equal ones once), sample each request's first token."""
        if not self.requests:
            logits_RV = self._go_on(requests)
            if logits_RV is not None:
                return self._sampled(logits_RV, 0)
        # What was finished since the last admission may be what these requests go on with.
        self._hand_over(whole=False)
        cached = [self.store.match(request.owner, request.fed) for request in requests]
        first: dict[object, int] = {}
        source: list[int] = []
        distinct: list[int] = []
        for index, request in enumerate(requests):
            name: object = request.fed.tobytes() if cached[index] == 0 else index
            if name not in first:
                first[name] = len(distinct)
                distinct.append(index)
            source.append(first[name])
        order = sorted(
            range(len(distinct)),
            key=lambda d: (len(requests[distinct[d]].fed) - cached[distinct[d]], d),
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
            length = max(len(requests[i].fed) for i in members)
            start = len(self.requests)
            rows = max(self.cache.rows, start + len(requests))
            beside = cache.rows * cache.capacity
            most = (self.room.left(self.agent) // self.token_bytes - beside) // rows
            self.cache.append(cache, take, length, held=start, most=most)
            self.requests.extend(requests[i] for i in members)
            logits_RV = self.policy.project(last_RH).index_select(0, take)
            finished += self._sampled(logits_RV, start)
        return finished

    def _go_on(self, requests: Sequence[Request]) -> Tensor | None:
        """Feed what is new in prompts whose states lie in one block of the store, in place; logits
        of their last tokens, or None where it cannot be done."""
        if not requests or not self._stay(requests):
            return None
        cached = [self.store.match(request.owner, request.fed) for request in requests]
        fresh = [r.fed[start:] for r, start in zip(requests, cached, strict=True)]
        width = max(map(len, fresh))
        found = self.store.take([request.owner for request in requests])
        assert found is not None
        cache, rows = found
        self._begin(cache)
        count = len(requests)
        free = sorted(set(range(count)) - set(rows))
        place = dict(zip(sorted(row for row in rows if row >= count), free, strict=True))
        self.cache.exchange(list(place.items()))
        order = sorted(range(count), key=lambda index: place.get(rows[index], rows[index]))
        self.requests, self._done = [requests[index] for index in order], []
        ids_RS = padded([fresh[i] for i in order], width)
        self.cache.used = max(cached) + width
        most = self.room.left(self.agent) // self.token_bytes // self.cache.rows
        self.cache.reserve(self._reach(requests, self.cache.used), most=most)
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
        """The prompts of ``order`` in forwards; ``beside`` the rows is what room leaves."""
        held = max(len(self.requests) + len(requests), self.cache.rows)
        places = max([self.cache.capacity, *(request.ahead for request in requests)])
        beside = self.room.left(self.agent) // self.token_bytes - held * places
        chunks: list[list[int]] = []
        longest = 0  # what is cached of a prompt of the last chunk
        for d in order:
            start = cached[distinct[d]]
            width = len(requests[distinct[d]].fed) - start
            used = max(longest, start) + width
            # The first rows of a batch become the batch; all others are copied into it.
            in_place = len(chunks) == 1 and not self.requests and len(order) == len(requests)
            rows = len(chunks[-1]) + 1 if chunks else 0
            if (
                chunks
                and rows * width <= self.prefill_tokens
                and (used <= places if in_place else rows * used <= beside)
            ):
                chunks[-1].append(d)
                longest = max(longest, start)
            else:
                chunks.append([d])
                longest = start
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
        fresh = [requests[i].fed[start:] for i, start in zip(indices, starts, strict=True)]
        cache = self._empty()
        cache.used = cache.capacity = max(starts) + max(map(len, fresh))
        if not self.requests:
            # These rows become the batch, as they are unless several requests share one.
            cache.room = self._reach([requests[i] for i in indices], cache.used)
            if not shared:
                cache.capacity = cache.room
        opening = None if any(starts) else self._opening(fresh, cache.capacity)
        if opening is not None:
            cache.begin_with(opening, len(indices))
            starts = [opening.used] * len(indices)
            fresh = [ids[opening.used :] for ids in fresh]
        elif any(starts):
            owners = [
                requests[i].owner if start else None
                for i, start in zip(indices, starts, strict=True)
            ]
            self.store.load(owners, max(starts), cache)
        width = max(map(len, fresh))
        ids_RS = padded(fresh, width)
        device = self.policy.device
        positions_RS = torch.tensor(starts)[:, None] + torch.arange(width)
        hidden_RSH = _extend(self.policy, ids_RS.to(device), positions_RS.to(device), cache)
        last = torch.tensor([len(ids) - 1 for ids in fresh], device=device)
        return cache, hidden_RSH[torch.arange(len(fresh), device=device), last]

    def _opening(self, prompts: Sequence[Ids], capacity: int) -> RowCache | None:
        """One row with the states of what all of these prompts begin with, such as a system
        message; None where feeding that once saves too little for a forward of its own, and where
        there is no room for it beside their rows of ``capacity`` tokens."""
        length = min(len(ids) - 1 for ids in prompts)
        length = min([length, *(shared_prefix(prompts[0], ids) for ids in prompts[1:])])
        saved = length * (len(prompts) - 1)
        if length < SHORTEST_OPENING or saved < WORTH_SAVING * sum(map(len, prompts)):
            return None
        if (len(prompts) * capacity + length) * self.token_bytes > self.room.left(self.agent):
            return None
        cache = self._empty()
        cache.used = cache.capacity = length
        device = self.policy.device
        positions_RS = torch.arange(length, device=device)[None]
        ids_RS = padded([prompts[0][:length]], length)
        _extend(self.policy, ids_RS.to(device), positions_RS, cache)
        return cache

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Feed every row's newest token and sample the next."""
        lengths = self._lengths()
        if max(lengths) > self.cache.capacity:
            self._grow(max(lengths))
            lengths = self._lengths()
        longest = max(lengths)
        self.cache.used = longest
        device = self.policy.device
        ids_R1 = torch.tensor([r.written[-1] for r in self.requests], device=device)[:, None]
        positions_R1 = torch.tensor(lengths, device=device)[:, None] - 1
        hidden_R1H = _extend(self.policy, ids_R1, positions_R1, self.cache)
        return self._sampled(self.policy.project(hidden_R1H[:, 0]), 0)

    def _lengths(self) -> list[int]:
        return [len(r.ids) + len(r.written) for r in self.requests]

    def _grow(self, longest: int) -> None:
        """Make places for ``longest`` tokens a row; rows that there is no room for are given up."""
        row = rounded(longest) * self.token_bytes
        left = self.room.make(self.agent, self.cache.rows * row)
        rows = None
        if left < self.cache.rows * row:
            # Finished turns that lie behind the rows are the first to go.
            self._done = []
            self._give_up(len(self.requests) - max(1, left // row))
            rows, longest = len(self.requests), max(self._lengths())
        most = left // self.token_bytes // (rows or self.cache.rows)
        self.cache.reserve(longest, most=most, rows=rows)

    def _give_up(self, count: int) -> None:
        """Let the last ``count`` requests by their places wait once more."""
        if count <= 0:
            return
        in_order = sorted(range(len(self.requests)), key=lambda row: self.requests[row].place)
        self.given_up += self._move_behind(in_order[-count:])

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

    def abandon(self) -> list[Request]:
        """Free the rows of requests that nobody waits for any more; returns these."""
        rows = [row for row, request in enumerate(self.requests) if request.future.done()]
        gone = [self.requests[row] for row in rows]
        if rows:
            self._retire(rows)
        return gone

    def _retire(self, finished: Sequence[int]) -> None:
        """Let these rows be done."""
        gone = self._move_behind(finished)
        self._done += [(request, row) for row, request in enumerate(gone, len(self.requests))]
        if not self.requests:
            self._hand_over(whole=True)
            self._begin(self._empty())

    def _move_behind(self, leaving: Sequence[int]) -> list[Request]:
        """Move these rows behind those that go on; returns their requests in their new order."""
        left = len(self.requests) - len(leaving)
        gone = set(leaving)
        last = [row for row in range(left, len(self.requests)) if row not in gone]
        first = [row for row in leaving if row < left]
        pairs = list(zip(first, last, strict=True))
        self.cache.exchange(pairs)
        for here, there in pairs:
            self.requests[here], self.requests[there] = self.requests[there], self.requests[here]
        behind = self.requests[left:]
        del self.requests[left:]
        return behind

    def _hand_over(self, *, whole: bool) -> None:
        """Give the states of finished requests to the store, where the conversation goes on."""
        done = [(r, row) for r, row in self._done if self.is_open(r.conversation)]
        self._done = []
        if done and (whole or self._may_copy(done)):
            self.store.keep(
                [request.owner for request, _ in done],
                [request.ids + ids_of(request.written) for request, _ in done],
                self.cache,
                [row for _, row in done],
                whole=whole,
            )

    def _may_copy(self, done: Sequence[tuple[Request, int]]) -> bool:
        """Whether there is room for the states of these beside the rows."""
        longest = max(len(request.ids) + len(request.written) for request, _ in done)
        copied = len(done) * longest * self.token_bytes
        kept = self.room.kept + copied <= self.room.limit // 2
        return kept and self.cache.nbytes + copied <= self.room.left(self.agent)


def _extend(policy: Policy, ids_RS: Tensor, positions_RS: Tensor, cache: RowCache) -> Tensor:
    """Hidden states [R, S, H] of new tokens at their positions, over what the cache holds."""
    cache.positions = positions_RS
    return policy.hidden(
        ids_RS,
        attention_mask=policy.masks(positions_RS, cache.used),
        position_ids=positions_RS,
        cache=cache,
    )
