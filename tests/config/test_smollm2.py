"""The recipe for a small pretrained model: where its models come from, what its examples say."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2

from satune.config.load import load_recipe
from satune.tasks.sums import Sums
from satune.types import Problem

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "smollm2.yaml"


def test_each_agents_model_can_be_had_from_elsewhere() -> None:
    recipe = load_recipe(RECIPE, ["team.agents.second.model=there"])
    models = {name: agent.model for name, agent in recipe.team.agents.items()}
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert models == {"first": hub, "second": "there", "third": hub}
    assert (recipe.task.name, recipe.protocol.name) == ("sums", "vote")


def test_the_template_shows_solved_examples_in_the_models_own_form() -> None:
    recipe = load_recipe(RECIPE)
    (chat,) = {agent.template.chat for agent in recipe.team.agents.values()}
    # As transformers renders chat templates.
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(chat or "")
    asked = [{"role": "user", "content": "What is 1 + 2?"}]
    text = template.render(messages=asked, add_generation_prompt=True)
    turns = re.findall(r"<\|im_start\|>(user|assistant)\n(.*)<\|im_end\|>\n", text)
    assert [role for role, _ in turns] == ["user", "assistant"] * 2 + ["user"]
    assert text.endswith("What is 1 + 2?<|im_end|>\n<|im_start|>assistant\n")
    task = Sums()
    shown = [turn for _, turn in turns]
    for answer, wanted in ((shown[1], "7"), (shown[3], "5")):
        assert task.grade(Problem.of("p", "?", wanted), answer).score == 1.0
