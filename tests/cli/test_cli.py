"""The commands as a person meets them: one JSON object, one line for bad input, exit codes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_world
from command_line import ENVIRONMENT, Run, refused
from satune.cli.common import shipped_recipe
from satune.config.load import load_recipe
from satune.files.arrays import read_rows
from satune.files.lock import LOCK, locked
from satune.training.run_directory import RunDirectory


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


# Results


def test_train_prints_one_json_object_and_logs_elsewhere(
    satune: Run, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, stdout, stderr = satune(
        "train", recipe, "log.report_to=tensorboard", "--out", out, "--json"
    )
    assert code == 0
    summary = json.loads(stdout)
    for key in ("reward_before", "reward_after"):
        assert isinstance(summary[key], float) and 0 <= summary[key] <= 1
    assert summary["stages"] == 2 and summary["tokens"] > 0 and summary["seconds"] > 0
    assert summary == json.loads((out / "summary.json").read_text())
    assert "held-out reward" in stderr and "stage 2: reward" in stderr
    assert "\x1b" not in stdout + stderr

    run = RunDirectory(out)
    sampled = [e for e in run.read_events() if e["event"] == "eval" and not e["greedy"]]
    rewards = [event["reward"] for event in sampled]
    assert rewards == [summary["reward_before"], summary["reward_after"]]
    for stage in (1, 2):
        rows = read_rows(run.episodes / f"stage-{stage:04d}.jsonl")
        assert len(rows) == 12
        assert all({"turns", "answer", "grade", "problem"} <= set(row) for row in rows)
    manifest = json.loads((out / "team" / "manifest.json").read_text())
    assert {"format", "seats", "agents", "protocol", "task"} <= set(manifest)
    assert manifest["seats"] == {"ann": "ann", "bob": "bob"}
    for agent in manifest["agents"].values():
        assert {"dir", "temperature", "template", "sharing", "delta"} <= set(agent)
        assert (out / "team" / agent["dir"] / "config.json").is_file()
        generation = json.loads(
            (out / "team" / agent["dir"] / "generation_config.json").read_text()
        )
        assert generation.get("top_p", 1.0) == 1.0 and generation.get("top_k", 0) == 0
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert any((out / "tensorboard").iterdir())


def test_without_json_a_table_is_shown(satune: Run, recipe: Path, tmp_path: Path) -> None:
    code, stdout, _ = satune("train", recipe, "stages=1", "--out", tmp_path / "run")
    assert code == 0
    assert "team reward, sampled" in stdout and "team reward, greedy" in stdout
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.slow
def test_a_finished_run_says_so(satune: Run, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = satune("train", recipe, "stages=1", "--out", out, "--json")
    events = (out / "events.jsonl").read_bytes()
    code, stdout, stderr = satune("train", recipe, "stages=1", "--out", out, "--resume", "--json")
    assert (code, stdout) == (0, first[1])
    assert "the run is finished" in stderr
    assert (out / "events.jsonl").read_bytes() == events
    # With more stages it goes on, and ends as a run that had them from the beginning.
    assert satune("train", recipe, "stages=2", "--out", out, "--resume")[0] == 0
    assert satune("train", recipe, "stages=2", "--out", tmp_path / "whole")[0] == 0
    assert tiny_world.team_files(out) == tiny_world.team_files(tmp_path / "whole")
    updates = tiny_world.events(tmp_path / "whole", "update")
    assert tiny_world.events(out, "update") == updates


@pytest.mark.slow
def test_resume_without_a_checkpoint_starts_anew(satune: Run, recipe: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert satune("train", recipe, "--out", whole)[0] == 0
    # What a run leaves that ended during its first evaluation.
    assert satune("train", recipe, "--out", out)[0] == 0
    shutil.rmtree(out / "checkpoints")
    for left in (out / "summary.json", out / "training.png"):
        left.unlink()
    shutil.rmtree(out / "team")
    events = (out / "events.jsonl").read_bytes().splitlines(keepends=True)
    (out / "events.jsonl").write_bytes(b"".join(events[:2]))
    code, _, stderr = satune("train", recipe, "--out", out, "--resume")
    assert code == 0
    assert nothing_to_resume(stderr) == [f"{out}: nothing to resume: {NO_CHECKPOINT}"]
    assert tiny_world.events(out) == tiny_world.events(whole)
    assert tiny_world.team_files(out) == tiny_world.team_files(whole)
    # And in a directory that is not there at all; brackets are no markup.
    new = tmp_path / "new [bold]"
    code, stdout, stderr = satune("train", recipe, "--out", new, "--resume", "--json")
    assert code == 0
    assert nothing_to_resume(stderr) == [f"{new}: nothing to resume: no run; a new one begins"]
    assert json.loads(stdout) == json.loads((new / "summary.json").read_text())
    assert tiny_world.events(new) == tiny_world.events(whole)


NO_CHECKPOINT = "no checkpoint of the run; it begins anew"


def nothing_to_resume(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "nothing to resume" in line]


def test_a_resume_that_goes_on_does_not_say_that_it_begins(
    satune: Run, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = satune("train", recipe, "stages=1", "--out", out)
    assert first[0] == 0 and not nothing_to_resume(first[2])
    code, _, stderr = satune("train", recipe, "stages=2", "--out", out, "--resume")
    assert code == 0 and not nothing_to_resume(stderr)


def test_nothing_begins_among_other_files(satune: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    line = refused(satune("train", recipe, "--out", tmp_path, "--resume"))
    assert line == f"{tmp_path}: is not empty and holds no run; give another --out"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_at_which_another_process_works(
    satune: Run, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with locked(out / LOCK, str(out)):
        there = json.loads((out / LOCK).read_text())
        told = (
            f"{out}: process {there['pid']} works there since {there['start']} on "
            f"{there['host']}; wait for it, or give another --out"
        )
        for more in ([], ["--resume"], ["--break-lock"]):
            assert refused(satune("train", recipe, "--out", out, *more)) == told
        assert refused(satune("eval", recipe, "--out", out)) == told
        assert [path.name for path in out.iterdir()] == [LOCK]


@pytest.fixture
def run_of_one_stage(
    satune: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run started with overrides, in a directory whose name no recipe has."""
    monkeypatch.chdir(tmp_path)
    assert satune("train", recipe, "stages=1", "seed=3", "--out", "first try")[0] == 0
    return tmp_path / "first try"


@pytest.mark.slow
def test_a_runs_own_recipe_resumes_that_run(
    satune: Run, recipe: Path, run_of_one_stage: Path, tmp_path: Path
) -> None:
    own = run_of_one_stage / "recipe.yaml"
    summary = json.loads((run_of_one_stage / "summary.json").read_text())
    # It holds what was overridden, so that nothing has to be said again.
    code, stdout, stderr = satune("train", own, "--resume", "--json")
    assert (code, json.loads(stdout)) == (0, summary)
    assert "the run is finished" in stderr
    assert "another recipe (seed)" in refused(satune("train", own, "seed=4", "--resume"))
    # What may be overridden is; a relative path will do.
    assert satune("train", "first try/recipe.yaml", "stages=2", "--resume")[0] == 0
    assert satune("train", recipe, "stages=2", "seed=3", "--out", "whole")[0] == 0
    team = tiny_world.team_files(tmp_path / "whole")
    assert tiny_world.team_files(run_of_one_stage) == team
    # An older checkpoint of it, without --resume beside.
    older = tiny_world.checkpoints(run_of_one_stage).names()[0]
    assert satune("train", own, "stages=2", "--resume-from", older)[0] == 0
    assert tiny_world.team_files(run_of_one_stage) == team
    assert not (tmp_path / "runs").exists()
    # --out goes before it.
    missing = satune("train", own, "--out", "whole", "--resume-from", "stage-0044")
    assert "whole/checkpoints: no checkpoint" in refused(missing)


def test_any_other_recipe_has_a_directory_of_its_name(
    satune: Run, run_of_one_stage: Path, tmp_path: Path
) -> None:
    own = run_of_one_stage / "recipe.yaml"
    before = (run_of_one_stage / "events.jsonl").read_bytes()
    # A copy names no run, wherever it lies; what is no run's recipe does not either.
    shutil.copy(own, run_of_one_stage / "beside.yaml")
    shutil.copy(own, tmp_path / "recipe.yaml")
    for copy, name in ((run_of_one_stage / "beside.yaml", "beside"), ("recipe.yaml", "recipe")):
        code, _, stderr = satune("train", copy, "stages=0", "--resume")
        assert code == 0
        assert nothing_to_resume(stderr) == [
            f"runs/{name}: nothing to resume: no run; a new one begins"
        ]
        assert RunDirectory(tmp_path / "runs" / name).unfinished() is None
    # Without --resume a run's recipe starts another run.
    shutil.rmtree(tmp_path / "runs")
    assert satune("train", own, "stages=0")[0] == 0
    assert RunDirectory(tmp_path / "runs" / "recipe").unfinished() is None
    assert (run_of_one_stage / "events.jsonl").read_bytes() == before


@pytest.mark.slow
def test_quickstart_prints_one_json_object(
    satune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The quickstart's recipe, cut down: what it trains is tested elsewhere.
    small = tmp_path / "relay.yaml"
    text = shipped_recipe("relay").read_text()
    assert re.search(r"(?m)^stages: \d+$", text)
    small.write_text(
        re.sub(r"(?m)^(stages|rollout|evaluate|optimizer|tiny): .*$", "", text)
        + "stages: 1\nrollout: {problems: 4, samples: 2, max_new_tokens: 8}\n"
        "evaluate: {problems: 4}\ntiny: {steps: 1, max_steps: 1, examples: 64, batch: 8}\n"
    )
    with open(small, "a") as file:
        file.write(f"# {tmp_path}\n")
    monkeypatch.setattr("satune.cli.quickstart.shipped_recipe", lambda given: small)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    out = tmp_path / "run"
    code, stdout, _ = satune("quickstart", "--out", out, "--seed", "3", "--json")
    assert code == 0
    summary = json.loads(stdout)
    assert {"reward_before", "reward_after", "stages", "seconds", "tokens"} <= set(summary)
    swap = summary["swap"]
    assert swap["verdict"] == "mixture" and Path(swap["out"], "manifest.json").is_file()
    assert Path(summary["report"]) == out / "report.html"
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    recipe = (out / "recipe.yaml").read_text()
    assert recipe.startswith("seed: 3\n") and "\n  seed: 3" in recipe
    # The command that a person is told to go on with is this run's own.
    again = satune("train", small, "seed=3", "tiny.seed=3", "--out", out, "--resume", "--json")
    assert (again[0], json.loads(again[1])) == (0, summary)


def test_describe_tells_sizes_without_loading(
    satune: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    code, stdout, _ = satune("describe", recipe, "team.agents.bob.model=tiny:llama-s", "--json")
    assert code == 0
    found = json.loads(stdout)
    assert {"recipe", "agents", "memory", "stage", "stages"} <= set(found)
    ann, bob = found["agents"]["ann"], found["agents"]["bob"]
    # By hand, tied embeddings once: embeddings 384·16; attention 16·16 (q) + 2·16·8 (k, v) +
    # 16·16 (o) + 2·8 (q and k norms); MLP 3·16·32; norms 3·16.
    assert ann["parameters"] == 384 * 16 + 256 + 256 + 256 + 16 + 1536 + 48
    assert bob["parameters"] > 300_000
    # AdamW in float32: gradients 4 bytes a parameter, moments 8, anchor and proposal 8.
    assert ann["memory"] == {
        "weights": 4 * ann["parameters"], "gradients": 4 * ann["parameters"],
        "optimizer": 8 * ann["parameters"], "anchor_and_proposal": 8 * ann["parameters"],
    }  # fmt: skip
    both = 4 * (ann["parameters"] + bob["parameters"])
    assert found["memory"]["together"] == both + 20 * bob["parameters"]
    # Weights of both, moments of both at rest, the larger one's moments, anchor and proposal.
    peak = found["peak"]
    assert peak["peak"] >= peak["measure"] > 3 * both + 4 * 4 * bob["parameters"]
    # hybrid: between one rollout a stage and one an agent, of 3 problems × 4 samples.
    assert found["stage"] == {
        "steps": 2,
        "rollouts": [1, 2],
        "episodes": [12, 24],
        "certify_episodes": [0, 0],
    }
    # Two steps, each tested once or twice, 5 problems × 3 samples on two sides.
    gated = "certify={problems: 5, samples: 3, accept: certified, backtracks: 1}"
    code, stdout, _ = satune("describe", recipe, gated, "--json")
    assert json.loads(stdout)["stage"]["certify_episodes"] == [60, 120]
    # One after three of the run's four steps and one at its end, both in the second stage.
    rare = gated.replace("samples: 3", "samples: 3, every: 3")
    code, stdout, _ = satune("describe", recipe, rare, "stages=2", "--json")
    assert json.loads(stdout)["stage"]["certify_episodes"] == [0, 120]


def test_describe_refuses_what_cannot_run(satune: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("async def play(talk):\n    return (\n")
    for override, said in {
        "task={name: realy}": "unknown task 'realy' (nearest: relay;",
        "task={name: relay, number: 3}": "task relay: unknown option 'number'",
        "protocol=chian": "unknown protocol 'chian'",
        "protocol={name: debate, round: 2}": "protocol debate: unknown option 'round'",
        f"protocol={tmp_path / 'broken.py'}:play": "broken.py",
        "rollout.max_new_tokens=100000": "rollout.max_new_tokens: 100000 leave no room",
    }.items():
        assert said in refused(satune("describe", recipe, override)), override


def test_describe_leaves_out_what_it_cannot_know(satune: Run, recipe: Path) -> None:
    hub = "team.agents.bob.model=somebody/some-model"
    code, stdout, _ = satune("describe", recipe, hub, "--json")
    found = json.loads(stdout)
    assert code == 0
    assert "parameters" not in found["agents"]["bob"] and "memory" not in found["agents"]["bob"]
    assert "parameters" in found["agents"]["ann"]
    assert found["memory"] == {} and "peak" not in found
    code, stdout, _ = satune("describe", recipe, hub)
    assert code == 0 and "memory: not known here" in stdout


def test_describe_knows_published_models(satune: Run, recipe: Path) -> None:
    hub = "team.agents.bob.model=Qwen/Qwen3-4B"
    code, stdout, _ = satune("describe", recipe, hub, "rollout.max_new_tokens=100", "--json")
    found = json.loads(stdout)
    assert code == 0
    bob = found["agents"]["bob"]
    assert bob["parameters"] == 4_022_468_096
    # Two x 36 layers x 8 heads x 128 numbers of 4 bytes.
    assert bob["cache"] == {"token": 4 * 73_728, "message": 100 * 4 * 73_728}
    # They are held in the type that attention computes in.
    code, stdout, stderr = satune("describe", recipe, hub, "optimizer.autocast=bfloat16", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["agents"]["bob"]["cache"]["token"] == 2 * 73_728
    # 24 bytes a parameter: weights, gradients, two moments, anchor and proposal, 4 bytes each.
    short = found["memory"]["together"] - 80e9
    assert short == pytest.approx(24 * 4_022_468_096 - 80e9, rel=1e-3)
    assert found["fit"] == (
        f"one device of 80 GB: too small by {short / 2**30:.1f} GiB;"
        " adapters take less (team.sharing=lora)"
    )

    wanted = ("team.sharing=lora", "team.dtype=bfloat16", "team.agents.ann.model=Qwen/Qwen3-4B")
    code, stdout, stderr = satune("describe", recipe, hub, *wanted, "--json")
    assert code == 0, stderr
    found = json.loads(stdout)
    # Under adapters the base is held once and in bfloat16, and so are keys and values.
    assert [agent["cache"]["token"] for agent in found["agents"].values()] == [2 * 73_728] * 2
    left = 80 * 10**9 - found["memory"]["together"]
    tokens = left // (2 * 2 * 73_728)
    assert found["fit"] == (
        f"one device of 80 GB: fits, {left / 2**30:.1f} GiB left for activations,"
        f" or the cache of {tokens:,} tokens of every agent"
    )
    _, stdout, _ = satune("describe", recipe, hub, *wanted)
    line = "key-value cache a token (a message of 6): ann 144.0 KiB (864.0 KiB), bob 144.0 KiB"
    assert found["fit"] in stdout and line in stdout


def test_no_stages_write_the_team_as_it_came(satune: Run, recipe: Path, tmp_path: Path) -> None:
    _, stdout, _ = satune("describe", recipe, "stages=0", "--json")
    found = json.loads(stdout)
    assert found["memory"]["largest_step"] == 0 and found["stage"]["steps"] == 0
    assert not found["agents"]["ann"]["trained"]
    out = tmp_path / "run"
    code, stdout, _ = satune("train", recipe, "stages=0", "--out", out, "--json")
    assert code == 0
    summary = json.loads(stdout)
    assert summary["stages"] == summary["updates_accepted"] == 0
    assert summary["reward_before"] == summary["reward_after"]
    assert (out / "team" / "manifest.json").is_file()
    assert not list((out / "checkpoints").glob("*/state.json"))
    model = Path(load_recipe(recipe).team.agents["ann"].model)
    before = load_file(model / "model.safetensors")
    after = load_file(out / "team" / "ann" / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    again = satune("train", recipe, "stages=0", "--out", out, "--resume", "--json")
    assert (again[0], json.loads(again[1])) == (0, summary)


def test_shipped_recipes_by_name(satune: Run) -> None:
    code, stdout, _ = satune("describe", "table1/sat_3x_qwen3_4b", "--json")
    assert code == 0 and "base" not in json.loads(stdout)["recipe"]
    line = refused(satune("describe", "table1/sat_3x_qwen3_8b"))
    assert "no recipe ships by that name; did you mean table1/sat_3x_qwen3_4b?" in line


def test_an_override_of_an_agent_that_is_not_there(satune: Run, recipe: Path) -> None:
    for command in ("describe", "train"):
        assert refused(satune(command, recipe, "team.agents.dave.model=tiny:llama-s")) == (
            "command line: team.agents.dave.model: the team has no agent 'dave'; the agents are "
            "ann, bob (a new agent is given whole: team.agents.dave={model: ...})"
        )


def test_describe_counts_adapters(satune: Run, recipe: Path) -> None:
    code, stdout, _ = satune("describe", recipe, "team.sharing=lora", "--json")
    assert code == 0
    # Rank 16 on q (16→16), k and v (16→8), o (16→16), gate and up (16→32), down (32→16).
    wanted = 16 * ((16 + 16) + 2 * (16 + 8) + (16 + 16) + 2 * (16 + 32) + (32 + 16))
    assert json.loads(stdout)["agents"]["ann"]["trained_parameters"] == wanted


# Bad input


def test_bad_recipes_are_one_line(satune: Run, recipe: Path, tmp_path: Path) -> None:
    def said(*overrides: str) -> str:
        line = refused(satune("train", recipe, *overrides, "--out", tmp_path / "run"))
        # No run began, so nothing has to be cleared away for the next attempt.
        assert not RunDirectory(tmp_path / "run").holds_run
        return line

    assert "rollout.problms: unknown key; did you mean rollout.problems?" in said(
        "rollout.problms=3"
    )
    assert "expected an integer, got 'many'" in said("rollout.problems=many")
    assert "rollout.samples" in said("rollout.samples=1")
    assert "use at least 2" in said("rollout.samples=1")
    assert "rollout.top_p" in said("rollout.top_p=0.9")
    assert "rollout.top_k" in said("rollout.top_k=5")
    assert "no seat 'caty'" in said("protocol={name: judge, judge: caty}")
    assert "unknown task 'relai' (nearest: relay" in said("task=relai")
    assert "unknown protocol 'chian' (nearest: chain" in said("protocol=chian")
    assert "did you mean tiny:qwen3-s?" in said("team.agents.ann.model=tiny:qwen-s", "task=relay")
    assert "agent ann: cannot load model" in said(f"team.agents.ann.model={tmp_path}")
    missing = said(f"task.data={recipe.parent / 'row.jsonl'}")
    assert "no such file" in missing and "rows.jsonl" in missing


def test_a_recipe_that_is_not_there(satune: Run, recipe: Path) -> None:
    line = refused(satune("train", recipe.with_name("recipy.yaml")))
    assert "no such file; did you mean" in line and "recipe.yaml" in line
    assert "no such file" in refused(satune("describe", "relai"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "r5", "prompt": "1+1", "ans', "line 3"),
        ('{"id": "r5", "prompt": "1+1"}', "line 3"),
        ('{"id": "r5", "answer": "2"}', "line 3"),
        ('["r5"]', "line 3"),
    ],
)
def test_bad_rows_name_file_and_line(
    satune: Run, recipe: Path, tmp_path: Path, row: str, message: str
) -> None:
    data = tmp_path / "rows.jsonl"
    good = [json.dumps({"id": f"r{i}", "prompt": "1", "answer": "1"}) for i in range(4)]
    data.write_text("\n".join([*good[:2], row, *good[2:]]) + "\n")
    # With the recipe's reward function, which asks for the column "answer", and without one.
    given = satune("train", recipe, f"task.data={data}", "--out", tmp_path / "run")
    assert f"{data}, {message}" in refused(given)
    exact = ("task={name: rows, data: " + str(data) + "}", "--out", str(tmp_path / "run"))
    assert f"{data}, {message}" in refused(satune("train", recipe, *exact))


def test_damaged_models_are_one_line(satune: Run, recipe: Path, tmp_path: Path) -> None:
    good = recipe.parent / "model-0"
    for name, damage in {
        "model.safetensors": b"\x10\x00",
        "config.json": b"{",
        "tokenizer.json": b"{",
    }.items():
        place = tmp_path / name
        shutil.copytree(good, place)
        (place / name).write_bytes(damage)
        ended = satune("train", recipe, f"team.agents.ann.model={place}", "--out", tmp_path / "r")
        assert "agent ann: cannot load model" in refused(ended), name
    shutil.copytree(good, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    bare = f"team.agents.ann.model={tmp_path / 'bare'}"
    assert "cannot load model" in refused(satune("train", recipe, bare, "--out", tmp_path / "r"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("async def talk(chat):\n    return 1 / 0\n", None),
        ("x = 1 / 0\nasync def talk(chat): ...\n", "line 1: ZeroDivisionError"),
        ("import not_there_at_all\n", "line 1: ModuleNotFoundError"),
        ("async def talk(chat)\n", "line 1: not valid Python"),
        ("def talk(chat): ...\n", "not an async function"),
        ("async def tolk(chat): ...\n", "no 'talk' in it (nearest: tolk"),
        ("async def talk(chat):\n    return (await chat.say('zoe')).text\n", "zoe"),
        ("async def talk(chat):\n    return 7\n", "its answer is a int"),
    ],
)
def test_protocols_from_files_that_are_wrong(
    satune: Run, recipe: Path, tmp_path: Path, text: str, message: str | None
) -> None:
    (tmp_path / "mine.py").write_text(text)
    named = f"protocol={tmp_path / 'mine.py'}:talk"
    if message is None:  # a fault while it runs is the author's own to trace
        with pytest.raises(ZeroDivisionError):
            satune("train", recipe, named, "--out", tmp_path / "run")
        return
    assert message in refused(satune("train", recipe, named, "--out", tmp_path / "run"))


def test_files_that_are_not_there_are_named(satune: Run, recipe: Path, tmp_path: Path) -> None:
    for section in ("protocol", "task"):
        given = f"{section}={{name: '{tmp_path / 'nowhere.py'}:thing'}}"
        assert "nowhere.py: no such file" in refused(
            satune("train", recipe, given, "--out", tmp_path / "run")
        )


def test_directories_that_cannot_be_used(satune: Run, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert satune("train", recipe, "stages=1", "--out", out)[0] == 0
    before = (out / "events.jsonl").read_bytes()
    assert "already holds a run; go on with it by --resume" in refused(
        satune("train", recipe, "stages=1", "--out", out)
    )
    changed = satune("train", recipe, "stages=1", "optimizer.lr=2e-3", "--out", out, "--resume")
    assert "started with another recipe (optimizer.lr)" in (said := refused(changed))
    assert "as it was written (docs/recipe.md lists what may change)" in said
    older = ["--out", str(out), "--resume-from", "stage-0044"]
    assert "no checkpoint 'stage-0044'" in refused(satune("train", recipe, "stages=1", *older))
    assert (out / "events.jsonl").read_bytes() == before
    assert (out / "summary.json").exists()

    (tmp_path / "file").write_text("")
    in_the_way = satune("train", recipe, "--out", tmp_path / "file" / "run")
    assert "a part of the path is a file" in refused(in_the_way)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert "is not empty" in refused(satune("train", recipe, "--out", tmp_path / "full"))


# Through a process of its own


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "satune", *map(str, arguments)]


def test_the_module_is_the_command(recipe: Path) -> None:
    ended = subprocess.run(
        command("train", recipe, "stagse=3"), capture_output=True, text=True, env=ENVIRONMENT
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: ") and "did you mean stages?" in ended.stderr


@pytest.mark.parametrize("word", ["team.agents.ann.model=mod\udcffel", "--out=r\udcffun"])
def test_a_word_that_is_no_utf_8_is_one_line(recipe: Path, word: str) -> None:
    ended = subprocess.run(
        command("train", recipe, word), capture_output=True, text=True, env=ENVIRONMENT
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert "\\udcff" in ended.stderr and "is not UTF-8; rename" in ended.stderr


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_line(recipe: Path, tmp_path: Path) -> None:
    hub = "team.agents.ann.model=somebody/some-model-that-is-not-there"
    ended = subprocess.run(
        command("train", recipe, hub, "--out", tmp_path / "run"),
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "agent ann: cannot load model 'somebody/some-model-that-is-not-there'" in ended.stderr


def interrupted(
    recipe: Path, out: Path, wait: Callable[[], bool]
) -> subprocess.CompletedProcess[str]:
    """Train 60 stages in a process, press ctrl-C once ``wait`` is true, and see what it says."""
    process = subprocess.Popen(
        command("train", recipe, "stages=60", "--out", out),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    while not wait() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out_text, err = process.communicate()
    return subprocess.CompletedProcess([], process.returncode, out_text, err)


@pytest.mark.slow
def test_ctrl_c_prints_the_command_that_goes_on(satune: Run, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    ended = interrupted(recipe, out, lambda: len(tiny_world.checkpoints(out).names()) > 0)
    assert ended.returncode == 130, ended.stderr
    assert ended.stdout == "" and "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("interrupted; go on with: satune train ")
    held = tiny_world.checkpoints(out)
    assert held.names() and all(held.damage(name) is None for name in held.names())
    # The command as printed, but for the number of stages, which a resume may change.
    words = shlex.split(last.partition(": ")[2])[1:]
    done = int(held.names()[-1].split("-")[1])
    few = ["stages=" + str(done + 1) if word == "stages=60" else word for word in words]
    code, _, stderr = satune(*few)
    assert code == 0, stderr
    assert RunDirectory(out).unfinished() is None


def test_ctrl_c_before_the_run_began_prints_no_command(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    started = time.monotonic()
    ended = interrupted(recipe, out, lambda: time.monotonic() - started > 0.7)
    if ended.stderr.startswith("Traceback"):
        pytest.skip("interrupted before the command's own first line")
    assert ended.returncode == 130
    assert "interrupted" in ended.stderr.splitlines()[-1]


def test_ctrl_c_while_a_module_loads_ends_with_130(tmp_path: Path) -> None:
    # A class made from a string, as dataclasses are, is where Python would die of the signal.
    (tmp_path / "interrupted_import.py").write_text("exec('raise KeyboardInterrupt')\n")
    (tmp_path / "command.py").write_text(
        "import typer\n"
        "from satune.cli.main import app, main\n"
        "@app.command(name='import-it')\n"
        "def import_it() -> None:\n"
        "    import interrupted_import\n"
        "main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "command", "import-it"],
        capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_a_benchmark_that_ends_badly_keeps_no_other_from_running(
    satune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ran(command: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
        asked.append(Path(command[1]).stem)
        code = {"step": 3, "grading": 4}.get(asked[-1], 0)
        return subprocess.CompletedProcess(command, code, stdout='{"ratio": 2}')

    monkeypatch.setattr(subprocess, "run", ran)
    code, _, stderr = satune("bench")
    assert asked == ["step", "sampling", "grading", "planning", "projection"]
    assert (code, stderr) == (3, "bench: step ended with 3\nbench: grading ended with 4\n")
    code, stdout, _ = satune("bench", "--json")
    assert code == 3 and set(json.loads(stdout)) == {"sampling", "planning", "projection"}
    assert satune("bench", "grading", "--json")[:2] == (4, "")
    assert satune("bench", "planning", "--json")[:2] == (0, '{"ratio": 2}\n')
