"""Teams, runs and recipes that somebody else made: what they would run, ask and touch."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny_world
from satune.agents.sources import saved_adapter
from satune.cli.main import main
from satune.commands.contestant import Contestant, local_contestant
from satune.commands.evaluate import Wanted, chosen_task
from satune.commands.reseat import find_team
from satune.commands.trust import Address, Code, Trust, claims, given_recipe, remember
from satune.config.load import load_recipe, recipe_text
from satune.engines.servers import Servers
from satune.team import load_team, manifest_of
from satune.types import UserError

NO_ENGINE: Any = None
SERVER = "http://collector.example/v1"
RECIPE = {
    "team": {"agents": {"a": {"model": "somebody/model"}, "b": {"model": "somebody/model"}}},
    "task": "relay",
    "protocol": "chain",
}


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty state directory, and a working directory beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("SATUNE_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "state"


@pytest.fixture
def evil(state: Path, tmp_path: Path) -> Path:
    """A file that leaves ``ran`` beside it when it is read."""
    path = tmp_path / "evil.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef thing(*a, **b): ...\n")
    return path


def entry(**changes: Any) -> dict[str, Any]:
    """An agent's entry in a manifest, served elsewhere."""
    plain = {"temperature": 1.0, "template": {}, "sharing": "separate", "delta": None}
    return {**plain, "served": f"{SERVER}#m", **changes}


def team(folder: Path, **changes: Any) -> Path:
    manifest = {
        "format": 1, "seats": {"a": "a"}, "agents": {"a": {**entry(), "dir": "a"}},
        "task": {"name": "relay"}, "protocol": {"name": "solo"},
    }  # fmt: skip
    del manifest["agents"]["a"]["served"]
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return folder


def run_of(folder: Path, recipe: dict[str, Any]) -> Path:
    """A run's directory as somebody may hand it on: its recipe with every default, and events."""
    folder.mkdir()
    (folder / "written.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "recipe.yaml").write_text(recipe_text(load_recipe(folder / "written.yaml")))
    (folder / "events.jsonl").touch()
    return folder


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        call(*arguments, **options)
    line = str(refused.value)
    assert "\n" not in line
    return line


# -- code -----------------------------------------------------------------------------------------

NAMES = {
    "task": {"task": "{it}"},
    "task in full": {"task": {"name": "{it}", "rounds": 2}},
    "reward": {"task": {"name": "rows", "data": "x.jsonl", "reward": "{it}"}},
    "in a list of options": {"task": {"name": "relay", "more": [{"then": ["{it}"]}]}},
    "protocol": {"protocol": "{it}"},
    "objective": {"objective": "{it}"},
    "order": {"order": "{it}"},
    "schedule": {"schedule": "{it}"},
    "credit": {"credit": "{it}"},
    "engine": {"engine": "{it}"},
}  # fmt: skip


def filled(value: Any, it: str) -> Any:
    return json.loads(json.dumps(value).replace("{it}", it))


@pytest.mark.parametrize("key", NAMES)
@pytest.mark.parametrize("it", ["{evil}:thing", "os:system", "subprocess:run", "a.b.c:d"])
def test_a_runs_own_code_is_refused_by_name(evil: Path, tmp_path: Path, key: str, it: str):
    it = it.replace("{evil}", str(evil))
    run = run_of(tmp_path / "run", RECIPE | filled(NAMES[key], it))
    for call, given in (
        (find_team, (run, None)),
        (given_recipe, (run / "recipe.yaml", [], Trust())),
    ):
        line = refusal(call, *given)
        assert line.startswith(f"{run}/recipe.yaml: would run {it} (") and "--trust" in line
    assert not (tmp_path / "ran").exists()
    # With the word given the next thing that is missing is told.
    assert "no complete checkpoint" in refusal(find_team, run, None, Trust(code=True))
    assert given_recipe(run / "recipe.yaml", [], Trust(code=True))


def test_the_code_of_a_model_is_refused_by_name(state: Path, tmp_path: Path):
    agents = {"a": {"model": "somebody/model", "trust_remote_code": True}}
    run = run_of(tmp_path / "run", RECIPE | {"team": {"agents": agents}})
    line = refusal(find_team, run, None)
    assert "the code that comes with somebody/model (team.agents.a.trust_remote_code)" in line
    # Neither the model's name on the command line nor another model's code is a word for it.
    assert refusal(find_team, run, None, Trust.of(said={"model": "somebody/model"})) == line
    remember(yaml.safe_load((run / "recipe.yaml").read_text()) | {"x": 1})
    assert "no complete checkpoint" in refusal(find_team, run, None)


@pytest.mark.parametrize("part", ["task", "protocol"])
def test_a_manifests_code_is_refused(evil: Path, tmp_path: Path, part: str):
    folder = team(tmp_path / "team", **{part: {"name": f"{evil}:thing"}})
    line = refusal(find_team, folder, None)
    assert line.startswith(f"{folder}/manifest.json: would run {evil}:thing ({part}.name)")
    assert find_team(folder, None, Trust(code=True)).recipe
    # What a recipe of one's own gives in its place is not asked about.
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {part: f"{evil}:thing"}))
    assert find_team(folder, recipe).recipe
    assert not (tmp_path / "ran").exists()


def test_an_evaluation_asks_only_about_what_it_would_run(evil: Path, tmp_path: Path):
    asked: list[Any] = []
    contestant = Contestant([], NO_ENGINE, {}, task={"name": f"{evil}:thing"}, admit=asked.append)
    chosen_task(contestant, Wanted(benchmark="relay"), 0)
    assert [list(claims(document)) for document in asked] == [[]]
    own = Contestant(
        [],
        None,
        {},
        task={"name": f"{evil}:thing"},
        admit=lambda doc: Trust().admit(doc, "team"),
    )
    assert refusal(chosen_task, own, Wanted(), 0).startswith(
        f"team: would run {evil}:thing (task.name)"
    )
    assert not (tmp_path / "ran").exists()
    named = Trust.of(said=[f"{evil}:thing"])
    spoken = Contestant([], NO_ENGINE, {}, admit=lambda doc: named.admit(doc, "team"))
    refusal(chosen_task, spoken, Wanted(benchmark=f"{evil}:thing"), 0)  # it is no task
    assert (tmp_path / "ran").exists()


def test_the_engine_of_the_run_beside_a_team_is_asked_about(evil: Path, tmp_path: Path):
    run = run_of(tmp_path / "run", RECIPE | {"engine": f"{evil}:thing"})
    inner = team(run / "team", agents={"a": entry()})
    known = Trust.of(allowed=[SERVER])
    line = refusal(local_contestant, str(inner), None, 1, [], print, Servers(), known)
    assert line.startswith(f"{run}/recipe.yaml: would run {evil}:thing (engine.name)")
    assert not (tmp_path / "ran").exists()


def test_what_a_training_used_is_known_until_it_changes(evil: Path, state: Path, tmp_path: Path):
    run = run_of(tmp_path / "run", RECIPE | {"task": f"{evil}:thing"})
    ours = load_recipe(run / "recipe.yaml").model_dump(mode="json")
    remember(ours)
    (kept,) = (state / "own").iterdir()
    assert re.fullmatch("[0-9a-f]{64}", kept.name) and f"{evil}:thing" in kept.read_text()
    given_recipe(run / "recipe.yaml", [], Trust())
    # Another place is the same code; another name in the file, or another content, is not.
    moved = evil.with_name("moved.py")
    moved.write_bytes(evil.read_bytes())
    Trust().admit({"task": f"{moved}:thing"}, "x")
    assert "would run" in refusal(Trust().admit, {"task": f"{evil}:other"}, "x")
    evil.write_text(evil.read_text() + "# changed\n")
    assert "would run" in refusal(given_recipe, run / "recipe.yaml", [], Trust())
    assert not (tmp_path / "ran").exists()


def test_what_lies_in_the_run_is_no_word_of_the_users(evil: Path, state: Path, tmp_path: Path):
    run = run_of(tmp_path / "run", RECIPE | {"task": f"{evil}:thing"})
    digest = Code("task", f"{evil}:thing").digest
    for folder in (run / "own", tmp_path / "here" / "own", run / ".local" / "state" / "satune"):
        folder.mkdir(parents=True)
        (folder / str(digest)).touch()
    assert "would run" in refusal(given_recipe, run / "recipe.yaml", [], Trust())


def test_a_module_is_known_by_its_files_and_not_imported(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "satune_quiet"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (package / "inner.py").write_text("def thing(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    named = Code("task", "satune_quiet.inner:thing")
    first = named.digest
    assert first is not None and not (tmp_path / "ran").exists()
    assert "satune_quiet" not in sys.modules
    (package / "__init__.py").write_text("x = 1\n")
    assert named.digest not in (None, first)
    # Built in, no package, not there: only the first can be known.
    assert Code("task", "time:sleep").digest is not None
    assert Code("task", "os.path:join").digest is None
    assert Code("task", "satune_quiet.missing:thing").digest is None


def test_a_recipe_given_by_its_file_is_the_users_own(evil: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"task": f"{evil}:thing"}))
    assert given_recipe(recipe, [], Trust()).task.name == f"{evil}:thing"
    run = run_of(tmp_path / "run", RECIPE)
    said = Trust.of(said=[{"task": {"name": f"{evil}:thing"}}])
    assert given_recipe(run / "recipe.yaml", [f"task={evil}:thing"], said)


@pytest.mark.parametrize("command", ["train", "describe", "eval"])
def test_the_commands_refuse_in_one_line(
    evil: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    run = run_of(tmp_path / "run", RECIPE | {"task": f"{evil}:thing"})
    options = {"train": ["--resume"], "describe": [], "eval": []}[command]
    monkeypatch.setattr(sys, "argv", ["satune", command, str(run / "recipe.yaml"), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.count("\n") == 1 and f"would run {evil}:thing (task.name)" in err
    assert not (tmp_path / "ran").exists()


def test_a_training_remembers_what_it_used(state: Path, tmp_path: Path):
    recipe = tiny_world.build(tmp_path / "world")
    tiny_world.training(recipe, tmp_path / "out").save_recipe()
    assert given_recipe(tmp_path / "out" / "recipe.yaml", [], Trust())
    reward = tmp_path / "world" / "reward.py"
    reward.write_text(reward.read_text() + "\n")
    line = refusal(given_recipe, tmp_path / "out" / "recipe.yaml", [], Trust())
    assert f"would run {reward}:ordinals (task.reward)" in line


def test_a_state_directory_that_cannot_be_written_is_told(
    evil: Path, state: Path, caplog: pytest.LogCaptureFixture
):
    state.write_text("a file in its place")
    remember({"task": f"{evil}:thing"})
    (told,) = caplog.messages
    assert "cannot be written" in told and "--trust" in told and "\n" not in told


@pytest.mark.parametrize(
    "text",
    ["org/name:train", "org/name:config:split", "tiny:qwen3-s", "cuda:0", "localhost:8000",
     "say: yes", "a b:c", ":x", "x:", "1+1:x", "file.py:2x", "", "model:org/name"],
)  # fmt: skip
def test_what_no_code_is_named_by_is_not_asked_about(text: str):
    assert list(claims({"task": {"data": text}})) == []


# -- servers and keys -----------------------------------------------------------------------------

SECRET = "AWS_SECRET_ACCESS_KEY"


def served_team(folder: Path) -> Path:
    server = {"api_key_env": SECRET}
    return team(folder, agents={"a": entry(server=server)}, seats={"a": "a"})


def test_a_manifests_server_gets_neither_prompts_nor_a_key(state: Path, tmp_path: Path):
    folder = served_team(tmp_path / "team")

    def evaluated(trust: Trust) -> Contestant:
        return local_contestant(str(folder), None, 1, [], print, Servers(), trust)

    for call in (evaluated, lambda trust: find_team(folder, None, trust)):
        line = refusal(call, Trust())
        assert f"the key in ${SECRET} to {SERVER}" in line
        assert line.endswith(f"--allow-address {SERVER}={SECRET}")
        # Code is another matter, and an address alone does not name that key.
        assert refusal(call, Trust(code=True)) == line
        assert refusal(call, Trust.of(allowed=[SERVER])) == line
        assert refusal(call, Trust.of(allowed=[f"{SERVER}/../x={SECRET}"])) == line
        assert call(Trust.of(allowed=[f"{SERVER.upper().replace('/V1', '/v1')}/={SECRET}"]))
    remember({"agents": {"a": entry(server={"api_key_env": SECRET})}})
    assert evaluated(Trust())
    remember({"agents": {"a": entry(server={"api_key_env": "OTHER"})}})
    other = team(tmp_path / "other", agents={"a": entry(server={"api_key_env": "HF_TOKEN"})})
    assert "HF_TOKEN" in refusal(find_team, other, None)


@pytest.mark.parametrize("text", [f"{SERVER}#m", f"{SERVER.upper()}#m", f" {SERVER}/#m",
                                  "ht\ntps://collector.example#m"])  # fmt: skip
def test_every_way_to_write_an_address_is_one(text: str):
    (found,) = claims({"task": {"name": "arbench_gn", "host": text}})
    assert isinstance(found, Address) and found.key == "task.host"


def test_an_address_in_a_runs_recipe_is_asked_for(state: Path, tmp_path: Path):
    asked = {"model": f"{SERVER}#m", "frozen": True, "server": {"api_key_env": SECRET}}
    agents = {"a": {"model": "somebody/model"}, "b": asked}
    run = run_of(tmp_path / "run", RECIPE | {"team": {"agents": agents}})
    line = refusal(given_recipe, run / "recipe.yaml", [], Trust())
    assert line.startswith(f"{run}/recipe.yaml: team.agents.b.model would send") and SECRET in line
    # The override that names address and key is a word for both.
    over = {"team": {"agents": {"b": {"model": f"{SERVER}#m", "server": {"api_key_env": SECRET}}}}}
    assert given_recipe(run / "recipe.yaml", [], Trust.of(said=over))
    assert "no address" in refusal(Trust.of, allowed=["collector.example"])


def test_a_description_takes_the_word_that_its_refusal_asks_for(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked = {"model": f"{SERVER}#m", "frozen": True, "server": {"api_key_env": SECRET}}
    agents = {"a": {"model": "somebody/model"}, "b": asked}
    run = run_of(tmp_path / "run", RECIPE | {"team": {"agents": agents}})

    def described(*words: str) -> tuple[int, str, str]:
        argv = ["satune", "describe", str(run / "recipe.yaml"), "--json", *words]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    code, _, err = described()
    assert code == 2 and f"add --allow-address {SERVER}={SECRET}" in err
    code, out, err = described("--allow-address", f"{SERVER}={SECRET}")
    assert code == 0, err
    assert set(json.loads(out)["agents"]) == {"a", "b"}


def test_the_host_of_an_agent_is_asked_about_with_its_token(state: Path, tmp_path: Path):
    agents = {"a": {"model": "somebody/model"}, "b": {"model": "x", "host": SERVER}}
    run = run_of(tmp_path / "run", RECIPE | {"team": {"agents": agents}})
    line = refusal(given_recipe, run / "recipe.yaml", [], Trust())
    assert "team.agents.b.host would send" in line and "$SATUNE_HOST_TOKEN" in line
    agents["b"]["host_token_env"] = SECRET
    run = run_of(tmp_path / "other", RECIPE | {"team": {"agents": agents}})
    assert f"${SECRET}" in refusal(given_recipe, run / "recipe.yaml", [], Trust())
    # The owner's address on the command line is the user's word for it, and for its own token.
    over = {"team": {"agents": {"b": {"host": SERVER}}}}
    assert SECRET in refusal(given_recipe, run / "recipe.yaml", [], Trust.of(said=over))
    assert given_recipe(tmp_path / "run" / "recipe.yaml", [], Trust.of(said=over))


# -- names, sizes and paths -----------------------------------------------------------------------

AGENTS = {
    "a path for a directory": ({"a": {**entry(), "dir": "../secret"}}, "no name of one beside"),
    "an absolute directory": ({"a": {**entry(), "dir": "/etc"}}, "no name of one beside"),
    "no directory": ({"a": {**entry(), "dir": None}}, "has no dir"),
    "a link": ({"a": {**entry(), "dir": "link"}}, "leads out of the team's"),
    "a mixture elsewhere": (
        {"a": {**entry(), "dir": "a", "mixture": {"dir": "..", "delta": 1}}},
        "no name of one beside",
    ),
    "an agent that is a path": ({"../../a": {**entry(), "dir": "a"}}, "other characters"),
    "a file as template": (
        {"a": {**entry(), "dir": "a", "template": {"chat": "/etc/passwd"}}},
        "no Jinja text",
    ),
    "attention from the hub": ({"a": {**entry(), "dir": "a", "attention": "x/y"}}, "neither sdpa"),
    "no entry": ({"a": None}, "has no dir"),
    "an adapter of another's base": ({"a": {**entry(), "dir": "adapter"}}, "outside of the team"),
    "an adapter of its parent": ({"a": {**entry(), "dir": "upward"}}, "outside of the team"),
}  # fmt: skip


@pytest.mark.parametrize("name", AGENTS)
def test_a_manifest_stays_in_its_directory(tmp_path: Path, name: str):
    agents, said = AGENTS[name]
    for each in agents.values():
        if each is not None:
            del each["served"]
    folder = team(tmp_path / "team", agents=agents, seats={"s": next(iter(agents))})
    (folder / "link").symlink_to(tmp_path)
    for place, base in (("adapter", str(tmp_path / "private")), ("upward", "/x/..")):
        (folder / place).mkdir()
        config = {"base_model_name_or_path": base}
        (folder / place / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "private").mkdir()
    for read in (manifest_of, load_team):
        line = refusal(read, folder)
        assert (
            line.startswith(f"{folder}/manifest.json: damaged manifest (agents.") and said in line
        )


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[]", "7", '{"format": 1}', '{"format": 1, "agents": {"a": "' + "9" * 5000],
)
def test_a_manifest_that_is_none_is_one_line(tmp_path: Path, text: str):
    folder = team(tmp_path / "team")
    assert manifest_of(folder)["seats"] == {"a": "a"}
    (folder / "manifest.json").write_text(text)
    assert refusal(manifest_of, folder).startswith(f"{folder}/manifest.json")


def test_an_adapter_imports_nothing(tmp_path: Path):
    config = {
        "base_model_name_or_path": "x/y",
        "megatron_config": {"a": 1},
        "megatron_core": "this",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert "names a module to import" in refusal(saved_adapter, str(tmp_path))


def test_a_swap_copies_nothing_from_outside_of_the_run(state: Path, tmp_path: Path):
    run = run_of(tmp_path / "run", RECIPE)
    assert "no complete checkpoint" in refusal(find_team, run, None)
    (run / "episodes").mkdir()
    (run / "episodes" / "stage-0001.jsonl").symlink_to(tmp_path / "secret")
    assert "is a link that leads out of" in refusal(find_team, run, None)


def test_code_that_lies_beside_a_teams_models_is_not_run(tmp_path: Path):
    folder = team(tmp_path / "team")
    model = tiny_world.save_model(folder / "a")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    for file, kinds in (
        ("config.json", ["AutoConfig", "AutoModelForCausalLM"]),
        ("tokenizer_config.json", ["AutoTokenizer"]),
    ):
        path = model / file
        config = json.loads(path.read_text())
        name = ["evil.E", None] if kinds == ["AutoTokenizer"] else "evil.E"
        config["auto_map"] = dict.fromkeys(kinds, name)
        path.write_text(json.dumps(config))
    assert load_team(folder, device="cpu").seats == {"a": "a"}  # by transformers' own classes
    config = json.loads((model / "config.json").read_text()) | {"model_type": "unheard-of"}
    (model / "config.json").write_text(json.dumps(config))
    assert "agent a: cannot load model" in refusal(load_team, folder, device="cpu")
    assert not (tmp_path / "ran").exists()


TEMPLATES = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "another file": "{% include 'SECRET' %}",
    "an import": "{% import 'SECRET' as x %}",
    "the tokenizer": "{{ raise_exception.__globals__['__builtins__'] }}",
    "no number": "{{ 1 // 0 }}",
    "a long range": "{% for i in range(10000000) %}x{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_teams_template_is_text_in_a_sandbox(tmp_path: Path, name: str):
    (tmp_path / "secret").write_text("token: 5ecre7")
    text = TEMPLATES[name].replace("RAN", str(tmp_path / "ran"))
    chat = text.replace("SECRET", str(tmp_path / "secret"))
    agent = {**entry(template={"chat": chat}), "dir": "a"}
    del agent["served"]
    folder = team(tmp_path / "team", agents={"a": agent})
    tiny_world.save_model(folder / "a")
    line = refusal(load_team, folder, device="cpu")
    assert "template.chat: the chat template cannot be rendered" in line and "5ecre7" not in line
    assert not (tmp_path / "ran").exists()


def test_a_runs_recipe_reads_no_other_file(tmp_path: Path):
    (tmp_path / "secret.yaml").write_text("token: {x}\n")
    run = run_of(tmp_path / "run", RECIPE)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(f"base: ../secret.yaml\n{text}")
    assert "stands by itself" in refusal(given_recipe, run / "recipe.yaml", [], Trust())
    template = {"template": {"chat": str(tmp_path / "secret.yaml")}}
    data = yaml.safe_load(text)
    data["team"]["agents"]["a"].update(template)
    (run / "recipe.yaml").write_text(yaml.safe_dump(data))
    for call, given in (
        (find_team, (run, None)),
        (given_recipe, (run / "recipe.yaml", [], Trust())),
    ):
        assert "neither a Jinja template nor a file" in refusal(call, *given)
    said = f"team.agents.a.template.chat={tmp_path / 'secret.yaml'}"
    assert given_recipe(run / "recipe.yaml", [said], Trust())
