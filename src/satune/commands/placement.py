"""Where everything of a recipe lies: agents on devices, beside servers, with their owners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from satune.agents.sources import saved_adapter
from satune.commands.assemble import engine_of
from satune.config.schema import AgentSection, Recipe
from satune.engines.vllm.settings import VLLMSettings
from satune.types import ServedModel


def is_here(section: AgentSection) -> bool:
    """Whether the agent's model is loaded in the process of the run."""
    return section.host is None and isinstance(section.model, str)


def device_of(recipe: Recipe, section: AgentSection, gpu: bool | None = None) -> str:
    """The device that an agent lies on. ``gpu`` says whether there is one for ``auto``; None: as it
    is on this machine."""
    name = section.device or recipe.team.device
    if name == "auto":
        name = "cuda" if (torch.cuda.is_available() if gpu is None else gpu) else "cpu"
    return "cuda:0" if name == "cuda" else name


def bases(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Of each agent that is here, what tells its base: the same for agents whose adapters lie on
    one, else its own."""
    agents = recipe.team.resolved().agents
    here = {name: each for name, each in agents.items() if is_here(each)}
    if recipe.team.sharing != "lora":
        return {name: (name,) for name in here}
    found: dict[str, tuple[str, ...]] = {}
    for name, section in here.items():
        model = str(section.model)
        saved = saved_adapter(model)
        found[name] = (saved.base if saved else model, section.attention or "")
    return found


def copied(recipe: Recipe) -> set[str]:
    """The agents whose models are copied for an engine that draws while they learn: those that
    learn, and those that share a base with one."""
    agents, found = recipe.team.resolved().agents, bases(recipe)
    learnt = {base for name, base in found.items() if not agents[name].frozen}
    return {name for name, base in found.items() if base in learnt}


def places_of(
    recipe: Recipe,
    weights: Mapping[str, int | None],
    steps: Mapping[str, int],
    gpu: bool | None = None,
) -> dict[str, Any]:
    """``agents``: of each its ``device`` and ``server``, or its ``host``. ``devices``: of each its
    ``agents`` and, in bytes, ``all_weights`` that lie there, the ``largest_step`` among them, and
    both ``together``, where the sizes are known. With ``sharding`` an agent lies on ``processes``:
    all, and there are no devices to tell apart.

    ``weights`` are those that lie on an agent's device because of it (None: not known), ``steps``
    what its step adds there.
    """
    servers = _servers(recipe)
    agents: dict[str, dict[str, Any]] = {}
    devices: dict[str, dict[str, Any]] = {}
    for name, section in recipe.team.resolved().agents.items():
        if section.host is not None:
            agents[name] = {"host": section.host}
        elif isinstance(section.model, ServedModel):
            agents[name] = {"server": {"address": section.model.address}}
        else:
            device = device_of(recipe, section, gpu)
            agents[name] = {"device": device}
            if recipe.sharding is not None:
                agents[name] = {"processes": "all"}
            else:
                devices.setdefault(device, {"agents": []})["agents"].append(name)
            if name in servers:
                agents[name]["server"] = servers[name]
    for there in devices.values():
        held = [weights[name] for name in there["agents"]]
        known = [each for each in held if each is not None]
        if len(known) == len(held):
            step = max(steps[name] for name in there["agents"])
            there |= {"all_weights": sum(known), "largest_step": step}
            there["together"] = there["all_weights"] + step
    return {"agents": agents, "devices": devices}


def _servers(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """vLLM's server of each agent that is here: its ``number``, and its ``address`` or, where it is
    started here, what it takes of the ``memory`` (as ``engine.memory``) and, on one of some
    devices, its ``device``."""
    settings = engine_of(recipe)
    if not isinstance(settings, VLLMSettings):
        return {}
    found = bases(recipe)
    order = list(dict.fromkeys(found.values()))
    servers: dict[str, dict[str, Any]] = {}
    for name, base in found.items():
        number = order.index(base)
        servers[name] = {"number": number}
        given, devices, memory = settings.servers, settings.devices, settings.memory
        if number < len(given):  # another number of them is refused when the engine is made
            servers[name]["address"] = given[number]
        elif not given:
            shared = settings.sharing(number, len(order)) if memory <= 1 else 1
            servers[name]["memory"] = memory / shared
            if devices:
                servers[name]["device"] = str(devices[number % len(devices)])
    return servers
