"""What a recipe will need, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from satune.agents.architectures import cached_numbers, configuration, skeleton
from satune.agents.specs import CriticSettings, LoraSpec
from satune.commands.assemble import check_room, engine_of, load_tasks, overlap_note
from satune.commands.placement import bases, copied, is_here, places_of
from satune.config.checks import schedule_of
from satune.config.load import recipe_text
from satune.config.schema import AgentSection, Recipe
from satune.engines.base import keeps_weights
from satune.protocols.named import load_protocol
from satune.tasks.catalog import find_task
from satune.tiny.zoo import is_tiny, tiny_model

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_PARTS = ("weights", "gradients", "optimizer", "anchor_and_proposal")
_DEVICE = 80 * 10**9
"""What a common accelerator holds; the description says whether that is enough."""


def describe_recipe(recipe: Recipe, gpu: bool | None = None) -> dict[str, Any]:
    """The effective recipe; per agent its size and memory in bytes; where everything lies
    (``commands.placement``, which says what ``gpu`` is); the episodes of a stage.

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
    agents: dict[str, Any] = {}
    base_of, counted = bases(recipe), set()
    apart = recipe.rollout.ahead and not keeps_weights(engine_of(recipe))
    twice = copied(recipe) if apart else set()
    held: dict[str, int | None] = {}
    for name, section in resolved.agents.items():
        entry: dict[str, Any] = {
            "model": str(section.model),
            "seats": [seat for seat, agent in resolved.seats.items() if agent == name],
            "temperature": section.temperature,
            "delta": recipe.trust_region.of(section.delta).delta,
            "trained": not section.frozen and recipe.stages > 0,
        }
        if is_here(section):
            entry |= _sized(recipe, section, alone=base_of[name] not in counted)
            counted.add(base_of[name])
            held[name] = _held(entry, copied=name in twice)
        else:
            # Elsewhere it may take what it takes.
            entry["memory"] = dict.fromkeys(_PARTS, 0)
        agents[name] = entry
    steps = sum(agent["trained"] for agent in agents.values())
    step_bytes = {
        name: sum(v for k, v in agent.get("memory", {}).items() if k != "weights")
        + agent.get("critic", {}).get("memory", {}).get("step", 0)
        for name, agent in agents.items()
    }
    places = places_of(recipe, held, step_bytes, gpu)
    rollouts = schedule_of(recipe).rollouts(steps)
    episodes = recipe.rollout.problems * recipe.rollout.samples
    memory: dict[str, int] = {}
    known = [each for each in held.values() if each is not None]
    # Sizes of models on the hub are not known here, and a sum without them would be too small.
    if len(known) == len(held):
        largest = max(step_bytes.values())
        memory = {"all_weights": sum(known), "largest_step": largest}
        memory["together"] = memory["all_weights"] + largest
    return {
        "recipe": yaml.safe_load(recipe_text(recipe)),
        "agents": agents,
        "memory": memory,
        "places": places,
        "fit": _fit(memory, agents, places["devices"]),
        "stage": {
            "steps": steps,
            "rollouts": list(rollouts),
            "episodes": [episodes * count for count in rollouts],
            "certify_episodes": _certify_episodes(recipe, steps),
        },
        "stages": recipe.stages,
        **_overlap(recipe),
    }


def _sized(recipe: Recipe, section: AgentSection, *, alone: bool) -> dict[str, Any]:
    """What is said of an agent's sizes; nothing where they cannot be told. The base is the agent's
    to count where it is ``alone`` on it so far."""
    model, lora = str(section.model), section.lora
    sizes = _sizes(model, lora, recipe)
    if sizes is None:
        return {}
    parameters, adapter, numbers = sizes
    master = 8 if recipe.team.dtype == "float64" else 4
    of_base = _BYTES[recipe.team.dtype] if lora else master
    still = section.frozen or recipe.stages == 0
    trained = 0 if still else (adapter if lora else parameters)
    weights = alone * parameters * of_base + (adapter * master if lora else 0)
    step = trained * master
    found: dict[str, Any] = {
        "parameters": parameters,
        "trained_parameters": trained,
        "memory": dict(zip(_PARTS, (weights, step, 2 * step, 2 * step), strict=True)),
    }
    if trained and recipe.critic.kind != "none":
        found["critic"] = _critic(recipe.critic, model, master)
    if numbers is not None:
        # Keys and values are held in the type that attention computes in.
        autocast = recipe.optimizer.autocast
        token = numbers * (of_base if autocast is None else _BYTES[autocast])
        found["cache"] = {"token": token, "message": token * recipe.rollout.max_new_tokens}
    return found


def _held(entry: dict[str, Any], *, copied: bool) -> int | None:
    """Bytes of weights that lie there because of an agent: its own, twice where what is drawn ahead
    is drawn with a copy, and its critic's. None where they cannot be told."""
    critic = entry.get("critic", {"memory": {"weights": 0}})
    if "memory" not in entry or "memory" not in critic:
        return None
    return entry["memory"]["weights"] * (1 + copied) + critic["memory"]["weights"]


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
    line = model.config.get_text_config().hidden_size + critic.inputs + 1
    held = trained = line
    if critic.kind == "model":
        held += sum(p.numel() for p in model.parameters())
        trained += sum(p.numel() for p in model.base_model.parameters())
    memory = {"weights": held * number, "step": 4 * trained * number}
    return {"parameters": trained, "memory": memory}


def _fit(
    memory: dict[str, int], agents: dict[str, Any], devices: Mapping[str, dict[str, Any]]
) -> str:
    """One line: whether weights and the largest step fit one device, the fullest where agents lie
    on several, and what that leaves."""
    together = memory.get("together")
    device, there = f"one device of {_DEVICE // 10**9} GB", list(agents)
    if together is not None and len(devices) > 1:
        fullest = max(devices, key=lambda name: devices[name]["together"])
        together, there = devices[fullest]["together"], devices[fullest]["agents"]
        device = f"devices of {_DEVICE // 10**9} GB, of which {fullest} is the fullest"
    if together is None:
        return f"{device}: not known here, the size of a model is missing"
    found = [agents[name] for name in there]
    if together > _DEVICE:
        sized = [agent for agent in found if "parameters" in agent]
        whole = any(agent["trained_parameters"] == agent["parameters"] for agent in sized)
        mend = "; adapters take less (team.sharing=lora)" if whole else ""
        return f"{device}: too small by {bytes_text(together - _DEVICE)}{mend}"
    caches = [agent["cache"]["token"] for agent in found if "cache" in agent]
    # Agents decode one after the other, but finished turns of all of them are kept.
    tokens = int((_DEVICE - together) / sum(caches)) if caches else 0
    whose = "every agent" if len(devices) < 2 else "every agent there"
    room = f", or the cache of {tokens:,} tokens of {whose}" if caches else ""
    return f"{device}: fits, {bytes_text(_DEVICE - together)} left for activations{room}"


def bytes_text(number: float | None) -> str:
    """A number of bytes as a person reads it; None is a size that is not known."""
    if number is None:
        return "not known here"
    if number == 0:
        return "0"
    power = min(int(math.log(number, 1024)), 4)
    return f"{number / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
