"""The lab: its exact values against values worked out by hand, and that a false bound is caught."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from satune.core import horizon_bounds, variation
from satune.lab import bounds, conversations, mdp, steps
from satune.lab.conversations import Layout, Tree
from satune.lab.ledger import Ledger
from satune.lab.mdp import World, divergence, evaluate, joint_policy, marginal_advantage
from satune.lab.run import run_lab
from satune.lab.studies import slope, xor_team


def two_state_world(gamma: float) -> World:
    """State 0: action 0 stays and earns 1, action 1 leaves for state 1, where nothing is earned."""
    return World(
        transition=torch.tensor([[[[1.0, 0], [0, 1]], [[0, 1], [0, 1]]]], dtype=torch.float64),
        reward=torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64),
        start=torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        gamma=torch.tensor([gamma], dtype=torch.float64),
        active=torch.ones(1, 2, 1, dtype=torch.bool),
        possible=torch.ones(1, 2, 2, dtype=torch.bool),
        parts=torch.tensor([[0], [1]]),
    )


def test_exact_values_of_a_world_worked_out_by_hand() -> None:
    world = two_state_world(0.5)
    stay = torch.tensor([[[[0.8, 0.2], [1.0, 0.0]]]], dtype=torch.float64)
    values = evaluate(world, stay)
    # V(0) = .8 (1 + .5 V(0)), so V(0) = .8/.6; state 0 is left with .2: d(0) = .5 Σ (.5·.8)^t.
    assert float(values.returns) == pytest.approx(0.8 / 0.6, rel=1e-14)
    assert values.occupancy[0].tolist() == pytest.approx([0.5 / 0.6, 1 - 0.5 / 0.6], rel=1e-14)
    # A(0, stay) = 1 + .5 V - V = 1/3, A(0, leave) = -V.
    assert values.advantage[0, 0].tolist() == pytest.approx([1 / 3, -4 / 3], rel=1e-13)
    assert float(values.span) == pytest.approx(5 / 3, rel=1e-13)
    own = marginal_advantage(world, stay, 0, values)
    assert torch.allclose(own[0], values.advantage[0])


def test_a_team_is_the_product_of_its_agents() -> None:
    rng = torch.Generator().manual_seed(0)
    world = mdp.random_world(rng, 3, 4, 2, 3, "random")
    policy = mdp.random_policy(rng, world, 3)
    joint = joint_policy(world, policy)
    assert torch.allclose(joint.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    assert joint[~world.possible].abs().max() == 0
    expected = torch.einsum("bsa,bsc->bsac", policy[:, 0], policy[:, 1]).flatten(-2)
    assert torch.equal(joint, expected)


@pytest.mark.parametrize(
    "p, q, expected",
    [
        ([0.5, 0.5], [0.25, 0.75], 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ([1.0, 0.0], [0.5, 0.5], math.log(2)),
        ([0.5, 0.5], [1.0, 0.0], math.inf),
        ([0.5, 0.5], [0.5, 0.5], 0.0),
        ([0.5, 0.5], [1e-30, 1.0], 0.5 * math.log(0.5e30) + 0.5 * math.log(0.5)),
        ([0.3, 0.7], [0.3 + 3e-9, 0.7 - 3e-9], 0.5 * 9e-18 * (1 / 0.3 + 1 / 0.7)),
    ],
)
def test_divergence(p: list[float], q: list[float], expected: float) -> None:
    found = divergence(torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64))
    assert float(found) == pytest.approx(expected, rel=1e-6, abs=0)


def test_a_conversation_enumerated_by_hand() -> None:
    """Agent 0 says a bit (1 with .25), agent 1 repeats it or not; reward 1 if equal."""
    layout = Layout("pair", ((0,), (1,)), (1,))
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    tree = Tree.of(layout, reward)
    first = torch.tensor([[[0.75, 0.25]]], dtype=torch.float64)
    second = torch.tensor([[[0.6, 0.4], [0.1, 0.9]]], dtype=torch.float64)
    # Leaves in the order 00, 01, 10, 11.
    leaves = tree.leaf([first, second])
    assert leaves[0].tolist() == pytest.approx([0.45, 0.3, 0.025, 0.225], rel=1e-14)
    assert float((leaves * reward).sum()) == pytest.approx(0.675, rel=1e-14)


def test_the_whole_lab_holds() -> None:
    found = run_lab(1, 400)
    assert found["violations"] == []
    for name, bound in found["bounds"].items():
        assert bound["held"] == bound["checked"] >= 100, name
        assert bound["decreased"] == 0, name
    assert found["bounds"]["paper"]["positive_gamma_half"] == 0
    searched = found["bounds"]["line_search"]
    assert searched["positive"] >= 0.3 * searched["checked"]
    assert found["exponents"]["penalty_fresh"] == pytest.approx(1.0, abs=0.01)
    # n(n+1)/2 fitted from 2 to 8 agents.
    assert found["exponents"]["penalty_stale"] == pytest.approx(1.8, abs=0.05)


@pytest.mark.slow
def test_three_seeds_of_two_thousand_instances_hold() -> None:
    found = run_lab(3, 2000)
    assert found["violations"] == [] and found["instances"] >= 6000
    for name, bound in found["bounds"].items():
        assert bound["held"] == bound["checked"] >= 1500 and bound["decreased"] == 0, name
    assert found["bounds"]["paper"]["positive_gamma_half"] == 0
    searched = found["bounds"]["line_search"]
    assert searched["positive"] >= 0.3 * searched["checked"]


HALVED: dict[str, tuple[Any, str]] = {
    "occupancy_mean": (bounds, "occupancy_shift_mean"),
    "occupancy_sup": (bounds, "occupancy_shift_sup"),
    "trpo": (bounds, "penalty_trpo"),
    "span": (bounds, "penalty_span"),
    "cpo": (bounds, "penalty_cpo"),
    "saturating": (bounds, "penalty_saturating"),
    "stage_fresh": (bounds, "penalty_fresh"),
    "stage_stale": (bounds, "penalty_stale"),
    "stage_naive": (bounds, "penalty_naive"),
    "return_change": (bounds, "return_change"),
    "bias": (bounds, "bias_cost"),
    "pinsker": (variation, "tv_pinsker"),
    "bretagnolle_huber": (variation, "tv_bretagnolle_huber"),
    "stale_occupancy": (bounds, "stale_occupancy_shift"),
    "largest_gain": (horizon_bounds, "largest_gain"),
    "sup_free": (horizon_bounds, "penalty_sup_free"),
    "turns": (horizon_bounds, "penalty_horizon"),
}


@pytest.mark.parametrize("name", HALVED)
def test_half_of_a_bound_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function = HALVED[name]
    whole: Callable[..., Tensor] = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *a, **k: 0.5 * whole(*a, **k))
    ledger = Ledger()
    rng = torch.Generator().manual_seed(0)
    if module is not horizon_bounds:
        steps.check_steps(ledger, rng, 900, 0)
    else:
        conversations.check_conversations(ledger, rng, 900, 0)
    assert any(line.startswith(name) for line in ledger.violations)


def test_a_surrogate_with_the_wrong_sign_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    gain = steps.gain_by_state
    monkeypatch.setattr(steps, "gain_by_state", lambda *a: -gain(*a))
    ledger = Ledger()
    steps.check_steps(ledger, torch.Generator().manual_seed(0), 90, 0)
    assert any(line.startswith("cpo") for line in ledger.violations)


def test_long_horizons_and_steps_without_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """gamma .9999, policies that are deterministic or the same, KL infinite."""
    world_of = mdp.random_world

    def extreme(*arguments: Any) -> World:
        world = world_of(*arguments)
        return World(**{**world.__dict__, "gamma": torch.full_like(world.gamma, 0.9999)})

    def moved(rng: torch.Generator, world: World, old: Tensor, agent: int, values: Any) -> Tensor:
        other = mdp.random_policy(rng, world, old.shape[-1])[:, agent]
        sharp = torch.nn.functional.one_hot(other.argmax(-1), other.shape[-1]).double()
        coin = torch.rand(len(old), 1, 1, generator=rng)
        return torch.where(coin < 0.7, sharp, old[:, agent])

    monkeypatch.setattr(steps, "random_world", extreme)
    monkeypatch.setattr(steps, "proposal", moved)
    ledger = Ledger()
    steps.check_steps(ledger, torch.Generator().manual_seed(1), 270, 1)
    assert ledger.violations == []
    assert ledger.tallies["paper"].counts == {"positive_gamma_half": 0}


def test_the_xor_team_by_hand() -> None:
    """From p = .49 both leave for 0 at once and lose; one after the other they part and gain."""
    found = xor_team(delta=0.05)
    assert found["worst_stale_start"] == pytest.approx(0.49)
    # KL(.49‖q) = .05 from above .49, found by halving; the other then goes below it.
    low, high = 0.49, 0.99
    for _ in range(60):
        middle = (low + high) / 2
        kl = 0.49 * math.log(0.49 / middle) + 0.51 * math.log(0.51 / (1 - middle))
        low, high = (middle, high) if kl <= 0.05 else (low, middle)
    q = low
    before = 2 * 0.49 * 0.51
    assert found["worst_stale"] == pytest.approx(2 * q * (1 - q) - before, abs=1e-9)
    assert found["fresh_there"] > 0 > found["worst_stale"]
    assert found["fresh_decreases"] == 0.0 < found["stale_decreases"]


def test_slope() -> None:
    assert slope([1, 2, 4, 8], [9.0, 2.0, 8.0, 32.0]) == pytest.approx(2.0)
    assert slope([1, 2], [1.0, 2.0]) is None


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from satune.cli.main import main

    out = tmp_path / "lab"
    monkeypatch.setattr("sys.argv", ["satune", "lab", "--seeds", "1", "--instances", "90",
                                     "--out", str(out), "--json"])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    keys = {"held", "checked", "median_tightness", "positive", "decreased"}
    assert all(keys <= set(bound) for bound in found["bounds"].values())
    assert "positive_gamma_half" in found["bounds"]["paper"] and found["exponents"]
    assert {p.name for p in out.iterdir()} == {
        "lab.json", "tightness.png", "growth.png", "xor.png", "rate.png",
    }  # fmt: skip

    whole = bounds.occupancy_shift_mean
    monkeypatch.setattr(bounds, "occupancy_shift_mean", lambda *a: 0.5 * whole(*a))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "violated: occupancy_mean: seed 0" in capsys.readouterr().err
