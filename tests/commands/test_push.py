"""A team on the hub: what goes, what stays, and that what went loads by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_world
from command_line import Run, refused
from hub import TOKEN, Hub, standing_in
from satune.team import load_team

REPO = "ann/relay"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two agents, whole weights, with certificates."""
    from satune.cli.train import run_training
    from satune.config.load import load_recipe

    folder = tmp_path_factory.mktemp("trained")
    recipe = tiny_world.build(folder / "world")
    (folder / "world" / "model-0" / "LICENSE").write_text("\nApache License, Version 2.0\n")
    overrides = [
        "stages=1", "certify.problems=2", "certify.samples=2", "checkpoint.every=stage",
    ]  # fmt: skip
    run_training(
        load_recipe(recipe, overrides), folder / "run", resume=False, checkpoint=None, command=""
    )
    return folder / "run"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A team of two adapters on one base that lies here."""
    from satune.commands.assemble import assemble
    from satune.config.load import load_recipe

    folder = tmp_path_factory.mktemp("adapted")
    recipe = tiny_world.build(folder / "world")
    model = folder / "world" / "model-0"
    overrides = ["team.sharing=lora", *(f"team.agents.{a}.model={model}" for a in ("ann", "bob"))]
    team = assemble(load_recipe(recipe, overrides)).team
    with torch.no_grad():
        for policy in team.policies.values():
            for parameter in policy.trainable().values():
                parameter.normal_(std=0.3)
    team.save(folder / "team")
    return folder / "team"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with standing_in() as made:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        # Large files by the hub's older way: the stand-in has no store of chunks.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


def unpacked(hub: Hub, folder: Path, repo: str = REPO) -> Path:
    for path, content in hub.repos[repo]["files"].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9)[None], use_cache=False).logits


def test_a_dry_run_prints_every_file_and_asks_nobody(
    satune: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*arguments: object, **named: object) -> None:
        raise AssertionError("a dry run asked the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    code, stdout, _ = satune("push", trained, REPO, "--dry-run", "--json")
    assert code == 0
    summary = json.loads(stdout)
    files = {file["path"]: file for file in summary["files"]}
    assert set(files) == {"README.md", "manifest.json"} | {
        f"{agent}/{name}"
        for agent in ("ann", "bob")
        for name in ("config.json", "generation_config.json", "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }  # fmt: skip
    weights = trained / "team" / "ann" / "model.safetensors"
    assert files["ann/model.safetensors"]["bytes"] == weights.stat().st_size
    assert summary["address"] is None
    code, shown, _ = satune("push", trained, REPO, "--dry-run")
    assert code == 0 and all(path in shown for path in files)
    assert "nothing was sent" in shown and "# relay" in shown


def test_what_is_sent_is_what_was_shown_and_loads_by_itself(
    satune: Run, trained: Path, hub: Hub, tmp_path: Path
) -> None:
    shown = json.loads(satune("push", trained, REPO, "--dry-run", "--json")[1])
    code, stdout, stderr = satune("push", trained, REPO, "--json")
    assert code == 0, stderr
    sent = json.loads(stdout)
    assert sent["files"] == shown["files"] and sent["address"] == f"{hub.address}/{REPO}"
    held = hub.repos[REPO]
    assert held["private"] and held["commits"] == 1
    assert {p: len(c) for p, c in held["files"].items()} == {
        file["path"]: file["bytes"] for file in shown["files"]
    }

    # Nothing of this machine, of the data or of the run is in any byte that was sent.
    everything = b"".join(hub.bodies) + b"".join(held["files"].values())
    private = [str(trained.parent), str(Path.home()) + "/", "OPENAI_API_KEY", "r11", "events.jsonl"]
    assert not [text for text in private if text.encode() in everything]

    folder = unpacked(hub, tmp_path / "downloaded")
    team = load_team(folder)
    assert team.seats == {"ann": "ann", "bob": "bob"}
    original = load_team(trained / "team")
    for agent in ("ann", "bob"):
        model = AutoModelForCausalLM.from_pretrained(folder / agent)
        assert torch.equal(logits(model), logits(original.policies[agent].causal_lm))
        assert AutoTokenizer.from_pretrained(folder / agent).chat_template


def test_adapters_go_with_their_base_at_the_root(
    satune: Run, adapted: Path, hub: Hub, tmp_path: Path
) -> None:
    assert satune("push", adapted, REPO)[0] == 0
    folder = unpacked(hub, tmp_path / "downloaded")
    original = load_team(adapted)
    for agent in ("ann", "bob"):
        config = json.loads((folder / agent / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == REPO
        base = AutoModelForCausalLM.from_pretrained(folder)
        model = PeftModel.from_pretrained(base, folder / agent)
        policy = original.policies[agent]
        policy.activate()
        torch.testing.assert_close(logits(model), logits(policy.causal_lm))
    # A base that is on the hub stays here.
    assert satune("push", adapted, "ann/other", "--base", "base-0=org/base")[0] == 0
    files = hub.repos["ann/other"]["files"]
    assert "model.safetensors" not in files
    named = json.loads(files["bob/adapter_config.json"])["base_model_name_or_path"]
    assert named == "org/base" and b"org/base" in files["README.md"]


def test_the_card_tells_what_the_run_measured(satune: Run, trained: Path) -> None:
    card = json.loads(satune("push", trained, REPO, "--dry-run", "--json")[1])["card"]
    events = [json.loads(line) for line in (trained / "events.jsonl").read_text().splitlines()]
    sampled = [e for e in events if e["event"] == "eval" and not e["greedy"]]
    mean, low, high = sampled[-1]["difference"]
    assert f"| {mean:+.3f} \\[{low:+.3f}, {high:+.3f}\\] |" in card
    assert f"| sampled | {sampled[0]['reward']:.3f} " in card
    updates = [e for e in events if e["event"] == "update"]
    lowers = [e["certificate"]["statistical"]["lower"] for e in updates if "certificate" in e]
    assert lowers, "the run has certificates"
    assert f"{sum(low > 0 for low in lowers)} of them were above 0" in card
    assert f"the largest was {max(lowers):+.4f}" in card
    spent = json.loads((trained / "summary.json").read_text())["certificates"]["confidence_spent"]
    assert f"is wrong is at most {spent:.3g}" in card
    for event in updates:
        for bound in event["certificate"]["theory"]:
            assert f"| {bound['name']} | {bound['status']} |" in card
    assert "guarantee" not in card and "proves nothing" in card
    # ann's base has a licence beside it, bob's has none: the team has none that could be named.
    assert "| ann | ann | model-0 | Apache License, Version 2.0 | whole weights | 1 |" in card
    assert "| bob | bob | model-1 | not known | whole weights | 1 |" in card
    head = yaml.safe_load(card.split("---\n")[1])
    assert "license" not in head and "base_model" not in head
    assert "rows.jsonl" in card and str(trained.parent) not in card
    told = json.loads(satune("push", trained, REPO, "--dry-run", "--json", "--license", "mit")[1])[
        "card"
    ]
    assert yaml.safe_load(told.split("---\n")[1])["license"] == "mit"


def test_the_licence_of_a_base_on_the_hub_is_asked_for(
    satune: Run, adapted: Path, hub: Hub
) -> None:
    hub.add("org/base", private=False)
    hub.repos["org/base"]["license"] = "apache-2.0"
    assert satune("push", adapted, REPO, "--base", "base-0=org/base")[0] == 0
    head = yaml.safe_load(hub.repos[REPO]["files"]["README.md"].decode().split("---\n")[1])
    assert head["license"] == "apache-2.0" and head["base_model"] == ["org/base"]


def test_of_the_run_goes_what_is_named(satune: Run, trained: Path) -> None:
    code, stdout, _ = satune(
        "push", trained, REPO, "--dry-run", "--json", "--include", "recipe", "--include", "episodes"
    )
    assert code == 0
    paths = {f["path"]: f["state"] for f in json.loads(stdout)["files"]}
    assert paths["run/recipe.yaml"] == "as it is"
    assert "run/episodes/stage-0001.jsonl" in paths and "run/events.jsonl" not in paths


# What is refused


def test_overwriting_and_publishing_take_a_word(satune: Run, trained: Path, hub: Hub) -> None:
    hub.add(REPO, private=True, old__bin="x", README__md="mine")
    line = refused(satune("push", trained, REPO))
    assert line.startswith(f"{REPO}: holds 2 files already; --overwrite")
    assert hub.repos[REPO]["commits"] == 0
    assert satune("push", trained, REPO, "--overwrite")[0] == 0
    files = hub.repos[REPO]["files"]
    assert "old.bin" not in files and files["README.md"] != b"mine"
    hub.add("ann/open", private=False)
    line = refused(satune("push", trained, "ann/open"))
    assert line == "ann/open: is there and public; add --public, or give another name"
    assert satune("push", trained, "ann/open", "--public")[0] == 0
    assert satune("push", trained, "ann/new", "--public")[0] == 0
    assert not hub.repos["ann/new"]["private"]
    # One that is private stays so, and is not called public.
    line = refused(satune("push", trained, REPO, "--public", "--overwrite"))
    assert line == (f"{REPO}: is there and private; change that on the hub, or leave --public out")
    assert hub.repos[REPO]["private"] and hub.repos[REPO]["commits"] == 1


def test_what_is_in_the_way_is_one_line(
    satune: Run, trained: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("relay", "a/b/c", "ann/../x", "ann/x--y", "/ann", "ann/"):
        assert "give OWNER/NAME" in refused(satune("push", trained, name, "--dry-run"))
    assert "no such directory" in refused(satune("push", tmp_path / "none", REPO))
    assert "no run and no team" in refused(satune("push", tmp_path, REPO))
    (tmp_path / "events.jsonl").write_text("")
    assert "has no team yet" in refused(satune("push", tmp_path, REPO))
    assert "expected one of recipe" in refused(satune("push", trained, REPO, "--include", "all"))
    assert "none does" in refused(satune("push", trained, REPO, "--base", "base-0=org/x"))
    hub.refuse = (403, "You do\nnot have the rights")
    line = refused(satune("push", trained, REPO))
    assert line.startswith(f"{REPO}: the hub refuses (403: ") and "may not write there" in line
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "not logged in" in refused(satune("push", trained, REPO))


def test_a_hub_that_cannot_be_reached_is_one_line(
    satune: Run, trained: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached" in refused(satune("push", trained, REPO))


def test_a_link_that_leads_out_is_not_followed(satune: Run, trained: Path, tmp_path: Path) -> None:
    team = tmp_path / "team"
    shutil.copytree(trained / "team", team)
    (tmp_path / "secret").write_text("secret")
    (team / "ann" / "model.safetensors").unlink()
    (team / "ann" / "model.safetensors").symlink_to(tmp_path / "secret")
    assert "is a link that leads out" in refused(satune("push", team, REPO, "--dry-run"))


def test_a_team_alone_says_that_its_training_is_not_known(
    satune: Run, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "team", tmp_path / "mine")
    summary = json.loads(satune("push", tmp_path / "mine", REPO, "--dry-run", "--json")[1])
    assert "No run lay beside this team" in summary["card"]
    assert "| ann | ann | not known | not known |" in summary["card"]


def changed(team: Path, agent: str, **entry: object) -> None:
    """Give an agent of a team's manifest other values; None takes one away."""
    path = team / "manifest.json"
    manifest = json.loads(path.read_text())
    gone = {key for key, value in entry.items() if value is None}
    values = manifest["agents"][agent] | entry
    manifest["agents"][agent] = {k: v for k, v in values.items() if k not in gone}
    path.write_text(json.dumps(manifest))


def test_an_agent_that_lives_with_its_owner_is_not_sent(
    satune: Run, trained: Path, tmp_path: Path
) -> None:
    team = tmp_path / "team"
    shutil.copytree(trained / "team", team)
    changed(team, "bob", dir=None, host="http://10.0.0.7:9000", digest="d1")
    line = refused(satune("push", team, REPO, "--dry-run"))
    assert line.startswith(f"{team}: agent bob lives with its owner (http://10.0.0.7:9000)")


def test_the_team_of_a_run_may_be_named_from_where_one_is(
    satune: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "runs" / "one")
    (tmp_path / "runs" / "one" / "team" / "ann.critic.safetensors").write_bytes(b"critic")
    monkeypatch.chdir(tmp_path)
    words = [REPO, "--dry-run", "--json", "--include", "critics", "--include", "events"]
    inside = json.loads(satune("push", "runs/one/team", *words)[1])
    assert inside == json.loads(satune("push", "runs/one", *words)[1])
    paths = [file["path"] for file in inside["files"]]
    assert "ann.critic.safetensors" in paths and "run/events.jsonl" in paths


def test_a_base_is_the_hubs_where_the_team_says_so_from_wherever_it_is_sent(
    satune: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    recipe = (run / "recipe.yaml").read_text()
    for number, name in ((0, "models/mine"), (1, "org/base")):
        (lies,) = {line.split()[-1] for line in recipe.splitlines() if f"model-{number}" in line}
        recipe = recipe.replace(lies, name)
    (run / "recipe.yaml").write_text(recipe)
    changed(run / "team", "bob", base="org/base")
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def bases() -> tuple[list[str], str]:
        told = json.loads(satune("push", run, REPO, "--dry-run", "--json")[1])["card"]
        return yaml.safe_load(told.split("---\n")[1]).get("base_model", []), told

    hub, told = bases()
    assert hub == ["org/base"]
    assert "| ann | ann | mine | not known |" in told and "models/mine" not in told
    assert "| bob | bob | org/base | not known |" in told
    # Teams of earlier versions do not say it: what lies here by the name is none of the hub's.
    manifest = run / "team" / "manifest.json"
    held = json.loads(manifest.read_text())
    for entry in held["agents"].values():
        del entry["base"]
    manifest.write_text(json.dumps(held))
    assert bases()[0] == ["models/mine"]
