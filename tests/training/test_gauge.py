"""What rounding decides is said, and too much of it stops the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_world
from satune.agents.packing import pack
from satune.agents.rounding import Gauged
from satune.core.settings import ObjectiveSettings
from satune.core.trust_region import TrustRegionSettings, Unit
from satune.training.gauge import figures_of, findings
from satune.training.self_check import Tolerance
from satune.training.settings import GaugeSettings
from satune.training.trainer import train
from satune.types import UserError
from tiny_models import turn

BY_ROUNDING = Tolerance(0.1, 2.0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose models lie on bfloat16's grid, as published ones do."""
    built = tiny_world.build(tmp_path_factory.mktemp("world"))
    for number in (0, 1):
        folder = built.parent / f"model-{number}"
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.to(torch.bfloat16).float().save_pretrained(folder)
    return built


def test_the_figures_by_hand() -> None:
    packed = pack([[turn([1], [2, 3])], [turn([1], [4])], [turn([1], [5])]])
    gauged = Gauged(
        cut_T=torch.zeros(4),
        floor_T=torch.tensor([0.0, 0.3, 0.1, 0.2]),
        kl_T=torch.tensor([0.5, 0.1, 0.1, 0.1]),
        rounded_kl_T=torch.tensor([0.1, 0.1, 0.1, 0.4]),
        masters_kl_T=torch.full((4,), 0.1),
        error_T=torch.tensor([0.15, 0.15, -0.4, 0.1]),
    )
    region = TrustRegionSettings(quantile=0.75)
    figures = figures_of(gauged, packed, ObjectiveSettings("sat"), region)
    # Sums .3, -.4, .1 against log .8 = -.223 and log 1.2 = .182.
    assert figures["clipped"] == pytest.approx(2 / 3)
    assert figures["token"] == pytest.approx(((2 * 0.15**2 + 0.4**2 + 0.1**2) / 4) ** 0.5)
    assert figures["episode"] == pytest.approx(((0.3**2 + 0.4**2 + 0.1**2) / 3) ** 0.5)
    wanted = {"floor": 0.2, "kl": 0.1, "kl_rounded": 0.1, "kl_masters": 0.1}
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted)
    of_tokens = figures_of(gauged, packed, ObjectiveSettings("grpo"), region)
    assert of_tokens["clipped"] == pytest.approx(1 / 4)
    # With a critic sat has a ratio a turn, or a token.
    one_each = figures_of(gauged, packed, ObjectiveSettings("sat"), region, "token")
    assert one_each["clipped"] == pytest.approx(1 / 4)
    assert figures_of(gauged, packed, ObjectiveSettings("reinforce"), region)["clipped"] == 0.0


@pytest.mark.parametrize(
    ("unit", "floor", "masters"),
    [("token", 0.2, 0.1), ("turn", 0.3, 0.2), ("trajectory", 0.4, 0.3)],
)
def test_kl_is_summed_over_the_trust_regions_unit(unit: Unit, floor: float, masters: float) -> None:
    # Turns of 2, 1 and 1 tokens, the first two of one episode; above level .75 lies the largest.
    packed = pack([[turn([1], [2, 3]), turn([9], [4])], [turn([1], [5])]])
    nothing_T = torch.zeros(4)
    gauged = Gauged(
        cut_T=nothing_T,
        floor_T=torch.tensor([0.0, 0.3, 0.1, 0.2]),
        kl_T=nothing_T,
        rounded_kl_T=nothing_T,
        masters_kl_T=torch.full((4,), 0.1),
        error_T=nothing_T,
    )
    region = TrustRegionSettings(quantile=0.75, unit=unit)
    figures = figures_of(gauged, packed, ObjectiveSettings("sat"), region)
    assert (figures["floor"], figures["kl_masters"]) == pytest.approx((floor, masters))


FINE = {"token": 1e-6, "episode": 1e-5, "clipped": 0.0, "floor": 1e-9, "kl": 0.02}


@pytest.mark.parametrize(
    ("changes", "said", "swamped"),
    [
        ({}, 0, False),
        ({"kl_rounded": 0.02, "kl_masters": 0.02}, 0, False),
        ({"clipped": 0.1}, 1, False),
        ({"clipped": 0.6}, 1, False),
        ({"clipped": 0.9}, 1, True),
        ({"floor": 0.02}, 1, False),
        ({"floor": 0.06}, 1, True),
        ({"kl_rounded": 0.004, "kl_masters": 0.02}, 1, False),  # a step that is hardly seen
        ({"kl_rounded": 0.0, "kl_masters": 0.02}, 1, True),  # and one that is not
        ({"kl_rounded": 0.6, "kl_masters": 0.02}, 1, True),  # one that all weights cross a tie in
        ({"kl_rounded": 0.04, "kl_masters": 1e-4}, 0, False),  # as much, but inside the region
        ({"kl_rounded": float("nan"), "kl_masters": 0.02}, 1, True),
        ({"clipped": 0.9, "floor": 0.02}, 2, True),
    ],
)
def test_what_is_said_and_what_is_too_much(
    changes: dict[str, float], said: int, swamped: bool
) -> None:
    found = findings(FINE | changes, delta=0.05)
    assert (len(found[0]), found[1]) == (said, swamped)


def test_in_float32_it_is_silent_and_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    runs = {}
    for every in (0, 2):
        out = tmp_path / str(every)
        changes = [f"gauge.every={every}", "stages=3"]
        train(tiny_world.training(recipe, out, changes), tolerance=Tolerance(1e-3, 1e-3))
        runs[every] = tiny_world.events(out, "update")
    gauged = [event.pop("rounding", None) for event in runs[2]]
    assert runs[0] == runs[2]
    assert [event is not None for event in gauged] == [True, True, False, False, True, True]
    for figures in filter(None, gauged):
        assert "warning" not in figures and "kl_masters" not in figures
        assert figures["floor"] < 1e-8 and figures["episode"] < 1e-4


def tied(weights: torch.Tensor) -> torch.Tensor:
    """Midway between two neighbours of bfloat16's grid."""
    low = weights.to(torch.bfloat16)
    return (low.float() + torch.nextafter(low, torch.full_like(low, 9.0)).float()) / 2


@pytest.mark.parametrize("rate", [1e-6, 1e-2], ids=["inside", "beyond"])
def test_a_step_that_the_type_makes_another_is_refused(tmp_path: Path, rate: float) -> None:
    """Of one far beyond delta the share that should lie inside is another step altogether."""
    recipe = tiny_world.build(tmp_path / "world")
    for number in (0, 1):
        folder = recipe.parent / f"model-{number}"
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.load_state_dict({name: tied(w) for name, w in model.state_dict().items()})
        model.save_pretrained(folder)
    out = tmp_path / "run"
    changes = ["team.dtype=bfloat16", f"optimizer.lr={rate}", "trust_region.delta=1e-5"]
    run = tiny_world.training(recipe, out, changes)
    before = tiny_world.weights(run)
    with pytest.raises(UserError, match=r"agent ann: rounding decides: .* once its weights are"):
        train(run, tolerance=BY_ROUNDING)
    assert tiny_world.same(before["ann"], tiny_world.weights(run)["ann"])
    assert tiny_world.checkpoints(out).names() == ["stage-0000"]


def test_who_wants_to_goes_on_with_a_warning(recipe: Path, tmp_path: Path) -> None:
    out, notes = tmp_path / "run", []
    changes = ["team.dtype=bfloat16", "optimizer.lr=1e-6", "gauge.act=warn", "stages=1"]
    run = tiny_world.training(recipe, out, changes)
    run.watch = lambda event: notes.append(event) if event["event"] == "note" else None
    train(run, tolerance=BY_ROUNDING)
    updates = tiny_world.events(out, "update")
    assert all("rounding decides" in event["rounding"]["warning"] for event in updates)
    assert [note["text"] for note in notes] == [e["rounding"]["warning"] for e in updates]


@pytest.mark.parametrize(
    "changes",
    [
        ["team.dtype=float16"],
        ["team.dtype=bfloat16", "team.sharing=lora", "optimizer.lr=1e-2"],
        ["team.dtype=float16", "team.sharing=lora", "optimizer.lr=1e-2"],
    ],
    ids=["float16", "adapters in bfloat16", "adapters in float16"],
)
def test_what_works_is_not_refused(recipe: Path, tmp_path: Path, changes: list[str]) -> None:
    out = tmp_path / "run"
    train(tiny_world.training(recipe, out, [*changes, "trust_region.delta=0.2"]),
          tolerance=BY_ROUNDING)  # fmt: skip
    updates = tiny_world.events(out, "update")
    assert all("kl_masters" in event["rounding"] for event in updates[:2])
    assert any(event["accepted"] for event in updates)


def test_it_is_due_in_the_first_stage_and_then_every_so_often() -> None:
    assert [stage for stage in range(1, 12) if GaugeSettings(every=4).due(stage)] == [1, 5, 9]
    assert not any(GaugeSettings(every=0).due(stage) for stage in range(1, 12))
