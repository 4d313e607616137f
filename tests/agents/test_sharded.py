"""A learner that is cut over processes: what the plain one does, whatever their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from processes import in_processes
from satune.agents.learner import LocalLearner
from satune.agents.packing import PackedTurns, pack
from satune.agents.policy import Policy
from satune.agents.processes import Processes
from satune.agents.sharded import Crew, ShardedLearner, ShardLearner
from satune.agents.shards import shard
from satune.agents.specs import OptimizerSettings, ShardingSettings
from satune.core.settings import ObjectiveSettings
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
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_step_is_that_of_the_plain_learner(count: int, kind: str, family: str) -> None:
    check(count, lambda: policies(kind, family), 1e-10)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_in_float32_it_is_that_but_for_rounding(kind: str) -> None:
    check(2, lambda: policies(kind, "qwen3", torch.float32), 1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_anchors_that_are_held_nowhere_are_computed_again(kind: str) -> None:
    settings = replace(SETTINGS, anchor_memory=0.0)
    check(2, lambda: policies(kind, "gpt2"), 1e-10, settings)


def test_layers_are_computed_again_in_the_backward() -> None:
    settings = replace(SETTINGS, gradient_checkpointing=True)
    check(2, lambda: policies("full", "gpt2"), 1e-10, settings)


def test_replicas_of_smaller_shards() -> None:
    sharding = ShardingSettings(replicas=2)
    check(4, lambda: policies("full", "gpt2"), 1e-10, sharding=sharding)
