"""Incumbent and newcomer in one seat: against both whole models, the learner, and enumeration."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from satune.agents.learner import LocalLearner, OptimizerSettings
from satune.agents.mixture import MixturePolicy, tokenizer_difference
from satune.agents.packing import pack
from satune.agents.policy import Policy
from satune.core.logprobs import exact_kl
from satune.core.projection import mixture_logprobs, project
from satune.engines.local import LocalEngine
from satune.tiny.zoo import tiny_tokenizer
from satune.training.self_check import Tolerance, self_check
from satune.types import Completion, Key, Prompt, Sampling, UserError, ids_of
from tiny_models import EOS, Alphabet, episode, next_token_logprobs, tiny_lm, turn

KEY = Key(0, "swap", stage=1, step=1)


def mixture(
    incumbent: dict[str, Any] | None = None,
    newcomer: dict[str, Any] | None = None,
    *,
    delta: float = 0.1,
    letters: int = 13,
    dtype: torch.dtype = torch.float64,
) -> MixturePolicy:
    """A small Qwen3 at .8 and a larger Llama at 1.3."""
    ours = {"family": "qwen3", "seed": 1, "layers": 1, "vocab": letters} | (incumbent or {})
    theirs = {"family": "llama", "seed": 2, "layers": 3, "vocab": letters} | (newcomer or {})
    if theirs["family"] == "llama":
        theirs = {"hidden_size": 24, "head_dim": 12} | theirs
    old = Policy("a", tiny_lm(**ours, dtype=dtype), Alphabet(letters), 0.8)
    new = Policy("new", tiny_lm(**theirs, dtype=dtype), Alphabet(letters), 1.3)
    return MixturePolicy("a", old, new, delta)


def wholly(policy: MixturePolicy, ids: Sequence[int]) -> torch.Tensor:
    """log π_λ [S, V] after each of ``ids``, from both whole models."""
    width = min(part.head.weight.shape[0] for part in policy.parts)  # type: ignore[union-attr]
    p_SV, q_SV = (
        torch.log_softmax(next_token_logprobs(part, ids)[:, :width], -1) for part in policy.parts
    )
    return mixture_logprobs(p_SV, q_SV, project(p_SV, q_SV, policy.delta).lambda_N)


def draw(policy: Policy, prompts: Sequence[Sequence[int]], tokens: int, **settings: Any) -> Any:
    engine = LocalEngine({"a": policy}, {"a": "a"}, **settings)

    async def one(index: int, ids: Sequence[int]) -> Completion:
        key = KEY.at(sample=index, seat="a")
        sampling = Sampling(tokens, temperature=policy.temperature)
        completion = await engine.generate("a", Prompt((), ids_of(ids)), sampling, key)
        engine.end(key)
        return completion

    async def every() -> list[Completion]:
        for index in range(len(prompts)):
            engine.begin(KEY.at(sample=index, seat="a"))
        return await asyncio.gather(*(one(i, ids) for i, ids in enumerate(prompts)))

    return asyncio.run(asyncio.wait_for(every(), 600))


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 3, 17, 40, 5]
    return [
        torch.randint(1, 13, (lengths[i % 5],), generator=generator).tolist() for i in range(count)
    ]


def scored(policy: Policy, pairs: Sequence[tuple[Sequence[int], Completion]]) -> torch.Tensor:
    packed = pack([[turn(ids, completion.ids)] for ids, completion in pairs])
    return LocalLearner(policy, OptimizerSettings(), frozen=True).score(packed)


def sampled(pairs: Sequence[tuple[Sequence[int], Completion]]) -> torch.Tensor:
    return torch.tensor([p for _, c in pairs for p in c.logprobs or ()], dtype=torch.float64)


def test_it_is_the_mixture_of_both_whole_models():
    policy = mixture()
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    hidden_SH = policy.hidden(torch.tensor([ids]))[0]
    expected_SV = wholly(policy, ids)
    logits_SV = policy.project(hidden_SH)
    assert torch.allclose(logits_SV / 0.8, expected_SV, rtol=0, atol=1e-9)
    assert torch.equal(policy.project(hidden_SH[None])[0], logits_SV)
    # Neither of the two alone, and as far from the incumbent as is allowed.
    p_SV, q_SV = (next_token_logprobs(part, ids) for part in policy.parts)
    assert float((expected_SV - p_SV).abs().max()) > 0.1
    assert float((expected_SV - q_SV).abs().max()) > 0.1
    found = policy.projection(hidden_SH)
    assert torch.allclose(exact_kl(expected_SV, p_SV), found.kl_N, rtol=1e-6, atol=0)
    assert bool((found.kl_N <= 0.1).all()) and bool((found.kl_N > 0.0999).any())
    # Nearer the newcomer than the incumbent is, at every state.
    assert bool((exact_kl(expected_SV, q_SV) < exact_kl(p_SV, q_SV)).all())


BATCHES: list[dict[str, Any]] = [
    {},
    {"max_rows": 3},
    {"max_rows": 7, "prefill_tokens": 50},
    {"max_rows": 5, "cache_tokens": 0},
]


@pytest.mark.parametrize(
    ("incumbent", "newcomer"),
    [
        ({}, {}),
        ({"family": "mistral", "sliding_window": 4}, {}),
        ({}, {"family": "mistral", "sliding_window": 4}),
        ({"family": "gpt2"}, {"family": "gpt_neox"}),
    ],
)
def test_sampled_log_probabilities_are_the_scored_ones(incumbent, newcomer):
    policy = mixture(incumbent, newcomer)
    rows = prompts(20)
    results = [draw(policy, rows, 8, **settings) for settings in BATCHES]
    assert len({tuple(c.ids) for c in results[0]}) > 10
    for found in results:
        assert [c.ids for c in found] == [c.ids for c in results[0]]
        pairs = list(zip(rows, found, strict=True))
        assert torch.allclose(sampled(pairs), scored(policy, pairs), rtol=0, atol=1e-6)
    for ids, completion in zip(rows, results[0], strict=True):
        expected_TV = wholly(policy, [*ids, *completion.ids])[len(ids) - 1 : -1]
        expected_T = expected_TV.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected_T.tolist(), abs=1e-6)


def test_conversations_go_on_from_the_states_of_both():
    policy = mixture()
    engine = LocalEngine({"a": policy}, {"a": "a", "b": "a"})

    async def one(key: Key) -> list[tuple[tuple[int, ...], Completion]]:
        said: list[tuple[tuple[int, ...], Completion]] = []
        ids: tuple[int, ...] = (1 + key.sample % 3, 5)
        for index, seat in enumerate(["a", "b", "a", "a"]):
            own = key.at(seat=seat, own_index=index)
            completion = await engine.generate(seat, Prompt((), ids_of(ids)), Sampling(6, 0.8), own)
            said.append((ids, completion))
            ids = (*ids, *(completion.ids or ()), 2, 3)
        engine.end(key)
        return said

    async def every() -> Any:
        keys = [KEY.at(sample=i) for i in range(9)]
        for key in keys:
            engine.begin(key)
        return await asyncio.gather(*(one(key) for key in keys))

    pairs = [pair for said in asyncio.run(asyncio.wait_for(every(), 600)) for pair in said]
    assert torch.allclose(sampled(pairs), scored(policy, pairs), rtol=0, atol=1e-6)


def test_a_float32_mixture_passes_the_self_check():
    policy = mixture(dtype=torch.float32)
    rows = prompts(24)
    episodes = [
        episode([_with_logprobs(ids, c)], 0.0, problem=f"p{i % 4}", sample=i // 4)
        for i, (ids, c) in enumerate(zip(rows, draw(policy, rows, 8), strict=True))
    ]
    learner = LocalLearner(policy, OptimizerSettings(), frozen=True)
    report = self_check({"a": learner}, episodes, Tolerance(mean=1e-4, largest=1e-3))
    assert 0 <= report["a"]["kl"] < 1e-6
    # It would notice: λ from another δ is another policy.
    policy.delta = 0.05
    with pytest.raises(UserError, match="self-check: agent a"):
        self_check({"a": learner}, episodes, Tolerance(mean=1e-4, largest=1e-3))


def _with_logprobs(ids: Sequence[int], completion: Completion) -> Any:
    made = turn(ids, completion.ids)
    return type(made)(
        **{
            **{name: getattr(made, name) for name in made.__slots__},
            "sampled_logprobs": completion.logprobs,
        }
    )


def test_frequencies_are_those_of_all_completions_counted_out():
    # Vocabulary of 4, EOS first: EOS alone, or 3 first tokens with 4 second ones: 13 completions.
    policy = mixture(letters=4, delta=0.2)
    prompt = [1, 2]
    expected: dict[tuple[int, ...], float] = {}
    first_V = wholly(policy, prompt)[-1].exp()
    expected[(EOS,)] = float(first_V[EOS])
    for first, second in itertools.product(range(1, 4), range(4)):
        second_V = wholly(policy, [*prompt, first])[-1].exp()
        expected[first, second] = float(first_V[first] * second_V[second])
    assert sum(expected.values()) == pytest.approx(1.0)
    draws = 6000
    counts = Counter(tuple(c.ids) for c in draw(policy, [prompt] * draws, 2))
    assert set(counts) <= set(expected)

    def fits(shares: dict[tuple[int, ...], float]) -> float:
        seen = [counts[ids] for ids in expected]
        return float(chisquare(seen, [draws * shares[ids] for ids in expected]).pvalue)

    assert fits(expected) > 1e-3
    # The test can tell: the incumbent's own distribution does not fit.
    alone: dict[tuple[int, ...], float] = {}
    old = policy.incumbent
    start_V = next_token_logprobs(old, prompt)[-1].exp()
    alone[(EOS,)] = float(start_V[EOS])
    for first, second in itertools.product(range(1, 4), range(4)):
        after_V = next_token_logprobs(old, [*prompt, first])[-1].exp()
        alone[first, second] = float(start_V[first] * after_V[second])
    assert fits(alone) < 1e-6


@pytest.mark.parametrize(("ours", "theirs"), [(16, 13), (13, 16), (15, 16)])
def test_padded_vocabularies(ours, theirs):
    policy = mixture({"vocab": ours}, {"vocab": theirs})
    rows = prompts(20)
    found = draw(policy, rows, 8)
    assert max(i for c in found for i in c.ids) < min(ours, theirs)
    pairs = list(zip(rows, found, strict=True))
    assert torch.allclose(sampled(pairs), scored(policy, pairs), rtol=0, atol=1e-6)
    hidden_SH = policy.hidden(torch.tensor([rows[3]]))[0]
    logits_SV = policy.project(hidden_SH)
    assert logits_SV.shape[1] == ours  # ids that the incumbent may have written can be scored
    narrow = min(ours, theirs)
    assert torch.allclose(logits_SV[:, :narrow] / 0.8, wholly(policy, rows[3]), rtol=0, atol=1e-9)
    assert bool(logits_SV[:, narrow:].isneginf().all())
    with pytest.raises(UserError, match="has logits for 12 ids, the tokenizer has 13"):
        mixture({"vocab": 13}, {"vocab": 12})


# -- the same tokenizer ---------------------------------------------------------------------------


def test_what_makes_tokenizers_differ():
    ours = tiny_tokenizer("tiny:qwen3-s")
    assert tokenizer_difference(ours, tiny_tokenizer("tiny:qwen3-m")) is None
    other = tiny_tokenizer("tiny:llama-s")
    assert "has id" in (tokenizer_difference(ours, other) or "")
    with pytest.raises(UserError, match="another tokenizer"):
        MixturePolicy(
            "a",
            Policy("a", tiny_lm("qwen3", vocab=len(other)), ours, 1.0),
            Policy("b", tiny_lm("qwen3", vocab=len(other)), other, 1.0),
            0.1,
        )

    class Swapped(Alphabet):
        def get_vocab(self) -> dict[str, int]:
            return super().get_vocab() | {"a": 2, "b": 1}

    class OtherEnd(Alphabet):
        eos_token_id = 3

    class OtherSpecials(Alphabet):
        all_special_ids = (EOS, 5)

    class OtherMerges(Alphabet):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return super().encode(text)[::-1]

    class Larger(Alphabet):
        def get_vocab(self) -> dict[str, int]:
            return super().get_vocab() | {"extra": 13}

    for other, phrase in (
        (Swapped(), "token 'a' has id 1 here and 2 there"),
        (OtherEnd(), "eos_token_id is 0 here and 3 there"),
        (OtherSpecials(), "other tokens are special"),
        (OtherMerges(), "taken apart differently"),
        (Larger(), "token 'extra' has id None here and 13 there"),
    ):
        assert phrase in (tokenizer_difference(Alphabet(), other) or "")
    assert tokenizer_difference(Alphabet(), Alphabet()) is None
    with pytest.raises(UserError, match="delta is 0"):
        mixture(delta=0)
