"""Runs with a critic an agent: what a step does with it, what is kept, and how a run goes on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_world
from command_line import Run
from satune.cli.train import run_training
from satune.commands.describe import describe_recipe
from satune.config.load import load_recipe
from satune.team import load_team
from satune.training.run import Training
from satune.training.run_directory import RunDirectory
from satune.training.update import Outcome, improve
from satune.types import Experience, Failure, Grade, Key, UserError

KEY = Key(0, "train", 1, 1)
LOST = Failure("the server is gone", policy=False)
PPO = ["objective=ppo", "credit=gae", "critic={kind: head, epochs: 2}"]
READS = ["credit=gae", "critic={kind: head, boundary: token, likelihoods: true}", "schedule=reuse"]
TRACES = [
    "credit={name: gae, traces: true}",
    "critic={kind: model, epochs: 1, lr: 1e-3}",
    "schedule=reuse",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


def fresh(recipe: Path, out: Path, *overrides: str) -> tuple[Training, Experience]:
    """A run with one rollout drawn, and that rollout as experience."""
    run = tiny_world.training(recipe, out, overrides)
    for name in run.learners:
        run.publish(name)
    batch = run.supply.batch(1, 1)
    return run, Experience(tuple(batch.episodes), tuple(batch.log_weights))


def step(run: Training, experience: Experience, **region: object) -> Outcome:
    settings = run.settings.update
    bounds = replace(settings.trust_region, **region)  # type: ignore[arg-type]
    return improve(
        run.learners["ann"], "ann", experience, replace(settings, trust_region=bounds),
        beta=bounds.beta, cap=None, key=KEY,
    )  # fmt: skip


def state(run: Training, agent: str = "ann") -> dict[str, torch.Tensor]:
    critic = run.learners[agent].critic
    assert critic is not None
    return {name: tensor.clone() for name, tensor in critic.state().items()}


# One step


def test_a_step_fits_the_critic_and_says_what_it_knew(recipe: Path, tmp_path: Path) -> None:
    run, experience = fresh(recipe, tmp_path / "run", *PPO)
    other = state(run, "bob")
    outcome = step(run, experience)
    assert outcome.accepted
    assert outcome.event["critic"]["explained_variance"] == pytest.approx(0, abs=1e-9)
    assert outcome.event["critic"]["value"] == 0.0 and outcome.event["critic"]["loss"] > 0
    assert outcome.event["seconds"]["critic"] > 0 and outcome.log_ratio_H is None
    assert float(state(run)["weights|head.weight"].abs().max()) > 0
    assert tiny_world.same(state(run, "bob"), other)


def test_what_was_written_before_is_read(recipe: Path, tmp_path: Path) -> None:
    """By the agent that speaks second, of the one that speaks first; it has nothing to read."""
    run, experience = fresh(recipe, tmp_path / "run", *READS, "protocol=chain")
    second = experience.episodes[0].turns[-1].agent
    for name in ("ann", "bob"):
        settings = run.settings.update
        improve(
            run.learners[name], name, experience, settings, beta=settings.trust_region.beta,
            cap=None, key=KEY,
        )  # fmt: skip
        weights = state(run, name)["weights|head.weight"]
        assert weights.shape == (1, 16 + 4)
        # The last two are of the moment before, which the first to speak does not have: 1 for all.
        assert bool((weights[0, 16:] != 0).all())
        same = bool(weights[0, 18] == weights[0, 19])
        assert same == (name != second)


@pytest.mark.parametrize("critic", ["head", "model"])
def test_a_step_that_is_reverted_leaves_no_trace(recipe: Path, tmp_path: Path, critic: str) -> None:
    run, experience = fresh(recipe, tmp_path / "run", *PPO, f"critic.kind={critic}")
    step(run, experience)  # so that there are moments as well
    learner = run.learners["ann"]
    before, weights, steps = state(run), learner.export(), learner.steps
    outcome = step(run, experience, delta=1e-12, backtracks=1)
    assert not outcome.accepted and "above delta" in outcome.event["reason"]
    assert tiny_world.same(state(run), before)
    assert tiny_world.same(learner.export(), weights) and learner.steps == steps
    # A reward that is not a number reaches neither the agent nor its critic.
    first, *rest = experience.episodes
    spoilt = (replace(first, grade=Grade(float("nan"))), *rest)
    outcome = step(run, replace(experience, episodes=spoilt))
    assert not outcome.accepted and "not finite" in outcome.event["reason"]
    assert tiny_world.same(state(run), before) and tiny_world.same(learner.export(), weights)


def test_where_nothing_is_to_be_learnt_nothing_moves(recipe: Path, tmp_path: Path) -> None:
    run, experience = fresh(recipe, tmp_path / "run", *PPO)
    even = tuple(replace(e, grade=Grade(0.5)) for e in experience.episodes)
    before, weights = state(run), run.learners["ann"].export()
    outcome = step(run, replace(experience, episodes=even))
    assert not outcome.accepted and outcome.event["reason"] == "no advantage differs from 0"
    assert outcome.beta == run.settings.update.trust_region.beta
    assert tiny_world.same(state(run), before)
    assert tiny_world.same(run.learners["ann"].export(), weights)


def test_what_the_world_ended_has_no_part_and_no_trace(recipe: Path, tmp_path: Path) -> None:
    ends = {}
    for kind in ("lost", "absent"):
        run, experience = fresh(recipe, tmp_path / kind, *TRACES)
        marked = tuple(
            replace(e, failure=LOST, grade=Grade(float("nan"))) if index % 3 == 0 else e
            for index, e in enumerate(experience.episodes)
        )
        if kind == "absent":
            marked = tuple(e for e in marked if not e.masked)
        outcome = step(run, Experience(marked, (0.0,) * len(marked)))
        assert outcome.accepted and outcome.log_ratio_H is not None
        ends[kind] = run.learners["ann"].export(), state(run), outcome.log_ratio_H
    (lost, absent) = ends["lost"], ends["absent"]
    assert tiny_world.same(lost[0], absent[0]) and tiny_world.same(lost[1], absent[1])
    # One turn an episode: 0 for those lost.
    assert lost[2][::3].tolist() == [0.0] * 4
    kept = torch.ones(12, dtype=torch.bool)
    kept[::3] = False
    assert torch.equal(lost[2][kept], absent[2])


def test_later_agents_learn_with_the_ratios_of_the_turns_before_them(
    recipe: Path, tmp_path: Path
) -> None:
    run, experience = fresh(recipe, tmp_path / "run", *TRACES)
    outcome = step(run, experience)
    batch = run.supply.batch(1, 1)
    run.state.batch = replace(batch, episodes=list(experience.episodes))
    assert outcome.log_ratio_H is not None
    run.state.batch.reweight(outcome.log_ratio_E)
    run.state.batch.note_ratios("ann", outcome.log_ratio_H)
    ratios = run.state.batch.log_ratios
    assert ratios is not None
    for one, each, whole in zip(
        experience.episodes, ratios, run.state.batch.log_weights, strict=True
    ):
        assert [u != 0 for u in each] == [turn.agent == "ann" for turn in one.turns]
        assert sum(each) == pytest.approx(whole, abs=1e-12)


# Whole runs


SEEN = """
def odd(prompts, completions, answer, **columns):
    \"\"\"1 for every second problem: what a prompt is worth can be seen in it.\"\"\"
    return [float(int(a) // 2 % 2) for a in answer]
"""


@pytest.mark.parametrize("critic", ["kind: head, lr: 0.1", "kind: model, lr: 3e-3"])
def test_values_explain_episodes_that_were_not_learnt_from(
    recipe: Path, tmp_path: Path, critic: str
) -> None:
    (tmp_path / "seen.py").write_text(SEEN)
    given = [
        f"task.reward={tmp_path / 'seen.py'}:odd", "rollout.problems=9", "rollout.samples=3",
        "objective=ppo", "credit=gae", f"critic={{{critic}, epochs: 12, clip: null}}",
        "schedule=fresh", "stages=3", "team.agents.bob.frozen=true", "evaluate.greedy=false",
    ]  # fmt: skip
    go(recipe, tmp_path / "run", given)
    explained = [
        e["critic"]["explained_variance"] for e in tiny_world.events(tmp_path / "run", "update")
    ]
    # The nine problems come again, with other messages; the values were told before the fit.
    assert explained[0] == pytest.approx(0, abs=1e-9) and explained[-1] > 0.6


def go(recipe: Path, out: Path, overrides: list[str], checkpoint: str | None = None) -> None:
    resume = checkpoint is not None
    loaded = load_recipe(recipe, overrides)
    run_training(loaded, out, resume=resume, checkpoint=checkpoint, command="")


def left(out: Path) -> dict[str, object]:
    run = RunDirectory(out)
    episodes = {path.name: path.read_bytes() for path in run.episodes.glob("stage-*")}
    return {
        "events": tiny_world.events(out), "episodes": episodes, "team": tiny_world.team_files(out),
        "state": (run.checkpoints / "stage-0002" / "state.json").read_text().count("critic"),
    }  # fmt: skip


@pytest.mark.parametrize("overrides", [PPO, TRACES, READS], ids=["ppo", "traces", "likelihoods"])
def test_a_run_goes_on_from_its_checkpoints_to_the_same_bits(
    recipe: Path, tmp_path: Path, overrides: list[str]
) -> None:
    overrides = [*overrides, "checkpoint.keep=9"]
    go(recipe, tmp_path / "whole", overrides)
    whole = left(tmp_path / "whole")
    files = whole["team"]
    assert {"ann.critic.safetensors", "bob.critic.safetensors"} <= set(files)  # type: ignore[arg-type]
    for name in ("stage-0001-step-1", "stage-0001"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        go(recipe, tmp_path / name, overrides, checkpoint=name)
        assert left(tmp_path / name) == whole


def test_the_gate_takes_the_critic_back_with_the_agent(recipe: Path, tmp_path: Path) -> None:
    gate = "certify={problems: 3, samples: 2, accept: certified, tolerance: 0, backtracks: 0}"
    out = tmp_path / "run"
    go(recipe, out, [*PPO, gate, "stages=1", "checkpoint.keep=9"])
    updates = tiny_world.events(out, "update")
    assert [event["gate"]["verdict"] for event in updates] == ["reverted"] * 2
    for agent in ("ann", "bob"):
        critic = load_file(out / "team" / f"{agent}.critic.safetensors")
        assert all(not bool(tensor.any()) for tensor in critic.values())


def test_a_team_is_loaded_without_its_critics(recipe: Path, tmp_path: Path) -> None:
    go(recipe, tmp_path / "run", [*PPO, "stages=1"])
    team = tmp_path / "run" / "team"
    critic = load_file(team / "ann.critic.safetensors")
    assert critic["head.weight"].shape == (1, 16) and critic["head.bias"].shape == (1,)
    assert bool(critic["head.weight"].any())
    assert set(load_team(team, device="cpu").policies) == {"ann", "bob"}


def test_an_agent_without_a_critic_keeps_and_says_nothing_of_one(
    recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    go(recipe, out, ["stages=1", "schedule=reuse", "team.agents.bob.frozen=true", *PPO])
    assert not (out / "team" / "bob.critic.safetensors").exists()
    plain = tmp_path / "plain"
    go(recipe, plain, ["stages=1", "schedule=reuse"])
    assert not list(plain.rglob("*.critic.*"))
    assert all("critic" not in str(event) for event in tiny_world.events(plain))


# Memory and models


def test_describe_counts_the_critic(recipe: Path) -> None:
    plain = describe_recipe(load_recipe(recipe))
    head = describe_recipe(load_recipe(recipe, PPO))
    model = describe_recipe(load_recipe(recipe, [*PPO, "critic.kind=model"]))
    assert "critic" not in plain["agents"]["ann"]
    # A line over 16 numbers; and, of a model, all but the head over tokens, which is tied here.
    parameters = plain["agents"]["ann"]["parameters"]
    sizes = {"head": 17, "model": parameters + 17}
    for kind, found in (("head", head), ("model", model)):
        critic = found["agents"]["ann"]["critic"]
        assert critic["parameters"] == sizes[kind]
        # float32: the weights, their gradients, two moments, and the copy that a step keeps.
        weights, step_bytes = 4 * sizes[kind], 4 * sizes[kind] * 4
        assert critic["memory"] == {"weights": weights, "step": step_bytes}
        extra = found["memory"]["together"] - plain["memory"]["together"]
        assert extra == 2 * weights + step_bytes  # weights of both agents, one step at a time


def test_describe_shows_the_critic(recipe: Path, satune: Run) -> None:
    code, out, _ = satune("describe", recipe, *PPO)
    assert code == 0
    # 17 numbers of 4 bytes, and four times as much in a step.
    assert "critics (weights and one step): ann 68.0 B and 272.0 B, bob 68.0 B and 272.0 B" in out
    _, out, _ = satune("describe", recipe)
    assert "critics" not in out


def test_a_critics_model_reads_the_agents_tokens(recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(recipe.parent / "model-1", tmp_path / "other")
    same = [*PPO, "critic.kind=model", f"critic.model={tmp_path / 'other'}"]
    run = tiny_world.training(recipe, tmp_path / "run", same)
    weights = state(run)
    first = [name for name in weights if name.endswith("embed_tokens.weight")]
    assert len(first) == 1
    assert torch.equal(weights[first[0]], dict(
        run.learners["bob"].policy.trainable())["model.embed_tokens.weight"].detach())  # type: ignore[attr-defined]  # fmt: skip
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace('"+"', '"§"'))
    with pytest.raises(UserError, match="different tokenizers"):
        tiny_world.training(recipe, tmp_path / "again", same)
