"""A seat that a served model fills: handed over, saved, trained around, given back."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import faulty_server
import tiny_world
from command_line import ENVIRONMENT, Run, refused
from faulty_server import FAULTS, Server
from satune.commands.train import check_recipe_unchanged
from satune.config.load import load_recipe, save_recipe
from satune.team import load_team
from satune.training.run_directory import RunDirectory
from satune.types import ServedModel, UserError
from swapped_teams import digests, go_on, state_of, trained

pytestmark = pytest.mark.slow  # each begins with a trained team and a seat handed over

MY_KEY = ("--server-option", "api_key_env=MY_KEY")
BOB = "team.agents.bob.model=http://host/v1#good"
KEYED = ENVIRONMENT | {"MY_KEY": "s3cret"}
ANYHOW = ("--tolerance", "1", "--problems", "8", "--looks", "1")
RAMP = ("--tolerance", "0.3", "--problems", "24", "--samples", "2", "--looks", "2")


@pytest.fixture(scope="module")
def process() -> Iterator[Server]:
    with faulty_server.running() as server:
        yield server


@pytest.fixture
def server(process: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """It wants the key that lies in $MY_KEY."""
    process.fresh(key="s3cret")
    monkeypatch.setenv("MY_KEY", "s3cret")
    return process


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random agents, of whom bob has the say, and a run of one stage."""
    folder = tmp_path_factory.mktemp("served")
    recipe = tiny_world.build(folder, ("bob", "ann"))
    text = yaml.safe_load(recipe.read_text())
    text["protocol"] = "vote"
    text["task"]["reward"] = "exact"
    recipe.write_text(yaml.safe_dump(text, sort_keys=False))
    trained(recipe, folder / "run", ["stages=1"])
    return folder


@pytest.fixture(scope="module")
def swapped(world: Path, process: Server) -> tuple[Path, dict[str, Any]]:
    """The run with a served model in bob's seat, by a server that fails every third time."""
    process.fresh(FAULTS, key="s3cret")
    before, out = digests(world / "run"), world / "swapped"
    code, said, err = called(
        "swap", world / "run", "--seat", "bob", "--with", f"{process.url}#good", *RAMP,
        *MY_KEY, "--out", out, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert digests(world / "run") == before
    return out, json.loads(said)


def called(*arguments: str | Path) -> tuple[int, str, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "satune", *map(str, arguments)],
        capture_output=True, text=True, env=KEYED,
    )  # fmt: skip
    return ended.returncode, ended.stdout, ended.stderr


def test_it_is_handed_the_seat_by_its_reward(swapped: Any) -> None:
    out, result = swapped
    record = result["swaps"][0]
    assert record["verdict"] == "accepted" and record["method"] == "handover"
    # It errs one time in ten; bob wrote noise.
    assert record["before"] < 0.1 and record["naive"] > 0.6
    rows = [json.loads(line) for line in (out / "swap-evidence.jsonl").read_text().splitlines()]
    assert {row["coin"] for row in rows} == {"newcomer", "incumbent"}
    assert record["tokens"] > 0
    assert not list(out.parent.glob("*answers*"))


def test_the_recipe_and_the_team_name_it_and_hold_no_key(world: Path, swapped: Any) -> None:
    out, _ = swapped
    section = load_recipe(out / "recipe.yaml").team.agents["bob"]
    assert section.frozen
    assert isinstance(section.model, ServedModel) and section.model.name == "good"
    assert section.server is not None and section.server.api_key_env == "MY_KEY"
    entry = json.loads((out / "team" / "manifest.json").read_text())["agents"]["bob"]
    assert entry["served"] == str(section.model) and "dir" not in entry
    assert not (out / "team" / "bob").exists() and not (out / "newcomers" / "bob").exists()
    team = load_team(out / "team", device="cpu")
    assert list(team.policies) == ["ann"] and team.specs["bob"].served == section.model
    for path in out.rglob("*"):
        assert not path.is_file() or b"s3cret" not in path.read_bytes()
    old, new = (place / "checkpoints" / "stage-0001" for place in (world / "run", out))
    kept = [path.name for path in old.glob("ann.*")]
    assert "ann.weights.safetensors" in kept
    assert all((old / name).read_bytes() == (new / name).read_bytes() for name in kept)
    assert not list(new.glob("bob.*"))
    assert state_of(out, "stage-0001")["state"]["versions"].keys() == {"ann"}


def test_training_goes_on_around_it(swapped: Any, server: Server, tmp_path: Path) -> None:
    server.set(faults=list(FAULTS))
    out = tmp_path / "on"
    shutil.copytree(swapped[0], out)
    summary = go_on(out, 3)
    assert summary["stages"] == 3
    after = [e for e in tiny_world.events(out, "update") if e["stage"] > 1]
    assert [e["agent"] for e in after] == ["ann", "ann"]
    assert summary["reward_after"] > 0.6
    rows = (out / "episodes" / "stage-0003.jsonl").read_text().splitlines()
    bob = [t for row in rows for t in json.loads(row)["turns"] if t["seat"] == "bob"]
    assert bob and all(turn["completion_ids"] is None for turn in bob)
    assert {body["model"] for body in server.seen()["bodies"]} == {"good"}


def test_the_seat_goes_back_to_a_local_model_or_does_not(
    satune: Run,
    world: Path,
    swapped: Any,
    server: Server,
) -> None:
    back = ("swap", swapped[0] / "team", "--recipe", world / "recipe.yaml", "--seat", "bob")
    back = (*back, "--with", world / "model-1", "--out", world / "back")
    line = refused(satune(*back, "--method", "project"))
    assert "--seat bob: is filled by a model whose weights are elsewhere" in line
    assert line.endswith("use --method handover")
    code, _, err = satune(*back, *RAMP, "--json")
    assert code == 2 and not (world / "back").exists(), err
    code, out, err = satune(*back, *ANYHOW, "--json")
    assert code == 0, err
    assert json.loads(out)["swaps"][0]["naive"] < 0.1
    manifest = json.loads((world / "back" / "manifest.json").read_text())
    assert manifest["agents"]["bob"]["dir"] == "bob"
    assert list(load_team(world / "back", device="cpu").policies) == ["bob", "ann"]


def test_a_worse_one_is_refused_in_one_line(
    satune: Run,
    swapped: Any,
    server: Server,
    tmp_path: Path,
) -> None:
    worse = ("--with", f"{server.url}#poor", *MY_KEY, "--out", tmp_path / "worse")
    ramp = ("--tolerance", "0.02", "--problems", "512", "--looks", "3")
    code, out, _ = satune("swap", swapped[0], "--seat", "bob", *worse, *ramp, "--json")
    result = json.loads(out)
    assert code == 2 and result["verdict"] == "refused"
    assert "the newcomer is worse" in result["reason"] and "\n" not in result["reason"]
    assert not (tmp_path / "worse").exists()


def test_every_seat_may_be_served(
    satune: Run,
    swapped: Any,
    server: Server,
    tmp_path: Path,
) -> None:
    out = tmp_path / "all"
    poor = ("--with", f"{server.url}#poor", *MY_KEY, "--out", out)
    code, _, err = satune("swap", swapped[0], "--seat", "ann", *poor, *ANYHOW, "--json")
    assert code == 0, err
    # Nothing is left to train: a team, not a run.
    assert not (out / "recipe.yaml").exists()
    team = load_team(out, device="cpu")
    assert team.policies == {} and list(team.served) == ["bob", "ann"]


def test_what_a_server_answered_before_a_kill_is_not_asked_again(
    world: Path, server: Server
) -> None:
    def command(out: str) -> list[str]:
        served = ("--with", f"{server.url}#good", *MY_KEY)
        return ["swap", str(world / "run"), "--seat", "bob", *served, *RAMP,
                "--out", str(world / out), "--json"]  # fmt: skip

    def result_of(out: str) -> dict[str, Any]:
        code, said, err = called(*command(out))
        assert code == 0, err
        found = json.loads(said)
        for each in (found, *found["swaps"]):
            del each["seconds"]
        assert found.pop("out") == str(world / out)
        return found

    server.set(limit=server.seen()["requests"] + 16)
    going = subprocess.Popen(
        [sys.executable, "-m", "satune", *command("killed")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=KEYED,
    )  # fmt: skip
    while len(server.seen()["answered"]) < 12 and going.poll() is None:
        time.sleep(0.02)
    going.kill()
    going.communicate()
    (answers,) = world.glob("killed.answers-*.jsonl")
    assert not (world / "killed").exists()
    # What was under way when it died had no reader.
    read = len(answers.read_text().splitlines())
    server.idle()
    server.set(requests=0)
    first = result_of("killed")
    asked = server.seen()["requests"]
    server.fresh(key="s3cret")
    assert result_of("not-killed") == first
    assert read > 0 and asked == server.seen()["requests"] - read
    assert not list(world.glob("*.answers-*"))


OPTION = ("--server-option",)
BAD = {
    "no model": (["http://host/v1"], "--with: a model at host: give http://ADDRESS/v1#MODEL"),
    "a key in it": (["http://u:pw@host/v1#good"], "its address holds a key"),
    "no such model": (["{url}#great"], "name a model that it serves"),
    "no key": (["{url}#good", *OPTION, "retries=1"], "wants a key; set $OPENAI_API_KEY"),
    "no such key": (["{url}#good", *OPTION, "api_key_env=NO_KEY"], "$NO_KEY is not set; export it"),
    "a key as a name": (["{url}#good", *OPTION, "api_key_env=sk-a.b"], "api_key_env: string"),
    "no such option": (["{url}#good", *OPTION, "rpn=5"], "option rpn: extra inputs"),
    "nobody there": (["http://127.0.0.1:9/v1#good"], "no answer after"),
    "to be projected": (["{url}#good", "--method", "project"], "use --method handover"),
    "a rate of 0": (["{url}#good", *OPTION, "requests_per_minute=0"], "should be greater than 0"),
    "options of no server": (["{model}", *OPTION, "retries=5"], "is for a newcomer at http"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str,
    satune: Run,
    world: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("satune.engines.openai.LONGEST_DELAY", 0.01)
    (model, *more), says = BAD[case]
    before = digests(world / "run")
    model = model.format(url=server.url, model=world / "model-1")
    keyed = () if more else MY_KEY
    bad = ("--seat", "bob", "--with", model, *keyed, *more, "--out", world / "bad")
    assert says in refused(satune("swap", world / "run", *bad))
    assert digests(world / "run") == before and not (world / "bad").exists()


RECIPES = {
    "to be trained": ({}, "bob.frozen: a served model cannot be trained; set frozen to true"),
    "an adapter": ({"frozen": True, "lora": {}}, "bob.lora: a served model takes no adapter"),
    "no model": ({"frozen": True, "model": "http://host/v1"}, "bob.model: a model at host: give"),
    "options of no server": ({"model": "here", "server": {}}, "bob.server: is for a model at http"),
    "a password": ({"frozen": True, "model": "http://u:pw@host/v1#m"}, "bob.model: a model at"),
    "a template": ({"frozen": True, "template": {"chat": "{{ a }}"}}, "bob.template.chat: its"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_with_one_is_checked(case: str, world: Path, tmp_path: Path) -> None:
    keys, says = RECIPES[case]
    text = yaml.safe_load((world / "recipe.yaml").read_text())
    text["team"]["agents"]["bob"] = {"model": "http://host/v1#good", **keys}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(text, sort_keys=False))
    with pytest.raises(UserError, match=re.escape(says)):
        load_recipe(path)


def test_a_description_counts_what_lies_here(satune: Run, world: Path) -> None:
    served = ("team.agents.bob.model=http://host/v1#good", "team.agents.bob.frozen=true")
    code, out, err = satune("describe", world / "recipe.yaml", *served, "--json")
    assert code == 0, err
    whole, found = (
        json.loads(satune("describe", world / "recipe.yaml", "--json")[1]),
        json.loads(out),
    )
    bob = found["agents"]["bob"]
    assert not bob["trained"] and "parameters" not in bob and set(bob["memory"].values()) == {0}
    assert 2 * found["memory"]["all_weights"] == whole["memory"]["all_weights"]
    assert found["memory"]["largest_step"] == whole["memory"]["largest_step"]
    code, out, err = satune("describe", world / "recipe.yaml", *served)
    assert code == 0 and "http://host/v1#good" in out, err


@pytest.mark.parametrize("what", ["team", "recipe.yaml"])
def test_an_evaluation_plays_with_it(
    what: str,
    satune: Run,
    world: Path,
    swapped: Any,
    server: Server,
    tmp_path: Path,
) -> None:
    data = ("--data", world / "rows.jsonl", "-k", "2", "--out", tmp_path / "eval", "--json")
    code, out, err = satune("eval", swapped[0] / what, *data)
    assert code == 0, err
    report, asked = json.loads(out), server.seen()
    assert report["problems"] == 12
    assert report["team"]["avg_at_k"] == report["seats"]["bob"]["avg_at_k"] > 0.6
    assert report["seats"]["ann"]["avg_at_k"] < 0.1
    assert asked["requests"] == 24 and {body["model"] for body in asked["bodies"]} == {"good"}
    # What was answered is on file, as with a team that is served whole.
    assert satune("eval", swapped[0] / what, *data)[0] == 0
    assert server.seen()["requests"] == 24


def test_two_models_of_one_name_are_not_one(
    satune: Run,
    swapped: Any,
    server: Server,
    tmp_path: Path,
) -> None:
    with faulty_server.running() as other:
        other.set(key="s3cret", errors={"good": 0.95})
        worse = ("--with", f"{other.url}#good", *MY_KEY, "--out", tmp_path / "worse")
        ramp = ("--tolerance", "0.05", "--problems", "256", "--looks", "2")
        code, out, err = satune("swap", swapped[0], "--seat", "bob", *worse, *ramp, "--json")
    assert code == 2, err
    record = json.loads(out)["swaps"][0]
    assert record["verdict"] == "refused" and record["before"] > 0.6 and record["naive"] < 0.4


def test_a_dry_run_writes_nothing_at_all(
    satune: Run,
    world: Path,
    server: Server,
    tmp_path: Path,
) -> None:
    dry = ("--with", f"{server.url}#good", *MY_KEY, "--dry-run", "--out", tmp_path / "a" / "b")
    code, out, err = satune("swap", world / "run", "--seat", "bob", *dry, "--json")
    assert code == 0, err
    assert json.loads(out)["swaps"][0]["naive"] > 0.6
    assert not list(tmp_path.iterdir())


def test_a_newcomer_is_asked_as_the_team_asks_its_server(
    satune: Run,
    swapped: Any,
    server: Server,
    tmp_path: Path,
) -> None:
    out = tmp_path / "both"
    ann = ("swap", swapped[0] / "team", "--seat", "ann", "--with", f"{server.url}#poor")
    code, _, err = satune(*ann, *ANYHOW, "--out", out, "--json")
    assert code == 0, err
    agents = json.loads((out / "manifest.json").read_text())["agents"]
    assert agents["ann"]["server"] == agents["bob"]["server"]
    assert agents["ann"]["server"]["api_key_env"] == "MY_KEY"
    two = refused(satune(*ann, *ANYHOW, *MY_KEY, *OPTION, "timeout=9", "--out", tmp_path / "two"))
    assert "is to be asked in two ways; give every agent there the same server section" in two


def test_a_resumed_run_may_ask_elsewhere(world: Path) -> None:
    held = load_recipe(world / "recipe.yaml", [BOB, "team.agents.bob.frozen=true"])
    directory = RunDirectory(world / "elsewhere")
    directory.start()
    save_recipe(held, directory.recipe)
    for change in (
        "team.agents.bob.model=http://other:80/v1#good", "team.agents.bob.server={timeout: 5}"
    ):  # fmt: skip
        check_recipe_unchanged(directory, load_recipe(directory.recipe, [change]))
    for change in ("team.agents.bob.model=http://host/v1#poor", "team.agents.ann.delta=0.1"):
        with pytest.raises(UserError, match=change.partition("=")[0]):
            check_recipe_unchanged(directory, load_recipe(directory.recipe, [change]))


def test_agents_at_one_address_agree_on_how_it_is_asked(world: Path) -> None:
    ann = ["team.agents.ann.model=http://host/v1#poor", "team.agents.ann.frozen=true"]
    bob = [BOB, "team.agents.bob.frozen=true", "team.agents.bob.server={timeout: 5}"]
    carl = f"team.agents.carl={{model: {world / 'model-0'}}}"
    with pytest.raises(UserError, match=r"agents.ann.server: 'bob' and 'ann' are at one address"):
        load_recipe(world / "recipe.yaml", [*ann, *bob, carl])


@pytest.mark.parametrize("thinking", [None, False])
def test_thinking_is_the_servers_to_turn_off(
    thinking: bool | None,
    satune: Run,
    swapped: Any,
    server: Server,
    tmp_path: Path,
) -> None:
    team = tmp_path / "team"
    shutil.copytree(swapped[0] / "team", team)
    manifest = json.loads((team / "manifest.json").read_text())
    manifest["agents"]["bob"]["template"]["enable_thinking"] = thinking
    (team / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = satune("eval", team, "-k", "1", "--out", tmp_path / "out", "--json")
    assert code == 0, err
    bodies = server.seen()["bodies"]
    said = None if thinking is None else {"enable_thinking": thinking}
    assert bodies and all(body.get("chat_template_kwargs") == said for body in bodies)
    # As long a message as it was trained with, though no recipe lies beside this team.
    assert {body["max_tokens"] for body in bodies} == {6}
