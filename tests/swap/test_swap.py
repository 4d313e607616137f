"""A swap from the trained run or team to the new directory, and what training makes of that."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

import tiny_world
from devices import Devices
from satune.agents.mixture import MixturePolicy
from satune.agents.rendering import ChatRenderer, TemplateSettings
from satune.commands import project
from satune.commands.assemble import Cast
from satune.commands.project import MEASURED, PROBLEMS
from satune.commands.reseat import find_team, load_found, reseated, with_newcomer
from satune.commands.swap import swap
from satune.commands.swap_request import SwapRequest
from satune.config.load import load_recipe
from satune.config.schema import AgentSection, TeamSection
from satune.play.match import Match
from satune.play.rollout import rollout_sync
from satune.swap.handover import play_mixture
from satune.swap.settings import HandOverSettings
from satune.team import load_team
from satune.tiny.training import TinySettings, imitate, rows_of
from satune.tiny.zoo import tiny_tokenizer
from satune.training.run_directory import RunDirectory
from satune.training.state_file import read_state
from satune.types import Entry, Key, ServedModel, UserError
from swapped_teams import ANY, digests, go_on, state_of, trained

SEVEN = '''
def seven(prompts, completions, answer, **columns):
    """1 for the answer that one model was taught and another was not."""
    return [float(text.strip() == "7") for text in completions]
'''


def give(source: Path, *pairs: tuple[str, Path], out: Path | None = None, **more: Any) -> Any:
    more = {"method": "handover", "hand_over": ANY, **more}
    seats, models = [seat for seat, _ in pairs], [str(model) for _, model in pairs]
    return swap(SwapRequest(source, seats, models, out=out, **more))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two agents, a newcomer's model, and a run of two stages."""
    folder = tmp_path_factory.mktemp("world")
    recipe = tiny_world.build(folder)
    tiny_world.save_model(folder / "newcomer", seed=7)
    trained(recipe, folder / "run", ["checkpoint.keep=9"])
    return folder


@pytest.fixture(scope="module")
def swapped(world: Path) -> tuple[Path, dict[str, Any], dict[str, str]]:
    before = digests(world / "run")
    result = give(world / "run", ("bob", world / "newcomer"), out=world / "swapped")
    return world / "swapped", result, before


# From a run to a run


def test_the_old_run_is_only_read(world: Path, swapped: Any) -> None:
    assert digests(world / "run") == swapped[2]
    assert not list(world.glob("*.writing"))


def test_who_was_not_swapped_is_the_same_bit_for_bit_and_the_newcomer_is_as_it_came(
    world: Path, swapped: Any
) -> None:
    out = swapped[0]
    old, new = (place / "checkpoints" / "stage-0002" for place in (world / "run", out))
    for part in ("weights", "optimizer"):
        name = f"ann.{part}.safetensors"
        assert (old / name).read_bytes() == (new / name).read_bytes()
    assert not (new / "bob.optimizer.safetensors").exists()
    newcomer = load_file(world / "newcomer" / "model.safetensors")
    weights = load_file(new / "bob.weights.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, newcomer[name])
    before, after = state_of(world / "run", "stage-0002"), state_of(out, "stage-0002")
    for key in ("stage", "step", "totals", "evaluations"):
        assert after["state"][key] == before["state"][key]
    assert after["state"]["betas"]["ann"] == before["state"]["betas"]["ann"]
    assert after["learner_steps"] == {"ann": before["learner_steps"]["ann"], "bob": 0}
    assert after["state"]["certify"]["offset"] > before["state"]["certify"]["offset"]


def test_the_new_run_stands_by_itself(world: Path, swapped: Any) -> None:
    out, result, _ = swapped
    model = Path(load_recipe(out / "recipe.yaml").team.agents["bob"].model)
    assert model.is_relative_to(out.resolve()) and (model / "config.json").is_file()
    old = tiny_world.events(world / "run")
    *carried, event = tiny_world.events(out)
    assert carried == old[: len(carried)] and carried
    assert event["event"] == "swap" and event["stage"] == 2 and event["seats"] == ["bob"]
    record = event["swaps"][0]
    assert record["verdict"] == "accepted" and record["tokens"] > 0
    assert record["after"] == record["naive"] and len(record["difference"]) == 3
    assert result["verdict"] == "accepted" and result["out"] == str(out)
    team = load_team(out / "team", device="cpu")
    assert team.seats == {"ann": "ann", "bob": "bob"}
    rows = [json.loads(line) for line in (out / "swap-evidence.jsonl").read_text().splitlines()]
    assert {row["coin"] for row in rows} == {"newcomer", "incumbent"}


def test_training_goes_on_from_the_swap(world: Path, swapped: Any, tmp_path: Path) -> None:
    out = tmp_path / "going-on"
    shutil.copytree(swapped[0], out)
    summary = go_on(out, 4)
    assert summary["stages"] == 4
    updates = tiny_world.events(out, "update")
    assert [e["stage"] for e in updates] == [1, 1, 2, 2, 3, 3, 4, 4]
    # The β that the untouched agent's next step starts with is the one its last step left.
    assert state_of(swapped[0], "stage-0002")["state"]["betas"]["bob"] == pytest.approx(0.001)
    assert [e["stage"] for e in tiny_world.events(out, "stage")] == [1, 2, 3, 4]
    assert (
        summary["reward_before"]
        == json.loads((world / "run" / "summary.json").read_text())["reward_before"]
    )


def test_a_model_that_is_swapped_for_itself_goes_on_as_if_nothing_had_been(
    world: Path, tmp_path: Path
) -> None:
    # Ann's first stages are the same in both; only Bob's optimiser and β begin anew.
    out = tmp_path / "same"
    result = give(world / "run", ("bob", world / "run" / "team" / "bob"), out=out)
    look = result["swaps"][0]["looks"][0]
    # The same uniforms on both sides: not one episode differs.
    assert look["old"] == look["new"] and look["mean"] == 0.0
    assert result["swaps"][0]["naive_difference"][0] == 0.0
    whole = tmp_path / "whole"
    shutil.copytree(world / "run", whole)
    (whole / "summary.json").unlink()
    go_on(whole, 3)
    go_on(out, 3)
    ann = [
        next(
            e for e in tiny_world.events(place, "update") if (e["stage"], e["agent"]) == (3, "ann")
        )
        for place in (whole, out)
    ]
    assert ann[0] == ann[1]


def test_a_run_in_the_middle_of_a_stage_has_that_stage_closed(world: Path, tmp_path: Path) -> None:
    source = tmp_path / "unfinished"
    shutil.copytree(world / "run", source)
    for name in ("stage-0002", "stage-0001-step-2"):
        shutil.rmtree(source / "checkpoints" / name, ignore_errors=True)
    (source / "summary.json").unlink()
    assert find_team(source, None).checkpoint == "stage-0002-step-1"
    out = tmp_path / "out"
    give(source, ("bob", world / "newcomer"), out=out)
    state = state_of(out, "stage-0002")
    assert (state["state"]["stage"], state["state"]["step"]) == (2, 0)
    assert "batch" not in state["state"] and "experience.jsonl" not in state["files"]
    assert tiny_world.events(out, "swap")[0]["closed_stage"] == 2
    go_on(out, 3)
    assert [e["stage"] for e in tiny_world.events(out, "update")] == [1, 1, 2, 3, 3]


def test_a_reference_and_what_is_held_for_a_certificate_follow_the_agent(
    world: Path, tmp_path: Path
) -> None:
    source = trained(
        world / "recipe.yaml",
        tmp_path / "run",
        ["objective.reference_kl=0.1", "certify={problems: 2, samples: 2, every: 3}", "stages=2"],
    )
    # Two stages are four steps: one certificate after three, Bob's last step is uncertified but for
    # the run's end; a checkpoint before it holds him.
    shutil.rmtree(source / "checkpoints" / "stage-0002")
    (source / "summary.json").unlink()
    out = tmp_path / "out"
    give(source, ("bob", world / "newcomer"), out=out)
    files = {path.name for path in (out / "checkpoints" / "stage-0002").iterdir()}
    assert {"ann.reference.safetensors", "bob.reference.safetensors"} <= files
    reference = load_file(out / "checkpoints" / "stage-0002" / "bob.reference.safetensors")
    weights = load_file(out / "checkpoints" / "stage-0002" / "bob.weights.safetensors")
    assert tiny_world.same(reference, weights)
    assert not any(name.startswith("bob.held") for name in files)
    go_on(out, 3)


def test_what_the_old_team_drew_ahead_is_left_behind(world: Path, tmp_path: Path) -> None:
    overrides = ["schedule=reuse", "rollout.ahead=1", "stages=2"]
    source, out = trained(world / "recipe.yaml", tmp_path / "run", overrides), tmp_path / "out"
    held = state_of(source, "stage-0002")
    assert held["state"]["early"] and any(".past-" in name for name in held["files"])
    give(source, ("bob", world / "newcomer"), out=out)
    state = state_of(out, "stage-0002")
    assert "early" not in state["state"] and not any(".past-" in name for name in state["files"])
    go_on(out, 4)
    rollouts = {e["stage"]: e for e in tiny_world.events(out, "rollout")}
    assert ["ahead" in rollouts[stage] for stage in (1, 2, 3, 4)] == [False, True, False, True]


# Who sits where


def test_a_seat_of_an_agent_with_several_gets_an_agent_of_its_own() -> None:
    old, new = AgentSection(model="old"), AgentSection(model="new")
    team = TeamSection(agents={"x": old, "y": old}, seats={"a": "x", "b": "x", "c": "y"})
    first, name = reseated(team, "b", new)
    assert name == "b" and first.seats == {"a": "x", "b": "b", "c": "y"}
    assert list(first.agents) == ["x", "b", "y"] and first.agents["b"] is new
    # The last seat it fills alone keeps its name.
    second, name = reseated(first, "a", new)
    assert name == "x" and second.agents["x"] is new and second.seats == first.seats
    taken = TeamSection(agents={"x": old, "b": old}, seats={"a": "x", "b": "x", "c": "b"})
    assert reseated(taken, "b", new)[1] == "b-2"
    shared = TeamSection(sharing="shared", agents={"x": old, "y": old})
    alone, name = reseated(shared, "y", new)
    assert alone.sharing == "separate" and alone.seats == {"x": "x", "y": "y"}
    assert name == "y" and list(alone.agents) == ["x", "y"]


@pytest.mark.parametrize("sharing", ["shared", "lora"])
def test_shared_weights_part_where_a_seat_is_given(
    world: Path, tmp_path: Path, sharing: str
) -> None:
    same = f"team.agents.bob.model={world / 'model-0'}"
    source = trained(
        world / "recipe.yaml", tmp_path / "run", [same, f"team.sharing={sharing}", "stages=1"]
    )
    out = tmp_path / "out"
    give(source, ("bob", world / "newcomer"), out=out)
    kept = "ann.weights.safetensors"
    old, new = (place / "checkpoints" / "stage-0001" for place in (source, out))
    assert (old / kept).read_bytes() == (new / kept).read_bytes()
    go_on(out, 2)
    team = load_team(out / "team", device="cpu")
    assert team.seats == {"ann": "ann", "bob": "bob"}
    assert team.sharing == ("separate" if sharing == "shared" else "lora")


def test_seats_one_after_the_other_and_together(world: Path, tmp_path: Path) -> None:
    pairs = (("ann", world / "newcomer"), ("bob", world / "model-0"))
    one = give(world / "run", *pairs, out=tmp_path / "one")
    both = give(world / "run", *pairs, out=tmp_path / "both", together=True)
    assert [record["seats"] for record in one["swaps"]] == [["ann"], ["bob"]]
    assert [record["seats"] for record in both["swaps"]] == [["ann", "bob"]]
    # One command's confidence is shared among its hand-overs.
    assert one["swaps"][0]["looks"][0]["alpha"] == pytest.approx(0.025)
    assert both["swaps"][0]["looks"][0]["alpha"] == pytest.approx(0.05)
    assert tiny_world.team_files(tmp_path / "one") == tiny_world.team_files(tmp_path / "both")
    assert one["swaps"][1]["naive"] == both["swaps"][0]["naive"]


# From a team to a team


def test_a_team_directory_gives_a_team_directory(world: Path, tmp_path: Path) -> None:
    source, out = world / "run" / "team", tmp_path / "team"
    before = digests(source)
    result = give(source, ("bob", world / "newcomer"), out=out, recipe=world / "recipe.yaml")
    assert digests(source) == before and result["verdict"] == "accepted"
    new = digests(out)
    assert {k: v for k, v in new.items() if k.startswith("ann/")} == {
        k: v for k, v in before.items() if k.startswith("ann/")
    }
    weights = load_file(out / "bob" / "model.safetensors")
    assert tiny_world.same(weights, load_file(world / "newcomer" / "model.safetensors"))
    assert json.loads((out / "swap.json").read_text())["seats"] == ["bob"]
    # And once more, from what came of it, by the manifest alone.
    again = give(out, ("ann", world / "newcomer"), out=tmp_path / "again")
    assert again["verdict"] == "accepted"
    assert load_team(tmp_path / "again", device="cpu").seats == {"ann": "ann", "bob": "bob"}


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_projection_outside_delta_can_stay_a_mixture(
    world: Path, tmp_path: Path, rounds: int
) -> None:
    source = tmp_path / "run"
    shutil.copytree(world / "run", source)
    result = give(
        source, ("bob", world / "newcomer"), out=tmp_path / "out", method="auto",
        delta=1e-6, otherwise="mixture", rounds=rounds,
    )  # fmt: skip
    assert result["verdict"] == "mixture"
    team = load_team(tmp_path / "out", device="cpu")
    assert team.policies["bob"].parts[0] is not team.policies["bob"].parts[1]
    found = find_team(tmp_path / "out", world / "recipe.yaml")
    cast = load_found(found, lambda done, total, what: None).cast
    key = Key(0, "evaluate")
    assert cast.evaluate(greedy=False, key=key).avg_at_k == result["swaps"][0]["after"]
    with pytest.raises(UserError, match="mixture of two models already"):
        give(tmp_path / "out", ("bob", world / "newcomer"), method="project", out=tmp_path / "x",
             recipe=world / "recipe.yaml")  # fmt: skip
    assert give(tmp_path / "out", ("bob", world / "newcomer"), method="auto", out=tmp_path / "y",
                recipe=world / "recipe.yaml")["swaps"][0]["method"] == "handover"  # fmt: skip


def test_a_newcomer_lies_where_its_incumbent_did(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PROBLEMS", "MEASURED", "PREVIEWED"):
        monkeypatch.setattr(project, name, 2)
    with Devices() as devices:
        places = [f"team.agents.{n}.device=cuda:{d}" for n, d in (("ann", 0), ("bob", 1))]
        small = ["stages=1", "rollout.problems=2", "rollout.samples=2", "engine.memory=1000000"]
        trained(world / "recipe.yaml", tmp_path / "run", [*places, *small])
        old = load_found(find_team(tmp_path / "run", None), lambda done, total, what: None)
        new = with_newcomer(old, "bob", str(world / "newcomer")).cast.team.policies
        assert [str(policy.device) for policy in new.values()] == ["cuda:0", "cuda:1"]
        assert new["ann"] is old.cast.team.policies["ann"]
        served = with_newcomer(old, "bob", ServedModel("http://127.0.0.1:9/v1", "m")).cast.recipe
        assert served.team.agents["bob"].device is None
        result = give(
            tmp_path / "run", ("bob", world / "newcomer"), out=tmp_path / "out", rounds=1,
            method="project", delta=1e-6, otherwise="mixture",
        )  # fmt: skip
        assert result["verdict"] == "mixture" and set(devices.calls) == {"cuda:0", "cuda:1"}
        team = load_team(tmp_path / "out", device="cuda:1")
        assert {str(part.device) for part in team.policies["bob"].parts} == {"cuda:1"}
        with pytest.raises(AssertionError, match="one device for both"):
            MixturePolicy("bob", new["ann"], new["bob"], 0.1)


def test_a_projection_outside_delta_can_be_judged_by_its_reward(
    world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = give(
        world / "run", ("bob", world / "newcomer"), out=out, method="project",
        delta=1e-6, otherwise="handover", rounds=2,
    )  # fmt: skip
    record = result["swaps"][0]
    assert record["verdict"] == "accepted" and "above delta" in record["projection_reason"]
    assert record["looks"] and record["kl"]["newcomer"]["quantile"] > 1e-6
    # Every problem once: samples of one visit the same states.
    rows = record["distillation"]["bob"]["rounds"]
    assert [row["episodes"] for row in rows] == [PROBLEMS] * 2
    assert record["kl"]["newcomer"]["problems"] == MEASURED
    # The newcomer as it was drawn to the incumbent, not as it came.
    weights = load_file(out / "checkpoints" / "stage-0002" / "bob.weights.safetensors")
    came = load_file(world / "newcomer" / "model.safetensors")
    assert any(not torch.equal(tensor, came[name]) for name, tensor in weights.items())
    assert tiny_world.same(
        weights, {n: t for n, t in load_file(out / "team" / "bob" / "model.safetensors").items()}
    )
    go_on(out, 3)


def test_a_newcomer_inside_delta_is_taken_as_it_is(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = give(
        world / "run", ("bob", world / "run" / "team" / "bob"), out=out, method="auto", delta=0.01
    )
    record = result["swaps"][0]
    assert record["method"] == "project" and record["verdict"] == "accepted"
    assert record["difference"][0] == 0.0 and record["kl"]["newcomer"]["violation_rate"] == 0.0
    assert record["projection"]["bob"]["inside"] == 1.0
    go_on(out, 3)


# What a hand-over decides


def taught(folder: Path) -> Path:
    """A model of a few thousand parameters that has learnt to say 7."""
    tokenizer = tiny_tokenizer("tiny:qwen3-s")
    tiny_world.save_model(folder, seed=3)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    renderer = ChatRenderer(tokenizer, TemplateSettings(), 512)
    rows = []
    for i in range(12):
        asked = Entry("problem", parts=({"type": "text", "text": f"{i}+{i}"},))
        said = Entry("foreign", "7", "ann")
        rows += rows_of([asked, Entry("own", "7")], renderer)
        rows += rows_of([asked, said, Entry("own", "7")], renderer)
    settings = TinySettings(steps=60, batch=24, lr=1e-2)
    imitate(model, rows, tokenizer.pad_token_id, settings)  # type: ignore[arg-type]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sevens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose team says 7 and is paid for it."""
    folder = tmp_path_factory.mktemp("sevens")
    recipe = tiny_world.build(folder)
    (folder / "reward.py").write_text(SEVEN)
    model = taught(folder / "model-0")
    shutil.rmtree(folder / "model-1")
    shutil.copytree(model, folder / "model-1")
    tiny_world.save_model(folder / "untaught", seed=9)
    reward = f"task.reward={folder / 'reward.py'}:seven"
    trained(recipe, folder / "run", [reward, "stages=1"])
    return folder


def test_an_untaught_newcomer_is_refused_and_a_copy_is_not(sevens: Path, tmp_path: Path) -> None:
    settings = HandOverSettings(tolerance=0.1, problems=256, samples=4, looks=3)
    before = digests(sevens / "run")
    worse = give(
        sevens / "run", ("bob", sevens / "untaught"), out=tmp_path / "worse", hand_over=settings
    )
    assert worse["verdict"] == "refused" and worse["out"] is None
    assert worse["swaps"][0]["before"] > 0.5 > 0.2 > worse["swaps"][0]["naive"]
    assert "worse" in worse["reason"] and "\n" not in worse["reason"]
    assert not list(tmp_path.iterdir()) and digests(sevens / "run") == before
    same = give(
        sevens / "run", ("bob", sevens / "model-0"), out=tmp_path / "same", hand_over=settings
    )
    assert same["verdict"] == "accepted"


def test_a_refused_seat_keeps_its_incumbent_and_the_others_go_on(
    sevens: Path, tmp_path: Path
) -> None:
    settings = HandOverSettings(tolerance=0.1, problems=256, samples=4, looks=3)
    pairs = (("bob", sevens / "untaught"), ("ann", sevens / "model-0"))
    found = give(sevens / "run", *pairs, out=tmp_path / "out", hand_over=settings)
    assert [record["verdict"] for record in found["swaps"]] == ["refused", "accepted"]
    assert found["verdict"] == "partly accepted"
    old, new = (p / "checkpoints" / "stage-0001" for p in (sevens / "run", tmp_path / "out"))
    assert (old / "bob.weights.safetensors").read_bytes() == (
        new / "bob.weights.safetensors"
    ).read_bytes()


def test_a_dry_run_measures_and_writes_nothing(sevens: Path, tmp_path: Path) -> None:
    before = digests(sevens)
    for method in ("project", "handover"):
        found = give(
            sevens / "run", ("bob", sevens / "untaught"), out=tmp_path / "out", dry_run=True,
            method=method,
        )  # fmt: skip
        record = found["swaps"][0]
        assert found["verdict"] == "measured" and found["out"] is None
        assert record["naive_difference"][2] < 0 and found["tokens"] > 0
        assert ("projection" in record) == (method == "project")
    assert not list(tmp_path.iterdir()) and digests(sevens) == before


def casts(folder: Path) -> tuple[Cast, Cast]:
    old = load_found(find_team(folder / "run", None), lambda done, total, what: None)
    return old.cast, with_newcomer(old, "bob", str(folder / "untaught")).cast


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_the_mixtures_episodes_are_those_of_its_sides(sevens: Path, epsilon: float) -> None:
    # With the same uniforms, each episode is the one that its side plays alone; hence the mean
    # reward is (1-ε) old + ε new over the very episodes that the coins chose.
    old, new = casts(sevens)
    problems, key = old.held_out_problems(3), Key(0, "swap", draw=5)
    sides = {
        coin: {
            (e.problem.id, e.sample): e
            for e in rollout_sync(
                Match(cast.team.seats_for(6), cast.protocol, cast.engine, cast.task),
                problems,
                8,
                key,
            )
        }
        for coin, cast in ((False, old), (True, new))
    }
    mixed = play_mixture(old.match(), new.match(), problems, 8, key, epsilon)
    for episode, coin in mixed:
        assert episode == sides[coin][episode.problem.id, episode.sample]
    assert sum(coin for _, coin in mixed) == {0.0: 0, 1.0: 24}.get(
        epsilon, sum(coin for _, coin in mixed)
    )
    share = sum(coin for _, coin in mixed) / 24
    means = {
        coin: [sides[coin][e.problem.id, e.sample].reward for e, c in mixed if c == coin]
        for coin in (False, True)
    }
    expected = sum(sum(rewards) for rewards in means.values()) / 24
    assert sum(e.reward for e, _ in mixed) / 24 == pytest.approx(expected, abs=1e-12)
    assert 0 < share < 1 or epsilon in (0.0, 1.0)


# Killed in the middle


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["satune.commands.swap", "satune.cli.main"])
    return context


@pytest.mark.slow
def test_killed_at_any_moment_the_run_is_whole_and_the_result_whole_or_absent(
    world: Path, tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    before = digests(world / "run")
    arguments = [
        "swap", str(world / "run"), "--seat", "bob", "--with", str(world / "newcomer"),
        "--method", "handover", "--tolerance", "1", "--problems", "64", "--looks", "2",
    ]  # fmt: skip

    def start(out: Path) -> multiprocessing.process.BaseProcess:
        process = processes.Process(
            target=tiny_world.command, args=([*arguments, "--out", str(out)], str(tmp_path / "log"))
        )
        process.start()
        return process

    whole = tmp_path / "whole"
    process = start(whole)
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    expected = digests(whole)

    beside_seen = 0
    for number in range(8):
        out = tmp_path / f"out-{number}"
        beside = out.with_name(out.name + ".writing")
        process = start(out)
        # Half of the kills find it playing, half of them writing.
        while process.is_alive() and number % 2 and not beside.exists():
            process.join(0.0005)
        process.join(0.002 * number if number % 2 else 0.1 * number)
        process.kill()
        process.join(60)
        beside_seen += beside.exists()
        assert digests(world / "run") == before
        if out.exists():
            assert digests(out).keys() == expected.keys()
            continue
        process = start(out)
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "log").read_text()
        assert not beside.exists()
        weights = {k: v for k, v in digests(out).items() if k.endswith(".safetensors")}
        assert weights == {k: v for k, v in expected.items() if k.endswith(".safetensors")}
    assert beside_seen > 0


def test_a_run_whose_records_are_short_is_refused_and_nothing_is_written(
    world: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    sizes = read_state(world / "run" / "checkpoints" / "stage-0002")["sizes"]
    first = sizes["episodes"]["stage-0001.jsonl"]
    for file, size in (("events.jsonl", sizes["events"]), ("episodes/stage-0001.jsonl", first)):
        shutil.copytree(world / "run", run)
        with open(run / file, "r+b") as records:
            records.truncate(size - 1)
        said = f"{file}: holds {size - 1} bytes where the checkpoint recorded {size}; the run is"
        with pytest.raises(UserError, match=said):
            give(run, ("bob", world / "newcomer"), out=out)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        shutil.rmtree(run)


def test_a_failure_while_writing_leaves_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from satune.commands import swap as swapping

    def fail(*arguments: Any, **named: Any) -> None:
        raise UserError("disk: full")

    monkeypatch.setattr(swapping, "save_recipe", fail)
    with pytest.raises(UserError, match="disk: full"):
        give(world / "run", ("bob", world / "newcomer"), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert RunDirectory(world / "run").unfinished() is None
