"""The local engine against the learner, against itself in other batches, and in trouble."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from satune.agents.learner import LocalLearner, OptimizerSettings
from satune.agents.packing import pack
from satune.agents.policy import Policy
from satune.engines.local import LocalEngine
from satune.types import Completion, Key, Prompt, Sampling, UserError, ids_of
from tiny_models import (
    EOS,
    next_token_logprobs,
    tiny_policy,
    turn,
)

KEY = Key(0, "train", stage=1, step=1)
SAMPLING = Sampling(12, temperature=0.8)


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def engine_of(*policies: Policy, **settings: Any) -> LocalEngine:
    policies = policies or (tiny_policy(),)
    named = {p.name: p for p in policies}
    return LocalEngine(named, {name: name for name in named}, **settings)


def prompt(ids: Sequence[int]) -> Prompt:
    return Prompt((), ids=ids_of(ids))


Draw = tuple[Sequence[int], Key]


def draw(
    engine: LocalEngine, draws: Sequence[Draw], sampling: Sampling = SAMPLING, seat: str = "a"
) -> list[Completion]:
    """One completion a conversation, all open at once."""

    async def all_of_them() -> list[Completion]:
        for _, key in draws:
            engine.begin(key)

        async def one(ids: Sequence[int], key: Key) -> Completion:
            try:
                return await engine.generate(seat, prompt(ids), sampling, key)
            finally:
                engine.end(key)

        return await asyncio.gather(*(one(*each) for each in draws))

    return run(all_of_them())


def unequal_draws(count: int = 30) -> list[Draw]:
    random = torch.Generator().manual_seed(1)
    lengths = [1, 3, 17, 40, 5]
    prompts = [torch.randint(1, 13, (n,), generator=random).tolist() for n in lengths]
    return [
        (prompts[i % len(prompts)], KEY.at(problem=f"p{i % len(prompts)}", sample=i, seat="a"))
        for i in range(count)
    ]


def play(
    engine: LocalEngine, seats: Sequence[str], conversations: int, sampling: Sampling = SAMPLING
) -> list[list[tuple[tuple[int, ...], Completion]]]:
    """Conversations in which ``seats`` speak in turn, each reading everything so far."""

    async def one(key: Key) -> list[tuple[tuple[int, ...], Completion]]:
        said: list[tuple[tuple[int, ...], Completion]] = []
        ids: tuple[int, ...] = (1 + key.sample % 3, 5)
        for index, seat in enumerate(seats):
            turn_key = key.at(seat=seat, own_index=index)
            completion = await engine.generate(seat, prompt(ids), sampling, turn_key)
            said.append((ids, completion))
            ids = (*ids, *(completion.ids or ()), 2, 3)
        engine.end(key)
        return said

    async def all_of_them() -> Any:
        keys = [KEY.at(problem=f"p{i % 3}", sample=i) for i in range(conversations)]
        for key in keys:
            engine.begin(key)
        return await asyncio.gather(*(one(key) for key in keys))

    return run(all_of_them())


def count_fed(policy: Policy) -> list[tuple[int, int]]:
    """(rows, new tokens a row) of every forward from now on."""
    fed: list[tuple[int, int]] = []
    hidden = policy.hidden

    def counted(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        fed.append((input_ids.shape[0], input_ids.shape[1]))
        return hidden(input_ids, **kwargs)

    policy.hidden = counted  # type: ignore[method-assign]
    return fed


def learned(policy: Policy, pairs: Sequence[tuple[Sequence[int], Completion]]) -> torch.Tensor:
    packed = pack([[turn(ids, completion.ids)] for ids, completion in pairs])
    return LocalLearner(policy, OptimizerSettings()).score(packed)


def sampled(pairs: Sequence[tuple[Sequence[int], Completion]]) -> torch.Tensor:
    return torch.tensor([p for _, c in pairs for p in c.logprobs or ()], dtype=torch.float64)


# -- what prompts begin with ----------------------------------------------------------------------


def with_system(lengths: Sequence[int], system: int) -> list[Draw]:
    """Prompts of ``lengths`` tokens behind ``system`` tokens that all of them begin with."""
    opening = [1 + i % 7 for i in range(system)]
    return [
        ([*opening, 8 + i % 4, *([3] * (length - 1))], KEY.at(problem=f"p{i}", seat="a"))
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "gpt2", "gpt_neox"])
def test_what_all_prompts_begin_with_is_fed_once_and_changes_nothing(family, monkeypatch):
    draws = with_system([1, 6, 4, 3], 20)
    policy = tiny_policy(family=family)
    engine = engine_of(policy)
    fed = count_fed(policy)
    found = draw(engine, draws)
    assert fed[:2] == [(1, 20), (4, 6)]
    monkeypatch.setattr("satune.engines.rows.SHORTEST_OPENING", 1000)
    engine = engine_of(tiny_policy(family=family))
    fed = count_fed(engine.policies["a"])
    plain = draw(engine, draws)
    assert fed[0] == (4, 26)
    for one, other in zip(found, plain, strict=True):
        assert one.ids == other.ids
        tolerance = 1e-10 if family.startswith("gpt") else 1e-6
        assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)


@pytest.mark.parametrize(
    ("lengths", "system", "settings"),
    [
        ([4], 20, {}),  # nobody to share it with
        ([4, 4, 4], 15, {}),  # too short for a forward of its own
        ([300, 300], 20, {}),  # too little of the whole
    ],
)
def test_a_beginning_that_saves_little_is_fed_with_the_rest(lengths, system, settings):
    engine = engine_of(**settings)
    fed = count_fed(engine.policies["a"])
    draw(engine, with_system(lengths, system))
    assert fed[0] == (len(lengths), system + max(lengths))


def test_a_prompt_that_is_the_beginning_of_the_others_keeps_its_last_token():
    policy = tiny_policy()
    draws = with_system([1, 6, 4], 20)
    draws.append((draws[0][0][:20], KEY.at(problem="short", seat="a")))
    engine = engine_of(policy)
    fed = count_fed(policy)
    found = draw(engine, draws)
    assert fed[:2] == [(1, 19), (4, 7)]
    pairs = [(ids, c) for (ids, _), c in zip(draws, found, strict=True)]
    assert torch.allclose(sampled(pairs), learned(policy, pairs).double(), rtol=0, atol=1e-6)


# -- any batching, one result ---------------------------------------------------------------------

BATCHES = [{"max_rows": 1}, {"max_rows": 3}, {"max_rows": 256}, {"prefill_tokens": 1}]
BATCHES += [{"max_rows": 7, "prefill_tokens": 50}, {"max_rows": 5, "cache_tokens": 0}]


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "gpt2", "gpt_neox"])
def test_any_batching_gives_the_same_tokens_in_float64(family):
    results = []
    for settings in BATCHES:
        found = draw(engine_of(tiny_policy(family=family), **settings), unequal_draws())
        results.append(found)
        for one, first in zip(found, results[0], strict=True):
            assert one.ids == first.ids and one.finish_reason == first.finish_reason
            # Norms that round to float32 inside can tip over by one unit of its rounding.
            tolerance = 1e-10 if family.startswith("gpt") else 1e-6
            assert one.logprobs == pytest.approx(first.logprobs, abs=tolerance)
    assert len({tuple(c.ids) for c in results[0]}) > 10  # it does sample


def test_any_batching_in_float32_differs_at_ties_only():
    policy = tiny_policy(dtype=torch.float32)
    draws = unequal_draws(60)
    results = [draw(engine_of(policy, **settings), draws) for settings in BATCHES]
    for (ids, key), first, *others in zip(draws, *results, strict=True):
        pairs = [(ids, first)]
        assert torch.allclose(sampled(pairs), learned(policy, pairs).double(), rtol=0, atol=1e-4)
        for other in others:
            assert first.ids is not None and other.ids is not None
            agreed = list(
                itertools.takewhile(
                    lambda pair: pair[0] == pair[1], zip(first.ids, other.ids, strict=False)
                )
            )
            same = len(agreed)
            gap = torch.tensor(first.logprobs[:same]) - torch.tensor(other.logprobs[:same])
            assert same == 0 or float(gap.abs().max()) <= 1e-4
            if other.ids != first.ids:
                rng = key.rng("tokens")
                uniform = [rng.random() for _ in range(same + 1)][-1]
                row = next_token_logprobs(policy, (*ids, *first.ids[:same]))[-1]
                edges = row.double().exp().cumsum(-1)
                assert float((edges - uniform).abs().min()) <= 1e-4


def test_the_uniforms_are_the_keys():
    # Token by token, by the whole model and the key's own stream.
    policy = tiny_policy(family="gpt_neox")
    draws = unequal_draws(12)
    for (ids, key), completion in zip(draws, draw(engine_of(policy), draws), strict=True):
        rng, written = key.rng("tokens"), list(ids)
        for token in completion.ids or ():
            edges = next_token_logprobs(policy, written)[-1].exp().cumsum(-1)
            assert token == int((edges <= rng.random()).sum())
            written.append(token)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_log_probabilities_are_the_learners(temperature):
    policy = tiny_policy(dtype=torch.float32, temperature=temperature)
    draws = unequal_draws()
    found = draw(engine_of(policy), draws, Sampling(12, temperature=temperature))
    pairs = [(ids, c) for (ids, _), c in zip(draws, found, strict=True)]
    assert torch.allclose(sampled(pairs), learned(policy, pairs).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen3", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}),
        (
            "qwen3",
            {
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        (
            "qwen3",
            {
                "sliding_window": 3,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "sliding_attention"],
            },
        ),
    ],
)
def test_sliding_windows(family, changes):
    policy = tiny_policy(family=family, **changes)
    wide = tiny_policy(family=family)
    draws = unequal_draws(15)
    found = draw(engine_of(policy, max_rows=4), draws)
    pairs = [(ids, c) for (ids, _), c in zip(draws, found, strict=True)]
    # The window makes a difference at these lengths, and the engine makes the same one.
    assert not torch.allclose(learned(wide, pairs), learned(policy, pairs), rtol=0, atol=1e-2)
    assert torch.allclose(sampled(pairs), learned(policy, pairs), rtol=0, atol=1e-6)
    turns = [pair for said in play(engine_of(policy), ["a"] * 4, 6) for pair in said]
    assert torch.allclose(sampled(turns), learned(policy, turns), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("temperature", "right"), [(0.8, True), (1.0, False)])
def test_frequencies(temperature, right):
    # 2,000 draws of one token at .8: they fit the probabilities at .8 and not those at 1.
    policy = tiny_policy(vocab=4, seed=5)
    draws = [((1, 2), KEY.at(sample=i, seat="a")) for i in range(2000)]
    found = draw(engine_of(policy), draws, Sampling(1, temperature=0.8))
    counts = torch.tensor([c.ids[0] for c in found]).bincount(minlength=4)
    policy.temperature = temperature
    expected = next_token_logprobs(policy, (1, 2))[-1].exp() * 2000
    assert (chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3) == right


def test_greedy_and_filters():
    policy = tiny_policy()
    ids = (3, 1, 4)
    (greedy,) = draw(engine_of(policy), [(ids, KEY.at(seat="a"))], Sampling(6, temperature=0.0))
    written = list(ids)
    for token in greedy.ids or ():
        assert token == int(next_token_logprobs(policy, written)[-1].argmax())
        written.append(token)
    draws = [(ids, KEY.at(sample=i, seat="a")) for i in range(200)]
    two = next_token_logprobs(policy, ids)[-1].topk(2).indices.tolist()
    kept = draw(engine_of(policy), draws, Sampling(1, temperature=0.8, top_k=2))
    assert {c.ids[0] for c in kept if c.ids} == set(two)
    most = draw(engine_of(policy), draws, Sampling(1, temperature=0.8, top_p=1e-6))
    assert {c.ids[0] for c in most if c.ids} == {two[0]}


# -- where a turn ends ----------------------------------------------------------------------------


def test_a_turn_ends_at_eos_or_at_its_limit():
    found = draw(engine_of(tiny_policy(vocab=4)), unequal_draws_of_four(), Sampling(5, 0.8))
    reasons = set()
    for completion in found:
        ids = completion.ids or ()
        assert completion.completion_tokens == len(ids) == len(completion.logprobs or ()) <= 5
        assert EOS not in ids[:-1]
        assert completion.finish_reason == ("stop" if ids[-1] == EOS else "length")
        assert completion.finish_reason == "stop" or len(ids) == 5
        assert completion.text == "".join(chr(96 + i) for i in ids if i != EOS)
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def unequal_draws_of_four() -> list[Draw]:
    return [((1, 2, 3)[: 1 + i % 3], KEY.at(sample=i, seat="a")) for i in range(40)]


def test_the_context_limit():
    policy = tiny_policy(max_position_embeddings=20)
    draws = [([5] * length, KEY.at(sample=length, seat="a")) for length in (3, 15, 19)]
    for (ids, _), completion in zip(draws, draw(engine_of(policy), draws), strict=True):
        assert len(ids) + completion.completion_tokens <= 20
        ended = completion.finish_reason == "stop" or completion.completion_tokens == 12
        assert ended or len(ids) + completion.completion_tokens == 20
    assert completion.completion_tokens == 1


# -- what is fed ----------------------------------------------------------------------------------


def test_equal_prompts_are_fed_once():
    policy = tiny_policy()
    engine = engine_of(policy)
    fed = count_fed(policy)
    prompts = {"p": (1, 2, 3, 4, 5), "q": (7, 8, 9)}
    draws = [
        (ids, KEY.at(problem=n, sample=i, seat="a")) for n, ids in prompts.items() for i in range(8)
    ]
    found = draw(engine, draws)
    assert fed[0] == (2, 5)  # two rows, padded to the longer
    # Then one token a row and step: everything written but each row's last is fed.
    assert sum(rows * new for rows, new in fed[1:]) == sum(c.completion_tokens - 1 for c in found)
    assert all(new == 1 for _, new in fed[1:])


def test_a_next_turn_feeds_what_is_new():
    policy = tiny_policy(family="gpt_neox")
    engine = engine_of(policy)
    fed = count_fed(policy)
    said = play(engine, ["a", "a", "a"], 1)[0]
    # Each turn feeds its prompt but for what the last turn fed (all but its newest token).
    expected, before = 0, 0
    for ids, completion in said:
        expected += len(ids) - before + completion.completion_tokens - 1
        before = len(ids) + completion.completion_tokens - 1
    assert sum(rows * new for rows, new in fed) == expected
    other = engine_of(policy, cache_tokens=0)
    fed.clear()
    without = play(other, ["a", "a", "a"], 1)[0]
    assert sum(rows * new for rows, new in fed) > expected
    for (ids, kept), (other_ids, fresh) in zip(said, without, strict=True):
        assert ids == other_ids and kept.ids == fresh.ids
        assert kept.logprobs == pytest.approx(fresh.logprobs, abs=1e-10)


@pytest.mark.parametrize("cache_tokens", [0, 60, 1 << 20])
def test_conversations_of_several_turns_and_agents(cache_tokens):
    policies = tiny_policy("a"), tiny_policy("b", "llama", seed=4, temperature=1.2)
    engine = engine_of(*policies, cache_tokens=cache_tokens, max_rows=5)
    for policy in policies:
        policy.temperature = SAMPLING.temperature
    said = play(engine, ["a", "b", "a", "a", "b"], 9)
    for policy in policies:
        pairs = [
            pair
            for each in said
            for seat, pair in zip("abaab", each, strict=True)
            if seat == policy.name
        ]
        assert torch.allclose(sampled(pairs), learned(policy, pairs), rtol=0, atol=1e-6)
    assert [[c.ids for _, c in each] for each in said] == [
        [c.ids for _, c in each] for each in play(engine_of(*policies), "abaab", 9)
    ]
    assert all(not store._kept and store._tokens == 0 for store in engine._stores.values())


def test_a_changed_prompt_reuses_only_its_agreeing_part():
    policy = tiny_policy()
    engine = engine_of(policy)
    key = KEY.at(seat="a")

    async def two_turns() -> list[tuple[tuple[int, ...], Completion]]:
        engine.begin(key)
        said = []
        for index, ids in enumerate([(1, 2, 3, 4, 5), (1, 2, 9, 4, 5, 6), (8, 2), (8, 2, 1)]):
            said.append(
                (ids, await engine.generate("a", prompt(ids), SAMPLING, key.at(own_index=index)))
            )
        engine.end(key)
        return said

    said = run(two_turns())
    assert torch.allclose(sampled(said), learned(policy, said), rtol=0, atol=1e-6)


def test_publish_forgets_states_of_the_old_weights():
    policy = tiny_policy()
    engine = engine_of(policy)
    key = KEY.at(seat="a")

    async def with_an_update() -> list[tuple[tuple[int, ...], Completion]]:
        engine.begin(key)
        first = await engine.generate("a", prompt((1, 2)), SAMPLING, key)
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.mul_(1.2)
        engine.publish("a", 3, {})
        ids = (1, 2, *(first.ids or ()), 4)
        second = await engine.generate("a", prompt(ids), SAMPLING, key.at(own_index=1))
        engine.end(key)
        assert first.version == 0 and second.version == 3
        return [(ids, second)]

    said = run(with_an_update())
    assert torch.allclose(sampled(said), learned(policy, said), rtol=0, atol=1e-6)


# -- order ----------------------------------------------------------------------------------------


def test_the_order_of_asking_does_not_matter():
    policy = tiny_policy(dtype=torch.float32)
    draws = unequal_draws()
    straight = draw(engine_of(policy, max_rows=4), draws)
    turned = draw(engine_of(policy, max_rows=4), draws[::-1])[::-1]
    # Requests are taken by key, so the batches and therefore the bits are the same.
    assert straight == turned


def test_it_decodes_when_nobody_can_go_on_without_it():
    policy = tiny_policy()
    engine = engine_of(policy)
    fed = count_fed(policy)

    async def one(sample: int) -> None:
        key = KEY.at(sample=sample, seat="a")
        for _ in range(50 * sample):  # the others wait for the slowest
            await asyncio.sleep(0)
        await engine.generate("a", prompt((1 + sample,)), SAMPLING, key)
        engine.end(key)

    async def together() -> None:
        for sample in range(4):
            engine.begin(KEY.at(sample=sample))
        await asyncio.gather(*(one(sample) for sample in range(4)))

    run(together())
    assert fed[0] == (4, 1)


# -- trouble --------------------------------------------------------------------------------------


def test_what_cannot_be_asked():
    engine = engine_of()
    with pytest.raises(UserError, match="no seat 'judge'; there are: a"):
        run(engine.generate("judge", prompt((1,)), SAMPLING, KEY))
    for empty in (Prompt(()), Prompt((), ids=ids_of())):
        with pytest.raises(UserError, match="seat a: the local engine needs token ids"):
            run(engine.generate("a", empty, SAMPLING, KEY))


def test_recurrent_layers_are_refused():
    policy = tiny_policy()
    policy.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match=r"agent a: .*linear_attention"):
        engine_of(policy)


def test_a_failing_conversation_does_not_stop_the_others():
    engine = engine_of()

    async def one(sample: int) -> Completion:
        key = KEY.at(sample=sample, seat="a")
        engine.begin(key)
        try:
            await asyncio.sleep(0)
            if sample == 1:
                raise RuntimeError("a protocol's own mistake")
            first = await engine.generate("a", prompt((1, 2)), SAMPLING, key)
            if sample == 2:
                raise RuntimeError("a later mistake")
            ids = (1, 2, *(first.ids or ()), 3)
            return await engine.generate("a", prompt(ids), SAMPLING, key.at(own_index=1))
        finally:
            engine.end(key)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(one(i) for i in range(5)), return_exceptions=True)

    results = run(all_of_them())
    assert [isinstance(r, Completion) for r in results] == [True, False, False, True, True]


def test_a_ctrl_c_while_it_decodes_is_not_told_twice(caplog, monkeypatch):
    """Of a task whose exception nobody asks for, asyncio prints the traceback as it goes."""

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    engine = engine_of()
    monkeypatch.setattr(Policy, "hidden", interrupted)
    try:
        draw(engine, [([1, 2, 3], KEY.at(problem="p", sample=0, seat="a"))])
    except KeyboardInterrupt:
        ended = True
    assert ended and engine._driver is not None and engine._driver.done()
    del engine
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_a_cancelled_request_does_not_stop_the_others():
    engine = engine_of(max_rows=2)

    async def some() -> list[Any]:
        keys = [KEY.at(sample=i, seat="a") for i in range(6)]
        for key in keys:
            engine.begin(key)

        async def one(key: Key) -> Completion:
            try:
                return await engine.generate("a", prompt((1, 2)), SAMPLING, key)
            finally:
                engine.end(key)

        tasks = [asyncio.create_task(one(key)) for key in keys]
        await asyncio.sleep(0)
        tasks[4].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = run(some())
    assert [isinstance(r, Completion) for r in results] == [True] * 4 + [False, True]


@pytest.mark.parametrize("forward", [1, 2, 3, 4])
def test_a_failing_model_fails_everyone_and_the_engine_lives_on(forward):
    # The first forwards are prompts (one each, so small is the budget), the others single tokens.
    policy = tiny_policy(family="gpt_neox")
    engine = engine_of(policy, prefill_tokens=1, max_rows=3)
    draws = unequal_draws(6)
    expected = draw(engine_of(policy), draws)
    hidden, calls = policy.hidden, itertools.count(1)

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) == forward:
            raise MemoryError("no room on the device")
        return hidden(*args, **kwargs)

    policy.hidden = failing  # type: ignore[method-assign]

    async def all_fail() -> list[Any]:
        for _, key in draws:
            engine.begin(key)

        async def one(ids: Sequence[int], key: Key) -> Completion:
            try:
                return await engine.generate("a", prompt(ids), SAMPLING, key)
            finally:
                engine.end(key)

        return await asyncio.gather(*(one(*each) for each in draws), return_exceptions=True)

    results = run(all_fail())
    failures = [r for r in results if isinstance(r, BaseException)]
    assert failures and all(isinstance(f, MemoryError) for f in failures)
    again = draw(engine, draws)
    assert [c.ids for c in again] == [c.ids for c in expected]
