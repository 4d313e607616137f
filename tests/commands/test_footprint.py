"""What is said of a stage's memory before anything is loaded, held against what it takes."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path

import pytest

from measured_stage import measure_apart, measured, write_recipe
from real_models import real_model
from satune.commands.footprint import stage_bytes_by_device
from satune.config.load import load_recipe
from satune.config.schema import Recipe
from satune.tiny.zoo import tiny_model, tiny_tokenizer


def stage_bytes(recipe: Recipe) -> dict[str, int] | None:
    """Those of the one device on which everything lies."""
    found = stage_bytes_by_device(recipe)
    if found is None:
        return None
    (only,) = found.values()
    return only


KINDS = {
    "full weights": [],
    "adapters": ["team.sharing=lora"],
    "bfloat16": ["team.dtype=bfloat16", "gauge.every=0"],
    "adapters in bfloat16": ["team.sharing=lora", "team.dtype=bfloat16", "gauge.every=0"],
    "several micro-batches": ["optimizer.micro_batch_tokens=256"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage of a model of 1.1 million parameters."""
    folder = tmp_path_factory.mktemp("stage")
    tiny_model("tiny:llama-m", 0).save_pretrained(folder / "model")
    tiny_tokenizer("tiny:llama-m").save_pretrained(folder / "model")
    return write_recipe(folder, folder / "model")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if "bfloat16" in k else ()) for k in KINDS]
)
def test_the_tensors_of_a_stage_are_foretold(recipe: Path, tmp_path: Path, kind: str) -> None:
    loaded = load_recipe(recipe, KINDS[kind])
    told = stage_bytes(loaded)
    assert told is not None
    assert told["peak"] == pytest.approx(measured(loaded, tmp_path / "run")["tensors"], rel=0.1)
    assert told["peak"] == max(told[phase] for phase in ("rollout", "update", "measure"))


@pytest.mark.real
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["full weights", "adapters"])
def test_the_memory_of_a_pretrained_models_stage_is_foretold(tmp_path: Path, kind: str) -> None:
    recipe, found = write_recipe(tmp_path, real_model("smollm2-135m")), tmp_path / "found.json"
    told = stage_bytes(load_recipe(recipe, KINDS[kind]))
    assert told is not None
    process = multiprocessing.get_context("spawn").Process(
        target=measure_apart, args=(str(recipe), str(tmp_path / "run"), KINDS[kind], str(found))
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    took = json.loads(found.read_text())
    print(f"\n{kind}: told {told}, took {took}")
    assert told["peak"] == pytest.approx(took["tensors"], rel=0.1)
    assert told["peak"] == pytest.approx(took["resident"], rel=0.25)


def test_a_model_that_is_not_here_has_no_figure(recipe: Path) -> None:
    for model in ("Qwen/Qwen3-4B", "somebody/some-model"):
        assert stage_bytes(load_recipe(recipe, [f"team.agents.ann.model={model}"])) is None


def test_a_tiny_model_is_laid_out_like_a_saved_one(recipe: Path) -> None:
    for overrides in ([], ["team.sharing=lora"]):
        named = [*overrides, "team.agents.ann.model=tiny:llama-m"]
        assert stage_bytes(load_recipe(recipe, named)) == stage_bytes(
            load_recipe(recipe, overrides)
        )


def test_a_team_with_critics_has_no_figure(recipe: Path) -> None:
    assert stage_bytes(load_recipe(recipe, ["credit=gae", "critic.kind=head"])) is None


def test_as_many_conversations_are_decoded_as_the_engine_takes(recipe: Path) -> None:
    whole, few = (stage_bytes(load_recipe(recipe, [f"engine.max_rows={n}"])) for n in (256, 4))
    assert whole and few
    assert few["rollout"] < whole["rollout"] and few["update"] == whole["update"]


def test_moments_on_disk_and_frozen_agents_take_nothing(recipe: Path) -> None:
    whole, disk, frozen = (
        stage_bytes(load_recipe(recipe, overrides))
        for overrides in ([], ["optimizer.offload=disk"], ["stages=0"])
    )
    assert whole and disk and frozen
    weights = sum(4 * p.numel() for p in tiny_model("tiny:llama-m", 0).parameters())
    # Two moments a parameter rest on the CPU between steps; a step has them in memory all the same.
    assert whole["rollout"] - disk["rollout"] == 2 * weights
    assert whole["peak"] == disk["peak"]
    assert "update" not in frozen and frozen["peak"] == whole["rollout"] - 2 * weights
