"""Trained teams to swap in, and what a run directory holds of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny_world
from satune.config.load import load_recipe
from satune.swap.settings import HandOverSettings
from satune.training.self_check import Tolerance
from satune.training.trainer import train

TOLERANCE = Tolerance(1e-3, 1e-3)
# Whatever the newcomer is worth: what these tests look at comes after the decision.
ANY = HandOverSettings(tolerance=1.0, problems=8, samples=2, looks=1)


def trained(recipe: Path, out: Path, overrides: Sequence[str] = ()) -> Path:
    train(tiny_world.training(recipe, out, overrides), tolerance=TOLERANCE)
    return out


def go_on(out: Path, stages: int) -> dict[str, Any]:
    """What ``satune train OUT/recipe.yaml --out OUT --resume stages=N`` does."""
    run = tiny_world.training(
        load_recipe(out / "recipe.yaml", [f"stages={stages}"]), out, resume=True
    )
    found = tiny_world.checkpoints(out).latest()
    assert found is not None
    return train(run, tolerance=TOLERANCE, checkpoint=found[0])


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def state_of(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "checkpoints" / name / "state.json").read_text())
