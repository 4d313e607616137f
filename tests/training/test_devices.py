"""A team whose agents lie on devices of their own: nothing of the two ever meets, and a run is what
it is on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_world
from devices import HOST, Devices
from satune.commands.world import AheadWorld
from satune.training.run_directory import RunDirectory
from satune.training.self_check import Tolerance
from satune.training.trainer import train

TOLERANCE = Tolerance(1e-3, 1e-3)
APART = ["team.agents.ann.device=cuda:0", "team.agents.bob.device=cuda:1"]
SMALL = [
    "rollout={problems: 2, samples: 2, max_new_tokens: 4}", "evaluate={problems: 1, samples: 1}",
    "optimizer.anchor_memory=500",
    "engine={order: exact, memory: 1000000}",
]  # fmt: skip
KINDS = {
    "certificates": [
        "stages=1", "certify={problems: 2, samples: 2}", "order=greedy",
        "objective.reference_kl=0.1", "optimizer.gradient_checkpointing=true",
    ],
    "critics": ["stages=1", "credit=gae", "critic.kind=model", "optimizer.offload=none"],
    "adapters drawn ahead": ["schedule=reuse", "rollout.ahead=1", "team.sharing=lora"],
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


def test_the_stand_in_notices_what_a_device_would() -> None:
    with Devices() as devices:
        here, there = torch.ones(2, device="cuda:0"), torch.ones(2).to("cuda:1")
        assert (here.device, there.device) == (torch.device("cuda:0"), torch.device("cuda:1"))
        assert (here[:1] * 2).device == here.device and here.cpu().device == HOST
        assert torch.equal(here.cpu(), there.cpu())
        for meeting in (
            lambda: here + there,
            lambda: torch.cat([here, torch.ones(2)]),
            lambda: torch.where(here > 0, there, there),
            lambda: torch.ones(2)[torch.zeros(1, dtype=torch.long, device="cuda:0")],
            here.numpy,
        ):
            with pytest.raises(AssertionError, match=r"meet|lies on"):
                meeting()
        here.copy_(there)
        assert (here * torch.tensor(2.0)).device == here.device
        model = torch.nn.Linear(2, 1).to("cuda:1")
        model(there).sum().backward()
        assert model.weight.grad is not None and model.weight.grad.device == there.device
    assert set(devices.calls) == {"cuda:0", "cuda:1"}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_two_agents_never_meet(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    overrides = [*SMALL, *KINDS[kind]]
    devices = Devices()
    draw = AheadWorld._draw_by

    def drawn(*given: Any) -> Any:
        with devices:  # a mode is its thread's
            return draw(*given)

    monkeypatch.setattr(AheadWorld, "_draw_by", drawn)
    with devices:
        one = [*overrides, "team.device=cuda:0"]
        train(tiny_world.training(recipe, tmp_path / "together", one), tolerance=TOLERANCE)
        assert set(devices.calls) == {"cuda:0"}
        apart = tiny_world.training(recipe, tmp_path / "apart", [*overrides, *APART])
        policies: Any = apart.world.cast.engine.policies  # type: ignore[attr-defined]
        assert [str(policy.device) for policy in policies.values()] == ["cuda:0", "cuda:1"]
        critics: Any = apart.world.critics  # type: ignore[attr-defined]
        lying = {name: str(critic._scorer.policy.device) for name, critic in critics.items()}
        assert lying == ({"ann": "cuda:0", "bob": "cuda:1"} if kind == "critics" else {})
        train(apart, tolerance=TOLERANCE)
        held = {name: learner.export() for name, learner in apart.learners.items()}
        for name, place in (("ann", "cuda:0"), ("bob", "cuda:1")):
            assert {str(tensor.device) for tensor in held[name].values()} == {place}
    assert set(devices.calls) == {"cuda:0", "cuda:1"}
    assert tiny_world.events(tmp_path / "apart") == tiny_world.events(tmp_path / "together")
    assert tiny_world.team_files(tmp_path / "apart") == tiny_world.team_files(tmp_path / "together")
    begun = RunDirectory(tmp_path / "apart").read_events()[0]
    assert begun["host"]["device"] == "cuda:0, cuda:1"  # type: ignore[typeddict-item]


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["exact", "throughput"])
def test_two_agents_on_two_accelerators_train(recipe: Path, tmp_path: Path, order: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two accelerators, there are {torch.cuda.device_count()}")
    overrides = [*KINDS["certificates"], *APART, f"engine.order={order}"]
    run = tiny_world.training(recipe, tmp_path / "run", overrides)
    before = tiny_world.weights(run)
    train(run, tolerance=TOLERANCE)
    after = tiny_world.weights(run)
    for name, place in (("ann", "cuda:0"), ("bob", "cuda:1")):
        assert {str(tensor.device) for tensor in after[name].values()} == {place}
    updates = tiny_world.events(tmp_path / "run", "update")
    assert [update["agent"] for update in updates] and any(u["accepted"] for u in updates)
    for update in updates:
        changed = not tiny_world.same(before[update["agent"]], after[update["agent"]])
        assert changed == update["accepted"]
