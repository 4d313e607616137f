"""A learner that is cut over processes: what the plain one does, whatever their number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from processes import in_processes
from real_models import real_model
from satune.agents.anchor import Snapshot
from satune.agents.crew import Crew, ShardLearner
from satune.agents.learner import LocalLearner
from satune.agents.packing import PackedTurns, pack
from satune.agents.policy import Policy
from satune.agents.ports import NonFinite
from satune.agents.processes import Processes
from satune.agents.sharded import ShardedLearner
from satune.agents.shards import check_layers, shard
from satune.agents.specs import OptimizerSettings, ShardingSettings
from satune.core.settings import ObjectiveSettings
from satune.types import UserError
from tiny_models import Letters, tiny_lm, turn

SETTINGS = OptimizerSettings(lr=0.01, micro_batch_tokens=48)
SAT = ObjectiveSettings("sat", beta=0.05, entropy=0.01)
ADVANTAGES_E = torch.tensor([0.7, -1.2, 0.4, 1.1, -0.3, 0.9], dtype=torch.float64)
WEIGHTS_E = torch.tensor([1.0, 0.5, 2.0, 1.5, 0.8, 1.0], dtype=torch.float64)


def experience() -> PackedTurns:
    """Six episodes of unequal length, one of several turns; the agent is absent from one."""
    random = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 13, (length,), generator=random).tolist()

    first, reply = ids(4), ids(3)
    return pack(
        [
            [turn(first, reply), turn([*first, *reply, *ids(2)], ids(9))],
            [turn(ids(1), ids(1))],
            [],
            [turn(ids(20), ids(30)), turn(ids(3), ids(2)), turn(ids(2), ids(5))],
            [turn(ids(2), ids(7))],
            [turn(ids(5), ids(2)), turn(ids(6), ids(1))],
        ]
    )


PACKED = experience()


def policies(kind: str, family: str, dtype: torch.dtype = torch.float64) -> dict[str, Policy]:
    """``full``: one agent; ``lora``: two agents' adapters of one base, whose matrices are not 0."""
    if kind == "full":
        return {"a": Policy("a", tiny_lm(family, dtype=dtype), Letters(), 0.8)}
    base = tiny_lm(family, dtype=dtype)
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config, adapter_name="agent_a")
    model.add_adapter("agent_b", config)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
                parameter.copy_(0.1 * noise)
    model = model.to(dtype)
    return {
        name: Policy(name, model, Letters(), 0.8, adapter=f"agent_{name}") for name in ("a", "b")
    }


def driven(
    count: int,
    made: Callable[[], dict[str, Policy]],
    scenario: Callable[[dict[str, ShardedLearner]], Any],
    settings: OptimizerSettings = SETTINGS,
    sharding: ShardingSettings | None = None,
) -> Any:
    """What ``scenario`` returns on rank 0 of ``count`` processes, given learners that are cut."""

    def work(processes: Processes) -> Any:
        whole = made()
        cut = shard(made(), dict.fromkeys(whole, False), processes)
        crew = Crew(processes, {name: ShardLearner(each, settings) for name, each in cut.items()})
        if not processes.drives:
            return crew.follow()
        found = scenario({name: ShardedLearner(crew, name, whole[name]) for name in cut})
        processes.dismiss()
        return found

    return in_processes(count, work, sharding)[0]


def step_and_measure(learners: dict[str, Any]) -> dict[str, Any]:
    """Everything of a step of each agent that training sees, as plain tensors and numbers."""
    found: dict[str, Any] = {}
    for name, learner in learners.items():
        learner.wake()
        before = learner.snapshot()
        anchor = learner.anchor(PACKED, before.weights)
        metrics, norms = [], []
        for episodes in ([0, 2, 3], [1, 4, 5]):
            metrics.append(learner.accumulate(anchor, episodes, ADVANTAGES_E, WEIGHTS_E, SAT))
            learner.complete(anchor)
            norms.append(learner.step())
        measured = learner.measure(anchor)
        proposal = learner.export()
        learner.interpolate(before.weights, proposal, 0.5)
        half = learner.measure(anchor)
        gradient = learner.gradient(PACKED, anchor.logprobs_T)
        found[name] = {
            "metrics": metrics,
            "norms": norms,
            "anchor": anchor.logprobs_T,
            "kl": measured.kl_T,
            "reverse": measured.reverse_kl_T,
            "half": half.kl_T,
            "written": learner.score(PACKED),
            "gradient": dict(gradient),
            "weights": dict(learner.export()),
            "optimizer": dict(learner.optimizer_state()),
        }
        learner.restore(before)
        found[name]["restored"] = dict(learner.export())
        found[name]["moments"] = dict(learner.optimizer_state())
        learner.rest()
    return found


def largest_difference(one: Any, other: Any) -> float:
    """Of everything in two nests, relative to the size of the tensor or number."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((largest_difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list):
        return max(largest_difference(*pair) for pair in zip(one, other, strict=True))
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (one, other))
    size = float(a.abs().max()) if a.numel() else 0.0
    return float((a - b).abs().max()) / max(size, 1e-6) if a.numel() else 0.0


def assert_same(plain: dict[str, Any], cut: dict[str, Any], within: float) -> None:
    """Weights may differ by more: AdamW divides the gradient by its own size, and where that is 0
    but for rounding (biases of keys) by little more than eps."""
    assert plain.keys() == cut.keys()
    for name in plain:
        for what, of in plain[name].items():
            limit = max(within, 1e-7) if what == "weights" else within
            assert largest_difference(of, cut[name][what]) <= limit, (name, what)


def check(
    count: int,
    made: Callable[[], dict[str, Policy]],
    within: float,
    settings: OptimizerSettings = SETTINGS,
    sharding: ShardingSettings | None = None,
    scenario: Callable[[dict[str, Any]], Any] = step_and_measure,
) -> None:
    plain = scenario({name: LocalLearner(p, settings) for name, p in made().items()})
    assert_same(plain, driven(count, made, scenario, settings, sharding), within)


# GPT-2 ties its head to the embedding.
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_step_is_that_of_the_plain_learner(kind: str) -> None:
    check(2, lambda: policies(kind, "gpt2"), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("count", [1, 3])
def test_whatever_the_number_of_processes(count: int, kind: str) -> None:
    check(count, lambda: policies(kind, "gpt_neox"), 1e-10)


@pytest.mark.slow
def test_two_replicas_of_the_whole_over_four_processes() -> None:
    sharding = ShardingSettings(replicas=2)
    check(4, lambda: policies("full", "gpt2"), 1e-10, sharding=sharding)


def gradients(learners: dict[str, Any]) -> dict[str, Any]:
    """The gradient of a weighted log-likelihood, and log-probabilities."""
    found: dict[str, Any] = {}
    for name, learner in learners.items():
        anchor = learner.anchor(PACKED)
        learner.complete(anchor)
        coefficients_T = ADVANTAGES_E[PACKED.episode_T] * WEIGHTS_E[PACKED.episode_T]
        found[name] = {
            "gradient": dict(learner.gradient(PACKED, coefficients_T)),
            "anchor": anchor.logprobs_T,
        }
    return found


def check_gradients(count: int, made: Callable[[], dict[str, Policy]], **how: Any) -> None:
    """In float32: the whole gradient of each agent within 1e-6 by its norm, of which 1e-5 is asked,
    and no entry of a tensor off by 1e-4 of the largest."""
    settings = how.get("settings", SETTINGS)
    plain = gradients({name: LocalLearner(p, settings) for name, p in made().items()})
    cut = driven(count, made, gradients, settings)
    assert_same(plain, cut, 1e-4)
    for name in plain:
        one, other = (found[name]["gradient"] for found in (plain, cut))
        flat, also = (torch.cat([g[n].double().flatten() for n in one]) for g in (one, other))
        assert float((flat - also).norm()) <= 1e-6 * float(flat.norm())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gradients_in_float32(kind: str) -> None:
    check_gradients(2, lambda: policies(kind, "qwen3", torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_anchors_that_are_held_nowhere_are_computed_again(kind: str) -> None:
    settings = replace(SETTINGS, anchor_memory=0.0)
    check(2, lambda: policies(kind, "gpt2"), 1e-10, settings)


@pytest.mark.slow
def test_layers_are_computed_again_in_the_backward() -> None:
    settings = replace(SETTINGS, gradient_checkpointing=True)
    check(2, lambda: policies("full", "gpt2"), 1e-10, settings)


def weights_from_outside(learners: dict[str, Any]) -> dict[str, Any]:
    """Weights and moments that are no shards, as of a checkpoint; a reference; a failed step."""
    found: dict[str, Any] = {}
    for name, learner in learners.items():
        given = {n: 1.1 * t.clone() for n, t in learner.export().items()}
        moments = {
            f"{n}|{kind}": torch.full_like(t, 0.01)
            for n, t in given.items()
            for kind in ("exp_avg", "exp_avg_sq")
        } | {f"{n}|step": torch.tensor(3.0) for n in given}
        learner.keep_reference()
        learner.load_weights(given)
        learner.load_optimizer_state(moments, 3)
        learner.wake()
        before = learner.snapshot()
        anchor = learner.anchor(PACKED, reference=True)
        objective = replace(SAT, reference_kl=0.1)
        metrics = learner.accumulate(anchor, range(6), ADVANTAGES_E, WEIGHTS_E, objective)
        norm = learner.step()
        moved = dict(learner.export())
        learner.restore(Snapshot(given, moments, 3))
        found[name] = {
            "metrics": metrics,
            "norm": norm,
            "steps": learner.steps,
            "weights": moved,
            "restored": dict(learner.export()),
            "moments": dict(learner.optimizer_state()),
            "reference": dict(learner.reference_weights),
        }
        broken = {n: torch.full_like(t, math.nan) for n, t in given.items()}
        learner.load_weights(broken)
        learner.complete(anchor)
        with pytest.raises(NonFinite):
            learner.accumulate(anchor, range(6), ADVANTAGES_E, WEIGHTS_E, SAT)
        learner.drop_gradients()
        learner.restore(before)
        learner.rest()
        found[name]["after"] = dict(learner.export())
    return found


def test_weights_come_from_outside_and_a_step_that_is_not_finite_is_undone() -> None:
    check(2, lambda: policies("full", "gpt2"), 1e-10, scenario=weights_from_outside)


@pytest.mark.slow
def test_in_bfloat16_it_is_that_but_for_rounding() -> None:
    def made() -> dict[str, Policy]:
        found = policies("full", "qwen3", torch.float32)
        found["a"].autocast = torch.bfloat16
        return found

    plain = gradients({name: LocalLearner(p, SETTINGS) for name, p in made().items()})
    cut = driven(2, made, gradients)
    assert largest_difference(plain, cut) < 0.1
    for name, gradient in cut["a"]["gradient"].items():
        assert gradient.dtype == torch.float32, name


def what_is_kept(learners: dict[str, Any]) -> list[int]:
    """How many things the processes keep: with a snapshot, after it, with an anchor, after it."""
    learner = learners["a"]
    crew = learner._crew

    def count() -> int:
        learner.drop_gradients()
        return len(crew._kept)

    snapshot = learner.snapshot()
    counts = [count()]
    weights = snapshot.weights
    del snapshot
    counts.append(count())
    del weights
    counts.append(count())
    anchor = learner.anchor(PACKED)
    counts.append(count())
    del anchor
    return [*counts, count()]


def test_what_nobody_refers_to_is_let_go() -> None:
    # Weights of a snapshot hold it.
    assert driven(1, lambda: policies("full", "gpt2"), what_is_kept) == [1, 1, 0, 1, 0]


def test_what_cannot_be_cut_is_refused() -> None:
    policy = policies("full", "gpt2")["a"]
    policy.causal_lm._no_split_modules = None
    with pytest.raises(UserError, match="does not say what its layers are"):
        check_layers(policy)
    policy.config.num_experts = 8
    with pytest.raises(UserError, match="mixture of experts"):
        check_layers(policy)


def test_replicas_have_to_be_equal_parts() -> None:
    said = in_processes(1, lambda processes: None, ShardingSettings(replicas=2), check=False)
    assert "1 processes are not 2 equal parts" in said[0]


REAL = OptimizerSettings(micro_batch_tokens=512)


def smollm2(kind: str) -> dict[str, Policy]:
    """SmolLM2 cut to its first six layers."""
    model = AutoModelForCausalLM.from_pretrained(
        real_model("smollm2-135m"), dtype=torch.float32, num_hidden_layers=6
    )
    if kind == "full":
        return {"a": Policy("a", model, Letters(), 0.8)}
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    random = torch.Generator().manual_seed(5)
    peft: Any = get_peft_model(model, config, adapter_name="agent_a")
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=random))
    return {"a": Policy("a", peft, Letters(), 0.8, adapter="agent_a")}


@pytest.mark.real
@pytest.mark.parametrize(("count", "kind"), [(1, "full"), (2, "full"), (2, "lora"), (3, "lora")])
def test_gradients_of_a_pretrained_model(count: int, kind: str) -> None:
    check_gradients(count, lambda: smollm2(kind), settings=REAL)
