"""SIGKILL at random moments: after enough resumes a run is what it would have been."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path

import pytest

import tiny_world

VARIANTS = {
    "hybrid": ["schedule=hybrid", "schedule.ess=0.8"],
    "reuse": ["schedule=reuse", "order=random", "optimizer.offload=disk"],
    "stale": ["schedule=stale", "objective.reference_kl=0.1", "evaluate.every=3"],
    "certified": [
        "certify={problems: 3, samples: 2, every: 3, evidence: balance, accept: certified,"
        " tolerance: 0.95, backtracks: 1}",
        "optimizer.lr=3e-3",
    ],
    "lora": ["schedule=fresh", "team.sharing=lora", "team.agents.bob.model=${ann}"],
}
STAGES = 8
KILLS = 6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that start with the imports done: a kill then finds a run, not an import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["satune.commands.train", "satune.training.trainer", "satune.cli.main"]
    )
    return context


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_killed_at_random_moments_a_run_is_the_same(
    recipe: Path,
    tmp_path: Path,
    processes: multiprocessing.context.ForkServerContext,
    name: str,
) -> None:
    shared = str(recipe.parent / "model-0")
    overrides = [text.replace("${ann}", shared) for text in VARIANTS[name]]
    log = tmp_path / "log"

    def start(out: Path, *more: str) -> multiprocessing.process.BaseProcess:
        arguments = ["train", str(recipe), *overrides, f"stages={STAGES}", "--out", str(out)]
        process = processes.Process(target=tiny_world.command, args=([*arguments, *more], str(log)))
        process.start()
        return process

    whole = tmp_path / "whole"
    process = start(whole)
    process.join(120)
    assert process.exitcode == 0, log.read_text()

    rng = random.Random(name)
    kills, killed_in, runs = 0, [], 0
    while kills < KILLS:
        runs += 1
        out = tmp_path / f"run-{runs}"
        while not (out / "summary.json").exists():
            before = len(tiny_world.events(out))
            process = start(out, "--resume")
            if rng.random() < 0.75:
                # Not while it still starts: a little after it has come further than it was.
                while process.is_alive() and len(tiny_world.events(out)) <= before:
                    process.join(0.01)
            process.join(rng.uniform(0.0, 0.25))
            if process.exitcode is None and kills < KILLS:
                process.kill()
                process.join(60)
                assert process.exitcode == -9
                kills += 1
                killed_in.append(len(tiny_world.events(out)))
            else:
                process.join(120)
                assert process.exitcode == 0, log.read_text()
        assert tiny_world.events(out) == tiny_world.events(whole)
        assert tiny_world.team_files(out) == tiny_world.team_files(whole)
        for path in (whole / "episodes").iterdir():
            assert (out / "episodes" / path.name).read_bytes() == path.read_bytes()
        same = [json.loads((place / "summary.json").read_text()) for place in (out, whole)]
        for summary in same:
            summary.pop("seconds"), summary.pop("team")
            summary.get("certificates", {}).pop("seconds", None)
        assert same[0] == same[1]
    print(f"{name}: killed after {killed_in} events in {runs} runs")
