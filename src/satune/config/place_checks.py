"""What must hold between the keys that say where a recipe is computed: on which devices, over which
processes, with which servers. ``checks`` has what must hold between all others."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from satune.config.schema import Recipe
from satune.loading import address_in, holds_key
from satune.types import ServedModel

Fault = tuple[str, str]


def shards_are_learners(recipe: Recipe) -> Iterator[Fault]:
    if recipe.sharding is None:
        return
    if recipe.critic.kind != "none":
        yield "sharding", "a critic is not sharded; use another credit than gae, or remove the key"
    if recipe.team.device not in ("auto", "cpu", "cuda"):
        yield (
            "team.device",
            f"must be auto, cpu or cuda with sharding, got {recipe.team.device}: every process"
            " takes the device of its number",
        )
    for name, agent in recipe.team.agents.items():
        if agent.device is not None:
            yield (
                f"team.agents.{name}.device",
                "is for a run in one process: with sharding every process holds a part of every"
                " agent; remove it or sharding",
            )


def one_base_lies_on_one_device(recipe: Recipe) -> Iterator[Fault]:
    """Of adapters whose bases are named alike; others are held together when they are loaded."""
    if recipe.team.sharing != "lora":
        return
    first: dict[tuple[str, str | None], tuple[str, str]] = {}
    for name, agent in recipe.team.agents.items():
        if isinstance(agent.model, ServedModel) or agent.host is not None:
            continue
        device = agent.device or recipe.team.device
        other, there = first.setdefault((agent.model, agent.attention), (name, device))
        if there != device and {there, device} != {"cuda", "cuda:0"}:
            yield (
                f"team.agents.{name}.device",
                f"'{other}' and '{name}' have adapters on one base, which lies on one device, and"
                f" here are {there} and {device}; make the two equal or set team.sharing to"
                " separate",
            )


def likelihoods_are_known_here(recipe: Recipe) -> Iterator[Fault]:
    """An owner tells nobody how likely a token was, and knows it of nobody else."""
    if not recipe.critic.likelihoods:
        return
    if recipe.critic.kind == "none":
        yield "critic.likelihoods", "is for a critic; set critic.kind or remove the key"
    for name, agent in recipe.team.agents.items():
        if agent.host is not None:
            yield (
                "critic.likelihoods",
                f"'{name}' lives at a host, which does not tell how likely its tokens were; set it"
                " to false",
            )


def vllm_is_given_models_that_it_knows(recipe: Recipe) -> Iterator[Fault]:
    if recipe.engine.name != "vllm":
        return
    for name, agent in recipe.team.agents.items():
        if isinstance(agent.model, str) and agent.model.startswith("tiny:"):
            yield f"team.agents.{name}.model", "is too small a model for vLLM; use engine: local"
    options = recipe.engine.options
    for at, server in enumerate(options["servers"]):
        path = f"engine.servers[{at}]"
        if address_in(server) is None or urlsplit(server).path.strip("/"):
            yield path, f"expected http://HOST:PORT, got '{server}'"
        elif holds_key(server):
            yield path, "its address holds a user, a password or a query; leave them out"
    context, longest = options["context"], recipe.rollout.max_new_tokens
    if context is not None and longest >= context:
        yield (
            "engine.context",
            f"must be above rollout.max_new_tokens ({longest}), or no prompt has room, got"
            f" {context}",
        )
    if recipe.team.dtype == "float64":
        yield "team.dtype", "vLLM does not compute in float64; use float32 or engine: local"
