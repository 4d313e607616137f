"""The local engine inside a bound of bytes: the same tokens, whatever room there is."""

from __future__ import annotations

import asyncio
import weakref
from random import Random
from typing import Any

import pytest
import torch

from devices import Devices
from satune.agents import memory as memory_of
from satune.agents.policy import Policy
from satune.engines import request as request_of
from satune.engines.cache import PrefixStore, RowCache
from satune.engines.local import LocalEngine
from satune.engines.probe import token_bytes
from satune.engines.room import rooms
from satune.engines.rows import Rows
from satune.types import Completion, Key, Prompt, Sampling, ids_of
from tiny_models import Letters, tiny_lm, tiny_policy

KEY = Key(0, "train", stage=1)


@pytest.fixture(autouse=True)
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message is as long as it may be."""
    monkeypatch.setattr(Policy, "eos_ids", frozenset())


def policy_of(length: int = 128) -> Policy:
    return tiny_policy("a", family="gpt_neox", max_position_embeddings=length)


def draw(engine: LocalEngine, prompts: list[list[int]], new: list[int]) -> list[Completion]:
    async def one(sample: int) -> Completion:
        key = KEY.at(problem="p", sample=sample, seat="a")
        wanted = Sampling(new[sample], temperature=0.8)
        try:
            return await engine.generate("a", Prompt((), ids_of(prompts[sample])), wanted, key)
        finally:
            engine.end(key)

    async def every() -> list[Completion]:
        for sample in range(len(prompts)):
            engine.begin(KEY.at(problem="p", sample=sample))
        return await asyncio.gather(*map(one, range(len(prompts))))

    return asyncio.run(asyncio.wait_for(every(), 500))


class Watched:
    """The most bytes of keys and values that were there after any forward, the most rows, and how
    many rows were given up."""

    def __init__(self, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes, self.rows, self.given_up = 0, 0, 0
        caches: weakref.WeakSet[RowCache] = weakref.WeakSet()
        made, hidden, give_up = RowCache.__init__, policy.hidden, Rows._give_up

        def make(cache: RowCache, *args: Any) -> None:
            made(cache, *args)
            caches.add(cache)

        def watched(ids: torch.Tensor, **more: Any) -> torch.Tensor:
            states = hidden(ids, **more)
            tensors = {id(t): t for cache in caches for t in (*cache.keys, *cache.values)}
            self.bytes = max(self.bytes, sum(t.nbytes for t in tensors.values()))
            self.rows = max(self.rows, ids.shape[0])
            return states

        def counted(rows: Rows, count: int) -> None:
            self.given_up += max(count, 0)
            give_up(rows, count)

        policy.hidden = watched  # type: ignore[method-assign]
        monkeypatch.setattr(RowCache, "__init__", make)
        monkeypatch.setattr(Rows, "_give_up", counted)


def unequal(count: int, longest: int) -> tuple[list[list[int]], list[int]]:
    random = torch.Generator().manual_seed(2)
    prompts = [
        torch.randint(1, 13, (3 + 7 * (i % 5),), generator=random).tolist() for i in range(count)
    ]
    return prompts, [longest - 10 * (i % 4) for i in range(count)]


@pytest.mark.parametrize("order", ["exact", "throughput"])
@pytest.mark.parametrize("rows", [0.2, 3])
def test_any_room_gives_the_same_tokens(rows, order, monkeypatch):
    # 6 requests of up to 31 + 100 tokens, in blocks of 64; of the new ones, 32 are given ahead.
    monkeypatch.setattr(request_of, "ROOM_AHEAD", 32)
    prompts, new = unequal(6, 100)
    free = draw(LocalEngine({"a": policy_of(192)}, {"a": "a"}), prompts, new)
    policy = policy_of(192)
    one = 192 * token_bytes("a", policy)
    engine = LocalEngine({"a": policy}, {"a": "a"}, memory=int(rows * one), order=order)
    watched = Watched(policy, monkeypatch)
    tight = draw(engine, prompts, new)
    assert [c.ids for c in tight] == [c.ids for c in free]
    assert [len(c.ids or ()) for c in tight] == new
    # A batch of one goes on whatever it takes.
    assert watched.bytes <= max(rows, 1) * one
    assert (watched.rows > 1) == (rows >= 3) and (watched.given_up > 0) == (rows >= 3)


def talk(engine: LocalEngine, turns: list[list[tuple[int, int]]]) -> list[list[Completion]]:
    """Each conversation's turns: (how many tokens are new in the prompt, how many are written)."""

    async def one(sample: int) -> list[Completion]:
        key = KEY.at(problem="p", sample=sample, seat="a")
        random = torch.Generator().manual_seed(sample)
        said: list[int] = []
        found: list[Completion] = []
        for own, (new, written) in enumerate(turns[sample]):
            said += torch.randint(1, 13, (new,), generator=random).tolist()
            wanted = Sampling(written, temperature=0.8)
            at = key.at(own_index=own)
            found.append(await engine.generate("a", Prompt((), ids_of(said)), wanted, at))
            assert found[-1].ids is not None
            said += found[-1].ids.tolist()
        engine.end(key)
        return found

    async def every() -> list[list[Completion]]:
        for sample in range(len(turns)):
            engine.begin(KEY.at(problem="p", sample=sample))
        return await asyncio.gather(*map(one, range(len(turns))))

    return asyncio.run(asyncio.wait_for(every(), 500))


def test_turns_that_go_on_in_place_stay_inside_the_bound(monkeypatch):
    """A second turn needs 330 places where the block has 320; twice those would be 640."""
    policy = policy_of(1024)
    limit = 16 * 384 * token_bytes("a", policy)
    engine = LocalEngine({"a": policy}, {"a": "a"}, memory=limit)
    watched = Watched(policy, monkeypatch)
    said = talk(engine, [[(250, 10), (60, 10)]] * 16)
    assert [[len(c.ids or ()) for c in each] for each in said] == [[10, 10]] * 16
    # All went on together, and the second turn's prompt was not fed anew.
    assert watched.bytes == limit and watched.rows == 16 and watched.given_up == 0


@pytest.mark.parametrize("order", ["exact", "throughput"])
def test_longer_prompts_that_join_rows_stay_inside_the_bound(order, monkeypatch):
    """Rows of 320 places go on while prompts of 330 come in; twice 320 would not fit four times."""
    policy = policy_of(1024)
    limit = 5 * 384 * token_bytes("a", policy)
    engine = LocalEngine({"a": policy}, {"a": "a"}, memory=limit, order=order)
    watched = Watched(policy, monkeypatch)
    said = talk(engine, [[(250, 10 + 20 * (i % 2))] for i in range(4)] + [[(330, 10)]] * 4)
    assert all(len(each) == 1 for each in said)
    assert 4 * 320 * token_bytes("a", policy) < watched.bytes <= limit


@pytest.mark.parametrize("order", ["exact", "throughput"])
@pytest.mark.parametrize("seed", range(3))
def test_any_conversations_stay_inside_the_bound(order, seed, monkeypatch):
    """Turns of any length after one another: what is kept of one may be long and what is new in it
    short, and the other way round in its neighbour."""
    monkeypatch.setattr(request_of, "ROOM_AHEAD", 32)
    random = Random(seed)
    turns = [
        [(random.choice((3, 40, 150)), random.choice((2, 15))) for _ in range(random.randint(1, 3))]
        for _ in range(14)
    ]
    free = talk(LocalEngine({"a": policy_of(1024)}, {"a": "a"}), turns)
    policy = policy_of(1024)
    # As much as the longest conversation has at most, two and a half times.
    limit = int(2.5 * 640 * token_bytes("a", policy))
    engine = LocalEngine({"a": policy}, {"a": "a"}, memory=limit, order=order)
    watched = Watched(policy, monkeypatch)
    tight = talk(engine, turns)
    assert [[c.ids for c in each] for each in tight] == [[c.ids for c in each] for each in free]
    assert watched.bytes <= limit and watched.rows > 1


@pytest.mark.slow
def test_64_requests_of_2000_tokens_finish_where_there_is_room_for_8(monkeypatch):
    prompts, new = unequal(64, 40)
    random = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(1, 13, (1960 - 31 * (i % 4),), generator=random).tolist() for i in range(64)
    ]
    free = draw(LocalEngine({"a": policy_of(2048)}, {"a": "a"}), prompts, new)
    policy = policy_of(2048)
    limit = 8 * 2048 * token_bytes("a", policy)
    engine = LocalEngine({"a": policy}, {"a": "a"}, memory=limit)
    watched = Watched(policy, monkeypatch)
    tight = draw(engine, prompts, new)
    assert [c.ids for c in tight] == [c.ids for c in free]
    assert watched.bytes <= limit and 4 <= watched.rows <= 8


def test_what_a_token_takes():
    # 2 layers, a key and a value of 2 heads of 8 numbers; qwen3 here has one head of keys.
    assert token_bytes("a", policy_of()) == 2 * 2 * 2 * 8 * 8
    for autocast, size in ((None, 4), (torch.bfloat16, 2)):
        policy = Policy("a", tiny_lm("qwen3", dtype=torch.float32), Letters(), 1, autocast=autocast)
        # Keys come in float32 under autocast, and attention computes in bfloat16.
        assert token_bytes("a", policy) == 2 * 2 * 1 * 8 * size


def test_agents_on_devices_of_their_own_have_a_room_each(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:0": 1000, "cuda:1": 60}
    monkeypatch.setattr(memory_of, "free_bytes", lambda device: free[str(device)])
    with Devices():
        policies = {name: tiny_policy(name) for name in ("ann", "bob", "eve")}
        for name, device in (("ann", "cuda:0"), ("bob", "cuda:1"), ("eve", "cuda:0")):
            policies[name].model.to(device)
        stores = {name: PrefixStore(100) for name in policies}
        found = rooms(0.5, policies, stores, {})
        assert found["ann"] is found["eve"] is not found["bob"]
        assert (found["ann"].limit, found["bob"].limit) == (500, 30)
        # What lies on one device takes nothing of the other's room.
        cache = RowCache(None)
        cache.keys = [torch.zeros(1, 1, 5, 2, device="cuda:0")]
        cache.values = [torch.zeros(1, 1, 5, 2, device="cuda:0")]
        found["ann"].decodes("ann", cache)
        assert found["eve"].left("eve") == 500 - 2 * 40 and found["bob"].left("bob") == 30
        assert found["bob"].alone("bob") and cache.nbytes == 80
        # Bytes are bytes on each.
        assert {room.limit for room in rooms(70.0, policies, stores, {}).values()} == {70}
