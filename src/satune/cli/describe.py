"""``satune describe``."""

from __future__ import annotations

from typing import Any

from satune.cli.common import (
    AsJson,
    Overrides,
    RecipeFile,
    TrustCode,
    open_console,
    shipped_recipe,
    show_result,
    trust_of,
)


def describe(
    recipe: RecipeFile,
    overrides: Overrides = None,
    trust: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """The resolved recipe, and what each agent needs, before anything is loaded."""
    from satune.commands.trust import given_recipe

    spoken = trust_of(trust, overrides)
    loaded = given_recipe(shipped_recipe(recipe), overrides or [], spoken)
    # These load torch, which no mistake needs.
    from satune.commands.describe import describe_recipe
    from satune.commands.footprint import stage_bytes

    peak = stage_bytes(loaded)
    show_result(describe_recipe(loaded) | ({"peak": peak} if peak else {}), as_json, _show)


def _show(description: dict[str, Any]) -> None:
    """The recipe, a table of agents, and what a stage takes."""
    import yaml
    from rich.table import Table

    from satune.commands.describe import bytes_text

    console = open_console()
    console.print(yaml.safe_dump(description["recipe"], sort_keys=False), highlight=False)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in ("agent", "model", "seats", "parameters", "trained", "weights", "one step"):
        table.add_column(column)
    for name, agent in description["agents"].items():
        memory = agent.get("memory", {})
        step = sum(v for k, v in memory.items() if k != "weights")
        table.add_row(
            name,
            agent["model"],
            ", ".join(agent["seats"]),
            _count(agent.get("parameters")),
            _count(agent.get("trained_parameters")),
            bytes_text(memory.get("weights")),
            bytes_text(step if memory else None),
        )
    console.print(table)
    memory, stage = description["memory"], description["stage"]
    fewest, most = stage["episodes"]
    episodes = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    fewest, most = stage["certify_episodes"]
    certified = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    console.print(
        f"memory: {bytes_text(memory.get('together'))} for all weights and the largest step "
        "(activations and key-value cache come on top); "
        f"a stage: {stage['steps']} steps, {episodes} episodes"
        f"{f' and {certified} for certificates' if most else ''}; "
        f"{description['stages']} stages",
        highlight=False,
        soft_wrap=True,
    )
    critics = [
        f"{name} {bytes_text(held.get('weights'))} and {bytes_text(held.get('step'))}"
        for name, agent in description["agents"].items()
        if "critic" in agent
        for held in [agent["critic"].get("memory", {})]
    ]
    if critics:
        console.print(
            f"in that, critics (weights and one step): {', '.join(critics)}",
            highlight=False,
            soft_wrap=True,
        )
    caches = [
        f"{name} {bytes_text(agent['cache']['token'])} ({bytes_text(agent['cache']['message'])})"
        for name, agent in description["agents"].items()
        if "cache" in agent
    ]
    if caches:
        longest = description["recipe"]["rollout"]["max_new_tokens"]
        console.print(
            f"key-value cache a token (a message of {longest:,}): {', '.join(caches)}",
            highlight=False,
            soft_wrap=True,
        )
    if "peak" in description:
        parts = {name: bytes_text(size) for name, size in description["peak"].items()}
        most = parts.pop("peak")
        console.print(
            f"tensors of a stage: at most {most} at once, activations and cache included "
            f"({', '.join(f'{name} {size}' for name, size in parts.items())})",
            highlight=False,
            soft_wrap=True,
        )
    console.print(description["fit"], highlight=False, soft_wrap=True)
    if "overlap" in description:
        console.print(description["overlap"], highlight=False, soft_wrap=True)


def _count(number: int | None) -> str:
    if number is None:
        return "not known here"
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f}{suffix}"
    return str(number)
