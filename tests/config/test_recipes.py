"""The shipped recipes against the paper's tables: every row is there, with its models and figures.

The rows below are copied by hand from arXiv 2605.05216. A row is the block and the name under which
the paper has it, the recipe, the agents, and the figures, which the recipe's comment must quote.
"""

from __future__ import annotations

import functools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from satune.commands import describe as description
from satune.config.load import load_recipe
from satune.config.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
GUIDE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")

# "q4": Qwen3-4B without thinking, "q4t": with.
MODELS = {
    "q06": "Qwen/Qwen3-0.6B", "q17": "Qwen/Qwen3-1.7B", "q4": "Qwen/Qwen3-4B",
    "q8": "Qwen/Qwen3-8B", "q14": "Qwen/Qwen3-14B", "q32": "Qwen/Qwen3-32B",
    "q30a3": "Qwen/Qwen3-30B-A3B", "qwq": "Qwen/QwQ-32B",
    "q253": "Qwen/Qwen2.5-3B-Instruct", "q2532": "Qwen/Qwen2.5-32B-Instruct",
    "q2572": "Qwen/Qwen2.5-72B-Instruct",
    "llama8": "meta-llama/Llama-3.1-8B-Instruct", "llama3": "meta-llama/Llama-3.2-3B-Instruct",
    "r1q": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "r1l8": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "r1l70": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "gemma": "google/gemma-3-12b-it",
}  # fmt: skip

# AIME24 AIME25 MATH-500 ZebraLogic AutoLogi DC SP GN PlanBench-BW. The two closed models of the
# table, GPT-4o-mini and o3-mini, cannot be had as weights and have no recipe.
TABLE_1 = {
    "qwen3_14b": ("q14", "31.7 23.3 90.1 33.1 79.1 37.9 32.7 36.5 29.7"),
    "qwen3_32b": ("q32", "31.0 20.2 88.6 29.2 78.5 41.3 35.7 39.1 34.3"),
    "qwen2_5_72b": ("q2572", "18.9 15.0 83.6 26.6 76.7 39.5 34.1 38.1 33.7"),
    "qwen3_30b_a3b_thinking": ("q30a3t", "80.4 70.9 98.0 89.5 88.1 43.1 38.4 42.3 39.1"),
    "qwq_32b": ("qwqt", "79.5 69.5 98.0 76.8 86.3 41.9 36.1 39.5 37.9"),
    "qwen3_32b_thinking": ("q32t", "81.4 72.9 97.2 88.8 87.3 42.7 38.9 41.1 40.3"),
    "deepseek_r1_distill_llama_70b": ("r1l70t", "70.0 56.3 94.5 71.3 83.5 42.1 35.4 40.7 39.1"),
    "grpo_qwen3_8b": ("q8", "39.1 27.9 90.7 35.4 80.3 40.1 35.2 38.9 33.1"),
    "dapo_qwen3_8b": ("q8", "41.3 30.1 91.5 36.7 80.9 40.7 35.9 39.3 33.5"),
    "debate_3x_qwen3_8b": ("q8 q8 q8", "68.7 59.1 95.2 84.1 85.1 43.1 38.0 42.3 38.3"),
    "judge_3x_qwen3_8b": ("q8 q8 q8", "71.1 61.7 95.9 86.3 85.9 44.3 39.4 43.5 39.1"),
    "role_play_3x_qwen3_8b": ("q8 q8 q8", "69.9 60.5 95.7 85.1 85.5 43.7 38.7 43.1 38.7"),
    "sat_3x_llama_3_1_8b": (
        "llama8 llama8 llama8", "70.3 63.4 86.1 80.7 83.9 35.9 32.7 34.9 37.1",
    ),
    "sat_3x_qwen3_4b": ("q4 q4 q4", "86.3 76.7 99.1 93.1 89.1 45.3 41.5 43.9 42.7"),
}  # fmt: skip
UNTRAINED = list(TABLE_1)[:7]
HEADERS_1 = (
    "AIME24", "AIME25", "MATH-500", "ZebraLogic", "AutoLogi", "ARBench DC", "SP", "GN",
    "PlanBench-BW",
)  # fmt: skip

# AIME24 AIME25 ARBench-DC PlanBench-BW average
TABLE_2 = {
    "2x_qwen3_0_6b_1_7b": ("q06 q06 q17", "22.1 17.3 26.1 24.5 22.5"),
    "qwen3_0_6b_1_7b_4b": ("q06 q17 q4", "49.7 38.5 31.5 32.9 38.2"),
    "2x_qwen3_1_7b_4b": ("q17 q17 q4", "55.9 44.3 33.1 34.9 42.1"),
    "qwen3_1_7b_4b_8b": ("q17 q4 q8", "66.9 56.3 35.5 36.7 48.9"),
    "2x_qwen3_4b_8b": ("q4 q4 q8", "72.1 61.1 36.7 38.5 52.1"),
    "2x_qwen3_4b_qwen2_5_3b": ("q4 q4 q253", "68.1 57.3 35.1 36.3 49.2"),
    "llama_8b_llama_3b_qwen2_5_3b": ("llama8 llama3 q253", "64.7 54.3 34.7 35.9 47.4"),
    "2x_qwen3_4b_llama_8b": ("q4 q4 llama8", "69.5 58.7 35.7 37.7 50.4"),
    "qwen3_4b_llama_8b_gemma_12b": ("q4 llama8 gemma", "74.3 64.1 36.9 38.3 53.4"),
    "r1_distill_1_5b_r1_distill_8b_qwen3_4b": ("r1qt r1l8t q4", "58.3 47.1 33.3 35.1 43.5"),
    "2x_qwen3_0_6b_thinking_4b": ("q06t q06t q4", "41.7 32.5 30.1 31.9 34.1"),
    "2x_qwen3_4b_thinking_1_7b": ("q4t q4t q17", "62.9 52.3 34.3 36.1 46.4"),
    "2x_qwen3_4b_thinking_8b": ("q4t q4t q8", "64.3 53.7 34.7 36.7 47.3"),
}
HEADERS_2 = ("AIME24", "AIME25", "ARBench DC", "PlanBench-BW", "average")

# agents; KL radius; composite before, after, gain; AIME24, AIME25, DC; violations; cost
TABLE_3 = {
    "direct_2x_qwen3_4b_llama_8b": ("q4 q4 llama8", 0.05, "56.5 55.5 -1.0 -1.2 -1.0 -0.6 - 1.33"),
    "direct_2x_qwen3_4b_qwen3_8b": ("q4 q4 q8", 0.05, "56.5 57.5 +1.0 +1.4 +1.2 +0.4 - 1.33"),
    "direct_qwen3_4b_2x_qwen3_8b": ("q4 q8 q8", 0.05, "56.5 66.5 +10.0 +11.8 +12.8 +5.6 - 1.67"),
    "swap_one_llama_8b": ("q4 q4 llama8", 0.01, "56.5 55.9 -0.6 -0.8 -0.6 -0.2 4.7 1.33"),
    "swap_one_qwen2_5_3b": ("q4 q4 q253", 0.01, "56.5 55.5 -1.0 -1.2 -1.2 -0.6 3.9 0.92"),
    "swap_one_qwen3_1_7b": ("q4 q4 q17", 0.01, "56.5 54.8 -1.7 -2.2 -2.2 -0.6 3.7 0.81"),
    "swap_one_qwen3_0_6b": ("q4 q4 q06", 0.01, "56.5 51.9 -4.6 -5.8 -6.0 -2.0 3.3 0.72"),
    "swap_one_gemma_12b": ("q4 q4 gemma", 0.01, "56.5 59.7 +3.2 +4.0 +4.8 +1.0 4.1 1.67"),
    "swap_two_qwen3_8b": ("q4 q8 q8", 0.01, "56.5 66.9 +10.4 +12.0 +13.2 +6.0 3.3 1.67"),
    "swap_three_qwen3_8b": ("q8 q8 q8", 0.004, "56.5 70.4 +13.9 +16.2 +17.6 +8.0 2.5 2.00"),
}

FIGURE_1 = {
    "sat_3x_qwen2_5_32b": "q2532 q2532 q2532",
    "grpo_qwen2_5_32b": "q2532",
    "dapo_qwen2_5_32b": "q2532",
}

K = {
    "aime24": 64, "aime25": 64, "zebralogic": 64, "arbench_dc": 25, "arbench_sp": 25,
    "arbench_gn": 25, "autologi": 8, "planbench_bw": 8, "planbench_logistics": 8, "math500": 4,
}  # fmt: skip


def row(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def quoted(name: str) -> str:
    """A recipe's comment as running text."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    return " ".join(lines)


def check_models(recipe: Recipe, agents: str) -> None:
    found = list(recipe.team.agents.values())
    assert len(found) == len(agents.split())
    for agent, short in zip(found, agents.split(), strict=True):
        thinks = short not in MODELS
        assert agent.model == MODELS[short[:-1] if thinks else short]
        assert agent.template.enable_thinking is thinks
        assert agent.temperature == 0.8


def check_the_papers_settings(recipe: Recipe, delta: float = 0.05) -> None:
    assert (recipe.schedule.name, recipe.order.name) == ("reuse", "static")
    assert (recipe.objective.name, recipe.objective.options) == ("sat", {"clip": 0.2})
    assert (recipe.credit.name, recipe.credit.options["clip"]) == ("group", 5)
    region = recipe.trust_region
    assert region.enabled and (region.delta, region.quantile) == (delta, 0.99)
    assert (region.beta, region.backtracks) == (0.001, 5)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (1e-5, 0.01)
    assert recipe.rollout.samples in (4, 8)
    assert recipe.protocol.name == "chain"


def figures(headers: tuple[str, ...], values: str) -> str:
    return ", ".join(f"{h} {v}" for h, v in zip(headers, values.split(), strict=True))


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1(name: str) -> None:
    agents, values = TABLE_1[name]
    recipe = row(f"table1/{name}")
    check_models(recipe, agents)
    comment = quoted(f"table1/{name}")
    assert comment.startswith("Table 1, ") and figures(HEADERS_1, values) in comment
    assert (recipe.stages == 0) == (name in UNTRAINED)
    method = name.partition("_")[0]
    if method == "sat":
        check_the_papers_settings(recipe)
    elif method in ("grpo", "dapo"):
        assert (recipe.objective.name, recipe.protocol.name) == (method, "solo")
        assert not recipe.trust_region.enabled
    elif name not in UNTRAINED:
        assert recipe.protocol.name == name.partition("_3x")[0]
        assert (recipe.schedule.name, recipe.objective.name) == ("simultaneous", "grpo")


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2(name: str) -> None:
    agents, values = TABLE_2[name]
    recipe = row(f"table2/{name}")
    check_models(recipe, agents)
    check_the_papers_settings(recipe)
    comment = quoted(f"table2/{name}")
    assert comment.startswith("Table 2, ") and figures(HEADERS_2, values) in comment


@pytest.mark.parametrize("name", TABLE_3)
def test_table_3(name: str) -> None:
    agents, delta, values = TABLE_3[name]
    recipe = row(f"table3/{name}")
    check_models(recipe, agents)
    check_the_papers_settings(recipe, delta)
    comment = quoted(f"table3/{name}")
    before, after, gain, aime24, aime25, dc, violations, cost = values.split()
    assert comment.startswith("Table 3, ")
    assert (
        f"{before} before, {after} after ({gain}); AIME24 {aime24}, AIME25 {aime25}, DC {dc}; "
        f"violations {'not given' if violations == '-' else violations + '%'}; cost {cost}."
    ) in comment
    swaps = re.findall(r"satune swap .*?--seat (\w+) --with (\S+) .*?--delta (\S+)", comment)
    changed = {seat: a.model for seat, a in recipe.team.agents.items() if a.model != MODELS["q4"]}
    if name.startswith("swap"):
        # Every seat whose model changes is swapped, at the paper's radius, and then trained on.
        assert {seat: model for seat, model, _ in swaps} == changed
        assert {float(radius) for *_, radius in swaps} == {delta}
        assert f"satune train runs/{name}-swapped/recipe.yaml --resume" in comment
    else:
        assert not swaps


def test_table_3_continues_the_run_of_table_1() -> None:
    assert row("table3/baseline") == row("table1/sat_3x_qwen3_4b")
    assert "56.5" in quoted("table3/baseline")


@pytest.mark.parametrize("name", FIGURE_1)
def test_figure_1(name: str) -> None:
    recipe = row(f"figure1/{name}")
    check_models(recipe, FIGURE_1[name])
    assert recipe.evaluate.every > 0
    assert quoted(f"figure1/{name}").startswith("Figure 1 ")
    if name.startswith("sat"):
        check_the_papers_settings(recipe)
    else:
        assert recipe.objective.name == name[:4]


BASELINES: dict[str, dict[str, Any]] = {
    "sat": {"schedule": "reuse", "protocol": "chain", "objective": "sat"},
    "hybrid": {"schedule": "hybrid", "protocol": "chain", "objective": "sat"},
    "teamtr": {"schedule": "fresh", "protocol": "chain", "objective": "sat"},
    "teamtr_3x_qwen3_8b": {"schedule": "fresh", "protocol": "chain", "objective": "sat"},
    "teamtr_8b_14b_32b": {"schedule": "fresh", "protocol": "chain", "objective": "sat"},
    "stale": {"schedule": "stale", "protocol": "chain", "objective": "sat"},
    "simultaneous": {"schedule": "simultaneous", "protocol": "chain", "objective": "sat"},
    "solo_grpo": {"schedule": "fresh", "protocol": "solo", "objective": "grpo"},
    "solo_dapo": {"schedule": "fresh", "protocol": "solo", "objective": "dapo"},
    "solo_ppo": {"schedule": "fresh", "protocol": "solo", "objective": "ppo"},
    "team_ppo": {"schedule": "simultaneous", "protocol": "chain", "objective": "ppo"},
    "debate": {"schedule": "simultaneous", "protocol": "debate", "objective": "grpo"},
    "judge": {"schedule": "simultaneous", "protocol": "judge", "objective": "grpo"},
    "role_play": {"schedule": "simultaneous", "protocol": "role_play", "objective": "grpo"},
    "as_it_is": {"protocol": "solo", "stages": 0},
    "debate_as_it_is": {"protocol": "debate", "stages": 0},
    "judge_as_it_is": {"protocol": "judge", "stages": 0},
    "role_play_as_it_is": {"protocol": "role_play", "stages": 0},
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(name: str) -> None:
    recipe = row(f"baselines/{name}")
    found = {
        "schedule": recipe.schedule.name, "protocol": recipe.protocol.name,
        "objective": recipe.objective.name, "stages": recipe.stages,
    }  # fmt: skip
    assert found | BASELINES[name] == found


@pytest.mark.parametrize("name", ["solo_ppo", "team_ppo"])
def test_ppo_has_a_critic(name: str) -> None:
    recipe = row(f"baselines/{name}")
    assert recipe.credit.name == "gae" and not recipe.trust_region.enabled
    critic = recipe.critic
    assert (critic.kind, critic.boundary) == ("model", "token")
    assert (critic.lam, critic.discount) == (0.95, 1)
    agents = recipe.team.agents.values()
    assert {agent.model for agent in agents} == {MODELS["q4"]}
    assert len(agents) == {"solo_ppo": 1, "team_ppo": 3}[name]


# Figure 1 (c) by tiny agents; these train here (benchmarks/violations.py).
TINY = ("sat", "grpo", "dapo", "ppo", "m2po")


@pytest.mark.parametrize("name", TINY)
def test_figure_1_in_small(name: str) -> None:
    recipe = row(f"figure1/tiny_{name}")
    assert recipe.objective.name == name and recipe.trust_region.enabled == (name == "sat")
    assert recipe.trust_region.delta == 0.05
    assert recipe.team == row("relay").team and recipe.task == row("relay").task
    assert (recipe.credit.name == "gae") == (name == "ppo")


ROWS = [
    *(f"baselines/{name}" for name in BASELINES),
    *(f"table1/{name}" for name in TABLE_1),
    *(f"table2/{name}" for name in TABLE_2),
    "table3/baseline",
    *(f"table3/{name}" for name in TABLE_3),
    *(f"figure1/{name}" for name in FIGURE_1),
]


def test_every_folder_is_installed() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    installed = {pattern for patterns in data.values() for pattern in patterns}
    folders = {p.parent.relative_to(ROOT) for p in RECIPES.rglob("*.yaml")}
    assert installed == {f"{folder}/*.yaml" for folder in folders}
    assert set(data) == {f"share/satune/{folder}" for folder in folders}


def test_no_recipe_is_left_out() -> None:
    found = {str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.glob("*/*.yaml")}
    assert found == {*ROWS, *(f"figure1/tiny_{name}" for name in TINY)}


@pytest.mark.parametrize("name", ROWS)
def test_what_all_of_them_share(name: str) -> None:
    recipe = row(name)
    assert (recipe.rollout.max_new_tokens, recipe.rollout.top_p) == (32768, 1)
    # Never a benchmark's test rows.
    assert (recipe.task.name, recipe.task.data) == (
        "maths", "agentica-org/DeepScaleR-Preview-Dataset",
    )  # fmt: skip
    assert recipe.evaluate.data is None


DOMAINS = re.findall(r"`(task='?\{?[^`]*)` *\|", GUIDE)


@pytest.mark.parametrize("name", ["sat_3x_qwen3_4b", "debate_3x_qwen3_8b", "grpo_qwen3_8b"])
def test_the_overrides_of_the_guide_parse(name: str) -> None:
    assert len(DOMAINS) == 4
    tasks = set()
    for line in DOMAINS:
        override = line.replace("'", "")
        tasks.add(row(f"table1/{name}", override).task.name)
    assert tasks == {"arbench_dc", "arbench_sp", "arbench_gn", "blocksworld"}


def test_the_guide_names_every_recipe_and_every_k() -> None:
    for name in ROWS:
        assert f"`{name}`" in GUIDE, name
    for benchmark, k in K.items():
        assert re.search(rf"(?m)^\| `{benchmark}` \| {k} \|", GUIDE), benchmark


@pytest.mark.slow
def test_the_guides_memory_is_what_describe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each model is laid out once, not once a row.
    configuration = functools.cache(description.configuration)
    skeletons: dict[int, Any] = {}
    build = description.skeleton
    monkeypatch.setattr(description, "configuration", configuration)
    monkeypatch.setattr(
        description,
        "skeleton",
        lambda config: skeletons.get(id(config)) or skeletons.setdefault(id(config), build(config)),
    )
    told = dict(re.findall(r"(?m)^\| [^|]+ \| `(\w+/\w+)` \| (.*) \|$", GUIDE))
    assert set(told) == set(ROWS)
    for name in ROWS:
        memory = description.describe_recipe(row(name))["memory"]
        adapters = description.describe_recipe(row(name, "team.sharing=lora"))["memory"]
        found = (*memory.values(), adapters["together"])
        assert told[name] == " | ".join(f"{size / 2**30:.1f}" for size in found), name
