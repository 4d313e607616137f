"""From a recipe to a run: the user's own functions, tiny bases, settings carried over."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny_world
from satune.commands.assemble import assemble, load_tasks
from satune.commands.train import optimizer_settings, tolerance_of, training_settings
from satune.config.load import load_recipe
from satune.files.arrays import read_rows
from satune.training.credit import GroupCredit
from satune.training.ordering import ORDERS
from satune.training.schedules import Hybrid
from satune.training.self_check import Tolerance
from satune.training.trainer import train
from satune.types import UserError

TOLERANCE = Tolerance(1e-3, 1e-3)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


# The user's own functions, trained with from end to end

PROTOCOL = '''
async def ping(talk, rounds: int = 1):
    """Every seat answers the one before it; the last message is the team's."""
    last = None
    for _ in range(rounds):
        for seat in talk.seats:
            last = await talk.say(seat, instruction=f"round of {talk.problem.id}")
    return last.text
'''

TASK = '''
from satune.types import Grade, Problem


class Vowels:
    """As many vowels as possible."""

    name = "vowels"
    fresh = True

    def __init__(self, seed: int = 0, letters: str = "aeiou"):
        self.seed, self.letters = seed, letters

    def problem_at(self, split, index):
        return Problem.of(f"{split}-{index}", "say something", metadata=index)

    def problems(self, split):
        index = 0
        while True:
            yield self.problem_at(split, index)
            index += 1

    def extract(self, text):
        return text or None

    def equal(self, a, b):
        return a == b

    def grade(self, problem, answer):
        text = answer or ""
        return Grade(sum(c in self.letters for c in text) / max(len(text), 1))
'''


def test_a_protocol_from_a_file_is_trained_with(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PROTOCOL)
    out = tmp_path / "run"
    chosen = f"protocol={{name: '{tmp_path / 'mine.py'}:ping', rounds: 2}}"
    run = tiny_world.training(recipe, out, [chosen, "stages=1", "schedule=stale"])
    train(run, tolerance=TOLERANCE)
    rows = read_rows(run.directory.episodes / "stage-0001.jsonl")
    assert len(rows) == 12
    for row in rows:
        assert [turn["seat"] for turn in row["turns"]] == ["ann", "bob"] * 2
        assert row["answer"] == row["turns"][-1]["text"]
    assert len(tiny_world.events(out, "update")) == 2
    manifest = json.loads((out / "team" / "manifest.json").read_text())
    assert manifest["protocol"]["rounds"] == 2


def test_a_task_from_a_file_is_trained_on(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    out = tmp_path / "run"
    chosen = f"task={{name: '{tmp_path / 'mine.py'}:Vowels', letters: 'aeiouy0123456789'}}"
    run = tiny_world.training(recipe, out, [chosen, "stages=1", "schedule=stale"])
    assert run.world.cast.task.letters.endswith("9")  # type: ignore[attr-defined]
    train(run, tolerance=TOLERANCE)
    rows = read_rows(run.directory.episodes / "stage-0001.jsonl")
    assert [row["problem"]["id"] for row in rows[::4]] == ["train-0", "train-1", "train-2"]
    assert any(event["accepted"] for event in tiny_world.events(out, "update"))


def test_rows_with_a_reward_of_trls_signature_are_trained_on(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = tiny_world.training(recipe, out, ["stages=1", "schedule=stale"])
    train(run, tolerance=TOLERANCE)
    rows = read_rows(run.directory.episodes / "stage-0001.jsonl")
    for row in rows:
        # The recipe's reward, by hand: the sum of the code points of what the reward is given.
        answer = row["answer"]
        assert row["grade"]["score"] == pytest.approx(sum(map(ord, answer)) % 7 / 6)
    assert len({row["grade"]["score"] for row in rows}) > 1
    trained = {row["problem"]["id"] for row in rows}
    held = run.world.cast.held_out_problems(3)  # type: ignore[attr-defined]
    assert not trained & {problem.id for problem in held}


# Held-out problems


def test_evaluation_data_of_their_own_are_all_used(recipe: Path, tmp_path: Path) -> None:
    data = tmp_path / "exam.jsonl"
    rows = [{"id": f"e{i}", "prompt": "1", "answer": "1"} for i in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_recipe(recipe, [f"evaluate.data={data}", "evaluate.problems=50"])
    cast = assemble(loaded)
    assert sorted(p.id for p in cast.held_out_problems(50)) == ["e0", "e1", "e2"]
    assert len(cast.train_problems(9, 0)) == 9
    # Both evaluations see the same problems, whatever was trained on between them.
    first = [p.id for p in cast.held_out_problems(2)]
    cast.train_problems(5, 3)
    assert [p.id for p in cast.held_out_problems(2)] == first


def test_training_never_sees_held_out_rows(recipe: Path) -> None:
    task, (same, split) = load_tasks(load_recipe(recipe))
    assert same is task and split == "eval"
    held = {p.id for p in task.problems("eval")}
    assert len(held) == 3  # a quarter of 12
    assert not held & {p.id for p in task.problems("train")}


# Settings


def test_every_section_reaches_the_loop(recipe: Path) -> None:
    loaded = load_recipe(
        recipe,
        [
            "objective={name: dapo, clip_low: 0.1, clip_high: 0.3, entropy: 0.01,"
            " reference_kl: 0.02}",
            "credit={overlong_buffer: 2, baseline: leave_one_out, normalise: false, clip: 3}",
            "schedule={name: hybrid, ess: 0.3, cap: 4}", "order=greedy",
            "rollout.dynamic_sampling=true",
            "trust_region={delta: 0.02, quantile: 0.9, unit: turn, beta: 0.5, adapt: false,"
            " backtracks: 2, enabled: false}",
            "team.agents.bob.delta=0.2", "team.agents.bob.learning_rate=0.5",
            "optimizer={lr: 0.1, epochs: 3, mini_batches: 2, warmup_steps: 7, max_grad_norm: 2,"
            " weight_decay: 0.3, betas: [0.5, 0.6], eps: 1e-3, micro_batch_tokens: 99,"
            " gradient_checkpointing: true, offload: disk}",
            "checkpoint={keep: 5, every: stage}", "evaluate.every=4", "seed=11", "stages=9",
        ],
    )  # fmt: skip
    found = training_settings(loaded)
    update, objective, region = found.update, found.update.objective, found.update.trust_region
    assert objective.name == "dapo"
    assert objective.options == {"clip_low": 0.1, "clip_high": 0.3}
    assert (objective.entropy, objective.reference_kl) == (0.01, 0.02)
    assert update.credit == GroupCredit("leave_one_out", False, 3, overlong_buffer=2)
    assert found.dynamic_sampling
    assert found.schedule == Hybrid(cap=4, ess=0.3)
    assert (region.delta, region.quantile, region.unit) == (0.02, 0.9, "turn")
    assert (region.beta, region.adapt, region.backtracks) == (0.5, False, 2)
    assert region.enabled is False
    assert (update.epochs, update.mini_batches, update.max_new_tokens) == (3, 2, 6)
    assert (found.deltas, found.seed, found.stages) == ({"bob": 0.2}, 11, 9)
    assert (found.region("bob").delta, found.region("ann").delta) == (0.2, 0.02)
    assert isinstance(found.order, functools.partial) and found.order.func is ORDERS["greedy"]
    assert (found.checkpoint.every, found.evaluate_every) == ("stage", 4)
    agents = loaded.team.resolved().agents
    ann, bob = (optimizer_settings(loaded, agents[name]) for name in ("ann", "bob"))
    assert (ann.lr, bob.lr) == (0.1, 0.5)
    assert (ann.weight_decay, ann.betas, ann.eps) == (0.3, (0.5, 0.6), 1e-3)
    assert (ann.warmup_steps, ann.max_grad_norm, ann.micro_batch_tokens) == (7, 2, 99)
    assert (ann.gradient_checkpointing, ann.offload) == (True, "disk")


def test_tolerance_follows_the_compute_type(recipe: Path) -> None:
    found = [
        tolerance_of(load_recipe(recipe, changes))
        for changes in (["team.dtype=float64"], [], ["optimizer.autocast=bfloat16"])
    ]
    largest = [tolerance.largest for tolerance in found]
    assert largest == sorted(largest) and largest[1] == 1e-3


def test_seats_share_an_agent_and_its_update_sums_over_both(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = tiny_world.training(
        recipe,
        out,
        [
            "team.sharing=shared",
            "stages=1",
            "schedule=stale",
            f"team.agents.bob.model={recipe.parent / 'model-0'}",
        ],
    )
    assert list(run.learners) == ["ann"] and run.seats == {"ann": ["ann", "bob"]}
    train(run, tolerance=TOLERANCE)
    (update,) = tiny_world.events(out, "update")
    rows = read_rows(run.directory.episodes / "stage-0001.jsonl")
    assert update["seats"] == ["ann", "bob"]
    own = sum(len(turn["completion_ids"]) for row in rows for turn in row["turns"])
    assert update["tokens"]["own"] == own
    assert {turn["agent"] for row in rows for turn in row["turns"]} == {"ann"}


# Tiny bases


def tiny(folder: Path, **changes: Any) -> Path:
    recipe = {
        "team": {"agents": {"ann": {"model": "tiny:qwen3-s"}}, "cache": str(folder / "cache")},
        "task": {"name": "relay", "numbers": 2},
        "protocol": "chain",
        "rollout": {"problems": 2, "samples": 2, "max_new_tokens": 4},
        "optimizer": {"mini_batches": 1},
        "evaluate": {"problems": 2},
        "tiny": {"steps": 1, "max_steps": 1, "examples": 32, "batch": 8},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def bases(folder: Path) -> dict[str, bytes]:
    cache = folder / "cache"
    return {p.name: (p / "model.safetensors").read_bytes() for p in cache.iterdir()}


def test_a_base_is_built_once_and_follows_its_own_seed(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    assemble(load_recipe(path))
    (held,) = bases(tmp_path).values()
    # Another seed of the run, or another evaluation, has nothing to do with the base ...
    assemble(load_recipe(path, ["seed=5", "evaluate.problems=3"]))
    assert list(bases(tmp_path).values()) == [held]
    # ... and alone, in an empty cache, it gives the same base.
    other = tmp_path / "other"
    assemble(load_recipe(tiny(other), ["seed=5", "evaluate.problems=3"]))
    assert bases(other) == bases(tmp_path)
    assemble(load_recipe(path, ["tiny.seed=5"]))
    assert len(bases(tmp_path)) == 2


def test_a_base_taught_on_a_file_depends_on_what_is_in_it(tmp_path: Path) -> None:
    def secrets(name: str, *numbers: str) -> str:
        data = tmp_path / name
        rows = [{"id": f"s{i}", "secret": secret} for i, secret in enumerate(numbers)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"task.data={data}"

    chosen: dict[str, Any] = {
        "task": {"name": "guess_number", "prompt": "short", "max_turns": 1},
        "protocol": "round_robin",
    }
    path = tiny(tmp_path, **chosen)
    assemble(load_recipe(path, [secrets("a.jsonl", "0123", "4567", "1357")]))
    assemble(load_recipe(path, [secrets("copy.jsonl", "0123", "4567", "1357")]))
    assert len(bases(tmp_path)) == 1
    assemble(load_recipe(path, [secrets("b.jsonl", "0123", "4567", "9876")]))
    assert len(bases(tmp_path)) == 2


def test_a_base_is_not_gated_on_the_evaluations_own_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, exam = tmp_path / "train.jsonl", tmp_path / "exam.jsonl"
    data.write_text("".join(json.dumps({"secret": s}) + "\n" for s in ("0123", "4567", "1357")))
    exam.write_text(json.dumps({"secret": "9876"}) + "\n")
    played: set[str] = set()
    grade = "satune.tasks.guess_number.GuessNumber.environment"
    from satune.tasks.guess_number import GuessNumber

    original = GuessNumber.environment

    def noted(self: Any, problem: Any, *rest: Any) -> Any:
        played.add(problem.answer)
        return original(self, problem, *rest)

    monkeypatch.setattr(grade, noted)
    chosen: dict[str, Any] = {
        "task": {
            "name": "guess_number",
            "prompt": "short",
            "max_turns": 1,
            "data": str(data),
            "eval_fraction": 0,
        },
        "protocol": "round_robin",
    }
    assemble(load_recipe(tiny(tmp_path, **chosen), [f"evaluate.data={exam}"]))
    assert played and "9876" not in played


def test_a_base_is_not_taught_for_messages_as_long_as_its_context(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    with pytest.raises(
        UserError, match=r"max_new_tokens: 2048 leave no room .* tiny:qwen3-s, 2048"
    ):
        assemble(load_recipe(path, ["rollout.max_new_tokens=2048"]))
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tiny(tmp_path)
    with pytest.raises(UserError) as caught:
        assemble(load_recipe(path, [f"team.cache={tmp_path / 'file' / 'cache'}"]))
    assert "\n" not in str(caught.value) and str(tmp_path / "file") in str(caught.value)


def test_a_full_disk_while_a_base_is_saved_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, os.strerror(28), str(tmp_path / "model.safetensors"))

    path = tiny(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(UserError, match="the disk is full"):
            assemble(load_recipe(path))
    assert bases(tmp_path) == {}
    assemble(load_recipe(path))
    assert len(bases(tmp_path)) == 1
