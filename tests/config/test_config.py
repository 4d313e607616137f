"""Recipes: defaults, overrides, the one line for everything that can be wrong, round trips."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from satune.agents.specs import ALL_LINEAR
from satune.commands.train import RESUMABLE, check_recipe_unchanged
from satune.config import schema, yaml12
from satune.config.derive import OWN, Named, models_in, sections_of
from satune.config.load import differences, load_recipe, recipe_text, save_recipe
from satune.core.settings import OBJECTIVES
from satune.engines.base import ENGINES
from satune.protocols.named import PROTOCOLS
from satune.tasks.catalog import TASKS, load_task
from satune.training.credit import CREDIT
from satune.training.ordering import ORDERS
from satune.training.run_directory import RunDirectory
from satune.training.schedules import SCHEDULES
from satune.types import ServedModel, UserError

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")

BASE = """\
team:
  agents:
    ada: {model: "tiny:qwen3-s"}
    ben: {model: "tiny:qwen3-s"}
task: relay
protocol: chain
"""


def choices(catalogue: Mapping[str, Any]) -> str:
    """The names of a catalogue as an error line gives them."""
    return ", ".join([*catalogue, OWN])


def write(folder: Path, text: str, name: str = "relay.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, *overrides: str) -> str:
    """The error's text with the folder taken off; it must be one line."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{path.parent}/", "")


@pytest.fixture
def relay(tmp_path: Path) -> Path:
    return write(tmp_path, BASE)


# Defaults and shapes


def test_defaults_are_the_papers_where_it_gives_one(relay: Path) -> None:
    recipe = load_recipe(relay)
    assert (recipe.objective.name, recipe.objective.options) == ("sat", {"clip": 0.2})
    assert (recipe.credit.name, recipe.credit.options["clip"]) == ("group", 5)
    assert (recipe.objective.reference_kl, recipe.objective.entropy) == (0, 0)
    region = recipe.trust_region
    assert (region.delta, region.quantile, region.beta, region.backtracks) == (0.05, 0.99, 0.001, 5)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (1e-5, 0.01)
    assert recipe.schedule == Named("hybrid", {"cap": None, "ess": 0.5})
    assert (recipe.rollout.top_p, recipe.rollout.top_k) == (1, 0)
    assert recipe.team.resolved().seats == {"ada": "ada", "ben": "ben"}


def test_options_of_tasks_and_protocols_pass_through(tmp_path: Path) -> None:
    text = BASE.replace("task: relay", "task: {name: relay, data: rows.jsonl, numbers: 5}")
    recipe = load_recipe(write(tmp_path, text), ["protocol.rounds=3"])
    assert (recipe.task.name, recipe.task.data) == ("relay", "rows.jsonl")
    assert recipe.task.options == {"numbers": 5}
    assert (recipe.protocol.name, recipe.protocol.options) == ("chain", {"rounds": 3})


def test_yaml_numbers_are_numbers(tmp_path: Path) -> None:
    text = BASE + "optimizer: {lr: 1e-5, eps: 1E-08}\nseed: 010\n"
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.optimizer.lr, recipe.optimizer.eps, recipe.seed) == (1e-5, 1e-8, 10)


# Overrides


def test_overrides_reach_any_depth_and_the_last_one_wins(relay: Path) -> None:
    recipe = load_recipe(
        relay,
        ["rollout.problems=8", "rollout.problems=9", "team.agents.ben.temperature=0.8",
         "optimizer.betas=[0.8, 0.9]", "objective=gspo", "objective.clip=0.1", "tiny.lr=1e-3"],
    )  # fmt: skip
    assert recipe.rollout.problems == 9
    assert recipe.team.agents["ben"].temperature == 0.8
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert (recipe.objective.name, recipe.objective.options) == ("gspo", {"clip": 0.1})
    assert recipe.tiny.lr == 1e-3


def test_an_objective_without_a_name_is_sat(relay: Path) -> None:
    objective = load_recipe(relay, ["objective.clip=0.3"]).objective
    assert (objective.name, objective.options) == ("sat", {"clip": 0.3})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.problems", "command line: 'rollout.problems' is not an override;"
         " write it as dotted.key=value"),
        ("=3", "command line: '=3' is not an override; write it as dotted.key=value"),
        ("rollout..samples=3", "command line: 'rollout..samples=3' is not an override;"
         " write it as dotted.key=value"),
        ("seed.x=3", "command line: seed: expected an integer, got keys (x)"),
        ("order.x.y=3", "command line: order.x: unknown key; the keys here are name"),
        ("team.agents.ada.model.x=3",
         "command line: team.agents.ada.model.x: team.agents.ada.model is 'tiny:qwen3-s'"
         " and has no keys"),
        ("team.agents.bem.temperature=0.5",
         "command line: team.agents.bem.temperature: the team has no agent 'bem'; did you mean"
         " 'ben'? (a new agent is given whole: team.agents.bem={model: ...})"),
        ("team.agents.zoe.lora.rank=3",
         "command line: team.agents.zoe.lora.rank: the team has no agent 'zoe'; the agents are"
         " ada, ben (a new agent is given whole: team.agents.zoe={model: ...})"),
        ("rollout.problms=3", "command line: rollout.problms: unknown key;"
         " did you mean rollout.problems?"),
        ("rollout.problems=many", "command line: rollout.problems: expected an integer,"
         " got 'many'"),
    ],
)  # fmt: skip
def test_bad_overrides(relay: Path, override: str, expected: str) -> None:
    assert message(relay, override) == expected


def test_an_override_may_add_an_agent(relay: Path) -> None:
    whole = "team.agents.dave={model: 'tiny:qwen3-s'}"
    agents = load_recipe(relay, [whole, "team.agents.dave.temperature=0.5"]).team.agents
    assert list(agents) == ["ada", "ben", "dave"]
    assert agents["dave"].temperature == 0.5


def test_an_override_that_is_not_yaml(relay: Path) -> None:
    text = message(relay, "optimizer.betas=[0.9,")
    assert text.startswith("command line: optimizer.betas: '[0.9,' is not YAML, line 1: ")


# One line for every fault. Each case adds its text to BASE.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rollout: {problems: many}", "rollout.problems: expected an integer, got 'many'"),
        ("rollout: {problems: true}", "rollout.problems: expected an integer, got true"),
        ("rollout: {problems: 1.5}", "rollout.problems: expected an integer, got 1.5"),
        ("rollout: {problems: 0}", "rollout.problems: expected a number of at least 1, got 0"),
        ("rollout:", "rollout: expected keys and values, got nothing (null)"),
        ("stages: [1]", "stages: expected an integer, got [1]"),
        ("optimizer: {lr: fast}", "optimizer.lr: expected a number, got 'fast'"),
        ("optimizer: {lr: .inf}", "optimizer.lr: expected a finite number, got inf"),
        ("optimizer: {lr: 0}", "optimizer.lr: expected a number above 0, got 0"),
        ("optimizer: {betas: [0.9, x]}", "optimizer.betas[1]: expected a number, got 'x'"),
        ("optimizer: {lr: 1e39}", "optimizer.lr: expected a number of at most 1e+30, got 1e+39"),
        ("optimizer: {betas: [0.9, 1.0]}",
         "optimizer.betas[1]: expected a number below 1, got 1.0"),
        ("optimizer: {betas: [-0.1, 0.9]}",
         "optimizer.betas[0]: expected a number of at least 0, got -0.1"),
        ("optimizer: {weight_decay: 1e9}",
         "optimizer.weight_decay: expected a number of at most 1e+06, got 1000000000.0"),
        ("optimizer: {eps: 1e-50}",
         "optimizer.eps: expected a number of at least 1e-30, got 1e-50"),
        ("optimizer: {autocast: fp8}",
         "optimizer.autocast: expected one of bfloat16, float16, got 'fp8'"),
        ("engine: {name: locl}", f"engine.name: expected one of {choices(ENGINES)}, got 'locl';"
         " did you mean 'local'?"),
        ("objective: {name: null}", f"objective.name: expected one of {choices(OBJECTIVES)},"
         " got 'None'"),
        ("log: {tensorboard: true}", "log.tensorboard: is log.report_to: [tensorboard] now"),
        ("checkpoint: {every: stages}", "checkpoint.every: expected one of step, stage or an"
         " integer, got 'stages'; did you mean 'stage'?"),
        ("checkpoint: {every: 0}", "checkpoint.every: expected one of step, stage or a number of at"
         " least 1, got 0"),
        ("order: statik", f"order.name: expected one of {choices(ORDERS)}, got 'statik';"
         " did you mean 'static'?"),
        ("credit: grup", f"credit.name: expected one of {choices(CREDIT)}, got 'grup';"
         " did you mean 'group'?"),
        ("credit: {baseline: man}", "credit.baseline: expected one of mean, leave_one_out, max,"
         " got 'man'; did you mean 'mean'?"),
        ("schedule: {name: fresh, ess: 0.3}",
         "schedule.ess: unknown key; the keys here are name, cap"),
        ("objective: {name: cispo, clip_high: 0}",
         "objective.clip_high: expected a number above 0, got 0"),
        ("log: {report_to: [wandbb]}", "log.report_to: expected one of tensorboard, wandb,"
         " trackio, mlflow, got 'wandbb'; did you mean 'wandb'?"),
        ("rolout: {problems: 3}", "rolout: unknown key; did you mean rollout?"),
        ("discount: {gamma: 0.99}",
         "discount: unknown key; the keys here are seed, team, task, protocol, rollout, schedule,"
         " order, objective, credit, critic, trust_region, gauge, optimizer, stages,"
         " evaluate, certify, engine, hosts, checkpoint, sharding, log, tiny"),
        ("objective: {name: sat, clipp: 0.1}",
         "objective.clipp: unknown key; did you mean objective.clip?"),
        ("objective: {name: dapo, clip_hi: 0.3}",
         "objective.clip_hi: unknown key; did you mean objective.clip_high?"),
        ("objective: {name: dapo, clip_low: x}",
         "objective.clip_low: expected a number, got 'x'"),
        ("objective: {name: gpso}", f"objective.name: expected one of {choices(OBJECTIVES)},"
         " got 'gpso'; did you mean 'gspo'?"),
        ("objective: gpso", f"objective.name: expected one of {choices(OBJECTIVES)},"
         " got 'gpso'; did you mean 'gspo'?"),
        ("objective: 3", "objective: expected keys and values, got 3"),
        ("schedule: frech", f"schedule.name: expected one of {choices(SCHEDULES)},"
         " got 'frech'; did you mean 'fresh'?"),
        ("seed: x\nstages: y\norder: z", "seed: expected an integer, got 'x' (and 2 more)"),
        ("seed: x\nstagse: 3", "stagse: unknown key; did you mean stages? (and 1 more)"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert message(write(tmp_path, BASE + text + "\n")) == f"relay.yaml: {expected}"


@pytest.mark.parametrize(
    ("team", "expected"),
    [
        ("{agents: {}}", "team.agents: expected at least 1 of them, got nothing"),
        ("{agents: {a: {}}}", "team.agents.a.model: is needed and not given"),
        ("{agents: {a: {modle: x, model: y}}}",
         "team.agents.a.modle: unknown key; did you mean team.agents.a.model?"),
        ("{agents: {a: {modle: x}}}",
         "team.agents.a.modle: unknown key; did you mean team.agents.a.model? (and 1 more)"),
        ("{agents: {a: {model: y, attention: flash}}}",
         "team.agents.a.attention: expected one of sdpa, eager, got 'flash'"),
        ("{agents: {a: {model: y, learning_rate: 1e39}}}",
         "team.agents.a.learning_rate: expected a number of at most 1e+30, got 1e+39"),
        ("{agents: {a: {model: 'http://h/v1#m', frozen: true, attention: eager}, b: {model: y}}}",
         "team.agents.a.attention: its server computes a served model; remove the key"),
        ("{agents: {a: {model: 'http://h/v1#m', frozen: true, device: cpu}, b: {model: y}}}",
         "team.agents.a.device: its server computes a served model; remove the key"),
        ("{agents: {a: {model: 'http://h/v1'}}}",
         "team.agents.a.model: a model at h: give http://ADDRESS/v1#MODEL"),
        ("{agents: {a: {model: 'http://u:pw@h/v1#m'}}}",
         "team.agents.a.model: a model at h: its address holds a key or a query; give the key in an"
         " environment variable (server.api_key_env)"),
        ("{agents: {a: {model: 3}}}", "team.agents.a.model: expected a text, got 3"),
        ("{agents: {a: {model: ''}}}",
         "team.agents.a.model: expected a text that is not empty, got ''"),
        ("{agents: {a: {model: {address: 'http://h/v1', name: m}}}}",
         "team.agents.a.model: expected a text, got keys (address, name)"),
        ("{agents: {a.b: {model: y}}}",
         "team.agents.a.b: expected a name of letters, digits, '-' and '_', got 'a.b'"),
        ("{agents: {a: {model: y, lora: {rnk: 3}}}}",
         "team.agents.a.lora.rnk: unknown key; did you mean team.agents.a.lora.rank?"),
        ("{agents: {a: {model: y, lora: {targets: [q, 3]}}}}",
         "team.agents.a.lora.targets[1]: expected a text, got 3"),
        ("{agents: {a: {model: y}}, seats: {s: 3}}", "team.seats.s: expected a text, got 3"),
    ],
)  # fmt: skip
def test_a_wrong_team_is_one_line(tmp_path: Path, team: str, expected: str) -> None:
    path = write(tmp_path, f"team: {team}\ntask: relay\nprotocol: chain\n")
    assert message(path) == f"relay.yaml: {expected}"


def test_a_key_that_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path, BASE.replace("task: relay\n", ""))
    assert message(path) == "relay.yaml: task: is needed and not given"


# Files


def test_a_missing_file_names_the_nearest_one(relay: Path) -> None:
    assert message(relay.with_name("realy.yaml")) == (
        "realy.yaml: no such file; did you mean relay.yaml?"
    )


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"relay\.yaml: no such file; the folder .*nowhere does"):
        load_recipe(tmp_path / "nowhere" / "relay.yaml")


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory; give the YAML file in it"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("seed: 1\nteam: {a: [1\n", "relay.yaml, line 3: "),
        ("seed: 1\nstages: 2\nseed: 3\n", "relay.yaml, line 3: the key 'seed' stands here"),
        ("seed: 1\n\tstages: 2\n", "relay.yaml, line 2: "),
        ("", "relay.yaml: is empty; a recipe needs at least team, task and protocol"),
        ("# nothing\n", "relay.yaml: is empty"),
        ("- 1\n- 2\n", "relay.yaml: expected keys such as team, task and protocol, got [1, 2]"),
    ],
)
def test_damaged_yaml_names_the_line(tmp_path: Path, text: str, start: str) -> None:
    assert message(write(tmp_path, text)).startswith(start)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "relay.yaml"
    path.write_bytes(b"seed: \xff\xfe")
    assert message(path) == "relay.yaml: not a text in UTF-8 (byte 6)"


def test_yaml_builds_plain_data_only(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: !!python/object/apply:os.getcwd []\n")
    assert "could not determine a constructor" in message(path)


def test_values_need_no_groups(relay: Path) -> None:
    recipe = load_recipe(relay, ["rollout.samples=1", "credit=gae", "critic.kind=head"])
    assert recipe.critic.rate == 1e-3 and recipe.critic.discount == 0.99
    assert load_recipe(relay, ["critic.kind=model", "credit=gae"]).critic.rate == 1e-5


# Keys that do not go together


@pytest.mark.parametrize(
    ("overrides", "key", "says"),
    [
        (["rollout.samples=1"], "rollout.samples", "use at least 2"),
        (["rollout.samples=1", "objective=reinforce"], "rollout.samples", "use at least 2"),
        (["credit=gae"], "credit.name", "gae asks a critic, but there is none; set critic.kind"),
        (["critic.kind=head"], "critic.kind", "values that credit 'group' never asks for"),
        (["credit=gae", "critic={kind: head, model: m}"], "critic.model", "is for critic.kind"),
        (["credit=gae", "critic={kind: model, model: 'http://localhost/v1#m'}"], "critic.model",
         "must be a model that can be trained here"),
        (["critic.likelihoods=true"], "critic.likelihoods", "is for a critic; set critic.kind"),
        (["credit=gae", "critic={kind: head, likelihoods: true}",
          "team.agents.ben.host='https://there'"], "critic.likelihoods",
         "'ben' lives at a host, which does not tell how likely its tokens were"),
        (["credit={name: gae, traces: true}", "critic.kind=head", "schedule=stale"],
         "credit.traces", "which schedule 'stale' does not; use reuse or hybrid"),
        (["rollout.top_p=0.9"], "rollout.top_p", "0.9 would make the policy's support depend"),
        (["rollout.top_k=50"], "rollout.top_k", "50 would make the policy's support depend"),
        (["team.seats={one: ada, two: bem, three: ben}"], "team.seats.two",
         "the team has no agent 'bem'; did you mean 'ben'?"),
        (["team.seats={one: ada}"], "team.agents.ben", "fills no seat"),
        (["protocol={name: judge, judge: beb}"], "protocol.judge",
         "the team has no seat 'beb'; did you mean 'ben'?"),
        (["protocol={name: role_play, roles: {zoe: solver}}"], "protocol.roles.zoe",
         "the team has no seat 'zoe'; the seats are ada, ben"),
        (["team.agents.ada.lora.dropout=0.1"], "team.agents.ada.lora.dropout", "must be 0"),
        (["team.agents.ada.delta=0"], "team.agents.ada.delta", "must be above 0, got 0"),
        (["trust_region.delta=-1"], "trust_region.delta",
         "expected a number above 0, got -1; to leave an agent as it is"),
        (["team.agents.ada.temperature=0"], "team.agents.ada.temperature", "must be above 0"),
        (["team.agents.ada.frozen=true", "team.agents.ben.frozen=true"], "team.agents",
         "all agents are frozen"),
        (["team.sharing=shared", "team.agents.ben.temperature=0.8"],
         "team.agents.ben.temperature",
         "'ada' and 'ben' share their weights and so must agree on temperature"),
        (["team.sharing=shared", "team.agents.ben.model=tiny:llama-s"], "team.agents.ben.model",
         "must agree on model"),
        (["rollout.problems=1", "rollout.samples=2"], "optimizer.mini_batches",
         "4 mini-batches cannot be cut from 2 episodes"),
        (["credit.overlong_buffer=512"], "credit.overlong_buffer",
         "must be below rollout.max_new_tokens (512), got 512"),
        (["rollout.ahead=1", "schedule=fresh"], "rollout.ahead", "reuse or hybrid, got 'fresh'"),
        (["rollout.ahead=1", "schedule=stale"], "rollout.ahead", "reuse or hybrid, got 'stale'"),
        (["rollout={ahead: 1, dynamic_sampling: true}"], "rollout.dynamic_sampling",
         "nobody knows ahead where the next batch begins"),
        (["rollout.ahead=1", "credit={name: gae, traces: true}", "critic.kind=head"],
         "credit.traces", "own turns are old too with rollout.ahead; set traces to false"),
        (["rollout.ahead=1", "order=greedy"], "order.name", "take another order or remove"),
        (["rollout.ahead=1", "sharding={}"], "rollout.ahead", "one process; remove it or sharding"),
        (["rollout.ahead=1", "team.agents.ben.host='https://there'"], "rollout.ahead",
         "needs the weights of every agent that learns here"),
        (["rollout.ahead=-1"], "rollout.ahead", "at least 0, got -1"),
        (["team.sharing=shared", "team.agents.ben.device=cuda:1"], "team.agents.ben.device",
         "'ada' and 'ben' share their weights and so must agree on device"),
        (["team.sharing=lora", "team.agents.ben.device=cuda:1"], "team.agents.ben.device",
         "adapters on one base, which lies on one device, and here are auto and cuda:1"),
        (["sharding={}", "team.agents.ben.device=cuda"], "team.agents.ben.device",
         "every process holds a part of every agent; remove it or sharding"),
    ],
)  # fmt: skip
def test_cross_checks(relay: Path, overrides: list[str], key: str, says: str) -> None:
    text = message(relay, *overrides)
    where, at, rest = text.split(": ", 2)
    assert where in ("command line", "relay.yaml")
    assert at == key
    assert says in rest
    assert "more)" not in rest


def test_nearby_recipes_pass_the_cross_checks(relay: Path) -> None:
    load_recipe(relay, ["rollout.samples=2", "rollout.problems=2"])
    load_recipe(relay, ["team.agents.ada.frozen=true", "team.agents.ada.delta=1e-6"])
    load_recipe(relay, ["protocol={name: judge, judge: ben}"])
    load_recipe(relay, ["protocol={name: role_play, roles: {ada: solver}}"])
    assert load_recipe(relay, ["credit.overlong_buffer=511"]).credit.name == "group"
    for schedule in ("reuse", "hybrid"):
        load_recipe(relay, ["rollout.ahead=2", f"schedule={schedule}", "order=random"])
    load_recipe(relay, ["rollout.ahead=1", "credit=gae", "critic.kind=head"])
    apart = ["team.agents.ada.device=cuda:0", "team.agents.ben.device=cuda:1"]
    load_recipe(relay, apart)
    load_recipe(relay, [*apart, "team.sharing=lora", "team.agents.ben.model=tiny:llama-s"])
    # Elsewhere, and named in another way, the device is the same.
    load_recipe(relay, [*apart, "team.sharing=lora", "team.agents.ben.host='https://there'"])
    load_recipe(relay, [apart[0], "team.device=cuda:0", "team.sharing=lora"])
    dapo = load_recipe(relay, ["objective=dapo", "objective.clip_low=null"]).objective
    assert dapo.options == {"clip_low": None, "clip_high": 0.28}


# Sharing


def test_shared_agents_collapse_into_the_first(relay: Path) -> None:
    team = load_recipe(relay, ["team.sharing=shared"]).team.resolved()
    assert list(team.agents) == ["ada"]
    assert team.seats == {"ada": "ada", "ben": "ada"}
    seats = ["team.sharing=shared", "team.seats={plan: ben, solve: ada, check: ben}"]
    assert load_recipe(relay, seats).team.resolved().seats == {
        "plan": "ada",
        "solve": "ada",
        "check": "ada",
    }


def test_sharing_lora_gives_every_agent_an_adapter(relay: Path) -> None:
    overrides = ["team.sharing=lora", "team.agents.ben.lora={rank: 4, alpha: 8, targets: [q_proj]}"]
    recipe = load_recipe(relay, overrides)
    agents = recipe.team.resolved().agents
    ada, ben = agents["ada"].lora, agents["ben"].lora
    assert ada is not None
    assert ben is not None
    assert (ada.rank, ada.targets) == (16, ALL_LINEAR)
    assert (ben.rank, ben.alpha, ben.targets) == (4, 8, ("q_proj",))
    assert recipe.team.agents["ada"].lora is None


# Templates


def test_a_template_file_becomes_part_of_the_recipe(tmp_path: Path) -> None:
    template = write(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}\n", "chat.jinja")
    path = write(tmp_path, BASE)
    recipe = load_recipe(path, [f"team.agents.ada.template.chat={template}"])
    assert recipe.team.agents["ada"].template.chat == template.read_text()
    save_recipe(recipe, tmp_path / "saved.yaml")
    template.unlink()
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_a_template_that_is_neither_text_nor_file(relay: Path) -> None:
    assert message(relay, "team.agents.ada.template.chat=chatml") == (
        "team.agents.ada.template.chat: 'chatml' is neither a Jinja template nor a file"
    )


def test_what_vllm_is_not_given(relay: Path) -> None:
    assert message(relay, "engine=vllm").startswith(
        "relay.yaml: team.agents.ada.model: is too small a model for vLLM; use engine: local"
    )
    real = ["team.agents.ada.model=org/M", "team.agents.ben.model=org/M", "engine=vllm"]
    assert load_recipe(relay, real).engine.options["probe"] == 320
    devices = load_recipe(relay, [*real, "engine.devices=[1, 2]"]).engine.options["devices"]
    assert devices == (1, 2)
    assert message(relay, *real, "engine.servers=[localhost:8000]") == (
        "command line: engine.servers[0]: expected http://HOST:PORT, got 'localhost:8000'"
    )
    assert "expected http://HOST:PORT" in message(relay, *real, "engine.servers=[http://h:1/v1]")
    assert "leave them out" in message(relay, *real, "engine.servers=[http://me:word@h:1]")
    assert message(relay, *real, "engine.context=100") == (
        "command line: engine.context: must be above rollout.max_new_tokens (512), or no prompt has"
        " room, got 100"
    )
    assert message(relay, *real, "team.dtype=float64") == (
        "command line: team.dtype: vLLM does not compute in float64; use float32 or engine: local"
    )
    assert message(relay, *real, "engine.rows=3") == (
        "command line: engine.rows: unknown key; did you mean engine.max_rows?"
    )


# Documentation


def test_every_key_is_documented_with_its_default() -> None:
    documented = defaults(GUIDE)
    headings = " ".join(line for line in GUIDE.splitlines() if line.startswith("#"))
    for section in sections(schema.Recipe):
        for name, field in section.model_fields.items():
            if sections_of(field):
                assert name in headings or name in documented
                continue
            shown = documented.get(name, [])
            assert shown, f"{section.__name__}.{name} is not in the tables"
            plain = isinstance(field.default, bool | int | float | str | None)
            # The seats' default is said in words; "name" stands for every objective at once.
            if plain and name not in ("seats", "name"):
                # repr tells 1 from true; a whole number may stand for a float.
                known = {repr(value) for value in shown}
                known |= {repr(float(value)) for value in shown if type(value) is int}
                assert repr(field.default) in known, f"{section.__name__}.{name}: {known}"


def defaults(text: str) -> dict[str, list[Any]]:
    """Last part of a key to the defaults that the tables of a Markdown text give for it."""
    found: dict[str, list[Any]] = {}
    for row in table_rows(text):
        key = next((cell for title, cell in row.items() if title.endswith("key")), None)
        if key is not None and "default" in row:
            found.setdefault(key.split(".")[-1], []).append(yaml12.parse(row["default"]))
    return found


def table_rows(text: str) -> Iterator[dict[str, str]]:
    """Each row of each table of a Markdown text, by the titles of its columns."""
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip().replace("`", "") for cell in line.split("|")[1:-1]]
        if not cells:
            header = []
        elif not header:
            header = cells
        elif not set(cells[0]) <= {"-"}:
            yield dict(zip(header, cells, strict=True))


def options_of(kind: str, names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options with their defaults that the table of tasks or protocols gives for each name."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for row in table_rows(GUIDE):
        if row.keys() >= {kind, "option", "default"}:
            every = row[kind] == "every"
            for name in names if every else row[kind].split(", "):
                assert row["option"] not in found[name], f"{name}: {row['option']} stands twice"
                if row["option"] != "none":
                    found[name][row["option"]] = yaml12.parse(row["default"])
    return found


def options_in_code(function: Callable[..., Any], skip: int = 0) -> dict[str, Any]:
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    needed = inspect.Parameter.empty
    return {p.name: "needed" if p.default is needed else p.default for p in parameters}


@pytest.mark.parametrize("name", list(TASKS))
def test_every_option_of_a_task_is_documented(name: str) -> None:
    documented, code = options_of("task", TASKS)[name], options_in_code(TASKS[name])
    # What stands for these two is no value: the run's seed, and that data are needed or published.
    assert documented.pop("seed") == "the run's"
    code.pop("seed")
    if "data" in code:
        source = documented.pop("data")
        assert source in ("needed", "published", None)
        assert code.pop("data") is None
        if source == "needed":
            with pytest.raises(UserError, match="needs data"):
                load_task(name)
        elif source is None:
            assert getattr(load_task(name), "fresh", False)
    assert documented == code


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_every_option_of_a_protocol_is_documented(name: str) -> None:
    listed = [row["protocol"] for row in table_rows(GUIDE) if "protocol" in row]
    assert name in listed
    code = options_in_code(PROTOCOLS[name], skip=1)
    assert options_of("protocol", PROTOCOLS)[name] == code


def test_what_a_resume_may_change_is_documented(relay: Path, tmp_path: Path) -> None:
    documented = [row["may differ"] for row in table_rows(GUIDE) if "may differ" in row]
    assert documented == list(RESUMABLE)
    directory = RunDirectory(tmp_path / "run")
    directory.start()
    save_recipe(load_recipe(relay), directory.recipe)
    for allowed in (
        "stages=3", "team.device=cpu", "team.agents.ben.device=cuda:1",
        "team.cache=/elsewhere", "optimizer.micro_batch_tokens=9",
        "optimizer.offload=none", "engine.max_rows=8", "checkpoint.keep=9",
        "log.report_to=tensorboard", "log.report_conversations=3", "log.project=other",
    ):  # fmt: skip
        check_recipe_unchanged(directory, load_recipe(relay, [allowed]))
    for other in (
        "seed=1", "team.dtype=float64", "team.agents.ben.frozen=true", "task.numbers=5",
        "team.agents.ben.model=tiny:llama-s", "protocol.rounds=2", "rollout.problems=4",
        "schedule=fresh", "schedule.ess=0.4", "order=random", "objective.clip=0.1",
        "credit.normalise=false", "trust_region.delta=0.1", "optimizer.lr=0.1",
        "evaluate.every=1", "certify.problems=4", "tiny.steps=9",
    ):  # fmt: skip
        with pytest.raises(UserError, match=other.partition("=")[0]):
            check_recipe_unchanged(directory, load_recipe(relay, [other, "stages=3"]))


def test_a_served_model_is_read_once_and_saved_as_it_was_written(
    relay: Path, tmp_path: Path
) -> None:
    written = "http://Host:80/v1/#org/M"
    at = f"team.agents.ben.model={written}"
    recipe = load_recipe(relay, [at, "team.agents.ben.frozen=true"])
    models = [agent.model for agent in recipe.team.agents.values()]
    assert models == ["tiny:qwen3-s", ServedModel("http://Host:80/v1/", "org/M")]
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert recipe.model_dump(mode="json")["team"]["agents"]["ben"]["model"] == written
    again = load_recipe(tmp_path / "saved.yaml")
    assert again == recipe and differences(again, recipe) == []


def test_a_served_models_address_may_change_and_its_name_may_not(
    relay: Path, tmp_path: Path
) -> None:
    def at(address: str) -> list[str]:
        return [f"team.agents.ben.model={address}", "team.agents.ben.frozen=true"]

    directory = RunDirectory(tmp_path / "run")
    directory.start()
    save_recipe(load_recipe(relay, at("http://a/v1#M")), directory.recipe)
    moved = [*at("http://b:8000/v1#M"), "team.agents.ben.server={timeout: 3}"]
    check_recipe_unchanged(directory, load_recipe(relay, moved))
    with pytest.raises(UserError, match=r"team\.agents\.ben\.model"):
        check_recipe_unchanged(directory, load_recipe(relay, at("http://a/v1#N")))


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The section and all those inside it."""
    yield model
    for field in model.model_fields.values():
        inner = sections_of(field)
        if typing.get_origin(field.annotation) is dict:
            inner = models_in(typing.get_args(field.annotation)[1])
        for _, section in inner:
            yield from sections(section)


# Saving


def test_what_is_saved_loads_back_equal(tmp_path: Path, relay: Path) -> None:
    recipe = load_recipe(
        relay,
        ["objective=dapo", "task.numbers=5", "task.data='1e-5'", "protocol={name: judge,"
         " judge: ben}", "team.seats={ada: ada, ben: ben}", "schedule.cap=2", "optimizer.lr=3e-4"],
    )  # fmt: skip
    save_recipe(recipe, tmp_path / "saved.yaml")
    again = load_recipe(tmp_path / "saved.yaml")
    assert again == recipe
    assert recipe_text(again) == recipe_text(recipe)
    assert again.task.data == "1e-5"


def test_differences_name_the_keys(relay: Path) -> None:
    ours = load_recipe(relay)
    theirs = load_recipe(relay, ["seed=1", "team.agents.ben.temperature=0.5", "task.numbers=3"])
    assert differences(ours, ours) == []
    assert differences(ours, theirs) == ["seed", "team.agents.ben.temperature", "task.numbers"]


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text("abc1e-.~", min_size=1, max_size=5), inner)
    ),
    max_leaves=8,
)


@given(plain)
def test_any_plain_data_survives_yaml(data: Any) -> None:
    assert yaml12.parse(yaml12.dump(data)) == data


@pytest.mark.parametrize(
    "settings",
    ["lr: 1e30, weight_decay: 1e6", "eps: 1e-30", "eps: 1e30", "betas: [0, 0]",
     "betas: [0.9999999, 0.9999999]", "lr: 1e30, betas: [0, 0.9999999], eps: 1e-30"],
)  # fmt: skip
def test_what_the_recipe_takes_the_optimiser_takes(tmp_path: Path, settings: str) -> None:
    optimizer = load_recipe(write(tmp_path, f"{BASE}optimizer: {{{settings}}}\n")).optimizer
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 0.5)
    adam = torch.optim.AdamW(
        [weight], optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay, foreach=True
    )
    adam.step()  # a number that float32 does not hold would raise here
    adam.step()
