"""What the tensors of a stage take, and what the process takes, as they are measured."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from pathlib import Path

import torch
import yaml

from satune.agents.live import LiveBytes
from satune.commands.assemble import assemble
from satune.commands.train import start_training
from satune.config.load import load_recipe
from satune.config.schema import Recipe
from satune.training.run_directory import RunDirectory
from satune.training.stage import run_stage
from tiny_world import REWARD

_PAGE = os.sysconf("SC_PAGE_SIZE")


def write_recipe(folder: Path, model: Path) -> Path:
    """One agent of ``model`` that adds numbers: a stage of 8 problems x 4 samples x 32 tokens with
    rewards that differ."""
    (folder / "reward.py").write_text(REWARD)
    sums = [(17 * i % 90 + 10, 31 * i % 80 + 11) for i in range(20)]
    rows = [{"id": f"{a}+{b}", "prompt": f"What is {a} + {b}?", "answer": a + b} for a, b in sums]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "team": {"agents": {"ann": {"model": str(model)}}, "device": "cpu"},
        "task": {
            "name": "rows", "data": str(folder / "rows.jsonl"),
            "reward": f"{folder / 'reward.py'}:ordinals", "eval_fraction": 0.1,
        },
        "protocol": "solo",
        "rollout": {"problems": 8, "samples": 4, "max_new_tokens": 32},
        "stages": 1,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def measured(recipe: Recipe, out: Path) -> dict[str, int]:
    """The most bytes at once during a stage of a run that has had stages before: ``tensors`` of
    those that are alive, ``resident`` of the process beyond what it had when this was called."""
    before = _resident()
    directory = RunDirectory(out)
    directory.start(resume=False)
    training = start_training(assemble(recipe), directory, lambda event: None)
    for learner in training.learners.values():
        moments = {
            f"{name}|{part}": torch.zeros_like(weights)
            for name, weights in learner.export().items()
            for part in ("exp_avg", "exp_avg_sq")
        }
        steps = {f"{name}|step": torch.tensor(1.0) for name in learner.export()}
        learner.load_optimizer_state(moments | steps, 1)
        del moments
    for name in training.learners:
        training.publish(name)
    gc.collect()
    most, over = [before], threading.Event()

    def watch() -> None:
        while not over.is_set():
            most.append(max(most.pop(), _resident()))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with LiveBytes() as live:
        live.count([each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)])
        run_stage(training)
        training.finish_saving()
    over.set()
    watcher.join()
    return {"tensors": live.peak, "resident": most[0] - before}


def measure_apart(recipe: str, out: str, overrides: list[str], found: str) -> None:
    """``measured`` as the main of a process of its own, which has imported all it needs."""
    torch.set_num_threads(1)
    took = measured(load_recipe(recipe, overrides), Path(out))
    Path(found).write_text(json.dumps(took))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
