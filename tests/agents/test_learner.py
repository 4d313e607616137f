"""The learner: gradients whatever the cut, anchors, snapshots, resting optimisers, failures."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from satune.agents import moments as moments_module
from satune.agents.anchor import Anchor, States
from satune.agents.learner import LocalLearner, OptimizerSettings
from satune.agents.packing import PackedTurns, pack
from satune.agents.policy import Policy
from satune.agents.ports import NonFinite
from satune.core.settings import OBJECTIVES, ObjectiveSettings
from satune.types import Turn
from tiny_models import (
    Letters,
    completion_logprobs,
    next_token_logprobs,
    tiny_lm,
    tiny_policy,
    turn,
)

SAT = ObjectiveSettings("sat")


def some_turns() -> list[list[Turn]]:
    """Six episodes of very unequal length, merged and unmerged turns; the agent is absent from
    one."""
    random = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 13, (length,), generator=random).tolist()

    first, reply = ids(4), ids(3)
    return [
        [turn(first, reply), turn([*first, *reply, *ids(2)], ids(9))],
        [turn(ids(1), ids(1))],
        [],
        [turn(ids(20), ids(30)), turn(ids(3), ids(2)), turn(ids(2), ids(5))],
        [turn(ids(2), ids(7))],
        [turn(ids(5), ids(2)), turn(ids(6), ids(1))],
    ]


TURNS = some_turns()
ADVANTAGES_E = torch.tensor([0.7, -1.2, 0.4, 1.1, -0.3, 0.9], dtype=torch.float64)
WEIGHTS_E = torch.tensor([1.0, 0.5, 2.0, 1.5, 0.8, 1.0], dtype=torch.float64)


def learner_of(policy: Policy | None = None, **settings: Any) -> LocalLearner:
    return LocalLearner(policy or tiny_policy(), OptimizerSettings(**settings))


def gradient_of(learner: LocalLearner) -> Tensor:
    parameters = learner.policy.trainable().values()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().clone() for p in parameters]
    )


def shake(learner: LocalLearner, size: float = 0.02, seed: int = 0) -> None:
    random = torch.Generator().manual_seed(seed)
    learner.load_weights(
        {
            n: w + (size * torch.randn(w.shape, generator=random, dtype=torch.float64)).to(w)
            for n, w in learner.export().items()
        }
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def train(
    learner: LocalLearner, packed: PackedTurns, steps: int, objective: ObjectiveSettings = SAT
) -> None:
    anchor = learner.anchor(packed)
    for _ in range(steps):
        learner.accumulate(anchor, range(packed.episodes), ADVANTAGES_E, WEIGHTS_E, objective)
        learner.complete(anchor)
        learner.step()


def states_of(learner: LocalLearner, states: States) -> Tensor:
    """All of them [T, H], by token."""
    scorer, packed = learner._scorer, pack(TURNS)
    hidden = [(b.tokens_T, states.at(scorer, b).hidden_TH) for b in scorer.batches(packed)]
    order_T = torch.cat([tokens_T for tokens_T, _ in hidden]).argsort()
    return torch.cat([each_TH for _, each_TH in hidden])[order_T]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


# -- scoring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_score_is_the_whole_models(budget):
    learner = learner_of(micro_batch_tokens=budget)
    expected_T = torch.cat(
        [
            completion_logprobs(learner.policy, t.prompt_ids, t.completion_ids)
            for each in TURNS
            for t in each
        ]
    )
    scored_T = learner.score(pack(TURNS))
    assert scored_T.dtype == torch.float64
    # The norms round to float32 inside.
    assert torch.allclose(scored_T, expected_T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gpt_neox"])
def test_merged_turns_score_like_unmerged(family):
    policy = tiny_policy(family=family)
    merged = pack([TURNS[0]])
    apart = pack([[t] for t in TURNS[0]])
    assert len(merged.sequences) == 1 and len(apart.sequences) == 2
    learner = learner_of(policy)
    tolerance = 1e-12 if family.startswith("gpt") else 1e-6
    assert torch.allclose(learner.score(merged), learner.score(apart), rtol=0, atol=tolerance)


def test_temperature_is_part_of_the_policy():
    cold, warm = tiny_policy(temperature=0.5), tiny_policy(temperature=2.0)
    assert not torch.allclose(
        learner_of(cold).score(pack(TURNS)), learner_of(warm).score(pack(TURNS))
    )


# -- accumulation ---------------------------------------------------------------------------------


def objective_gradient(
    dtype: torch.dtype, budget: int, objective: ObjectiveSettings, family: str = "qwen3"
) -> tuple[Tensor, dict[str, float]]:
    learner = learner_of(tiny_policy(family=family, dtype=dtype), micro_batch_tokens=budget)
    learner.keep_reference({n: 1.1 * w for n, w in learner.export().items()})
    packed = pack(TURNS)
    anchor = learner.anchor(packed, reference=objective.reference_kl > 0)
    learner.complete(anchor)
    shake(learner)
    metrics = learner.accumulate(anchor, range(6), ADVANTAGES_E, WEIGHTS_E, objective)
    return gradient_of(learner), metrics


TERMS = [
    *({"name": name} for name in OBJECTIVES),
    {"name": "sat", "beta": 0.3},
    {"name": "grpo", "reference_kl": 0.2},
    {"name": "dapo", "entropy": 0.1},
    {"name": "gspo", "beta": 0.3, "reference_kl": 0.2, "entropy": 0.1},
]


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(terms))
@pytest.mark.parametrize(
    ("dtype", "family", "tolerance"),
    [
        (torch.float32, "qwen3", 1e-6),
        (torch.float64, "qwen3", 1e-12),
        (torch.float64, "gpt_neox", 1e-12),
    ],
)
def test_any_micro_batching_gives_one_gradient(dtype, family, tolerance, terms):
    objective = ObjectiveSettings(**terms)
    whole, metrics = objective_gradient(dtype, 10_000, objective, family)
    assert whole.norm() > 0
    for budget in (1, 40, 110):
        cut, again = objective_gradient(dtype, budget, objective, family)
        assert relative(cut, whole) <= tolerance
        assert again == pytest.approx(metrics, rel=1e-4 if dtype == torch.float32 else 1e-9)


def test_terms_beside_the_objective_have_their_gradient():
    # By whole-vocabulary sums over each state: mean over tokens of w KL(new||anchor) and so on.
    learner = learner_of(tiny_policy(family="gpt_neox"))
    policy, packed = learner.policy, pack(TURNS)
    learner.keep_reference({n: 1.05 * w for n, w in learner.export().items()})
    anchor = learner.anchor(packed, reference=True)
    learner.complete(anchor)
    start = learner.export()

    def states(grad: bool = False) -> Tensor:
        rows = []
        with torch.set_grad_enabled(grad):
            for each in TURNS:
                for t in each:
                    ids = torch.tensor([[*t.prompt_ids, *t.completion_ids]])
                    logits = policy.causal_lm(input_ids=ids).logits[0] / policy.temperature
                    rows.append(torch.log_softmax(logits[len(t.prompt_ids) - 1 : -1], -1))
        return torch.cat(rows)

    anchor_TV = states()
    learner.load_weights({n: 1.05 * w for n, w in start.items()})
    reference_TV = states()
    learner.load_weights(start)
    shake(learner)
    new_TV = states(grad=True)
    weights_T = WEIGHTS_E[packed.episode_T]
    expected = 0.3 * (new_TV.exp() * (new_TV - anchor_TV)).sum(-1)
    expected = expected + 0.2 * (new_TV.exp() * (new_TV - reference_TV)).sum(-1)
    expected = expected + 0.1 * (new_TV.exp() * new_TV).sum(-1)  # minus entropy
    value = (weights_T * expected).sum() / packed.tokens
    parameters = list(policy.trainable().values())
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    wanted = torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(gradients, parameters, strict=True)
        ]
    )
    objective = ObjectiveSettings("sat", beta=0.3, reference_kl=0.2, entropy=0.1)
    learner.accumulate(anchor, range(6), torch.zeros_like(ADVANTAGES_E), WEIGHTS_E, objective)
    assert relative(gradient_of(learner), wanted) < 1e-10


def test_mini_batches_use_their_own_totals():
    # The mean of two mini-batches of three episodes is the one of all six.
    learner = learner_of()
    anchor = learner.anchor(pack(TURNS))
    learner.complete(anchor)
    learner.accumulate(anchor, range(6), ADVANTAGES_E, WEIGHTS_E, SAT)
    whole = gradient_of(learner)
    learner.drop_gradients()
    for mini in ([4, 0, 2], [5, 1, 3]):
        learner.accumulate(anchor, mini, ADVANTAGES_E, WEIGHTS_E, SAT)
    assert relative(gradient_of(learner) / 2, whole) < 1e-12


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_weightless_episodes_contribute_exactly_nothing(name):
    objective = ObjectiveSettings(name, beta=0.1, entropy=0.1)
    gradients = []
    for poison in (0.0, math.nan):
        learner = learner_of(micro_batch_tokens=1)
        anchor = learner.anchor(pack(TURNS))
        learner.complete(anchor)
        shake(learner)
        advantages_E, weights_E = ADVANTAGES_E.clone(), WEIGHTS_E.clone()
        weights_E[[0, 3]] = 0.0
        advantages_E[[0, 3]] = poison
        anchor.logprobs_T[anchor.packed.episode_T == 0] = poison or -1.0
        learner.accumulate(anchor, range(6), advantages_E, weights_E, objective)
        gradients.append(gradient_of(learner))
    assert torch.equal(*gradients) and gradients[0].norm() > 0


def test_an_absent_agent_has_no_gradient():
    learner = learner_of()
    anchor = learner.anchor(pack(TURNS))
    assert learner.accumulate(anchor, [2], ADVANTAGES_E, WEIGHTS_E, SAT) == {}
    assert gradient_of(learner).norm() == 0


def test_gradient_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        learner = learner_of(gradient_checkpointing=checkpointing, micro_batch_tokens=60)
        calls = count_forwards(learner.policy.backbone)
        anchor = learner.anchor(pack(TURNS))
        learner.accumulate(anchor, range(6), ADVANTAGES_E, WEIGHTS_E, SAT)
        results.append((gradient_of(learner), calls["layers"]))
    assert relative(results[1][0], results[0][0]) < 1e-12
    assert results[1][1] == 2 * results[0][1]  # every block ran again in the backward pass


def count_forwards(backbone: nn.Module) -> dict[str, int]:
    calls = {"layers": 0}

    def called(*_: object) -> None:
        calls["layers"] += 1

    for layer in backbone.layers:  # type: ignore[union-attr]
        layer.mlp.register_forward_pre_hook(called)
    return calls


def test_autocast_agrees_roughly():
    gradients, scores = [], []
    for autocast in (None, torch.bfloat16):
        lm = tiny_lm("qwen3", dtype=torch.float32, initializer_range=0.2)
        learner = learner_of(Policy("a", lm, Letters(), 0.8, autocast=autocast))
        anchor = learner.anchor(pack(TURNS))
        learner.accumulate(anchor, range(6), ADVANTAGES_E, WEIGHTS_E, SAT)
        assert gradient_of(learner).dtype == torch.float32
        gradients.append(gradient_of(learner))
        scores.append(learner.score(anchor.packed))
        learner.wake()
        learner.step()
        assert float(learner.measure(anchor).kl_T.max()) < 1e-3
    # bfloat16 keeps 8 bits: 2^-8 = .004 an operation.
    assert 1e-4 < relative(gradients[1], gradients[0]) < 0.1
    assert 0 < float((scores[1] - scores[0]).abs().max()) < 0.1


# -- anchors --------------------------------------------------------------------------------------


def test_the_first_mini_batch_fills_the_anchor():
    packed, anchors = pack(TURNS), []
    for deposit in ([], [0, 3, 4], list(range(6))):
        learner = learner_of()
        anchor = learner.anchor(packed)
        if deposit:
            learner.accumulate(anchor, deposit, ADVANTAGES_E, WEIGHTS_E, SAT)
            assert set(packed.episode_T[anchor.known_T].tolist()) == set(deposit) - {2}
        learner.complete(anchor)
        assert bool(anchor.known_T.all())
        anchors.append(anchor)
    held = [states_of(learner, each.states) for each in anchors]
    for anchor, states_TH in zip(anchors[1:], held[1:], strict=True):
        assert torch.allclose(states_TH, held[0], rtol=0, atol=1e-6)
        assert torch.allclose(anchor.logprobs_T, anchors[0].logprobs_T, rtol=0, atol=1e-6)


def test_a_first_mini_batch_has_the_gradient_of_a_completed_anchor():
    # KL to the anchor has no gradient at the anchor, so leaving it out there changes nothing.
    gradients = []
    for complete in (False, True):
        learner = learner_of(tiny_policy(family="gpt_neox"))
        anchor = learner.anchor(pack(TURNS))
        if complete:
            learner.complete(anchor)
        objective = ObjectiveSettings("sat", beta=5.0)
        learner.accumulate(anchor, range(6), ADVANTAGES_E, WEIGHTS_E, objective)
        gradients.append(gradient_of(learner))
    assert relative(*gradients) < 1e-12


@pytest.mark.parametrize("tied", [True, False])
def test_measure_against_the_anchor(tied):
    learner = learner_of(tiny_policy(tie_word_embeddings=tied))
    packed = pack([[t] for each in TURNS for t in each])
    anchor = learner.anchor(packed)
    learner.complete(anchor)
    here = learner.measure(anchor)
    assert float(here.kl_T.max()) == 0.0 and float(here.reverse_kl_T.max()) == 0.0
    assert torch.equal(here.logprobs_T, anchor.logprobs_T)

    def states() -> Tensor:
        return torch.cat(
            [
                next_token_logprobs(learner.policy, (*t.prompt_ids, *t.completion_ids))[
                    len(t.prompt_ids) - 1 : -1
                ]
                for each in TURNS
                for t in each
            ]
        )

    old_TV = states()
    shake(learner)
    new_TV = states()
    measured = learner.measure(anchor)
    forward_T = (new_TV.exp() * (new_TV - old_TV)).sum(-1)
    reverse_T = (old_TV.exp() * (old_TV - new_TV)).sum(-1)
    assert torch.allclose(measured.kl_T, forward_T, rtol=1e-5, atol=1e-9)
    assert torch.allclose(measured.reverse_kl_T, reverse_T, rtol=1e-5, atol=1e-9)
    assert not torch.allclose(forward_T, reverse_T, rtol=1e-3)


def test_gradient_disturbs_nothing():
    learner = learner_of()
    packed = pack(TURNS)
    anchor = learner.anchor(packed)
    learner.accumulate(anchor, range(6), ADVANTAGES_E, WEIGHTS_E, SAT)
    weights, accumulated = learner.export(), gradient_of(learner)
    coefficients_T = (WEIGHTS_E * ADVANTAGES_E)[packed.episode_T]
    found = learner.gradient(packed, coefficients_T)
    assert same(learner.export(), weights) and torch.equal(gradient_of(learner), accumulated)
    # At the anchor, reinforce's gradient is -1/6 of the same sum.
    learner.drop_gradients()
    learner.accumulate(anchor, range(6), ADVANTAGES_E, WEIGHTS_E, ObjectiveSettings("reinforce"))
    flat = torch.cat(
        [found.get(n, torch.zeros_like(p)).flatten() for n, p in learner.policy.trainable().items()]
    )
    assert relative(-6 * gradient_of(learner), flat) < 1e-6


# -- steps, snapshots, resting --------------------------------------------------------------------


def test_the_first_step_is_adams():
    # Bias-corrected, the first step is lr g / (|g| + eps) and weight decay lr w wd: here eps is 1,
    # and the gradient is scaled to norm .5 first; one warm-up step halves lr.
    settings = {"lr": 0.1, "weight_decay": 0.2, "eps": 1.0, "max_grad_norm": 0.5}
    learner = learner_of(**settings, warmup_steps=1)
    learner.wake()
    anchor = learner.anchor(pack(TURNS))
    learner.accumulate(anchor, range(6), 50 * ADVANTAGES_E, WEIGHTS_E, SAT)
    gradient, before = gradient_of(learner), learner.export()
    norm = learner.step()
    assert norm == pytest.approx(float(gradient.norm())) and norm > 0.5
    used = {n for n in before if not torch.equal(before[n], learner.export()[n])}
    start = 0
    for name, w in before.items():
        g = (gradient[start : start + w.numel()] * 0.5 / norm).view_as(w)
        start += w.numel()
        if name in used:
            expected = w * (1 - 0.05 * 0.2) - 0.05 * g / (g.abs() + 1.0)
            assert torch.allclose(learner.export()[name], expected, rtol=0, atol=1e-12)
    assert "model.embed_tokens.weight" in used and learner.steps == 1
    assert gradient_of(learner).norm() == 0


def test_revert_is_bit_exact():
    learner = learner_of(lr=0.01)
    learner.wake()
    packed = pack(TURNS)
    train(learner, packed, 3)
    snapshot = learner.snapshot()
    held = copy.deepcopy((snapshot.weights, snapshot.optimizer))
    assert snapshot.steps == 3 and len(snapshot.optimizer) > 0
    train(learner, packed, 2)
    after = learner.export()
    assert not same(after, held[0])
    assert same(snapshot.weights, held[0]) and same(snapshot.optimizer, held[1])
    learner.restore(snapshot)
    assert same(learner.export(), held[0]) and learner.steps == 3
    assert same(learner.optimizer_state(), held[1])
    # The same steps again lead to the same place: nothing else remembers.
    train(learner, packed, 2)
    assert same(learner.export(), after)
    learner.restore(snapshot)
    assert same(learner.optimizer_state(), held[1])


def test_revert_before_the_first_step_forgets_the_moments():
    learner = learner_of(lr=0.01)
    learner.wake()
    snapshot = learner.snapshot()
    train(learner, pack(TURNS), 1)
    learner.restore(snapshot)
    assert learner.optimizer_state() == {} and learner.steps == 0
    assert same(learner.export(), snapshot.weights)


def test_interpolation():
    learner = learner_of(lr=0.01)
    learner.wake()
    start = learner.export()
    train(learner, pack(TURNS), 2)
    target, moments = learner.export(), learner.optimizer_state()
    for scale, expected in ((0.0, start), (1.0, target)):
        learner.interpolate(start, target, scale)
        assert same(learner.export(), expected)
    learner.interpolate(start, target, 0.25)
    for name, w in learner.export().items():
        assert torch.allclose(w, 0.75 * start[name] + 0.25 * target[name], rtol=0, atol=1e-15)
    assert same(learner.optimizer_state(), moments) and learner.steps == 2  # a shrink keeps them


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resting_changes_nothing(offload, dtype, tmp_path: Path):
    weights = []
    for rests in (False, True):
        policy = tiny_policy(dtype=dtype)
        settings = OptimizerSettings(lr=0.01, offload=offload, warmup_steps=3)
        learner = LocalLearner(policy, settings, scratch=tmp_path / "scratch")
        packed = pack(TURNS)
        for _ in range(3):
            learner.wake()
            train(learner, packed, 2)
            if rests:
                moments = learner.optimizer_state()
                learner.rest()
                assert not learner.moments.awake
                assert same(learner.optimizer_state(), moments)
                assert bool(learner.moments._resting) == (offload == "cpu")
                learner.wake()
                assert same(learner.optimizer_state(), moments)
                learner.rest()
        weights.append(learner.export())
        assert learner.steps == 6
    assert same(*weights)
    assert (tmp_path / "scratch").exists() == (offload == "disk")


def test_moments_on_disk_are_written_beside_those_that_somebody_may_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: list[Path] = []

    def save(tensors, path):
        assert not Path(path).exists()
        written.append(Path(path))
        save_file(tensors, path)

    monkeypatch.setattr(moments_module, "save_file", save)
    settings = OptimizerSettings(lr=0.01, offload="disk")
    learner = LocalLearner(tiny_policy(), settings, scratch=tmp_path / "scratch")
    for _ in range(2):
        learner.wake()
        train(learner, pack(TURNS), 1)
        learner.rest()
    assert len(written) == 2 and not written[-1].exists()
    assert len(list((tmp_path / "scratch").iterdir())) == 1


@pytest.mark.parametrize("offload", ["cpu", "disk", "none"])
def test_restored_moments_rest_where_moments_rest(offload, tmp_path: Path):
    """A learner that rests is given back a snapshot: the gate's revert, or a resume."""
    settings = OptimizerSettings(lr=0.01, offload=offload)
    learner = LocalLearner(tiny_policy(), settings, scratch=tmp_path / "scratch")
    packed = pack(TURNS)
    learner.wake()
    train(learner, packed, 1)
    snapshot = learner.snapshot()
    weights, moments = dict(snapshot.weights), dict(snapshot.optimizer)
    train(learner, packed, 1)
    learner.rest()
    snapshot.rest()
    assert same(snapshot.weights, weights) and same(snapshot.optimizer, moments)
    learner.restore(snapshot)
    assert bool(learner.moments._resting) == (offload != "disk")
    assert learner.moments._on_disk == (offload == "disk")
    assert same(learner.optimizer_state(), moments) and same(learner.export(), weights)
    learner.wake()
    assert same(learner.optimizer_state(), moments)
    # Nothing that was held rests in the file of what came after it.
    learner.load_optimizer_state({}, 0)
    learner.rest()
    assert not learner.optimizer_state()


def test_a_resting_snapshot_can_be_restored():
    # A checkpoint is loaded into a learner that rests.
    first, second = learner_of(lr=0.01), learner_of(lr=0.01)
    packed = pack(TURNS)
    first.wake()
    train(first, packed, 2)
    first.rest()
    second.restore(first.snapshot())
    for learner in (first, second):
        learner.wake()
        train(learner, packed, 2)
    assert same(first.export(), second.export()) and first.steps == second.steps == 4


def test_a_frozen_agent_has_no_optimiser_and_no_gradient():
    learner = LocalLearner(tiny_policy(), OptimizerSettings(), frozen=True)
    learner.wake()
    assert learner.optimizer_state() == {}
    assert not any(p.requires_grad for p in learner.policy.trainable().values())


def test_reference_weights_are_the_beginnings():
    learner = learner_of(lr=0.01)
    start = learner.export()
    learner.keep_reference()
    learner.wake()
    train(learner, pack(TURNS), 1)
    before = learner.export()
    anchor = learner.anchor(pack(TURNS), reference=True)
    assert same(learner.reference_weights, start) and same(learner.export(), before)
    learner.load_weights(start)
    at_start: Anchor = learner.anchor(pack(TURNS))
    learner.complete(at_start)
    assert anchor.reference is not None
    states_TH = states_of(learner, anchor.reference)
    assert torch.allclose(states_TH, states_of(learner, at_start.states), rtol=0, atol=1e-12)
    # Held or computed again, they are the same; the learner's own weights are in their place.
    learner.load_weights(before)
    assert torch.equal(states_of(learner, anchor.reference), states_TH)
    assert same(learner.export(), before)


# -- failures -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite():
    learner = learner_of()
    before = learner.export()
    anchor = learner.anchor(pack(TURNS))
    advantages_E = ADVANTAGES_E.clone()
    advantages_E[3] = math.nan
    with pytest.raises(NonFinite, match="loss"):
        learner.accumulate(anchor, range(6), advantages_E, WEIGHTS_E, SAT)
    assert same(learner.export(), before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(value):
    learner = learner_of()
    learner.wake()
    before = learner.export()
    anchor = learner.anchor(pack(TURNS))
    learner.accumulate(anchor, range(6), ADVANTAGES_E, WEIGHTS_E, SAT)
    next(iter(learner.policy.trainable().values())).grad[0, 0] = value
    with pytest.raises(NonFinite, match="gradient"):
        learner.step()
    assert same(learner.export(), before) and learner.steps == 0
    assert learner.optimizer_state() == {} and gradient_of(learner).norm() == 0


# -- the others stay as they are ------------------------------------------------------------------


def shared_base(dtype: torch.dtype = torch.float32) -> tuple[dict[str, LocalLearner], nn.Module]:
    base: Any = tiny_lm("qwen3", dtype=dtype)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config, adapter_name="first")
    model.add_adapter("second", config)
    learners = {}
    for name in ("first", "second"):
        policy = Policy(name, model, Letters(), 0.8, adapter=name)
        for seed, parameter in enumerate(policy.trainable().values()):
            torch.manual_seed(seed)
            nn.init.normal_(parameter, std=0.2)
        learners[name] = LocalLearner(policy, OptimizerSettings(lr=0.05))
    return learners, model


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_adapter_moves_alone(dtype):
    learners, model = shared_base(dtype)
    packed = pack(TURNS)
    second = learners["second"].score(packed)
    before = everything(model)
    learner = learners["first"]
    learner.wake()
    train(learner, packed, 2)
    learner.rest()
    after = everything(model)
    own = set(learner.policy.trainable())
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == own and len(own) == 28
    assert torch.equal(learners["second"].score(packed), second)
    # The other way round, after the active adapter has changed hands.
    learners["second"].wake()
    train(learners["second"], packed, 2)
    last = everything(model)
    assert {n for n in after if not torch.equal(after[n], last[n])} == set(
        learners["second"].policy.trainable()
    )


def test_separate_agents_do_not_touch_each_other():
    learners = [learner_of(tiny_policy(name, seed=7), lr=0.05) for name in ("a", "b")]
    before = everything(learners[1].policy.model)
    learners[0].wake()
    train(learners[0], pack(TURNS), 2)
    assert same(everything(learners[1].policy.model), before)
    assert not same(everything(learners[0].policy.model), before)
