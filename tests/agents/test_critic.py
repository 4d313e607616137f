"""The critic: whose states it reads, what a fit changes and what it leaves alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from satune.agents.anchor import Anchor
from satune.agents.critic import LocalCritic
from satune.agents.learner import LocalLearner
from satune.agents.moments import Moments
from satune.agents.packing import PackedTurns, pack
from satune.agents.policy import Policy
from satune.agents.ports import NonFinite, ValueTargets
from satune.agents.specs import CriticSettings, OptimizerSettings
from satune.core.values import value_loss
from satune.types import Key
from tiny_models import Letters, tiny_lm, tiny_policy, turn

KEY = Key(0, "train", 1, 1)
OPTIMIZER = OptimizerSettings(micro_batch_tokens=40)
TURNS = [
    [turn((1, 2), (3, 4, 5)), turn((1, 2, 3, 4, 5, 6), (7, 0))],
    [turn((2, 2, 2), (4,))],
    [turn((5,), (6, 7, 8, 9, 0)), turn((8, 1), (3, 3))],
]


def packed() -> PackedTurns:
    return pack(TURNS)


NOTHING = torch.zeros(packed().tokens, 0)
"""What is read beside the states."""


def made(kind: str, **changes) -> tuple[LocalLearner, LocalCritic, Anchor]:
    settings = CriticSettings(kind, **changes)  # type: ignore[arg-type]
    policy = tiny_policy(family="gpt_neox")
    own = tiny_policy(family="gpt_neox", seed=1) if kind == "model" else policy
    critic = LocalCritic(own, settings, OPTIMIZER)
    learner = LocalLearner(policy, OPTIMIZER, critic=critic)
    anchor = learner.anchor(packed())
    learner.complete(anchor)
    return learner, critic, anchor


def lesson(
    critic: LocalCritic,
    anchor: Anchor,
    beside_TF: Tensor = NOTHING,
    *,
    every: int = 1,
    seed: int = 0,
) -> ValueTargets:
    tokens_N = torch.arange(0, anchor.packed.tokens, every)
    rng = torch.Generator().manual_seed(seed)
    targets_N, weights_N = torch.rand(2, len(tokens_N), generator=rng, dtype=torch.float64)
    return ValueTargets(
        tokens_N, targets_N, critic.values(anchor, beside_TF).double()[tokens_N], weights_N
    )


def by_whole_model(learner: LocalLearner | LocalCritic, policy, weight: Tensor) -> Tensor:
    """weight·h + bias of the state before each own token, every turn fed alone."""
    found = []
    for own in (t for turns in TURNS for t in turns):
        ids = torch.tensor([[*own.prompt_ids, *own.completion_ids]])
        states_SH = policy.causal_lm.base_model(input_ids=ids).last_hidden_state[0]
        first = len(own.prompt_ids) - 1
        found.append(states_SH[first : first + len(own.completion_ids)] @ weight[:-1] + weight[-1])
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_values_are_a_line_over_the_states_that_predict_the_tokens(kind: str) -> None:
    learner, critic, anchor = made(kind)
    assert (
        critic.values(anchor, NOTHING).tolist() == [0.0] * anchor.packed.tokens
    )  # before the first fit
    critic.fit(anchor, NOTHING, lesson(critic, anchor), KEY)
    weights = critic.weights()
    line = torch.cat([weights["head.weight"][0], weights["head.bias"]])
    policy = critic._scorer.policy
    expected_T = by_whole_model(learner, policy, line).detach()
    found_T = critic.values(anchor, NOTHING)
    assert found_T.abs().max() > 1e-3 and found_T.dtype == torch.float64
    torch.testing.assert_close(found_T, expected_T, rtol=1e-10, atol=1e-12)


def test_a_head_reads_the_anchor_whatever_the_agent_has_become() -> None:
    learner, critic, anchor = made("head")
    critic.fit(anchor, NOTHING, lesson(critic, anchor), KEY)
    before_T = critic.values(anchor, NOTHING)
    nowhere = learner.anchor(packed())
    nowhere.states.room = 0  # nothing is held: everything is computed again
    learner.complete(nowhere)
    learner.load_weights({name: 1.1 * w for name, w in learner.export().items()})
    assert torch.equal(critic.values(anchor, NOTHING), before_T)
    torch.testing.assert_close(critic.values(nowhere, NOTHING), before_T, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_what_is_read_beside_the_states_counts_as_much_as_they_do(kind: str) -> None:
    """AdamW's first step moves every weight by the rate, and what is read is √H = 4 times as large
    inside; its first moment is a tenth of the gradient."""
    settings = {"likelihoods": True, "epochs": 1, "mini_batches": 1, "clip": None, "lr": 1e-3}
    _, critic, anchor = made(kind, **settings)
    beside_TF = torch.rand(packed().tokens, 4, generator=torch.Generator().manual_seed(3))
    told = lesson(critic, anchor, beside_TF, every=2)
    line_F = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    values_N = (4 * beside_TF.double() @ line_F)[told.tokens_N]
    none_N = torch.zeros_like(values_N)
    loss = value_loss(values_N, none_N, told.targets_N, told.weights_N, None) / len(values_N)
    (gradient_F,) = torch.autograd.grad(loss, line_F)
    critic.fit(anchor, beside_TF, told, KEY)
    assert critic.weights()["head.weight"].shape == (1, 16 + 4)
    (moment,) = (t for name, t in critic.state().items() if name == "optimizer|head.weight|exp_avg")
    found_F = moment[0, 16:].double()
    expected_F = gradient_F / gradient_F.norm()
    torch.testing.assert_close(found_F / found_F.norm(), expected_F, rtol=1e-5, atol=0)
    found_T = critic.values(anchor, beside_TF) - critic.values(anchor, torch.zeros_like(beside_TF))
    moved_T = -4e-3 * beside_TF.double() @ gradient_F.sign()
    torch.testing.assert_close(found_T, moved_T, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_a_fit_leaves_the_agent_as_it_is(kind: str) -> None:
    learner, critic, anchor = made(kind)
    weights = learner.export()
    critic.fit(anchor, NOTHING, lesson(critic, anchor), KEY)
    assert all(torch.equal(weights[name], now) for name, now in learner.export().items())
    assert all(p.grad is None for p in learner.policy.trainable().values())
    assert not critic._moments.awake
    names = set(critic.weights())
    assert {"head.weight", "head.bias"} <= names
    assert (names == {"head.weight", "head.bias"}) == (kind == "head")
    assert not any("embed_out" in name for name in names)  # the head over tokens has no part in it


@pytest.mark.parametrize("kind", ["head", "model"])
def test_a_step_follows_the_gradient_of_the_loss(kind: str) -> None:
    """One pass, one mini-batch: AdamW's first step is the rate times the gradient's sign, and the
    loss that is told is that of the values before it."""
    learner, critic, anchor = made(kind, epochs=1, mini_batches=1, lr=1e-3, clip=None)
    # Away from 0, where a model of its own has no gradient in its states.
    slope = torch.linspace(-0.2, 0.3, 16, dtype=torch.float64)[None]
    critic.load({**critic.state(), "weights|head.weight": slope})
    told = lesson(critic, anchor, every=2)
    before = critic.weights()
    policy = critic._scorer.policy
    line = torch.cat([before["head.weight"][0], before["head.bias"]]).requires_grad_()
    values_N = by_whole_model(learner, policy, line)[told.tokens_N]
    none_N = torch.zeros_like(values_N)
    loss = value_loss(values_N, none_N, told.targets_N, told.weights_N, None) / len(values_N)
    wanted = [line]
    if kind == "model":
        wanted += [dict(policy.backbone.named_parameters())["embed_in.weight"]]
    gradients = torch.autograd.grad(loss, wanted)
    assert critic.fit(anchor, NOTHING, told, KEY) == pytest.approx(loss.item(), rel=1e-12)
    after = critic.weights()
    moved = torch.cat([(after[n] - before[n]).flatten() for n in ("head.weight", "head.bias")])
    torch.testing.assert_close(moved, -1e-3 * gradients[0].sign(), rtol=1e-3, atol=0)
    if kind == "model":
        moved = after["model.embed_in.weight"] - before["model.embed_in.weight"]
        large = gradients[1].abs() > 1e-6
        assert bool(large.any())
        expected = -1e-3 * gradients[1].sign()
        torch.testing.assert_close(moved[large], expected[large], rtol=1e-2, atol=0)


def test_gradients_of_a_model_in_float16_do_not_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loss whose derivatives by the states lie below float16's least number, 6e-8."""
    anchor, found = made("model")[2], []

    def kept(moments: Moments, rate: float) -> None:
        layers = [p.grad for n, p in critic._parameters.items() if n.startswith("model.")]
        found.append(torch.cat([g.flatten() for g in layers if g is not None]))

    monkeypatch.setattr(Moments, "step", kept)
    for autocast in (None, torch.float16):
        model = tiny_lm("gpt_neox", seed=1, dtype=torch.float32)
        policy = Policy("a", model, Letters(), 0.8, autocast=autocast)
        critic = LocalCritic(policy, CriticSettings("model", epochs=1, mini_batches=1), OPTIMIZER)
        torch.nn.init.constant_(critic._head.weight, 0.5)
        told = lesson(critic, anchor)
        critic.fit(anchor, NOTHING, replace(told, weights_N=1e-6 * told.weights_N), KEY)
    exact, half = found
    assert float(exact.norm()) > 0
    assert float((half - exact).norm() / exact.norm()) < 0.1


def test_targets_of_other_tokens_have_no_part() -> None:
    _, critic, anchor = made("head", epochs=200, mini_batches=1, lr=3e-2, clip=None)
    told = lesson(critic, anchor, every=3)
    critic.fit(anchor, NOTHING, told, KEY)
    off_N = critic.values(anchor, NOTHING)[told.tokens_N] - told.targets_N
    # Five states and sixteen numbers a state: a line goes through all of them.
    assert off_N.abs().max() < 0.02


def test_the_clip_holds_a_fit_near_what_was_said_before() -> None:
    _, critic, anchor = made("head", epochs=300, mini_batches=1, lr=1e-3, clip=0.1)
    told = lesson(critic, anchor)
    far = ValueTargets(told.tokens_N, told.targets_N + 5, told.before_N, told.weights_N + 0.1)
    critic.fit(anchor, NOTHING, far, KEY)
    # AdamW's momentum carries them on for some steps, but not to the targets above 5.
    assert 0.05 < critic.values(anchor, NOTHING).max() < 0.4


@pytest.mark.parametrize("kind", ["head", "model"])
def test_a_snapshot_puts_the_critic_back_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    learner, critic, anchor = made(kind)
    critic.fit(anchor, NOTHING, lesson(critic, anchor), KEY)
    before, snapshot = critic.state(), learner.snapshot()
    assert any("exp_avg" in name for name in before)
    critic.fit(anchor, NOTHING, lesson(critic, anchor, seed=1), KEY)
    there = critic.state()
    assert not torch.equal(before["weights|head.weight"], there["weights|head.weight"])
    learner.restore(snapshot)
    back = critic.state()
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in before.items())
    # And goes on from there as it did the first time.
    critic.fit(anchor, NOTHING, lesson(critic, anchor, seed=1), KEY)
    again = critic.state()
    assert all(torch.equal(again[name], tensor) for name, tensor in there.items())


def test_an_agent_without_a_critic_has_none_in_its_snapshot() -> None:
    learner = LocalLearner(tiny_policy(family="gpt_neox"), OPTIMIZER)
    assert learner.critic is None and learner.snapshot().critic == {}


def test_what_is_not_finite_leaves_the_values_alone() -> None:
    _, critic, anchor = made("head")
    told = lesson(critic, anchor)
    before = critic.weights()
    bad = ValueTargets(told.tokens_N, told.targets_N * math.nan, told.before_N, told.weights_N)
    with pytest.raises(NonFinite, match="the loss of the values is not finite"):
        critic.fit(anchor, NOTHING, bad, KEY)
    assert all(torch.equal(before[name], now) for name, now in critic.weights().items())
    assert not critic._moments.awake
