"""A model of its own for the roles of an environment, beside the team's engine."""

from __future__ import annotations

import asyncio
import json

import pytest
import yaml

import tiny_world
from satune.agents.pretrained import AgentSpec, Precision, load_policies
from satune.commands.assemble import assemble, no_progress
from satune.commands.contestant import local_contestant
from satune.commands.evaluate import Wanted, examine
from satune.config.load import load_recipe
from satune.engines.roles import LocalRole, WithRoles, with_roles
from satune.engines.servers import Servers
from satune.play.match import Match
from satune.play.rollout import rollout_sync
from satune.types import EpisodeFailure, Key, Prompt, Sampling, ServedModel, UserError
from scripted import ScriptedEngine

PUZZLES = [
    {"id": f"p{i}", "surface": f"{i}+{i}", "bottom": str(2 * i), "key_question": []}
    for i in range(1, 4)
]

ASKING = """
async def asking(talk):
    await talk.say(talk.seats[0])
    return "Q: is it so?"
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    recipe = tiny_world.build(folder, ("ann",))
    tiny_world.save_model(folder / "host", seed=7, context=8192)
    tiny_world.save_model(folder / "player", seed=8, context=8192)
    (folder / "sp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PUZZLES))
    return folder, recipe


def recipe_with(world, name, **task):
    folder, path = world
    raw = yaml.safe_load(path.read_text())
    raw["team"]["agents"]["ann"]["model"] = str(folder / "player")
    raw["task"] = {"name": "arbench_sp", "data": str(folder / "sp.jsonl"), "max_turns": 2, **task}
    raw["task"]["eval_fraction"] = 0.0
    target = folder / f"{name}.yaml"
    target.write_text(yaml.safe_dump(raw))
    return load_recipe(target)


def play(cast):
    return rollout_sync(
        Match(cast.team.seats_for(6), cast.protocol, cast.engine, cast.task),
        list(cast.task.problems("all")),
        2,
        Key(3, "evaluate"),
    )


def role(world):
    spec = AgentSpec("host", str(world[0] / "host"))
    options = {"shared_base": False, "precision": Precision.of("float32"), "device": "cpu"}
    return LocalRole(load_policies([spec], seed=0, **options)["host"])


def ask(engine, *contents):
    key = Key(0, "environment", problem="p")
    roles = ("system", *("user", "assistant") * len(contents))
    messages = tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=False))
    sampling = Sampling(5, temperature=0.7, top_p=0.7)
    return asyncio.run(engine.generate("environment", Prompt(messages), sampling, key))


def test_a_team_plays_against_a_model_in_this_process_the_same_way_each_time(world):
    recipe = recipe_with(world, "local", host=f"model:{world[0] / 'host'}")
    cast = assemble(recipe)
    assert isinstance(cast.engine, WithRoles)
    episodes = play(cast)
    assert [len(e.observations) for e in episodes] == [2] * 6
    assert all(0.0 <= e.reward <= 1.0 for e in episodes)
    again = play(assemble(recipe))
    assert [[t.text for t in e.turns] for e in again] == [
        [t.text for t in e.turns] for e in episodes
    ]
    assert [e.environment_tokens for e in again] == [e.environment_tokens for e in episodes]


def test_a_server_is_opened_by_whoever_assembles(world):
    opened = []

    class Server(ScriptedEngine):
        async def generate(self, seat, prompt, sampling, key):
            opened.append((seat, prompt.messages[0]["role"], key.purpose))
            return await super().generate(seat, Prompt(({},)), sampling, key)

    class Known(Servers):
        def model(self, model, key_variable=None):
            opened.append(model)
            return Server(lambda *_: "Yes")

    recipe = recipe_with(world, "server", host="http://localhost:1/v1#m")
    cast = assemble(recipe, no_progress, Known())
    assert opened == [ServedModel("http://localhost:1/v1", "m")]
    play(cast)
    assert all(call == ("environment", "system", "environment") for call in opened[1:])


@pytest.mark.parametrize("kind", ["local", "served"])
def test_an_evaluation_attaches_roles_once(world, tmp_path, monkeypatch, kind):
    loaded, opened = [], []

    def counted(specs, **options):
        loaded.append((specs[0].model, options["device"], options["precision"]))
        return load_policies(specs, **options)

    def open_server(model):
        opened.append(model)
        return ScriptedEngine(lambda *_: "Yes")

    monkeypatch.setattr("satune.engines.roles.load_policies", counted)
    host = f"model:{world[0] / 'host'}" if kind == "local" else "http://localhost:1/v1#m"
    recipe_with(world, f"once-{kind}", host=host)
    (tmp_path / "asking.py").write_text(ASKING)
    path = world[0] / f"once-{kind}.yaml"
    contestant = local_contestant(
        str(path), path, 1, ["team.dtype=float64"], no_progress, Servers()
    )
    contestant.open_server = open_server
    data, protocol = str(world[0] / "sp.jsonl"), f"{tmp_path / 'asking.py'}:asking"
    wanted = Wanted(samples=1, data=data, protocol=protocol, max_new_tokens=4)
    report = asyncio.run(examine(contestant, wanted, tmp_path, no_progress))
    assert report["environment_tokens"] > 0
    # Where the recipe's team lies, and in its precision.
    local = [(str(world[0] / "host"), "cpu", Precision.of("float64"))]
    served = [ServedModel("http://localhost:1/v1", "m")]
    assert (loaded, opened) == ((local, []) if kind == "local" else ([], served))


def test_without_a_model_for_roles_the_teams_engine_stays_as_it_is(world):
    team = ScriptedEngine(lambda *_: "")
    options = {"precision": Precision.of("float32"), "device": "cpu"}
    options["open_server"] = Servers().model
    assert with_roles(team, None, **options) is team
    with pytest.raises(UserError, match="agent host: cannot load model"):
        with_roles(team, str(world[0] / "nowhere"), **options)


def test_only_what_the_environment_asks_goes_to_its_model():
    team, roles = ScriptedEngine(lambda *_: "team"), ScriptedEngine(lambda *_: "role")
    engine = WithRoles(team, roles)
    key = Key(0, "evaluate")
    prompt, sampling = Prompt(({},)), Sampling(1)

    async def both():
        one = await engine.generate("environment", prompt, sampling, key)  # a seat of that name
        two = await engine.generate("x", prompt, sampling, key.at(purpose="environment"))
        return one.text, two.text

    assert asyncio.run(both()) == ("team", "role")
    engine.begin(key)
    engine.end(key)
    assert (team.begun, team.ended, roles.begun) == ([key], [key], [])


def test_a_full_context_loses_its_oldest_questions(world):
    host = role(world)
    object.__setattr__(host._policy.config, "max_position_embeddings", 120)
    short = ask(host, "1+1", "c")
    long = ask(host, "1+1", *("9" * 30, "8" * 30) * 20, "c")
    assert long.prompt_tokens <= 115 and long.prompt_tokens > short.prompt_tokens
    with pytest.raises(EpisodeFailure, match=r"host: \d+ tokens of a prompt and 5 new ones exceed"):
        ask(host, "1" * 400, "c")


def test_a_template_that_refuses_instructions_gets_them_with_the_first_question(world):
    spec = AgentSpec("host", str(world[0] / "host"))
    options = {"shared_base": False, "precision": Precision.of("float32"), "device": "cpu"}
    policy = load_policies([spec], seed=0, **options)["host"]
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }};{% endfor %}"
    )
    host = LocalRole(policy)
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]
    assert policy.tokenizer.decode(host._ids(host._text(messages))).replace(" ", "") == "1\n\n2;"
    policy.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        LocalRole(policy)
