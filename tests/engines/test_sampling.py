"""Tokens from logits: inversion by hand, filters, frequencies."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from satune.engines.sampling import sample_tokens
from satune.types import Sampling

# Probabilities .5, .125, .25, .125.
LOGITS_V = torch.tensor([0.5, 0.125, 0.25, 0.125], dtype=torch.float64).log()


def draw(uniforms, logits=LOGITS_V, **settings):
    rows = logits.expand(len(uniforms), -1)
    tokens_R, logprobs_R = sample_tokens(
        rows, [Sampling(1, **settings)] * len(uniforms), list(uniforms)
    )
    return tokens_R.tolist(), logprobs_R.tolist()


def test_a_uniform_is_inverted_through_the_cdf():
    # Cumulative .5, .625, .875, 1; each step belongs to the token above it.
    tokens, logprobs = draw([0.0, 0.49, 0.5, 0.624, 0.625, 0.874, 0.875, 0.999])
    assert tokens == [0, 0, 1, 1, 2, 2, 3, 3]
    assert logprobs == pytest.approx([LOGITS_V[t].item() for t in tokens])


def test_temperature_sharpens():
    # At T = 1/2 the probabilities are squared: 16, 1, 4, 1 of 22; cumulative .727, .773, .955.
    tokens, logprobs = draw([0.72, 0.73, 0.78, 0.96], temperature=0.5)
    assert tokens == [0, 1, 2, 3]
    assert logprobs == pytest.approx([math.log(n / 22) for n in (16, 1, 4, 1)])


def test_greedy():
    tokens, logprobs = draw([0.0, 0.999], temperature=0.0)
    assert tokens == [0, 0] and logprobs == pytest.approx([math.log(0.5)] * 2)


def test_top_k():
    # Tokens 0 and 2 stay, with 2/3 and 1/3; log-probabilities are the policy's all the same.
    tokens, logprobs = draw([0.66, 0.67, 0.999], top_k=2)
    assert tokens == [0, 2, 2]
    assert logprobs == pytest.approx([math.log(p) for p in (0.5, 0.25, 0.25)])
    # As many as any request may ask for are all of them.
    uniforms = [0.1, 0.55, 0.7, 0.9]
    assert draw(uniforms, top_k=2**31 - 1) == draw(uniforms)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {0}), (0.5, {0}), (0.51, {0, 2}), (0.75, {0, 2})]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    tokens, _ = draw([i / 200 for i in range(200)], top_p=top_p)
    assert set(tokens) == kept


def test_rows_keep_their_own_settings():
    tokens_R, logprobs_R = sample_tokens(
        LOGITS_V.expand(4, -1),
        [Sampling(1), Sampling(1, temperature=0.0), Sampling(1, top_k=1), Sampling(1)],
        [0.6, 0.6, 0.6, 0.9],
    )
    assert tokens_R.tolist() == [1, 0, 0, 3]
    assert logprobs_R.tolist() == pytest.approx([LOGITS_V[t].item() for t in (1, 0, 0, 3)])


@given(
    st.lists(st.floats(-30, 30), min_size=2, max_size=8),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5),
    st.floats(0.2, 3),
)
def test_a_row_depends_on_itself_alone(logits, uniforms, temperature):
    row = torch.tensor(logits, dtype=torch.float32)
    together = draw(uniforms, row, temperature=temperature)
    apart = [draw([u], row, temperature=temperature) for u in uniforms]
    assert together == ([t[0] for t, _ in apart], [p[0] for _, p in apart])


def test_a_token_without_mass_is_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    tokens, _ = draw([0.0, 0.4999, 0.5, 1 - 2**-53], logits)
    assert tokens == [1, 1, 3, 3]


def test_rare_tokens_keep_their_place():
    # .5, a hundred tokens of 1e-9, the rest: a running sum in float32 would not notice the hundred.
    probabilities = torch.tensor([0.5, *[1e-9] * 100, 0.5 - 1e-7], dtype=torch.float64)
    tokens, _ = draw([0.5 + (k - 0.5) * 1e-9 for k in (1, 50, 100, 101)], probabilities.log())
    assert tokens == [1, 50, 100, 101]


@pytest.mark.parametrize("first", [0, 128, 200])
def test_rare_tokens_keep_their_place_among_blocks(first):
    # One token has nearly all of the mass of its block, in float32; the next ones 1e-10 each.
    weights = torch.full((384,), 1e-10, dtype=torch.float64)
    weights[first] = 1.0
    total, before = weights.sum().item(), first * 1e-10 + 1.0
    tokens, _ = draw([(before + (k - 0.5) * 1e-10) / total for k in (1, 30, 50)], weights.log())
    assert tokens == [first + 1, first + 30, first + 50]


@given(st.integers(1, 700), st.integers(0, 2**31), st.floats(0, 1, exclude_max=True), st.booleans())
def test_large_vocabularies_are_inverted_as_by_one_running_sum(size, seed, u, rare):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(size, generator=generator, dtype=torch.float64)
    weights = weights.pow(8 if rare else 1) * (weights > (0.9 if rare else 0.3))
    weights[seed % size] = 0.5  # at least one may be drawn
    cumulative = (weights / weights.sum()).cumsum(-1)
    (token,), _ = draw([u], weights.log().float())
    below = cumulative[token - 1].item() if token else 0.0
    assert weights[token] > 0
    assert below - 1e-6 <= u * cumulative[-1].item() <= cumulative[token].item() + 1e-6


@pytest.mark.parametrize("size", [127, 128, 129, 300])
def test_what_weighs_nothing_at_the_end_is_not_drawn_by_the_largest_uniform(size):
    # Of so many rows some blocks' sums are rounded up, and go beyond their last token.
    logits_RV = torch.full((200, size), -math.inf)
    logits_RV[:, :100] = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    tokens_R, _ = sample_tokens(logits_RV, [Sampling(1)] * 200, [1 - 2**-53] * 200)
    assert set(tokens_R.tolist()) == {99}
    assert draw([0.5], torch.full((size,), math.nan))[0] == [size - 1]
