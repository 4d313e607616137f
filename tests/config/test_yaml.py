"""YAML that would fill the memory, or never end."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from satune.config import yaml12
from satune.config.load import load_recipe
from satune.types import UserError

LAUGHS = "a: &a [" + ", ".join("x" * 10) + "]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)  # fmt: skip
HOSTILE = {
    "a billion laughs": (LAUGHS, "aliases stand for more than 100,000 values"),
    "a list in itself": ("a: &a [*a]\n", "aliases stand for more than 100,000 values"),
    "keys in themselves": ("a: &a {b: *a}\n", "aliases stand for more than 100,000 values"),
    "deep": ("[" * 50_000, "nested too deeply"),
    "a long integer": ("a: " + "9" * 5000, "an integer of more than 1000 digits"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_line(tmp_path: Path, name: str):
    text, said = HOSTILE[name]
    with pytest.raises(yaml.YAMLError):
        yaml12.parse(text)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        load_recipe(path)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_aliases_in_measure_are_read():
    assert yaml12.parse("a: &a [1, 2]\nb: *a\n") == {"a": [1, 2], "b": [1, 2]}
    # 1 mapping, 2 keys, a list of 300 and 330 aliases of it: 1 + 2 + 301 + 1 + 330 * 301 = 99,635.
    inner = ", ".join(["1"] * 300)
    text = f"a: &a [{inner}]\nb: [{', '.join(['*a'] * 330)}]\n"
    assert len(yaml12.parse(text)["b"]) == 330
    with pytest.raises(yaml.YAMLError):
        yaml12.parse(text.replace("b: [", "b: [*a, *a, "))
    assert yaml12.parse("") is None and yaml12.parse("a: 010\n") == {"a": 10}
