"""A run of many stages takes no more memory than one of few."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_world
from satune.commands.assemble import assemble
from satune.commands.train import start_training
from satune.config.load import load_recipe
from satune.training.run_directory import RunDirectory
from satune.training.self_check import Tolerance
from satune.training.trainer import train

STAGES, SETTLED, WINDOW = 200, 20, 10
"""Memory of the last stages is held against that of the first ones that come after the start."""
SHORT_TEXTS = 4096
SMALL = (
    f"stages={STAGES}", "rollout={problems: 2, samples: 2, max_new_tokens: 4}",
    "optimizer.mini_batches=1",
)  # fmt: skip


def run(recipe: str, out: str, found: str) -> None:
    """The main of a process of its own: writes the memory at every stage, and at the ends of both
    windows how many objects of each type there are."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def watch(event: Any) -> None:
        if event["event"] != "stage":
            return
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        row: dict[str, Any] = {"bytes": resident * os.sysconf("SC_PAGE_SIZE")}
        if event["stage"] in (SETTLED + WINDOW, STAGES):
            gc.collect()
            row["objects"] = Counter(type(each).__name__ for each in gc.get_objects())
        rows.append(row)

    directory = RunDirectory(out)
    directory.start(resume=False)
    training = start_training(assemble(load_recipe(recipe, SMALL)), directory, watch)
    train(training, tolerance=Tolerance(mean=1e-4, largest=1e-3))
    Path(found).write_text(json.dumps(rows))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat_from_stage_20_to_stage_200(tmp_path: Path) -> None:
    recipe, found = tiny_world.build(tmp_path / "world"), tmp_path / "found.json"
    arguments = (str(recipe), str(tmp_path / "run"), str(found))
    process = multiprocessing.get_context("spawn").Process(target=run, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
    rows = json.loads(found.read_text())
    assert len(rows) == STAGES
    sizes = [row["bytes"] for row in rows]
    early = statistics.median(sizes[SETTLED : SETTLED + WINDOW])
    late = statistics.median(sizes[-WINDOW:])
    assert late <= 1.05 * early, (early, late)
    before, after = (Counter(row["objects"]) for row in rows if "objects" in row)
    grown = {name: count for name, count in (after - before).items() if count > 50}
    # The ids of short texts, of which each of the two renderers keeps so many.
    assert grown.pop("array", 0) < 2 * SHORT_TEXTS
    assert not grown
