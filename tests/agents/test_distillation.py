"""The gradient and the figures of distillation, against the whole models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from satune.agents.learner import LocalLearner
from satune.agents.mixture import MixturePolicy
from satune.agents.packing import PackedTurns, pack
from satune.agents.policy import Policy
from satune.agents.ports import NonFinite
from satune.agents.specs import OptimizerSettings
from satune.core.logprobs import exact_kl
from satune.types import Turn, ids_of
from tiny_models import Alphabet, next_token_logprobs, tiny_lm

EPISODES = (((1, 7), (3, 4, 0)), ((2, 7), (5, 0)), ((1, 7, 9), (8, 2, 6, 0)), ((4,), (0,)))
"""Prompt and completion of one turn in each episode."""


def turn(prompt: tuple[int, ...], completion: tuple[int, ...]) -> Turn:
    return Turn(
        seat="ann",
        agent="ann",
        moment=0,
        own_index=0,
        text="",
        finish_reason="stop",
        version=0,
        prompt_ids=ids_of(prompt),
        completion_ids=ids_of(completion),
        sampled_logprobs=None,
    )


def policy(name: str, seed: int, temperature: float, layers: int = 1) -> Policy:
    model = tiny_lm("qwen3", seed=seed, layers=layers, initializer_range=0.3)
    return Policy(name, model, Alphabet(), temperature)


@pytest.fixture
def mixture() -> MixturePolicy:
    return MixturePolicy("ann", policy("old", 1, 0.8), policy("new", 2, 1.1, layers=2), 0.1)


@pytest.fixture
def packed() -> PackedTurns:
    return pack([[turn(*each)] for each in EPISODES])


def learner(student: Policy, tokens: int = 16384, checkpointing: bool = False) -> LocalLearner:
    return LocalLearner(
        student,
        OptimizerSettings(
            lr=1.0,
            weight_decay=0.0,
            warmup_steps=3,
            max_grad_norm=0.0,
            micro_batch_tokens=tokens,
            gradient_checkpointing=checkpointing,
        ),
    )


def gradients(student: Policy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in student.trainable().items() if p.grad is not None}


@pytest.mark.parametrize(("tokens", "checkpointing"), [(16384, False), (6, False), (16384, True)])
def test_the_gradient_is_that_of_the_mean_kl_however_it_is_cut(
    mixture: MixturePolicy, packed: PackedTurns, tokens: int, checkpointing: bool
) -> None:
    student = policy("ann", 3, 0.7)
    chosen = (0, 2, 3)
    mean = learner(student, tokens, checkpointing).distil(packed, chosen, mixture)
    found = gradients(student)
    for parameter in student.trainable().values():
        parameter.grad = None
    # Three, four and one own tokens; KL(student‖mixture) after the student's temperature.
    kl = torch.zeros((), dtype=torch.float64)
    for prompt, completion in (EPISODES[at] for at in chosen):
        ids, rows = torch.tensor([[*prompt, *completion]]), slice(len(prompt) - 1, -1)
        own_NV = torch.log_softmax(student.causal_lm(input_ids=ids).logits[0] / 0.7, -1)[rows]
        mixed_NV = mixture.project(mixture.hidden(ids)[0])[rows] / mixture.temperature
        kl = kl + (own_NV.exp() * (own_NV - mixed_NV)).sum()
    (kl / 8).backward()
    assert mean == pytest.approx(float(kl.detach()) / 8, rel=1e-5)
    expected = gradients(student)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


def test_episodes_without_an_own_token_teach_nothing(mixture: MixturePolicy) -> None:
    student = policy("ann", 3, 0.7)
    packed = pack([[turn(*EPISODES[0])], []])
    assert learner(student).distil(packed, [1], mixture) == 0.0
    assert not gradients(student)


def test_a_rate_that_is_given_is_the_steps_own(mixture: MixturePolicy, packed: PackedTurns) -> None:
    student = policy("ann", 3, 0.7)
    taught = learner(student)
    before = student.export()
    taught.wake()
    taught.distil(packed, range(4), mixture)
    slopes = gradients(student)
    taught.step(0.01)
    # AdamW's first step moves a parameter by rate · g/(|g| + eps): nothing of the settings' rate of
    # 1, nor of its warm-up, which would make it a quarter.
    for name, parameter in student.trainable().items():
        moved = (before[name] - parameter.detach()).double()
        slope = slopes[name].double()
        assert torch.allclose(moved, 0.01 * slope / (slope.abs() + 1e-8), atol=1e-6), name
    # Where none is given the settings' counts, in its second step of four.
    taught.distil(packed, range(4), mixture)
    before = student.export()
    taught.step()
    after = student.export()
    assert max(float((before[name] - after[name]).abs().max()) for name in before) > 0.1


def test_distances_are_those_of_the_whole_models(
    mixture: MixturePolicy, packed: PackedTurns
) -> None:
    student = policy("ann", 3, 0.7)
    found = learner(student, tokens=6).distances(packed, mixture)
    at = 0
    for prompt, completion in EPISODES:
        ids, rows = (*prompt, *completion), slice(len(prompt) - 1, -1)
        old_NV, new_NV, own_NV = (
            next_token_logprobs(each, ids)[rows]
            for each in (mixture.incumbent, mixture.newcomer, student)
        )
        here = slice(at, at + len(completion))
        for column_T, pair in (
            (found.to_incumbent_T, (own_NV, old_NV)),
            (found.from_incumbent_T, (old_NV, own_NV)),
            (found.to_newcomer_T, (own_NV, new_NV)),
        ):
            expected = exact_kl(*pair).double()
            assert torch.allclose(column_T[here], expected, rtol=1e-4, atol=1e-6)
        at += len(completion)
    assert at == packed.tokens and bool((found.to_mixture_T > 0).all())


def test_what_is_not_finite_is_said(mixture: MixturePolicy, packed: PackedTurns) -> None:
    student = policy("ann", 3, 0.7)
    with torch.no_grad():
        next(iter(student.trainable().values())).fill_(math.nan)
    with pytest.raises(NonFinite, match="the student's logits"):
        learner(student).distil(packed, [0], mixture)
    with pytest.raises(NonFinite, match="the student's logits"):
        learner(student).distances(packed, mixture)
