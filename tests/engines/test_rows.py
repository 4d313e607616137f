"""States that stay where they are between turns, against none kept at all."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from satune.engines.cache import PrefixStore, RowCache
from satune.engines.local import LocalEngine
from satune.engines.rows import Rows
from satune.types import Key, Prompt, Sampling, ids_of
from tiny_models import tiny_policy


def play(engine: LocalEngine, routing: str, conversations: int = 40, turns: int = 10) -> list[Any]:
    """Conversations of unequal turns, some of which end early; their seats speak in turn or
    mostly so. Returns (prompt, completion) ids by conversation."""

    async def one(sample: int) -> list[Any]:
        key, rng = Key(0, "train", stage=1, problem="p", sample=sample), random.Random(sample)
        ids: tuple[int, ...] = (1 + sample % 3, 5, 2)
        said = []
        for turn in range(turns):
            seat = "ab"[turn % 2]
            if routing == "mostly in turn" and rng.random() < 0.05:
                seat = "ba"[turn % 2]
            completion = await engine.generate(
                seat,
                Prompt((), ids_of(ids)),
                Sampling(rng.choice([3, 9]), temperature=0.8),
                key.at(seat=seat, own_index=turn),
            )
            assert completion.ids is not None
            said.append((ids, tuple(completion.ids)))
            ids = (*ids, *completion.ids, *(rng.randrange(1, 13) for _ in range(rng.randint(1, 5))))
            if rng.random() < 0.08:
                break
        engine.end(key)
        return said

    async def every() -> list[Any]:
        for sample in range(conversations):
            engine.begin(Key(0, "train", stage=1, problem="p", sample=sample))
        return await asyncio.gather(*(one(sample) for sample in range(conversations)))

    return asyncio.run(every())


def team(**settings: Any) -> LocalEngine:
    policies = {"a": tiny_policy("a"), "b": tiny_policy("b", seed=4)}
    return LocalEngine(policies, {"a": "a", "b": "b"}, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["in turn", "mostly in turn"])
def test_going_on_in_place_gives_the_same_tokens(routing, monkeypatch):
    taken: list[bool] = []
    exchanged: list[int] = []
    go_on, exchange = Rows._go_on, RowCache.exchange

    def counted_go_on(self: Rows, requests: Any) -> Any:
        found = go_on(self, requests)
        taken.append(found is not None)
        return found

    def counted_exchange(self: RowCache, pairs: Any) -> None:
        exchanged.append(len(pairs))
        exchange(self, pairs)

    monkeypatch.setattr(Rows, "_go_on", counted_go_on)
    monkeypatch.setattr(RowCache, "exchange", counted_exchange)
    alone = play(team(max_rows=1, cache_tokens=0), routing)
    for settings in (
        {},
        {"max_rows": 16},
        {"prefill_tokens": 200},
        {"cache_tokens": 1500, "max_rows": 30},
    ):
        engine = team(**settings)
        assert play(engine, routing) == alone
        assert all(not store._kept and store._tokens == 0 for store in engine._stores.values())
    # Not vacuous: blocks were gone on with in place, others were gathered, and rows moved.
    assert any(taken) and not all(taken) and sum(exchanged) > 100


def test_a_block_is_taken_whole_or_not_at_all():
    policy = tiny_policy("a")
    cache = RowCache()
    cache.capacity = cache.used = 8
    head = policy.config.num_key_value_heads, policy.config.head_dim
    cache.keys = [torch.zeros(4, head[0], 8, head[1])]
    cache.values = [torch.zeros(4, head[0], 8, head[1])]
    owners = [("c", row) for row in range(4)]

    def filled(budget: int) -> PrefixStore:
        store = PrefixStore(budget)
        store.keep(owners, [(1, 2, 3)] * 4, cache, [3, 1, 0, 2], whole=True)
        return store

    found = filled(100).take(owners[:3])
    assert found is not None and found[1] == [3, 1, 0]
    # Half of the block's rows would lie idle, and a stranger's states lie elsewhere.
    assert filled(100).take(owners[:2]) is None
    assert filled(100).take([*owners, ("c", 9)]) is None
    # 8 places a row: of 20 tokens two rows are kept, and they count until they are forgotten.
    store = filled(20)
    assert [store.match(owner, (1, 2, 3)) for owner in owners] == [2, 2, 0, 0]
    store.forget(owners[0])
    assert store._tokens == 8
