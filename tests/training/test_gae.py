"""Generalised advantages over own turns and tokens, against the sum that defines them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from satune.agents.specs import CriticSettings
from satune.training.credit import CREDIT, GaeCredit, load_credit
from satune.training.gae import Estimate, own_advantages, own_moments
from satune.training.gae import estimate as estimate_of
from satune.training.update import own_turns
from satune.types import Episode, Grade, UserError
from tiny_models import episode, turn

RAW = GaeCredit(whiten=False, clip=None)


def talk(*messages: tuple[str, int, int], reward: float = 1.0) -> Episode:
    """An episode of messages (agent, moment, tokens)."""
    turns = [
        turn((1, 2), [1] * tokens, agent=agent, seat=agent, moment=moment)
        for agent, moment, tokens in messages
    ]
    return episode(turns, reward)


def estimate(
    episodes: Sequence[Episode],
    values: Sequence[float],
    *,
    rule: GaeCredit = RAW,
    log_weights: Sequence[float] | None = None,
    log_ratios: Sequence[Sequence[float]] | None = None,
    cap: float | None = None,
    **critic,
) -> Estimate:
    return estimate_of(
        rule,
        "ann",
        episodes,
        own_turns("ann", episodes),
        torch.tensor(values, dtype=torch.float64),
        CriticSettings("head", **critic),
        torch.tensor(log_weights or [0.0] * len(episodes), dtype=torch.float64),
        log_ratios,
        cap,
    )


def test_two_turns_by_hand() -> None:
    # V = .5 and .8 (of the first token of each turn), R = 1, γ = .9, λ = .5:
    # A_2 = 1 - .8 = .2; A_1 = .9 * .8 - .5 + .9 * .5 * .2 = .22 + .09 = .31.
    one = talk(("ann", 0, 2), ("bob", 1, 1), ("ann", 2, 1))
    found = estimate([one], [0.5, 9.0, 0.8], gamma=0.9, lam=0.5)
    assert found.lesson.per == "turn"
    assert found.lesson.advantages_U.tolist() == pytest.approx([0.31, 0.2], rel=1e-14)
    assert found.lesson.weights_U.tolist() == [1.0, 1.0]
    assert found.targets.tokens_N.tolist() == [0, 2]
    assert found.targets.targets_N.tolist() == pytest.approx([0.81, 1.0], rel=1e-14)
    assert found.targets.before_N.tolist() == [0.5, 0.8]


def test_between_tokens_by_hand() -> None:
    # Tokens V = .5, .6 | .8, γ = 1, λ = .5: .2; .8 - .6 + .5 * .2 = .3; .6 - .5 + .5 * .3 = .25.
    one = talk(("ann", 0, 2), ("bob", 1, 1), ("ann", 2, 1))
    found = estimate([one], [0.5, 0.6, 0.8], boundary="token", lam=0.5)
    assert found.lesson.per == "token"
    assert found.lesson.advantages_U.tolist() == pytest.approx([0.25, 0.3, 0.2], rel=1e-14)
    assert found.targets.tokens_N.tolist() == [0, 1, 2]


def test_discounts_where_none_is_given() -> None:
    assert CriticSettings("head").discount == 0.99
    assert CriticSettings("head", boundary="token").discount == 1.0
    assert CriticSettings("head", boundary="token", gamma=0.9).discount == 0.9


def test_traces_by_hand() -> None:
    """bob was updated: his first message is half as likely now, his second three times as likely.

    γ = 1, λ = .5, V = .5, .8, R = 1. c_1 = 1/2 of what bob answers between, c_2 = min(1, 3) = 1 of
    what he says at the end: A_2 = .2, A_1 = .5 (.8 - .5 + .5 * .2) = .2."""
    one = talk(("ann", 0, 1), ("bob", 1, 1), ("ann", 2, 1), ("bob", 3, 1))
    ratios = [[0.0, math.log(0.5), 0.0, math.log(3.0)]]
    traced = replace(RAW, traces=True)
    given = {"log_ratios": ratios, "log_weights": [math.log(1.5)], "gamma": 1.0, "lam": 0.5}
    found = estimate([one], [0.5, 0.8], rule=traced, **given)
    assert found.lesson.advantages_U.tolist() == pytest.approx([0.2, 0.2], rel=1e-14)
    # Nothing was changed before the first turn; before the second bob's first message was.
    assert found.lesson.weights_U.tolist() == pytest.approx([1.0, 0.5], rel=1e-14)
    # Without traces: the weight of the whole episode, and no c.
    whole = estimate([one], [0.5, 0.8], **given)
    assert whole.lesson.advantages_U.tolist() == pytest.approx([0.4, 0.2], rel=1e-14)
    assert whole.lesson.weights_U.tolist() == pytest.approx([1.5, 1.5], rel=1e-14)
    capped = estimate([one], [0.5, 0.8], cap=1.2, **given)
    assert capped.lesson.weights_U.tolist() == pytest.approx([1.2, 1.2], rel=1e-14)


def test_what_is_written_at_once_answers_the_turn_it_has_not_seen() -> None:
    one = talk(("bob", 0, 1), ("ann", 0, 1), ("bob", 1, 1), ("ann", 2, 1))
    packed = own_turns("ann", [one])
    found = own_moments(packed, [one], "ann", [[-1.0, 0.0, -2.0, 0.0]])
    assert found.before_S.tolist() == [0.0, -3.0]
    assert found.during_S.tolist() == [-3.0, 0.0]


def test_turns_of_one_moment_share_what_follows() -> None:
    # Two seats of ann at once, V = .2 and .4, then one of V = .6; R = 1, γ = 1, λ = 1: what follows
    # is worth V + A = 1 to both, and each is compared with its own value.
    one = talk(("ann", 0, 1), ("ann", 0, 1), ("bob", 1, 1), ("ann", 2, 1))
    found = estimate([one], [0.2, 0.4, 0.6], gamma=1.0, lam=1.0)
    assert found.lesson.advantages_U.tolist() == pytest.approx([0.8, 0.6, 0.4], rel=1e-14)


def test_a_turn_without_tokens_is_no_step() -> None:
    one = talk(("ann", 0, 1), ("ann", 1, 0), ("ann", 2, 1))
    found = estimate([one], [0.5, 0.8], gamma=0.9, lam=0.5)
    assert found.lesson.advantages_U.tolist() == pytest.approx([0.31, 0.0, 0.2], rel=1e-14)
    assert found.lesson.weights_U.tolist() == [1.0, 0.0, 1.0]
    assert found.targets.tokens_N.tolist() == [0, 1]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    shapes=st.lists(
        st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.integers(1, 3)),
                 min_size=1, max_size=6),
        min_size=1, max_size=4,
    ),
    boundary=st.sampled_from(["turn", "token"]),
)  # fmt: skip
def test_every_conversation_has_the_sum_that_defines_it(seed, shapes, boundary) -> None:
    """A_k = Σ_l (γλ)^l c_k ... c_{k+l} δ_{k+l}, term by term, over conversations of any shape."""
    rng = torch.Generator().manual_seed(seed)
    names = {"a": "ann", "b": "bob"}
    episodes = []
    for shape in shapes:
        moment, messages = 0, []
        for agent, jump, tokens in shape:
            if any(name == names[agent] and at == moment for name, at, _ in messages):
                jump = max(jump, 1)  # one seat an agent here
            moment += jump
            messages.append((names[agent], moment, tokens))
        episodes.append(talk(*messages, reward=float(torch.rand(1, generator=rng))))
    packed = own_turns("ann", episodes)
    values_T = torch.rand(packed.tokens, generator=rng, dtype=torch.float64)
    ratios = [
        [float(torch.randn(1, generator=rng)) * (t.agent == "bob") for t in e.turns]
        for e in episodes
    ]
    gamma, lam = torch.rand(2, generator=rng, dtype=torch.float64).tolist()
    moments = own_moments(packed, episodes, "ann", ratios)
    rewards_E = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
    found = own_advantages(moments, values_T, rewards_E, gamma=gamma, lam=lam, per=boundary)

    expected: list[float] = []
    token = 0
    for one, ratio in zip(episodes, ratios, strict=True):
        begins = [t.moment for t in one.turns if t.agent == "ann"]
        steps: list[tuple[float, float]] = []  # V and c of each step
        for place, own in enumerate(t for t in one.turns if t.agent == "ann"):
            end = begins[place + 1] if place + 1 < len(begins) else 99
            answered = sum(
                u for t, u in zip(one.turns, ratio, strict=True)
                if t.agent == "bob" and own.moment <= t.moment < end
            )  # fmt: skip
            count = len(own.completion_ids or ())
            states = values_T[token : token + count].tolist()
            token += count
            trace = min(1.0, math.exp(answered))
            steps += [(states[0], trace)] if boundary == "turn" else [
                (value, trace if place == count - 1 else 1.0) for place, value in enumerate(states)
            ]  # fmt: skip
        after = [*(value for value, _ in steps[1:]), 0.0]
        delta = [
            (one.reward if k == len(steps) - 1 else 0.0) + gamma * after[k] - steps[k][0]
            for k in range(len(steps))
        ]
        for k in range(len(steps)):
            expected.append(
                sum(
                    (gamma * lam) ** j
                    * math.prod(c for _, c in steps[k : k + j + 1])
                    * delta[k + j]
                    for j in range(len(steps) - k)
                )
            )
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_whitening_and_the_clip() -> None:
    episodes = [talk(("ann", 0, 1), reward=r) for r in (0.0, 0.5, 1.0)]
    plain = estimate(episodes, [0.5] * 3).lesson.advantages_U
    assert plain.tolist() == [-0.5, 0.0, 0.5]
    whitened = estimate(episodes, [0.5] * 3, rule=GaeCredit(clip=None)).lesson.advantages_U
    root = math.sqrt(1.5)  # σ = √(1/6), half over which
    assert whitened.tolist() == pytest.approx([-root, 0.0, root], rel=1e-6)
    # With weights 1, 1, 2 the mean is 1/8 and σ² = (25 + 1 + 2 * 9)/64/4 = 11/64.
    weighted = estimate(
        episodes, [0.5] * 3, rule=GaeCredit(clip=1.0), log_weights=[0.0, 0.0, math.log(2)]
    )
    sigma = math.sqrt(11) / 8
    expected = [-1.0, -0.125 / sigma, 0.375 / sigma]
    assert weighted.lesson.advantages_U.tolist() == pytest.approx(expected, rel=1e-6)
    # The critic's targets know nothing of either.
    assert weighted.targets.targets_N.tolist() == [0.0, 0.5, 1.0]
    same = estimate(episodes[:1] * 3, [0.1] * 3, rule=GaeCredit()).lesson.advantages_U
    assert same.tolist() == [0.0] * 3


def test_rewards_of_the_agents_own_seats() -> None:
    one = talk(("ann", 0, 1), ("bob", 1, 1))
    graded = replace(one, grade=Grade(0.25, seats={"ann": 0.75, "bob": 0.0}))
    assert estimate([graded], [0.0]).lesson.advantages_U.tolist() == [0.25]
    own = replace(RAW, reward="seats")
    assert estimate([graded], [0.0], rule=own).lesson.advantages_U.tolist() == [0.75]


def test_what_the_values_explained() -> None:
    episodes = [talk(("ann", 0, 1), reward=r) for r in (0.0, 1.0)]
    assert estimate(episodes, [0.2, 1.2]).explained_variance == pytest.approx(1.0)
    assert estimate(episodes, [0.5, 0.5]).explained_variance == pytest.approx(0.0)
    # Residuals 0 and .5 have a quarter of the variance.
    assert estimate(episodes, [0.0, 0.5]).explained_variance == pytest.approx(0.75)
    assert estimate(episodes[:1] * 2, [0.0, 0.5]).explained_variance is None


def test_the_rule_by_name() -> None:
    assert load_credit("gae", {"traces": True}) == CREDIT["gae"](traces=True)
    with pytest.raises(ValueError, match=r"credit\.reward 'mine': choose one of team, seats"):
        GaeCredit(reward="mine")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown option 'trace'"):
        load_credit("gae", {"trace": True})
