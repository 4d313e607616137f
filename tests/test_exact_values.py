"""A critic that knows every value exactly, on the conversations of ``test_exact_method``.

Agent a speaks twice, b once in between. With exact values the expectation of a generalised
advantage is the advantage itself whatever λ is, so that a step at the anchor follows the gradient
of J: summed over turns or over tokens, on the team's own conversations or on an older team's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from satune.agents.specs import CriticSettings
from satune.core.settings import ObjectiveSettings
from satune.training.credit import GaeCredit
from satune.training.gae import Estimate, estimate
from satune.training.update import own_turns
from test_exact_method import (
    EPISODES,
    PROBLEMS,
    REWARDS_E,
    N,
    Team,
    completed_anchor,
    enumerated_gradient,
    expectation_weights,
    make_team,
    perturb,
    relative,
)

KIND = "gpt2 and gpt_neox"  # float64 throughout
RULE = GaeCredit(whiten=False, clip=None)


def exact_values(team: Team, agent: str) -> Tensor:
    """V [T] of the state before each own token, by summing over every way to go on."""
    probabilities_E = team.probabilities()
    paid: dict[tuple, float] = {}
    mass: dict[tuple, float] = {}
    states: list[tuple] = []
    for e, one in enumerate(EPISODES):
        before: tuple = (one.problem.id,)
        for turn in one.turns:
            ids = tuple(turn.completion_ids or ())
            for place in range(len(ids) if turn.agent == agent else 0):
                state = (*before, ids[:place])
                states.append(state)
                paid[state] = paid.get(state, 0.0) + float(probabilities_E[e] * REWARDS_E[e])
                mass[state] = mass.get(state, 0.0) + float(probabilities_E[e])
            before = (*before, ids)
    return torch.tensor([paid[state] / mass[state] for state in states], dtype=torch.float64)


def estimated(
    values_T: Tensor, agent: str, boundary: str, lam: float, log_weights_E: Tensor, **more
) -> Estimate:
    settings = CriticSettings("head", boundary=boundary, gamma=1.0, lam=lam)  # type: ignore[arg-type]
    packed = own_turns(agent, EPISODES)
    rule = more.pop("rule", RULE)
    return estimate(rule, agent, EPISODES, packed, values_T, settings, log_weights_E, **more)


def step_gradient(team: Team, agent: str, found: Estimate, probabilities_E: Tensor) -> Tensor:
    """Of the objective to be maximised at the anchor, over every conversation."""
    learner = team.learners[agent]
    anchor = completed_anchor(learner, agent)
    lesson, packed = found.lesson, anchor.packed
    of_unit = packed.episode_T
    if lesson.per == "turn":
        of_unit = torch.zeros(packed.turns, dtype=torch.long)
        of_unit[packed.turn_T] = packed.episode_T
    learner.accumulate(
        anchor, range(N), lesson.advantages_U,
        lesson.weights_U * expectation_weights(probabilities_E)[of_unit],
        ObjectiveSettings("sat"), lesson.per,
    )  # fmt: skip
    parameters = list(team.policies[agent].trainable().values())
    gradient = -torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    )
    learner.drop_gradients()
    return gradient


def gradient_of_reward(team: Team, agent: str) -> Tensor:
    value = (team.logprobs().exp() * REWARDS_E).sum() / len(PROBLEMS)
    return enumerated_gradient(team, agent, value)


@pytest.mark.parametrize(("boundary", "lam"), [("turn", 0.5), ("token", 0.3)])
def test_the_gradient_with_exact_values_is_that_of_the_reward(boundary: str, lam: float) -> None:
    team = make_team(KIND)
    found = estimated(exact_values(team, "a"), "a", boundary, lam, torch.zeros(N).double())
    actual = step_gradient(team, "a", found, team.probabilities())
    assert relative(actual, gradient_of_reward(team, "a")) < 1e-10


def moved_team() -> tuple[Team, Tensor, list[list[float]], Tensor]:
    """The team after b has moved; the probabilities before; log r of each turn, and of episodes."""
    team = make_team(KIND)
    old_E = team.probabilities()
    perturb(team.learners["b"], 0.05, seed=3)
    log_ratio_E = team.probabilities().log() - old_E.log()
    ratios = [[0.0, u, 0.0] for u in log_ratio_E.tolist()]
    return team, old_E, ratios, log_ratio_E


def test_whole_weights_make_an_older_teams_conversations_do() -> None:
    team, old_E, ratios, log_ratio_E = moved_team()
    assert float(log_ratio_E.abs().max()) > 0.05
    values_T = exact_values(team, "a")
    found = estimated(values_T, "a", "turn", 0.5, log_ratio_E, log_ratios=ratios)
    actual = step_gradient(team, "a", found, old_E)
    assert relative(actual, gradient_of_reward(team, "a")) < 1e-10
    # Not so without weights, nor with the values of the team before.
    stale = estimated(values_T, "a", "turn", 0.5, torch.zeros(N).double())
    assert relative(step_gradient(team, "a", stale, old_E), gradient_of_reward(team, "a")) > 1e-3


def test_traces_have_the_bias_that_their_bound_allows() -> None:
    """E_old of a turn's estimate given what the agent had seen and said, against the advantage."""
    team, old_E, ratios, log_ratio_E = moved_team()
    traced = GaeCredit(traces=True, whiten=False, clip=None)
    values_T, lam = exact_values(team, "a"), 0.7
    found = estimated(values_T, "a", "turn", lam, log_ratio_E, rule=traced, log_ratios=ratios)
    # b's answers follow a's first turn: weights 1 there, and the whole ratio at the second.
    weights_E2 = found.lesson.weights_U.view(N, 2)
    assert torch.equal(weights_E2[:, 0], torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(weights_E2[:, 1].log(), log_ratio_E, rtol=0, atol=1e-12)
    estimate_E2 = found.lesson.advantages_U.view(N, 2)
    new_E = team.probabilities()
    first_T = found.targets.before_N.view(N, 2)
    said = [(e.problem.id, tuple(e.turns[0].completion_ids or ())) for e in EPISODES]
    largest_bias = alpha = 0.0
    residual = torch.stack([first_T[:, 1] - first_T[:, 0], REWARDS_E - first_T[:, 1]])
    for state in sorted(set(said)):
        same = torch.tensor([each == state for each in said])
        old, new = (each_E[same] / each_E[same].sum() for each_E in (old_E, new_E))
        bias = float((old * estimate_E2[same, 0]).sum() - (new * residual[0, same]).sum())
        largest_bias = max(largest_bias, abs(bias))
        # The other factors of a conversation have not changed, so this is the TV of b's answers.
        alpha = max(alpha, float((old - new).abs().sum()) / 2)
    bound = alpha * float(residual.abs().max()) / (1 - lam * (1 - alpha))
    assert 1e-4 < largest_bias <= bound
    # Nobody answers after the second turn: no bias there, in all of the gradient it makes.
    by_hand_E = REWARDS_E - first_T[:, 1]
    torch.testing.assert_close(estimate_E2[:, 1], by_hand_E, rtol=0, atol=1e-12)
