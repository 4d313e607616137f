"""What others are told of a recipe holds no place and no address."""

from __future__ import annotations

from pathlib import Path

import pytest

from satune.report.card import card
from satune.report.public import public, without_places
from satune.report.source import Source

CASES = [
    ("/home/ann/models/mine", "mine"),
    ("/home/ann/my models/the one", "the one"),
    ("/home/ann/reward.py:exact", "reward.py:exact"),
    ("~/reward.py:exact", "reward.py:exact"),
    ("../data/rows.jsonl", "rows.jsonl"),
    ("data/rows.jsonl", "rows.jsonl"),
    ("data/of/ann", "ann"),
    ("model:/home/ann/host", "model:host"),
    ("http://10.0.0.7:8000/v1#Qwen/Qwen3-4B", "(withheld)#Qwen/Qwen3-4B"),
    ("ask http://ann@host/v1 or /srv/ann/x", "ask (withheld) or x"),
    ("file:///home/ann/x", "(withheld)"),
    (r"C:\\Users\\ann\\mine", "mine"),
    # What is no place stays as it is.
    ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
    ("org/name:config:split", "org/name:config:split"),
    ("tiny:llama-s", "tiny:llama-s"),
    ("package.module:name", "package.module:name"),
    (
        "/no_think Answer yes/no/maybe, and/or 1/2/3.",
        "/no_think Answer yes/no/maybe, and/or 1/2/3.",
    ),
    ("/no_think", "/no_think"),
    ("all-linear", "all-linear"),
    ("0.001", "0.001"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "told"), CASES, ids=[text or "nothing" for text, _ in CASES])
def test_of_a_path_the_last_name_and_of_an_address_nothing(text: str, told: str) -> None:
    assert without_places(text) == told


def test_a_relative_path_is_known_by_being_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_places("ann/mine") == "ann/mine"
    (tmp_path / "ann" / "mine").mkdir(parents=True)
    assert without_places("ann/mine") == "mine"


def test_names_of_keys_caches_and_templates_are_left_out() -> None:
    recipe = {
        "team": {
            "agents": {
                "ann": {
                    "model": "http://host/v1#m",
                    "server": {"api_key_env": "MY_KEY", "retries": 8},
                    "host_token_env": "MY_TOKEN",
                    "template": {"chat": "{{ secret }}", "names": True},
                }
            },
            "cache": "/home/ann/cache",
        },
        "log": {"report_to": ["wandb"]},
    }
    assert public(recipe) == {
        "team.agents.ann.model": "(withheld)#m",
        "team.agents.ann.server.retries": "8",
        "team.agents.ann.template.names": "True",
        "log.report_to": "wandb",
    }


def test_each_item_of_a_list_is_told_without_its_place() -> None:
    task = {
        "name": "rows",
        "reward": ["rewards/of/ann.py:exact", "/home/ann/b.py:short", "exact"],
        "more": {"from": ["data/ann/x.jsonl", 2]},
    }
    told = public({"task": task})
    assert told["task.reward"] == "ann.py:exact, b.py:short, exact"
    assert told["task.more.from"] == "x.jsonl, 2"
    text = card("ann/x", [], {"task": task}, Source(Path("run"), "run"))
    assert "rows (reward ann.py:exact, b.py:short, exact, more" in text and "data/ann" not in text
