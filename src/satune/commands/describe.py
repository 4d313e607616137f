"""What a recipe will need, before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import yaml

from satune.agents.architectures import cached_numbers, configuration, skeleton
from satune.agents.specs import CriticSettings, LoraSpec
from satune.commands.assemble import check_room, engine_of, load_tasks, overlap_note
from satune.config.checks import schedule_of
from satune.config.load import recipe_text
from satune.config.schema import Recipe
from satune.engines.base import keeps_weights
from satune.protocols.named import load_protocol
from satune.tasks.catalog import find_task
from satune.tiny.zoo import is_tiny, tiny_model
from satune.types import ServedModel

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_PARTS = ("weights", "gradients", "optimizer", "anchor_and_proposal")
_DEVICE = 80 * 10**9
"""What a common accelerator holds; the description says whether that is enough."""


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """The effective recipe; per agent its size and memory in bytes; the episodes of a stage.

    Memory counts weights, gradients, AdamW's two moments (resident for one agent at a time) and the
    two copies a step keeps (anchor and proposal). With ``rollout.ahead`` the sum of all weights has
    the engine's copies too. ``cache`` holds an agent's key-value cache in
    bytes: a token, and a message of ``max_new_tokens``. It grows with the conversations that are
    decoded at once and, like activations, is in no sum. ``critic`` has the parameters of an agent's
    critic, and as memory its weights and what a step adds: gradients, moments, a copy. Sizes that
    cannot be told are absent: of models that are neither here nor among the published ones that
    ``agents.architectures`` lists.

    Raises UserError for a task, protocol or option that is none, and for messages as long as a
    context.
    """
    resolved = recipe.team.resolved()
    task, protocol = recipe.task, recipe.protocol
    find_task(task.name, task.data, recipe.seed, None, **task.options)
    load_protocol(protocol.name, list(resolved.seats), None, **protocol.options)
    master = 8 if recipe.team.dtype == "float64" else 4
    agents: dict[str, Any] = {}
    counted: set[str] = set()
    own_weights = recipe.rollout.ahead and keeps_weights(engine_of(recipe))
    total = 0
    for name, section in resolved.agents.items():
        entry: dict[str, Any] = {
            "model": str(section.model),
            "seats": [seat for seat, agent in resolved.seats.items() if agent == name],
            "temperature": section.temperature,
            "delta": recipe.trust_region.of(section.delta).delta,
            "trained": not section.frozen and recipe.stages > 0,
        }
        if section.host is not None or isinstance(section.model, ServedModel):
            # Elsewhere it may take what it takes.
            entry["memory"] = dict.fromkeys(_PARTS, 0)
        elif (sizes := _sizes(section.model, section.lora, recipe)) is not None:
            parameters, adapter, numbers = sizes
            shared = recipe.team.sharing == "lora" and section.model in counted
            counted.add(section.model)
            base_bytes = (
                0
                if shared
                else parameters * (_BYTES[recipe.team.dtype] if section.lora else master)
            )
            still = section.frozen or recipe.stages == 0
            trained = 0 if still else (adapter if section.lora else parameters)
            entry["parameters"] = parameters
            entry["trained_parameters"] = trained
            weights = base_bytes + (adapter * master if section.lora else 0)
            step = trained * master
            entry["memory"] = dict(zip(_PARTS, (weights, step, 2 * step, 2 * step), strict=True))
            # What is drawn ahead is drawn with a copy, while the learner changes.
            copied = bool(trained and recipe.rollout.ahead and not own_weights)
            total += entry["memory"]["weights"] * (1 + copied)
            if trained and recipe.critic.kind != "none":
                entry["critic"] = _critic(recipe.critic, section.model, master)
                total += entry["critic"].get("memory", {}).get("weights", 0)
            if numbers is not None:
                # Keys and values are held in the type that attention computes in.
                held = _BYTES[recipe.team.dtype] if section.lora else master
                autocast = recipe.optimizer.autocast
                token = numbers * (held if autocast is None else _BYTES[autocast])
                entry["cache"] = {"token": token, "message": token * recipe.rollout.max_new_tokens}
        agents[name] = entry
    steps = sum(agent["trained"] for agent in agents.values())
    updates = max(
        (
            sum(v for k, v in agent["memory"].items() if k != "weights")
            + agent.get("critic", {}).get("memory", {}).get("step", 0)
            for agent in agents.values()
            if "memory" in agent
        ),
        default=0,
    )
    # Sizes of models on the hub are not known here, and a sum without them would be too small.
    known = all(
        "memory" in agent and "memory" in agent.get("critic", agent) for agent in agents.values()
    )
    rollouts = schedule_of(recipe).rollouts(steps)
    episodes = recipe.rollout.problems * recipe.rollout.samples
    memory = (
        {"all_weights": total, "largest_step": updates, "together": total + updates}
        if known
        else {}
    )
    return {
        "recipe": yaml.safe_load(recipe_text(recipe)),
        "agents": agents,
        "memory": memory,
        "fit": _fit(memory, agents),
        "stage": {
            "steps": steps,
            "rollouts": list(rollouts),
            "episodes": [episodes * count for count in rollouts],
            "certify_episodes": _certify_episodes(recipe, steps),
        },
        "stages": recipe.stages,
        **_overlap(recipe),
    }


def _certify_episodes(recipe: Recipe, steps: int) -> list[int]:
    """The fewest and most episodes that a stage's certificates draw."""
    certify = recipe.certify
    windows = [1] if schedule_of(recipe).together else _windows(steps, certify.every, recipe.stages)
    sides = 1 if certify.evidence == "pessimistic" else 2
    one = certify.problems * certify.samples * sides
    tests = 1 + certify.backtracks * (certify.accept == "certified")
    return [one * min(windows), one * max(windows) * tests]


def _windows(steps: int, every: int, stages: int) -> list[int]:
    """How many certificates fall into each stage of so many steps: one after ``every`` steps, which
    may be of two stages, and one at the end of the run."""
    found, open_steps = [], 0
    for _ in range(stages):
        count, open_steps = divmod(open_steps + steps, every)
        found.append(count)
    if open_steps:
        found[-1] += 1
    return found or [0]


def _overlap(recipe: Recipe) -> dict[str, str]:
    """What training and evaluation data share, if both are files (a hub's are not fetched here)."""
    files = (recipe.task.data, recipe.evaluate.data)
    if not all(file is not None and Path(file).is_file() for file in files):
        return {}
    line = overlap_note(*load_tasks(recipe))
    return {"overlap": line} if line else {}


def _sizes(
    source: str, lora: LoraSpec | None, recipe: Recipe
) -> tuple[int, int, int | None] | None:
    """(parameters, adapter parameters, cached numbers a token) of a model, without its weights."""
    model = laid_out(source)
    if model is None:
        return None
    if is_tiny(source) or Path(source).exists():  # of the published ones sizes alone are listed
        text = model.config.get_text_config()
        check_room(source, getattr(text, "max_position_embeddings", None), recipe)
    parameters = sum(p.numel() for p in model.parameters())
    adapter = 0
    if lora is not None:
        wanted = lora.targets
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or module is head:
                continue
            if wanted == ("all-linear",) or name.rsplit(".", 1)[-1] in wanted:
                adapter += lora.rank * (module.in_features + module.out_features)
    return parameters, adapter, cached_numbers(model.config)


def laid_out(name: str) -> Any:
    """A model without its weights; None where its sizes cannot be told."""
    if is_tiny(name):
        return tiny_model(name, 0)
    config = configuration(name)
    return None if config is None else skeleton(config)


def _critic(critic: CriticSettings, agents: str, number: int) -> dict[str, Any]:
    """Parameters and memory of the critic of an agent with the model ``agents``, ``number`` bytes a
    parameter; nothing of a model whose sizes cannot be told."""
    model = laid_out(critic.model or agents)
    if model is None:
        return {}
    line = model.config.get_text_config().hidden_size + 1
    held = trained = line
    if critic.kind == "model":
        held += sum(p.numel() for p in model.parameters())
        trained += sum(p.numel() for p in model.base_model.parameters())
    memory = {"weights": held * number, "step": 4 * trained * number}
    return {"parameters": trained, "memory": memory}


def _fit(memory: dict[str, int], agents: dict[str, Any]) -> str:
    """One line: whether weights and the largest step fit one device, and what that leaves."""
    together = memory.get("together")
    device = f"one device of {_DEVICE // 10**9} GB"
    if together is None:
        return f"{device}: not known here, the size of a model is missing"
    if together > _DEVICE:
        sized = [agent for agent in agents.values() if "parameters" in agent]
        whole = any(agent["trained_parameters"] == agent["parameters"] for agent in sized)
        mend = "; adapters take less (team.sharing=lora)" if whole else ""
        return f"{device}: too small by {bytes_text(together - _DEVICE)}{mend}"
    caches = [agent["cache"]["token"] for agent in agents.values() if "cache" in agent]
    # Agents decode one after the other, but finished turns of all of them are kept.
    tokens = int((_DEVICE - together) / sum(caches)) if caches else 0
    room = f", or the cache of {tokens:,} tokens of every agent" if caches else ""
    return f"{device}: fits, {bytes_text(_DEVICE - together)} left for activations{room}"


def bytes_text(number: float | None) -> str:
    """A number of bytes as a person reads it; None is a size that is not known."""
    if number is None:
        return "not known here"
    if number == 0:
        return "0"
    power = min(int(math.log(number, 1024)), 4)
    return f"{number / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
