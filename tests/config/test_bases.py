"""Recipes that build on another: what goes over what, and the one line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from satune.config.load import load_recipe, recipe_text, save_recipe
from satune.types import UserError

BASE = """\
seed: 7
team:
  agents:
    ada: {model: "tiny:qwen3-s", temperature: 0.8}
    ben: {model: "tiny:qwen3-s", temperature: 0.8}
task: {name: relay, numbers: 5}
protocol: {name: debate, rounds: 3}
rollout: {problems: 8, samples: 2}
objective: {clip: 0.1, entropy: 0.01}
"""


def write(folder: Path, **files: str) -> Path:
    """The files (``over__low`` is over/low.yaml); gives the first one's path."""
    paths = [folder / f"{name.replace('__', '/')}.yaml" for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return paths[0]


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{path.parent}/", "")


def test_own_keys_go_over_the_base_mapping_by_mapping(tmp_path: Path) -> None:
    text = "base: low.yaml\nteam: {agents: {ben: {model: 'tiny:llama-s'}}}\nrollout: {samples: 4}\n"
    recipe = load_recipe(write(tmp_path, top=text, low=BASE))
    agents = recipe.team.agents
    assert list(agents) == ["ada", "ben"]
    assert (agents["ada"].model, agents["ada"].temperature) == ("tiny:qwen3-s", 0.8)
    assert (agents["ben"].model, agents["ben"].temperature) == ("tiny:llama-s", 0.8)
    assert (recipe.rollout.problems, recipe.rollout.samples) == (8, 4)
    assert (recipe.seed, recipe.task.options) == (7, {"numbers": 5})


def test_bases_of_bases_and_overrides_last(tmp_path: Path) -> None:
    middle = "base: ../low.yaml\nseed: 8\nstages: 3\n"
    path = write(tmp_path, top="base: in/middle.yaml\nseed: 9\n", in__middle=middle, low=BASE)
    recipe = load_recipe(path, ["rollout.samples=6"])
    assert (recipe.seed, recipe.stages, recipe.rollout.samples) == (9, 3, 6)


def test_another_name_leaves_the_options_of_the_first_behind(tmp_path: Path) -> None:
    text = "base: low.yaml\nprotocol: {name: judge, judge: ben}\nobjective: dapo\n"
    recipe = load_recipe(write(tmp_path, top=text, low=BASE))
    assert recipe.protocol.options == {"judge": "ben"}
    assert recipe.objective.name == "dapo" and recipe.objective.entropy == 0


@pytest.mark.parametrize("text", ["{name: debate, rounds: 1}", "{rounds: 1}"])
def test_the_same_name_keeps_them(tmp_path: Path, text: str) -> None:
    low = BASE.replace("rounds: 3", "rounds: 3, extra: 1")
    path = write(tmp_path, top=f"base: low.yaml\nprotocol: {text}\n", low=low)
    assert load_recipe(path).protocol.options == {"rounds": 1, "extra": 1}
    path = write(tmp_path, top="base: low.yaml\nprotocol: debate\n", low=low)
    assert load_recipe(path).protocol.options == {"rounds": 3, "extra": 1}


def test_short_names_of_the_base_take_options(tmp_path: Path) -> None:
    low = BASE.replace("{name: debate, rounds: 3}", "debate")
    path = write(tmp_path, top="base: low.yaml\nprotocol: {rounds: 1}\n", low=low)
    assert load_recipe(path).protocol.model_dump() == {"name": "debate", "rounds": 1}


def test_the_objective_keeps_its_keys_without_a_name(tmp_path: Path) -> None:
    path = write(tmp_path, top="base: low.yaml\nobjective: {clip: 0.3}\n", low=BASE)
    objective = load_recipe(path).objective
    assert (objective.options, objective.entropy) == ({"clip": 0.3}, 0.01)


def test_null_takes_a_key_of_the_base_away(tmp_path: Path) -> None:
    text = "base: low.yaml\nteam: {agents: {ben: null}}\nprotocol: solo\nrollout: null\n"
    recipe = load_recipe(write(tmp_path, top=text, low=BASE))
    assert list(recipe.team.agents) == ["ada"]
    assert (recipe.rollout.problems, recipe.rollout.samples) == (96, 4)
    # Where the base has nothing to take away, null is what it is in any recipe.
    path = write(tmp_path, top="base: low.yaml\nschedule: null\n", low=BASE)
    assert message(path).startswith("top.yaml: schedule: expected keys and values, got nothing")


def test_the_effective_recipe_stands_by_itself(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, top="base: low.yaml\nseed: 1\n", low=BASE))
    assert "base:" not in recipe_text(recipe)
    save_recipe(recipe, tmp_path / "elsewhere.yaml")
    (tmp_path / "low.yaml").unlink()
    assert load_recipe(tmp_path / "elsewhere.yaml") == recipe


def test_a_base_lies_beside_the_file_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, in__top="base: ../low.yaml\n", low=BASE)
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    assert load_recipe(path).seed == 7


def test_faults_name_the_file_they_stand_in(tmp_path: Path) -> None:
    low = BASE.replace("samples: 2", "samples: 2, problms: 3")
    path = write(tmp_path, top="base: low.yaml\nrollout: {max_new_tokens: 5}\n", low=low)
    wanted = "low.yaml: rollout.problms: unknown key; did you mean rollout.problems?"
    assert message(path) == wanted
    path = write(tmp_path, top="base: low.yaml\nrollout: {samples: many}\n", low=BASE)
    assert message(path).startswith("top.yaml: rollout.samples: expected an integer")
    path = write(tmp_path, top="base: low.yaml\n", low=BASE.replace("temperature: 0.8", "tmp: 1"))
    assert message(path).startswith("low.yaml: team.agents.ada.tmp: unknown key")
    path = write(tmp_path, top="base: low.yaml\nrollout: {samples: 2}\n", low=BASE)
    assert message(path, "rollout.samples=1").startswith("command line: rollout.samples: ")


def test_what_is_no_base(tmp_path: Path) -> None:
    path = write(tmp_path, top="base: lwo.yaml\n", low=BASE)
    assert message(path) == "top.yaml: base: no such file: lwo.yaml; did you mean low.yaml?"
    path = write(tmp_path, top="base: ../in/lwo.yaml\n", low=BASE)
    assert message(path).endswith("in/lwo.yaml; mend the path")
    for given, shown in (("[low.yaml]", "['low.yaml']"), ("null", "None"), ("3", "3")):
        path = write(tmp_path, top=f"base: {given}\n", low=BASE)
        assert message(path) == f"top.yaml: base: expected one recipe's file, got {shown}"
    path = write(tmp_path, top="base: low.yaml\n", low="seed: [1\n")
    assert message(path).startswith("low.yaml, line 2: ")
    path = write(tmp_path, top="base: low.yaml\n", low=BASE)
    assert message(path, "base=other.yaml").startswith("command line: base: only a file")


def test_bases_in_a_ring(tmp_path: Path) -> None:
    path = write(tmp_path, top="base: top.yaml\n")
    wanted = "top.yaml: base: top.yaml builds on this file itself; remove one base key"
    assert message(path) == wanted
    path = write(tmp_path, top="base: low.yaml\n", low="base: ./top.yaml\n")
    wanted = "low.yaml: base: ./top.yaml builds on this file itself; remove one base key"
    assert message(path) == wanted
