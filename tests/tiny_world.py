"""A team of random models small enough that a whole run takes a second, and what a run leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from satune.commands.assemble import assemble
from satune.commands.train import start_training
from satune.config.load import load_recipe
from satune.config.schema import Recipe
from satune.core.certificates import StatisticalCertificate
from satune.files.events import UNEQUAL
from satune.tiny.zoo import tiny_tokenizer
from satune.training import certification
from satune.training.checkpoint import Checkpoints
from satune.training.run import Training
from satune.training.run_directory import RunDirectory

REWARD = '''
def ordinals(prompts, completions, answer, **columns):
    """Rewards differ between almost any two texts, so that every group has a gradient."""
    return [sum(map(ord, text)) % 7 / 6 for text in completions]
'''


def save_model(folder: Path, seed: int = 0, *, context: int = 512) -> Path:
    """A random Qwen3 of about 7 thousand parameters with the tiny tokenizer, as a directory."""
    tokenizer = tiny_tokenizer("tiny:qwen3-s")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build(folder: Path, agents: Sequence[str] = ("ann", "bob")) -> Path:
    """Models, rows, a reward and the recipe that names them by absolute paths; gives the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward.py").write_text(REWARD)
    rows = [{"id": f"r{i}", "prompt": f"{i}+{i}", "answer": str(2 * i)} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "seed": 0,
        "team": {
            "agents": {
                name: {"model": str(save_model(folder / f"model-{i}", seed=i))}
                for i, name in enumerate(agents)
            },
            "device": "cpu",
        },
        "task": {
            "name": "rows",
            "data": str(folder / "rows.jsonl"),
            "reward": f"{folder / 'reward.py'}:ordinals",
            "eval_fraction": 0.25,
        },
        "protocol": "chain",
        "rollout": {"problems": 3, "samples": 4, "max_new_tokens": 6},
        "optimizer": {"lr": 1e-3, "mini_batches": 2},
        "stages": 2,
        "evaluate": {"problems": 3, "samples": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def training(
    recipe: Recipe | Path, out: Path, overrides: Sequence[str] = (), *, resume: bool = False
) -> Training:
    """A run ready to train in this process, silent."""
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    directory = RunDirectory(out)
    directory.start(resume=resume)
    cast = assemble(loaded, apart=loaded.rollout.ahead > 0)
    return start_training(cast, directory, lambda event: None)


def judged(monkeypatch: pytest.MonkeyPatch, lowers: Sequence[float]) -> None:
    """Let each test come to the next of these lower bounds, counted from the run's first test."""
    real = certification.certify

    def certify(*evidence: Any, decision: int, **named: Any) -> StatisticalCertificate:
        found = real(*evidence, decision=decision, **named)
        return replace(found, lower=lowers[decision - 1])

    monkeypatch.setattr(certification, "certify", certify)


def checkpoints(out: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(out / "checkpoints", keep)


def events(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The run's events without what no two runs share."""
    found = [_timeless(event) for event in RunDirectory(out).read_events()]
    return [event for event in found if kind is None or event["event"] == kind]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in UNEQUAL}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def weights(trained: Training) -> dict[str, dict[str, torch.Tensor]]:
    return {name: learner.export() for name, learner in trained.learners.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def team_files(out: Path) -> dict[str, bytes]:
    """Weights of the saved team by path."""
    team = out / "team"
    return {str(path.relative_to(team)): path.read_bytes() for path in team.rglob("*.safetensors")}


def command(arguments: Sequence[str], log: str) -> None:
    """``satune`` with these arguments, as the main of a process of its own that logs to a file."""
    import os
    import sys

    from satune.cli.main import main

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["satune", *arguments]
    torch.set_num_threads(1)
    main()
