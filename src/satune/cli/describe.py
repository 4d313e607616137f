"""``satune describe``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from satune.cli.common import (
    AllowAddress,
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
    allow_address: AllowAddress = None,
    on: Annotated[
        str | None, typer.Option(help="a device (h200, a100, ...): seconds and memory on paper")
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="so many of them")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of a prompt, assumed")] = 512,
    answer: Annotated[
        int | None, typer.Option(min=1, help="tokens of a message; max_new_tokens if left out")
    ] = None,
    compute: Annotated[float, typer.Option(help="share of peak operations, assumed")] = 0.4,
    bandwidth: Annotated[float, typer.Option(help="share of peak bandwidth, assumed")] = 0.6,
    as_json: AsJson = False,
) -> None:
    """The resolved recipe, and what each agent needs, before anything is loaded."""
    from satune.commands.trust import given_recipe

    spoken = trust_of(trust, overrides, allow_address)
    loaded = given_recipe(shipped_recipe(recipe), overrides or [], spoken)
    # These load torch, which no mistake needs.
    from satune.commands.describe import describe_recipe
    from satune.commands.footprint import stage_bytes_by_device

    description = describe_recipe(loaded, gpu=None if on is None else True)
    if on is not None:
        from satune.commands.hardware import Assumed, plan

        assumed = Assumed(prompt, answer, compute, bandwidth)
        description["plan"] = plan(loaded, on, devices, assumed)
    elif found := stage_bytes_by_device(loaded):
        fullest = max(found, key=lambda device: found[device]["peak"])
        description["peak"] = found[fullest]
        placed = description["places"]["devices"]
        for device, phases in found.items() if len(placed) > 1 else ():
            placed[device]["peak"] = phases["peak"]
    show_result(description, as_json, _show)


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
    for line in place_lines(description["places"]):
        console.print(line, highlight=False, soft_wrap=True)
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
        where = " on the fullest device" if len(description["places"]["devices"]) > 1 else ""
        console.print(
            f"tensors of a stage{where}: at most {most} at once, activations and cache included "
            f"({', '.join(f'{name} {size}' for name, size in parts.items())})",
            highlight=False,
            soft_wrap=True,
        )
    if "plan" in description:
        for line in plan_lines(description["plan"]):
            console.print(line, highlight=False, soft_wrap=True)
    else:
        console.print(description["fit"], highlight=False, soft_wrap=True)
    if "overlap" in description:
        console.print(description["overlap"], highlight=False, soft_wrap=True)


def place_lines(places: dict[str, Any]) -> list[str]:
    """Where what lies: a line a device, a server, and an agent that lies elsewhere."""
    from satune.commands.describe import bytes_text

    lines = []
    for device, there in places["devices"].items():
        held = ""
        if len(places["devices"]) > 1:
            held = f", {bytes_text(there.get('together'))} of weights and the largest step"
        if "peak" in there:
            held += f", at most {bytes_text(there['peak'])} of tensors"
        lines.append(f"on {device}: {', '.join(there['agents'])}{held}")
    cut = [name for name, place in places["agents"].items() if "processes" in place]
    if cut:
        lines.append(f"cut over all processes: {', '.join(cut)}")
    servers: dict[str, list[str]] = {}
    for name, place in places["agents"].items():
        if "host" in place:
            lines.append(f"with its owner, at {place['host']}: {name}")
        server = place.get("server")
        if server is not None:
            servers.setdefault(_server(server), []).append(name)
    return lines + [f"{server}: {', '.join(names)}" for server, names in servers.items()]


def _server(server: dict[str, Any]) -> str:
    """What a line calls a server by, and what it takes."""
    from satune.commands.describe import bytes_text

    if "number" not in server:
        return f"served at {server['address']}"
    where = ""
    if "address" in server:
        where = f" at {server['address']}"
    elif "device" in server:
        where = f" on CUDA device {server['device']}"
    if "memory" in server:
        memory, whose = server["memory"], "its" if "device" in server else "the"
        share = f"{100 * memory:.3g}% of {whose} memory"
        where += f", {share if memory <= 1 else f'{bytes_text(memory)} of keys and values'}"
    return f"vLLM server {server['number']}{where}"


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """What a stage takes on the devices that were asked about, and what that rests on."""
    from satune.commands.describe import bytes_text

    def span(low: float, high: float) -> str:
        texts = [_time(each) for each in (low, high)]
        return texts[0] if texts[0] == texts[1] else " to ".join(texts)

    seconds, memory, assumed = plan["seconds"], plan["memory"], plan["assumed"]
    rows = ", ".join(f"{name} {count:,}" for name, count in plan["rows"].items())
    on, which = f"on {plan['devices']} × {plan['device']}", "a"
    if plan["apart"]:
        on, which = f"{on}, agents apart and counted one after another", "the fullest"
    low, high = plan["device_hours"]
    hours = f"{low:,.1f}" if f"{low:,.1f}" == f"{high:,.1f}" else f"{low:,.1f} to {high:,.1f}"
    return [
        f"{on}, on paper: a stage {span(*seconds['stage'])} "
        f"(rollouts {span(*seconds['rollout'])}, learning {span(*seconds['learning'])}); the run "
        f"{hours} device hours",
        f"{which} device holds {bytes_text(memory['held'])} of weights and the largest step and "
        f"{bytes_text(memory['activations'])} of activations; messages decoded at once: {rows}",
        f"assumed: prompts of {assumed['prompt']:,} and messages of {assumed['answer']:,} tokens, "
        f"{assumed['precision']}, {assumed['share_of_compute']:.0%} of the published operations "
        f"and {assumed['share_of_bandwidth']:.0%} of the bandwidth, {assumed['candidates']} "
        "candidates measured a step; evaluations and what devices say to one another are left out",
    ]


def _time(seconds: float) -> str:
    for limit, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _count(number: int | None) -> str:
    if number is None:
        return "not known here"
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f}{suffix}"
    return str(number)
