"""What a recipe would take on hardware that is not here: worked out by hand for one agent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config

from satune.agents.architectures import active_parameters
from satune.cli.describe import plan_lines
from satune.commands import hardware
from satune.commands.describe import describe_recipe, laid_out
from satune.commands.hardware import Assumed, Device, plan
from satune.config.load import load_recipe
from satune.types import UserError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# Qwen3-0.6B: 28 layers of 1,024, 16 heads of 128, 8 of them with keys and values, tied embeddings.
MODEL = "Qwen/Qwen3-0.6B"
THREE = {
    name: {"model": MODEL, "device": f"cuda:{n}"} for name, n in (("a", 0), ("b", 1), ("c", 1))
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"team: {{agents: {{a: {{model: {MODEL}}}}}, dtype: bfloat16}}\n"
        "gauge: {every: 0}\ntask: relay\nprotocol: vote\nschedule: fresh\nstages: 3\n"
        "rollout: {problems: 4, samples: 2, max_new_tokens: 100}\n"
        "optimizer: {micro_batch_tokens: 1024}\n"
    )
    return path


def test_a_stage_of_one_agent_by_hand(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_recipe(recipe)
    parameters = describe_recipe(loaded)["agents"]["a"]["parameters"]
    # Embeddings 151,936 × 1,024; a layer: q and o 2,048 × 1,024, k and v 1,024 × 1,024, three
    # of 3,072 × 1,024, norms 2 × 1,024 and 2 × 128; the last norm.
    layer = 2 * 2048 * 1024 + 2 * 1024 * 1024 + 3 * 3072 * 1024 + 2 * 1024 + 2 * 128
    assert parameters == 151936 * 1024 + 28 * layer + 1024
    # A device of 10^14 operations and 10^12 bytes a second, reached by half and by a fifth.
    monkeypatch.setitem(hardware.DEVICES, "box", Device(100e9, 1e12, 1e14, 1e13))
    found = plan(loaded, "box", 1, Assumed(50, None, 0.5, 0.2))
    attention, cache = 4 * 28 * 16 * 128, 2 * (2 * 28 * 8 * 128)
    # 8 messages at once: every token reads the weights and 8 × (50 + 100 / 2) tokens of cache.
    reading = (2 * parameters + 8 * cache * 100) / (0.2 * 1e12)
    counting = 8 * (2 * parameters + attention * 100) / (0.5 * 1e14)
    assert reading > counting
    prompts = 8 * 50 * (2 * parameters + attention * 25) / (0.5 * 1e14)
    rollout = 100 * reading + prompts
    # A problem's prompt once for two samples: 8 × (100 + 25) tokens; one forward for the anchor,
    # three for the epoch and two for what is measured.
    once = 8 * 125 * (2 * parameters + attention * 100)
    learning = 6 * once / (0.5 * 1e14)
    assert found["rows"] == {"a": 8}
    assert found["seconds"]["rollout"] == pytest.approx([rollout] * 2)
    assert found["seconds"]["learning"] == pytest.approx([learning] * 2)
    assert found["seconds"]["stage"] == pytest.approx([rollout + learning] * 2)
    assert found["device_hours"] == pytest.approx([3 * (rollout + learning) / 3600] * 2)
    # 17 numbers a layer, unit and token in 16 bits.
    assert found["memory"]["activations"] == 1024 * 1024 * 2 * 17 * 28
    # float32 masters: weights, gradients, two moments, two copies.
    assert found["memory"]["held"] == 24 * parameters


def test_two_devices_share_rows_and_operations(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    one, two = (plan(loaded, "h200", count) for count in (1, 2))
    assert (one["rows"], two["rows"]) == ({"a": 8}, {"a": 4})
    assert two["seconds"]["learning"][0] == pytest.approx(one["seconds"]["learning"][0] / 2)
    assert two["memory"]["held"] == one["memory"]["held"] / 2
    # Reading the weights is not shared: half of the rows take more than half of the time.
    assert two["seconds"]["rollout"][0] > 0.5 * one["seconds"]["rollout"][0]


def test_what_is_drawn_ahead_is_scored_twice_and_drawn_with_a_copy(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hardware.DEVICES, "box", Device(100e9, 1e12, 1e14, 1e13))
    found, weights = [], []
    for ahead in (0, 1):
        loaded = load_recipe(recipe, ["schedule=reuse", f"rollout.ahead={ahead}"])
        weights.append(describe_recipe(loaded)["memory"]["all_weights"])
        found.append(plan(loaded, "box", 1, Assumed(50, None, 0.5, 0.2))["seconds"])
    assert weights[1] == 2 * weights[0]
    # Eight forward passes' worth in place of six.
    assert found[1]["learning"][0] == pytest.approx(found[0]["learning"][0] * 8 / 6)
    assert found[1]["rollout"] == found[0]["rollout"]


def test_rows_are_fitted_beside_all_weights(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bigger = ["rollout.problems=4000"]
    parameters = describe_recipe(load_recipe(recipe))["agents"]["a"]["parameters"]
    monkeypatch.setitem(hardware.DEVICES, "box", Device(20e9, 1e12, 1e14, 1e13))
    message = 2 * (2 * 28 * 8 * 128) * (512 + 100)
    for agents, devices, held in (
        # float32 masters and the 16 bits that are computed in.
        (1, 1, 4 + 2),
        # Those of both agents, a half on each device, and one agent's whole.
        (2, 2, 4 + 2),
    ):
        team = {n: {"model": MODEL} for n in ("a", "b")[:agents]}
        loaded = load_recipe(recipe, [f"team.agents={json.dumps(team)}", *bigger])
        fits = int((0.9 * 20e9 - held * parameters) / message)
        assert plan(loaded, "box", devices)["rows"]["a"] == fits < 8000 / devices
    # Adapters' base lies there in 16 bits, and is computed with as it is.
    loaded = load_recipe(recipe, ["team.sharing=lora", *bigger])
    agent = describe_recipe(loaded)["agents"]["a"]
    fits = int((0.9 * 20e9 - agent["memory"]["weights"]) / message)
    assert plan(loaded, "box", 1)["rows"]["a"] == fits


def test_agents_on_devices_of_their_own_by_hand(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three agents of one model, two on one device: nothing is cut, and nothing overlaps."""
    three = f"team.agents={json.dumps(THREE)}"
    monkeypatch.setitem(hardware.DEVICES, "box", Device(100e9, 1e12, 1e14, 1e13))
    one = plan(load_recipe(recipe), "box", 1)
    found = plan(load_recipe(recipe, [three]), "box")
    assert found["apart"] and found["devices"] == 2 and not one["apart"]
    assert found["rows"] == dict.fromkeys("abc", 8)
    for part in ("rollout", "learning"):
        times = 3 * 3 if part == "rollout" else 3  # the schedule is fresh: a rollout a step
        assert found["seconds"][part] == pytest.approx([times * one["seconds"][part][0]] * 2)
    parameters = describe_recipe(load_recipe(recipe))["agents"]["a"]["parameters"]
    # Two agents' masters, and the gradients, moments and copies of one of them.
    assert found["memory"]["held"] == (2 * 4 + 20) * parameters
    hours = 2 * 3 * found["seconds"]["stage"][0] / 3600
    assert found["device_hours"] == pytest.approx([hours] * 2)
    said = plan_lines(found)
    assert said[0].startswith("on 2 × box, agents apart and counted one after another, on paper: ")
    assert said[1].startswith("the fullest device holds ")


def test_rows_are_fitted_on_the_agents_own_device(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = describe_recipe(load_recipe(recipe))["agents"]["a"]["parameters"]
    monkeypatch.setitem(hardware.DEVICES, "box", Device(25e9, 1e12, 1e14, 1e13))
    overrides = [f"team.agents={json.dumps(THREE)}", "rollout.problems=4000"]
    message = 2 * (2 * 28 * 8 * 128) * (512 + 100)
    rows = plan(load_recipe(recipe, overrides), "box")["rows"]
    # float32 masters of those that lie there, and the 16 bits that are computed in.
    for name, held in (("a", 4 + 2), ("b", 8 + 2), ("c", 8 + 2)):
        assert rows[name] == int((0.9 * 25e9 - held * parameters) / message)


@pytest.mark.parametrize(
    ("devices", "count", "memory", "said"),
    [
        (("cuda:0", "cuda:1"), 4, 100e9,
         "puts its agents on 2 devices (cuda:0, cuda:1); leave out --devices"),
        (("cuda:0", "cpu"), None, 100e9, "b on a CPU is not in a plan for box"),
        (("cuda:0", "cuda:1"), None, 14e9,
         "weights and the largest step of a on cuda:0 are 14 GB, activations 1.0 GB"),
    ],
)  # fmt: skip
def test_devices_of_ones_own_that_cannot_be_planned(
    recipe: Path, monkeypatch: pytest.MonkeyPatch,
    devices: tuple[str, str], count: int | None, memory: float, said: str,
) -> None:  # fmt: skip
    team = {n: {"model": MODEL, "device": d} for n, d in zip("ab", devices, strict=True)}
    monkeypatch.setitem(hardware.DEVICES, "box", Device(memory, 1e12, 1e14, 1e13))
    with pytest.raises(UserError) as caught:
        plan(load_recipe(recipe, [f"team.agents={json.dumps(team)}"]), "box", count)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_fullest_device_holds_and_computes_with_is_of_one(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two agents lie on the first device, and the one on the second has the larger activations."""
    activations = {"a": 1e9, "b": 1e9, "c": 50e9}
    monkeypatch.setattr(hardware, "_activations", lambda recipe, name, *_: activations[name])
    devices = {"a": "cuda:0", "b": "cuda:0", "c": "cuda:1"}
    team = {name: {"model": MODEL, "device": device} for name, device in devices.items()}
    loaded = load_recipe(recipe, [f"team.agents={json.dumps(team)}"])
    placed = describe_recipe(loaded)["places"]["devices"]
    assert placed["cuda:0"]["together"] > placed["cuda:1"]["together"]
    found = plan(loaded, "b200")["memory"]
    assert found == {"held": placed["cuda:1"]["together"], "activations": 50e9}


def test_auto_is_a_device_of_the_plan(recipe: Path) -> None:
    """Whatever lies in the machine on which it is asked."""
    team = {"a": {"model": MODEL, "device": "cuda:0"}, "b": {"model": MODEL}}
    both = load_recipe(recipe, [f"team.agents={json.dumps(team)}"])
    assert not plan(both, "h200", 1)["apart"]
    team["c"] = {"model": MODEL, "device": "cuda:1"}
    found = plan(load_recipe(recipe, [f"team.agents={json.dumps(team)}"]), "h200")
    assert found["devices"] == 2


def test_a_token_goes_through_some_of_the_experts() -> None:
    model = laid_out("Qwen/Qwen3-30B-A3B")
    experts = 48 * 128 * 3 * 2048 * 768
    whole = sum(p.numel() for p in model.parameters())
    # 8 of 128; the 3.3 billion that the model's name and card tell.
    assert active_parameters(model) == whole - experts * 120 // 128
    assert 3.2e9 < active_parameters(model) < 3.4e9
    small = laid_out(MODEL)
    assert active_parameters(small) == sum(p.numel() for p in small.parameters())


def test_what_a_plan_needs_and_does_not_find(recipe: Path, tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=128, vocab_size=13)
    config.save_pretrained(tmp_path / "gpt2")
    for overrides, said in (
        ([f"team.agents.a.model={tmp_path / 'gpt2'}", "rollout.max_new_tokens=8"],
         r"agent a: what .*/gpt2 keeps of a token is not known .*no num_key_value_heads"),
        (["credit=gae", "critic={kind: model, model: some/other}"],
         "critic: the sizes of some/other are not known here"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as caught:
            plan(load_recipe(recipe, overrides), "h200", 1)
        assert "\n" not in str(caught.value)


def test_the_fewest_devices_that_hold_it() -> None:
    path = RECIPES / "baselines" / "teamtr_3x_qwen3_8b.yaml"
    with pytest.raises(UserError, match=r"activations of .* do not fit h200, however"):
        plan(load_recipe(path, ["optimizer.gradient_checkpointing=false"]), "h200")
    again = load_recipe(path, ["optimizer.gradient_checkpointing=true"])
    found = plan(again, "h200")
    together = describe_recipe(again)["memory"]["together"]
    room = 0.9 * 141e9 - found["memory"]["activations"]
    assert together / found["devices"] <= room < together / (found["devices"] / 2)
    with pytest.raises(UserError, match=r"^describe: 1 × h200 hold .* give more devices$"):
        plan(again, "h200", 1)
    said = plan_lines(found)
    assert said[0].startswith(f"on {found['devices']} × h200, on paper: a stage ")
    assert "40% of the published operations and 60% of the bandwidth" in said[2]


def test_an_agent_that_lives_elsewhere_takes_nothing_here(recipe: Path) -> None:
    agents = f"team.agents={{a: {{model: {MODEL}}}, b: {{model: private, host: 'http://h/x'}}}}"
    here, alone = (
        plan(load_recipe(recipe, [agents]), "h200", 1),
        plan(load_recipe(recipe), "h200", 1),
    )
    assert here["rows"] == alone["rows"] == {"a": 8}
    assert here["seconds"]["learning"] == alone["seconds"]["learning"]


def test_schedules_that_roll_out_again_have_a_span(recipe: Path) -> None:
    least, most = plan(load_recipe(recipe, ["schedule=hybrid"]), "h200")["seconds"]["rollout"]
    assert least == most  # one agent has one rollout whatever comes
    hybrid = load_recipe(RECIPES / "relay.yaml")
    least, most = plan(hybrid, "h200")["seconds"]["rollout"]
    assert most == pytest.approx(3 * least)


@pytest.mark.parametrize(
    ("overrides", "device", "assumed", "said"),
    [
        ([], "h20", {}, "no device 'h20'"),
        (["team.agents.a.model=some/other"], "h200", {}, "agent a: the sizes of some/other"),
        (["optimizer.gradient_checkpointing=true"], "rtx4090", {"prompt": 200000},
         "does not hold its weights and the keys and values of one message of 200,100 tokens"),
        ([], "h200", {"compute": 0.0}, "--compute is 0; give a share above 0, at most 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line(
    recipe: Path, overrides: list[str], device: str, assumed: dict, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        plan(load_recipe(recipe, overrides), device, 64, Assumed(**assumed))
    assert said in str(caught.value) and "\n" not in str(caught.value)
