"""The objectives: values and gradients by hand, splits into micro-batches, weightless episodes."""

import inspect
import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from satune.core.objectives import (
    LINEAR_ABOVE,
    LOSSES,
    ObjectiveBatch,
    objective_loss,
)
from satune.core.settings import OBJECTIVES, WHOLE, ObjectiveSettings

NAN = math.nan
NAMES = tuple(OBJECTIVES)
PESSIMISTIC = ("sat", "gspo", "grpo", "dapo", "ppo")
"""Those that take the smaller of the clipped and the free gain."""


def bundle(
    logprobs: list[float] | Tensor,
    anchor: list[float] | Tensor,
    episode: list[int],
    advantages: list[float],
    weights: list[float] | None = None,
    **changes,
) -> ObjectiveBatch:
    def number(values) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64)

    fields = {
        "logprobs_T": number(logprobs).requires_grad_(),
        "anchor_logprobs_T": number(anchor),
        "episode_T": torch.tensor(episode, dtype=torch.long),
        "turn_T": torch.tensor(episode, dtype=torch.long),
        "unit_T": torch.tensor(episode, dtype=torch.long),
        "advantages_U": number(advantages),
        "weights_U": number(weights or [1.0] * len(advantages)),
        "episode_total": float(len(advantages)),
        "token_total": float(len(episode)),
    }
    return ObjectiveBatch(**(fields | changes))


def test_every_objective_takes_the_options_that_its_settings_declare():
    assert list(LOSSES) == list(OBJECTIVES)
    for name, loss in LOSSES.items():
        options = list(inspect.signature(loss).parameters)[1:]
        assert options == [field.name for field in fields(OBJECTIVES[name])], name


TERMS = ("beta", "reference_kl", "entropy")


def chosen(name: str, **choices) -> ObjectiveSettings:
    """Settings of an objective from its options and the terms beside it, together."""
    terms = {key: choices.pop(key) for key in TERMS if key in choices}
    return ObjectiveSettings(name, choices, **terms)


def value_and_gradient(batch: ObjectiveBatch, **choices) -> tuple[float, list[float], dict]:
    loss, metrics = objective_loss(batch, chosen(**choices))
    (gradient,) = torch.autograd.grad(loss, batch.logprobs_T)
    return loss.item(), gradient.tolist(), metrics


def two_episodes() -> ObjectiveBatch:
    """Episode 0: three tokens, log-ratios .1, -.3, .05, A = 2, w = .5; episode 1: one token,
    log-ratio .4, A = -1, w = 3."""
    return bundle([-0.9, -1.3, -0.95, -0.6], [-1.0] * 4, [0, 0, 0, 1], [2.0, -1.0], [0.5, 3.0])


def test_sat_hand_computed():
    # u = (-.15, .4). Episode 0: e^-.15 = .861 inside [.8, 1.2]: r A. Episode 1: A < 0, r = e^.4
    # above 1.2: min(-1.49, -1.2) = -1.49, not held. Loss = -(.5 * 2 e^-.15 - 3 e^.4)/2; the
    # derivative of each term by each of its tokens is the term itself.
    loss, gradient, metrics = value_and_gradient(two_episodes(), name="sat")
    assert loss == pytest.approx(-(math.exp(-0.15) - 3 * math.exp(0.4)) / 2)
    assert gradient == pytest.approx([-math.exp(-0.15) / 2] * 3 + [1.5 * math.exp(0.4)])
    assert metrics["clipped"] == 0 and metrics["clippable"] == 2
    # Each is read off the device for every micro-batch.
    assert sorted(metrics) == ["clippable", "clipped", "policy_loss"]


def test_sat_sums_and_never_averages():
    # Two tokens of log-ratio .1 each: u = .2 > log 1.2 = .1823 is held, their mean .1 would not be.
    batch = bundle([0.1, 0.1], [0.0, 0.0], [0, 0], [1.0])
    loss, gradient, metrics = value_and_gradient(batch, name="sat")
    assert loss == pytest.approx(-1.2) and gradient == [0.0, 0.0] and metrics["clipped"] == 1
    loss, gradient, metrics = value_and_gradient(batch, name="gspo")
    assert loss == pytest.approx(-math.exp(0.1)) and metrics["clipped"] == 0
    assert gradient == pytest.approx([-math.exp(0.1) / 2] * 2)


@pytest.mark.parametrize(
    "advantage, log_ratio, gain, slope",
    [
        (1.0, math.log(1.19), 1.19, 1.19),
        (1.0, math.log(1.21), 1.2, 0.0),
        (1.0, math.log(0.5), 0.5, 0.5),
        (-1.0, math.log(0.81), -0.81, -0.81),
        (-1.0, math.log(0.79), -0.8, 0.0),
        (-1.0, math.log(1.5), -1.5, -1.5),
    ],
)
@pytest.mark.parametrize(
    "choices",
    [{"name": n, "clip": 0.2} for n in ("sat", "gspo", "grpo")]
    + [{"name": "dapo", "clip_low": 0.2, "clip_high": 0.2}],
    ids=lambda choices: choices["name"],
)
def test_the_clip_is_pessimistic(choices, advantage, log_ratio, gain, slope):
    # Range [.8, 1.2]. One token: all four objectives coincide.
    batch = bundle([log_ratio], [0.0], [0], [advantage])
    loss, gradient, metrics = value_and_gradient(batch, **choices)
    assert loss == pytest.approx(-gain) and gradient == pytest.approx([-slope])
    assert metrics["clipped"] == (slope == 0)


def one_token(advantage: float, ratio: float, **choices) -> tuple[float, float]:
    """Gain and its slope in log π for one token whose ratio to the anchor is ``ratio``."""
    loss, gradient, _ = value_and_gradient(
        bundle([math.log(ratio)], [0.0], [0], [advantage]), **choices
    )
    return -loss, -gradient[0]


def test_the_ends_of_the_clip_are_apart_and_either_may_be_absent():
    both = {"name": "dapo", "clip_low": 0.3, "clip_high": 0.2}
    assert one_token(1, 1.21, **both) == pytest.approx((1.2, 0))
    assert one_token(-1, 0.71, **both) == pytest.approx((-0.71, -0.71))
    assert one_token(-1, 0.69, **both) == pytest.approx((-0.7, 0))
    lower = both | {"clip_high": None}
    assert one_token(1, 3.0, **lower) == pytest.approx((3, 3))
    assert one_token(-1, 0.69, **lower) == pytest.approx((-0.7, 0))
    assert one_token(1, 0.69, **lower) == pytest.approx((0.69, 0.69))
    upper = both | {"clip_low": None}
    assert one_token(1, 1.21, **upper) == pytest.approx((1.2, 0))
    assert one_token(-1, 0.01, **upper) == pytest.approx((-0.01, -0.01))
    for name in ("sat", "gspo", "grpo"):
        for advantage in (1, -1):
            for ratio in (0.01, 3.0):
                expected = pytest.approx((advantage * ratio, advantage * ratio))
                assert one_token(advantage, ratio, name=name, clip=None) == expected


def test_cispo_bounds_a_tokens_weight_and_never_its_gradient():
    # Gain sg(min(r, 2)) A log π, log π = log r here: the slope is min(r, 2) A also beyond the
    # clip, where dapo has none.
    choices = {"name": "cispo", "clip_high": 1.0}
    assert one_token(1, 1.5, **choices) == pytest.approx((1.5 * math.log(1.5), 1.5))
    assert one_token(1, 3.0, **choices) == pytest.approx((2 * math.log(3), 2))
    assert one_token(-1, 3.0, **choices) == pytest.approx((-2 * math.log(3), -2))
    # Without a lower clip, as its authors run it, a small ratio counts for what it is.
    assert one_token(1, 0.1, **choices) == pytest.approx((0.1 * math.log(0.1), 0.1))
    assert one_token(1, 0.1, **choices, clip_low=0.2)[1] == pytest.approx(0.8)


def test_cispo_hand_computed():
    # Each token counts w A r log π / 4: .5·2·(e^.1·(-.9) + e^-.3·(-1.3) + e^.05·(-.95)) and
    # 3·(-1)·e^.4·(-.6), with r held at 1.25 for the last (e^.4 = 1.49).
    loss, gradient, metrics = value_and_gradient(two_episodes(), name="cispo", clip_high=0.25)
    ratios = [math.exp(0.1), math.exp(-0.3), math.exp(0.05), 1.25]
    slopes = [ratio * weight / 4 for ratio, weight in zip(ratios, [1, 1, 1, -3], strict=True)]
    values = zip(slopes, [-0.9, -1.3, -0.95, -0.6], strict=True)
    assert loss == pytest.approx(-sum(slope * logprob for slope, logprob in values))
    assert gradient == pytest.approx([-slope for slope in slopes])
    assert metrics["clipped"] == 1 and metrics["clippable"] == 4


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), low=st.sampled_from([None, 0.2]), high=st.floats(0.1, 5))
def test_cispos_gradient_is_that_of_its_definition(seed, low, high):
    """d/dθ of -1/T Σ w A sg(clip(r)) log π, written token by token from the definition."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, anchor = (-2 * torch.rand(6, dtype=torch.float64, generator=generator) for _ in "ab")
    batch = bundle(logprobs, anchor, [0, 0, 1, 1, 1, 2], [1.5, -0.5, 2.0], [1.0, 2.0, 0.5])
    _, gradient, _ = value_and_gradient(batch, name="cispo", clip_low=low, clip_high=high)
    new, old = batch.logprobs_T.tolist(), anchor.tolist()
    expected = []
    for token, episode in enumerate(batch.episode_T.tolist()):
        ratio = math.exp(new[token] - old[token])
        held = min(max(ratio, 0.0 if low is None else 1 - low), 1 + high)
        weight = float(batch.weights_U[episode] * batch.advantages_U[episode])
        expected.append(-weight * held / 6)
    assert gradient == pytest.approx(expected)


def test_ppo_hand_computed():
    # Three tokens of one episode, A = 2, -1, .5 a token; ratios 1.5, .5, 1.1 and clips .8, 1.2:
    # min(3, 2.4) = 2.4 held; min(-.5, -.8) = -.8 held; .55 free. Loss = -(2.4 - .8 + .55)/3.
    ratios = [1.5, 0.5, 1.1]
    batch = bundle(
        [math.log(r) - 1 for r in ratios], [-1.0] * 3, [0, 0, 0], [2.0, -1.0, 0.5],
        unit_T=torch.arange(3), episode_total=1.0,
        entropy_T=torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64),
    )  # fmt: skip
    loss, gradient, metrics = value_and_gradient(batch, name="ppo")
    assert loss == pytest.approx(-2.15 / 3, rel=1e-14)
    assert gradient == pytest.approx([0.0, 0.0, -0.55 / 3], rel=1e-14)
    assert metrics["clipped"] == 2 and metrics["clippable"] == 3
    # With an entropy bonus of .1: less .1 times its mean over tokens, .6.
    loss, _, _ = value_and_gradient(batch, name="ppo", entropy=0.1)
    assert loss == pytest.approx(-2.15 / 3 - 0.06, rel=1e-14)


def test_m2po_hand_computed():
    # u = .1, -.3, .05, .4: squares .01, .09, .0025, .16. Mean of all .0656; without .16: .0342,
    # below .04, so the last is left out and the others' ratios are free of any clip.
    loss, gradient, metrics = value_and_gradient(two_episodes(), name="m2po")
    gains = [math.exp(0.1), math.exp(-0.3), math.exp(0.05)]  # w A = .5 * 2
    assert loss == pytest.approx(-sum(gains) / 4, rel=1e-14)
    assert gradient == pytest.approx([*(-g / 4 for g in gains), 0.0], rel=1e-14)
    assert metrics["clipped"] == 1 and metrics["clippable"] == 4
    # .0342 is above .03: without .09 as well the mean of .01 and .0025 is .00625.
    _, gradient, metrics = value_and_gradient(two_episodes(), name="m2po", second_moment=0.03)
    assert gradient == pytest.approx([-gains[0] / 4, 0.0, -gains[2] / 4, 0.0], rel=1e-14)
    _, gradient, _ = value_and_gradient(two_episodes(), name="m2po", second_moment=0.07)
    assert gradient[3] == pytest.approx(3 * math.exp(0.4) / 4, rel=1e-14)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), limit=st.floats(0.001, 1))
def test_m2po_leaves_out_as_few_tokens_as_it_takes(seed, limit):
    generator = torch.Generator().manual_seed(seed)
    u_T = torch.randn(7, dtype=torch.float64, generator=generator)
    batch = bundle(u_T - 1, [-1.0] * 7, [0, 0, 0, 1, 1, 1, 2], [1.0, -1.0, 2.0], [1.0, 2.0, 0.0])
    _, gradient, _ = value_and_gradient(batch, name="m2po", second_moment=limit)
    kept = [token for token in range(7) if gradient[token] != 0]
    squares = sorted((float(u_T[token]) ** 2, token) for token in range(6))
    # One after the other from the largest on, as the paper's algorithm has it.
    while squares and sum(square for square, _ in squares) / len(squares) >= limit:
        squares.pop()
    assert kept == sorted(token for _, token in squares)  # that of weight 0 counts for nobody


TURNS = {"episode_T": [0, 0, 0, 0, 1, 1], "turn_T": [3, 3, 4, 4, 5, 5]}


def by_turns() -> ObjectiveBatch:
    """Two turns of episode 0, u = .1 - .2 and .3 + .1, A = 1, -2; one of episode 1, u = .5 + 0,
    A = 3; weights 1, .5, 2."""
    u = [0.1, -0.2, 0.3, 0.1, 0.5, 0.0]
    return bundle(
        [each - 1 for each in u], [-1.0] * 6, TURNS["episode_T"], [1.0, -2.0, 3.0], [1.0, 0.5, 2.0],
        turn_T=torch.tensor(TURNS["turn_T"]), unit_T=torch.tensor([0, 0, 1, 1, 2, 2]),
        episode_total=2.0,
    )  # fmt: skip


def test_objectives_over_ratios_take_advantages_a_turn():
    # sat: e^-.1; -2 e^.4 .5 (not held); 3 * 1.2 * 2 (held): a sum over turns, a mean over episodes.
    gains = [math.exp(-0.1), -math.exp(0.4), 7.2]
    loss, gradient, metrics = value_and_gradient(by_turns(), name="sat")
    assert loss == pytest.approx(-sum(gains) / 2, rel=1e-14)
    expected = [-gains[0] / 2] * 2 + [-gains[1] / 2] * 2 + [0.0] * 2
    assert gradient == pytest.approx(expected, rel=1e-14)
    assert metrics["clipped"] == 1 and metrics["clippable"] == 3
    # gspo: the mean of a turn's two log-ratios, -.05, .2, .25; the last two above log 1.2 = .182.
    gains = [math.exp(-0.05), -math.exp(0.2), 7.2]
    loss, gradient, _ = value_and_gradient(by_turns(), name="gspo")
    assert loss == pytest.approx(-sum(gains) / 2, rel=1e-14)
    expected = [-gains[0] / 4] * 2 + [-gains[1] / 4] * 2 + [0.0] * 2
    assert gradient == pytest.approx(expected, rel=1e-14)
    loss, gradient, _ = value_and_gradient(by_turns(), name="reinforce")
    # Σ w A Σ log π = 1 * (-2.1) - 1 * (-1.6) + 6 * (-1.5)
    assert loss == pytest.approx((2.1 - 1.6 + 9.0) / 2, rel=1e-14)
    assert gradient == pytest.approx([-0.5] * 2 + [0.5] * 2 + [-3.0] * 2, rel=1e-14)


def test_objectives_over_tokens_take_the_advantage_of_the_tokens_turn():
    ratio = [math.exp(u) for u in (0.1, -0.2, 0.3, 0.1, 0.5, 0.0)]
    gains = [ratio[0], ratio[1], -ratio[2], -ratio[3], 6 * 1.2, 6.0]
    loss, _, _ = value_and_gradient(by_turns(), name="ppo")
    assert loss == pytest.approx(-sum(gains) / 6, rel=1e-14)
    # grpo: episode 0 has four tokens, episode 1 two.
    loss, gradient, _ = value_and_gradient(by_turns(), name="grpo")
    assert loss == pytest.approx(-(sum(gains[:4]) / 4 + sum(gains[4:]) / 2) / 2, rel=1e-14)
    assert gradient[5] == pytest.approx(-6 / 4, rel=1e-14)


def test_a_turn_of_weight_0_is_silent_and_the_others_of_its_episode_are_not():
    batch = replace(by_turns(), weights_U=torch.tensor([0.0, 0.5, 2.0]).double())
    hidden = replace(batch, advantages_U=torch.tensor([NAN, -2.0, 3.0]).double())
    for name in NAMES:
        loss, gradient, _ = value_and_gradient(hidden, name=name)
        assert math.isfinite(loss) and gradient[:2] == [0.0, 0.0], name
        assert gradient[2] != 0 or name == "m2po", name


def earlier(name: str, batch: ObjectiveBatch) -> Tensor:
    """The objectives over episodes, written for episodes alone."""
    episodes = batch.advantages_U.numel()

    def summed(values_T: Tensor) -> Tensor:
        return torch.zeros(episodes, dtype=values_T.dtype).index_add(0, batch.episode_T, values_T)

    def held(u: Tensor, advantages: Tensor, high: float = 0.2) -> Tensor:
        clipped = u.clamp(math.log1p(-0.2), math.log1p(high)).exp()
        excess = torch.relu(u - LINEAR_ABOVE)
        free = u.clamp(max=LINEAR_ABOVE).exp() * (1 + excess)
        return torch.minimum(free * advantages, clipped * advantages)

    u_T = batch.logprobs_T - batch.anchor_logprobs_T
    own_E = summed(torch.ones_like(u_T)).clamp(min=1)
    advantages_T = batch.advantages_U[batch.episode_T]
    if name in ("sat", "gspo"):
        u_E = summed(u_T) if name == "sat" else summed(u_T) / own_E
        gain_E = held(u_E, batch.advantages_U)
    elif name == "grpo":
        gain_E = summed(held(u_T, advantages_T)) / own_E
    else:
        gain_T = batch.weights_U[batch.episode_T] * held(u_T, advantages_T, 0.28)
        return -gain_T.sum() / batch.token_total
    return -(batch.weights_U * gain_E).sum() / batch.episode_total


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8))
@pytest.mark.parametrize("name", ["sat", "gspo", "grpo", "dapo"])
def test_an_advantage_an_episode_is_what_it_was_to_the_last_bit(name, seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    episode_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    logprobs, anchor = (torch.randn(sum(lengths), generator=generator) for _ in "ab")
    advantages_E, weights_E = (torch.randn(len(lengths), generator=generator) for _ in "ab")
    batch = ObjectiveBatch(
        logprobs.requires_grad_(), anchor, episode_T, episode_T, episode_T,
        advantages_E, weights_E.exp(), float(len(lengths)), float(max(1, sum(lengths))),
    )  # fmt: skip
    now, before = objective_loss(batch, ObjectiveSettings(name))[0], earlier(name, batch)
    assert torch.equal(now, before)
    pair = [torch.autograd.grad(loss, batch.logprobs_T)[0] for loss in (now, before)]
    assert torch.equal(*pair)


def test_gspo_hand_computed():
    # u/|y| = (-.05, .4), the gradient of each token is divided by its episode's length.
    loss, gradient, _ = value_and_gradient(two_episodes(), name="gspo")
    assert loss == pytest.approx(-(math.exp(-0.05) - 3 * math.exp(0.4)) / 2)
    assert gradient == pytest.approx([-math.exp(-0.05) / 6] * 3 + [1.5 * math.exp(0.4)])


def test_grpo_hand_computed():
    # Episode 0 (A = 2, w/2 = 1/4): token gains 2e^.1, 2e^-.3, 2e^.05 averaged over 3 tokens.
    loss, gradient, metrics = value_and_gradient(two_episodes(), name="grpo")
    tokens = [2 * math.exp(0.1), 2 * math.exp(-0.3), 2 * math.exp(0.05)]
    assert loss == pytest.approx(-sum(tokens) / 12 + 1.5 * math.exp(0.4))
    assert gradient == pytest.approx([-each / 12 for each in tokens] + [1.5 * math.exp(0.4)])
    assert metrics["clippable"] == 4


def test_dapo_hand_computed():
    # Every token counts 1/4 times its episode's weight; clip_high .28.
    loss, gradient, _ = value_and_gradient(two_episodes(), name="dapo", clip_high=0.28)
    tokens = [math.exp(0.1), math.exp(-0.3), math.exp(0.05), -3 * math.exp(0.4)]
    assert loss == pytest.approx(-sum(tokens) / 4)
    assert gradient == pytest.approx([-each / 4 for each in tokens])


def test_reinforce_hand_computed():
    # -(.5 * 2 * (-3.15) + 3 * (-1) * (-.6))/2
    loss, gradient, metrics = value_and_gradient(two_episodes(), name="reinforce")
    assert loss == pytest.approx((3.15 - 1.8) / 2)
    assert gradient == pytest.approx([-0.5, -0.5, -0.5, 1.5])
    assert metrics["clipped"] == 0


def test_gradients_at_the_anchor():
    # All ratios are 1, nothing is clipped: sat and reinforce have -w A/E at every token of the
    # episode, gspo and grpo -w A/(E |y|), dapo and cispo -w A/T.
    batch = bundle([-1.0] * 5, [-1.0] * 5, [0, 0, 1, 1, 1], [0.5, -2.0], [1.0, 0.25])
    weighted = [0.5, 0.5, -0.5, -0.5, -0.5]
    length = [2, 2, 3, 3, 3]
    expected = {
        "sat": [-each / 2 for each in weighted],
        "reinforce": [-each / 2 for each in weighted],
        "gspo": [-each / (2 * size) for each, size in zip(weighted, length, strict=True)],
        "grpo": [-each / (2 * size) for each, size in zip(weighted, length, strict=True)],
        **{name: [-each / 5 for each in weighted] for name in ("dapo", "ppo", "cispo", "m2po")},
    }
    for name in NAMES:
        _, gradient, _ = value_and_gradient(batch, name=name)
        assert gradient == pytest.approx(expected[name], rel=1e-14), name


@pytest.mark.parametrize("name", ["sat", "reinforce"])
def test_the_exact_policy_gradient_by_enumeration(name):
    # Two tokens from a vocabulary of 3, each episode weighted by its probability: the gradient of
    # the loss at the anchor is -dJ/dtheta, J = sum over all 9 sequences of p(y) R(y), for any b.
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_()
    second = torch.randn(3, 3, dtype=torch.float64, generator=generator).requires_grad_()
    rewards = torch.rand(9, dtype=torch.float64, generator=generator)
    tokens = torch.stack(
        [
            first.log_softmax(0).repeat_interleave(3),
            second.log_softmax(1).flatten(),
        ],
        dim=1,
    )
    probability = tokens.sum(1).exp()
    truth = torch.autograd.grad((probability * rewards).sum(), (first, second), retain_graph=True)
    batch = bundle(
        [0.0] * 18,
        tokens.detach().flatten(),
        [row for row in range(9) for _ in range(2)],
        (rewards - 0.37).tolist(),
        probability.tolist(),
        logprobs_T=tokens.flatten(),
        episode_total=1.0,
    )
    loss, _ = objective_loss(batch, ObjectiveSettings(name=name))
    got = torch.autograd.grad(loss, (first, second))
    for mine, exact in zip(got, truth, strict=True):
        torch.testing.assert_close(mine, -exact, rtol=1e-12, atol=1e-15)


def test_terms_beside_the_objective():
    # A = 0 leaves loss = .1 * KL - .02 * H + .3 * KL_ref with weighted token means over 4 tokens,
    # though only 3 tokens are here.
    batch = bundle(
        [0.0] * 3,
        [0.0] * 3,
        [0, 1, 1],
        [0.0, 0.0],
        [2.0, 0.5],
        token_total=4.0,
        kl_T=torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64),
        reference_kl_T=torch.tensor([3.0, 0.0, 2.0], dtype=torch.float64),
        entropy_T=torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64),
    )
    for name in NAMES:
        choices = ObjectiveSettings(name=name, beta=0.1, reference_kl=0.3, entropy=0.02)
        loss, metrics = objective_loss(batch, choices)
        assert loss.item() == pytest.approx((0.1 * 5 + 0.3 * 7 - 0.02 * 4) / 4)
        assert metrics["policy_loss"] == 0
    assert objective_loss(batch, ObjectiveSettings(name="sat"))[0] == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [1000.0, -1000.0, 89.0])
def test_huge_ratios_stay_finite(name, advantage, dtype, u):
    new = torch.tensor([u - 1, -1.0, -1.0], dtype=dtype, requires_grad=True)
    old = torch.tensor([-1.0, -1.0, -1.0], dtype=dtype)
    batch = bundle(
        new,
        old,
        [0, 1, 1],
        [advantage, 1.0],
        logprobs_T=new,
        anchor_logprobs_T=old,
    )
    loss, gradient, _ = value_and_gradient(batch, name=name)
    assert math.isfinite(loss) and all(map(math.isfinite, gradient))
    if name in PESSIMISTIC:
        # What the clip holds has no pull; a ratio that ran away with A < 0 is pulled back.
        assert (gradient[0] > 0) if (u > 0 and advantage < 0) else (gradient[0] == 0)
    elif name == "m2po":
        assert gradient[0] == 0  # left out on either side
    elif u > 0:
        # The others pull every token in the direction of its advantage.
        assert gradient[0] * advantage < 0
    assert gradient[1] != 0


def test_the_ratio_is_exact_up_to_its_tangent():
    batch = bundle([LINEAR_ABOVE, LINEAR_ABOVE + 2], [0.0, 0.0], [0, 1], [-1.0, -1.0])
    loss, gradient, _ = value_and_gradient(batch, name="sat")
    top = math.exp(LINEAR_ABOVE)
    assert loss == pytest.approx((top + 3 * top) / 2)
    assert gradient == pytest.approx([top / 2, top / 2])


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_of_weight_zero_contributes_exactly_nothing(name):
    scored = {
        "kl_T": torch.tensor([1.0, NAN, 2.0, NAN], dtype=torch.float64),
        "reference_kl_T": torch.tensor([1.0, math.inf, 2.0, NAN], dtype=torch.float64),
        "entropy_T": torch.tensor([1.0, NAN, 2.0, NAN], dtype=torch.float64),
    }
    dirty = bundle(
        [-1.1, NAN, -0.8, math.inf],
        [-1.0, NAN, -1.0, -1.0],
        [0, 1, 2, 1],
        [1.0, NAN, -2.0],
        [1.0, 0.0, 2.0],
        **scored,
    )
    clean = bundle(
        [-1.1, -0.8],
        [-1.0, -1.0],
        [0, 1],
        [1.0, -2.0],
        [1.0, 2.0],
        episode_total=3.0,
        token_total=4.0,
        **{key: values[[0, 2]] for key, values in scored.items()},
    )
    choices = {"name": name, "beta": 0.5, "reference_kl": 0.25, "entropy": 0.125}
    loss, gradient, metrics = value_and_gradient(dirty, **choices)
    clean_loss, clean_gradient, clean_metrics = value_and_gradient(clean, **choices)
    assert loss == clean_loss
    assert gradient == [clean_gradient[0], 0.0, clean_gradient[1], 0.0]
    assert metrics == clean_metrics


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_that_counts_is_seen(name):
    for changes in ({"advantages": [NAN, 1.0]}, {"weights": [NAN, 1.0]}):
        fields = {"advantages": [1.0, 1.0], "weights": [1.0, 1.0]} | changes
        batch = bundle([-1.0, -1.0], [-1.0, -1.0], [0, 1], **fields)
        assert objective_loss(batch, ObjectiveSettings(name=name))[0].isnan()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    parts=st.integers(1, 8),
    name=st.sampled_from(sorted(set(NAMES) - WHOLE)),
)
def test_accumulation_in_any_split_equals_the_whole(seed, lengths, parts, name):
    generator = torch.Generator().manual_seed(seed)
    episodes, tokens = len(lengths), sum(lengths)

    def normal(size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator)

    parameters = normal(tokens).requires_grad_()
    anchor = parameters.detach() + 0.3 * normal(tokens)
    episode = torch.repeat_interleave(torch.arange(episodes), torch.tensor(lengths))
    advantages, weights = normal(episodes), normal(episodes).exp()
    part_of = torch.randint(parts, (episodes,), generator=generator)
    choices = ObjectiveSettings(name=name, beta=0.1, reference_kl=0.2, entropy=0.3)

    def run(chosen: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mask = chosen[episode]
        place = chosen.cumsum(0) - 1
        logprobs = parameters[mask]
        batch = ObjectiveBatch(
            logprobs_T=logprobs,
            anchor_logprobs_T=anchor[mask],
            episode_T=place[episode[mask]],
            turn_T=episode[mask],
            unit_T=place[episode[mask]],
            advantages_U=advantages[chosen],
            weights_U=weights[chosen],
            episode_total=float(episodes),
            token_total=float(max(1, tokens)),
            kl_T=logprobs**2,
            reference_kl_T=logprobs.exp(),
            entropy_T=logprobs.sin(),
        )
        loss, metrics = objective_loss(batch, choices)
        return loss, torch.autograd.grad(loss, parameters)[0], metrics

    loss, gradient, metrics = run(torch.ones(episodes, dtype=torch.bool))
    split = [run(part_of == part) for part in range(parts)]
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(sum(each[0] for each in split), loss, **close)
    torch.testing.assert_close(sum(each[1] for each in split), gradient, **close)
    for key, value in metrics.items():
        torch.testing.assert_close(sum(each[2][key] for each in split), value, **close)


def test_bad_input():
    batch = two_episodes()
    with pytest.raises(ValueError, match="kl has the coefficient"):
        objective_loss(batch, ObjectiveSettings(name="sat", beta=0.1))
    with pytest.raises(ValueError, match="whole mini-batch"):
        objective_loss(replace(batch, token_total=0.0), ObjectiveSettings(name="sat"))
    with pytest.raises(ValueError, match="length of logprobs_T"):
        objective_loss(replace(batch, kl_T=torch.zeros(3)), ObjectiveSettings(name="sat"))
    with pytest.raises(ValueError, match="one weight"):
        objective_loss(replace(batch, weights_U=torch.ones(3)), ObjectiveSettings(name="sat"))
    with pytest.raises(ValueError, match=f"choose one of {', '.join(OBJECTIVES)}"):
        ObjectiveSettings(name="trpo")
    with pytest.raises(ValueError, match=r"objective\.clip 1\.0: give a number below 1"):
        ObjectiveSettings("sat", {"clip": 1.0})
    with pytest.raises(ValueError, match=r"objective\.clip_high -0\.1: give a number above 0"):
        ObjectiveSettings("dapo", {"clip_high": -0.1})
    with pytest.raises(ValueError, match=r"objective\.entropy -1: give a number of at least 0"):
        ObjectiveSettings("sat", entropy=-1)


# The user's own, and derivatives by the values alone


def test_an_objective_of_the_users_own_has_its_options_and_the_terms_beside_it():
    def squares(batch: ObjectiveBatch, *, scale: float = 1.0):
        """A least-squares pull of each token to its anchor: nothing that a ratio could do."""
        gap_T = batch.logprobs_T - batch.anchor_logprobs_T
        return scale * (batch.weights_T * gap_T**2).sum() / batch.token_total, {}

    own = ObjectiveSettings("mine.py:squares", {"scale": 3.0}, beta=0.5, loss=squares)
    batch = bundle(
        [1.0, -1.0], [0.0, 0.0], [0, 1], [1.0, 1.0], kl_T=torch.tensor([2.0, 4.0]).double()
    )
    loss, metrics = objective_loss(batch, own)
    # 3·(1 + 1)/2 + .5·(2 + 4)/2
    assert loss.item() == 4.5 and metrics["policy_loss"] == 3.0 and "clipped" not in metrics
    assert torch.autograd.grad(loss, batch.logprobs_T)[0].tolist() == [3.0, -3.0]
    vector = replace(own, loss=lambda batch: (batch.logprobs_T, {}), options={})
    with pytest.raises(ValueError, match=r"mine\.py:squares: its loss has the shape \(2,\)"):
        objective_loss(batch, vector)


@pytest.mark.parametrize("name", NAMES)
def test_the_derivative_by_the_values_alone_is_that_through_the_model(name):
    """θ -> values -> loss in one graph, against c = ∂loss/∂values on leaves of their own and then
    the gradient of Σ c·value: the chain rule, so that a step may be taken in two passes."""
    generator = torch.Generator().manual_seed(3)
    parameters = torch.randn(4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    values = (-parameters[0].exp(), parameters[1] ** 2, parameters[2].exp(), parameters[3].cos())
    names = ("logprobs_T", "kl_T", "reference_kl_T", "entropy_T")
    fixed = bundle([0.0] * 6, [-1.0] * 6, [0, 0, 1, 1, 1, 2], [1.5, -0.5, 2.0], [1.0, 2.0, 0.0])
    terms = chosen(name, beta=0.3, reference_kl=0.2, entropy=0.1)
    loss, _ = objective_loss(replace(fixed, **dict(zip(names, values, strict=True))), terms)
    (whole,) = torch.autograd.grad(loss, parameters, retain_graph=True)
    leaves = [value.detach().requires_grad_() for value in values]
    apart, _ = objective_loss(replace(fixed, **dict(zip(names, leaves, strict=True))), terms)
    by_value = torch.autograd.grad(apart, leaves)
    surrogate = sum((c * value).sum() for c, value in zip(by_value, values, strict=True))
    (passed,) = torch.autograd.grad(surrogate, parameters)
    torch.testing.assert_close(passed, whole, rtol=1e-12, atol=1e-14)
    # The clip holds some of the tokens' ratios and not all; the episode of weight 0 has no pull.
    assert bool((whole[1:, :5] != 0).all()) and bool(whole[0].any())
    assert whole[:, 5].tolist() == [0.0] * 4
