"""What a recipe would take on named hardware: on paper, from published peaks and counted work.

Nothing is run. The work is counted: 2 operations a parameter and token forward, twice as many back
(once as many through a frozen base), and attention's 4 a layer, unit of the heads and token that is
looked at. A device does it at a share of its published peak; decoding reads all weights and the
held keys and values once a token of every row, at a share of the published bandwidth. The shares
are assumptions until they are measured on the device, and are said with the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from satune.agents.architectures import active_parameters, cached_numbers, configuration
from satune.commands.describe import describe_recipe, laid_out
from satune.config.checks import schedule_of
from satune.config.schema import Recipe
from satune.loading import nearest_hint
from satune.tiny.zoo import is_tiny, tiny_model
from satune.types import ServedModel, UserError


@dataclass(frozen=True, slots=True)
class Device:
    """Published figures: bytes of memory, bytes a second, dense operations a second in 16 bits
    (summed in float32) and in float32 outside tensor cores."""

    memory: float
    bandwidth: float
    half: float
    single: float


DEVICES: dict[str, Device] = {
    "a100": Device(80e9, 2.04e12, 312e12, 19.5e12),
    "b200": Device(180e9, 7.7e12, 2250e12, 75e12),
    "h100": Device(80e9, 3.35e12, 989e12, 67e12),
    "h200": Device(141e9, 4.8e12, 989e12, 67e12),
    "l40s": Device(48e9, 0.864e12, 362e12, 91.6e12),
    "mi300x": Device(192e9, 5.3e12, 1307e12, 163e12),
    "rtx4090": Device(24e9, 1.008e12, 165e12, 82.6e12),
}
"""Data sheets of the SXM or OAM forms where there are several."""

_USABLE = 0.9
"""The share of a device's memory that is planned with: the rest is the runtime's and fragments."""
_CANDIDATES = 2
"""So many proposals a step are measured: the first one is shrunk more often than not."""


@dataclass(frozen=True, slots=True)
class Assumed:
    """What the recipe does not say: tokens of a prompt (what a seat reads of the others included)
    and of a message, and which share of a device's peaks is reached."""

    prompt: int = 512
    answer: int | None = None
    compute: float = 0.4
    bandwidth: float = 0.6

    def __post_init__(self) -> None:
        for name in ("compute", "bandwidth"):
            if not 0 < getattr(self, name) <= 1:
                given = getattr(self, name)
                raise UserError(f"describe: --{name} is {given:g}; give a share above 0, at most 1")


@dataclass(frozen=True, slots=True)
class Work:
    """One agent's model: parameters, those that a token goes through and those that are trained,
    operations of attention a token that is looked at, and bytes of a set of weights and of a
    token's keys and values. ``at_rest``: held weights are of the type that is computed in."""

    parameters: int
    active: int
    trained: int
    attention: float
    weights: int
    cache: int
    at_rest: bool

    def forward(self, tokens: float, context: float) -> float:
        """Operations of so many tokens that look at ``context`` others each."""
        return tokens * (2 * self.active + self.attention * context)


def plan(
    recipe: Recipe, name: str, devices: int | None = None, assumed: Assumed | None = None
) -> dict[str, Any]:
    """Memory a device and seconds a stage on ``devices`` devices of that name (None: the fewest, a
    power of two, that hold all weights and the largest step, cut evenly). Agents that the recipe
    puts on devices of their own lie there whole, ``apart``, and there are as many as it names: one
    agent decodes or learns at a time, which is what the local engine and a sweep do.

    ``seconds`` has the fewest and the most a stage, since some schedules roll out as often as they
    need to; ``rows`` how many messages of each agent are decoded at once on one device. Raises
    UserError for a device that is not listed, for a model whose sizes are not known, and where the
    devices do not hold it.
    """
    assumed = assumed or Assumed()
    if name not in DEVICES:
        raise UserError(f"no device {name!r}{nearest_hint(name, DEVICES)}")
    device, described = DEVICES[name], describe_recipe(recipe, gpu=True)
    half = recipe.optimizer.autocast is not None or recipe.team.dtype in ("bfloat16", "float16")
    peak = assumed.compute * (device.half if half else device.single)
    answer = assumed.answer or recipe.rollout.max_new_tokens
    item = 2 if half else 4
    works = {n: _work(recipe, n, described["agents"][n], item) for n in described["agents"]}
    works = {n: work for n, work in works.items() if work is not None}
    if not works:
        raise UserError("describe: all agents live elsewhere; there is nothing to plan")
    longest = assumed.prompt + answer
    activations = {n: _activations(recipe, n, longest, item) for n in works}
    if "together" not in described["memory"]:
        raise UserError(
            f"describe: critic: the sizes of {recipe.critic.model} are not known here; give "
            "critic.model a directory"
        )
    room = _USABLE * device.memory
    most = max(activations.values())
    if most >= room:
        raise UserError(
            f"describe: activations of {most / 1e9:,.0f} GB do not fit {name}, however many "
            "there are; set optimizer.gradient_checkpointing, or fewer "
            "optimizer.micro_batch_tokens"
        )
    placed = described["places"]["devices"]
    apart = len(placed) > 1
    memory = described["memory"]
    if apart:
        devices = _apart(placed, name, devices, room, activations)
        # The fullest one: what it holds, and what its own agents compute with.
        held, most = max(
            (
                (each["together"], max(activations[n] for n in each["agents"]))
                for each in placed.values()
            ),
            key=sum,
        )
    else:
        devices = _together(memory["together"], name, devices, room, most)
        held = memory["together"] / devices
    rows: dict[str, int] = {}
    decode, learn = {}, {}
    episodes = recipe.rollout.problems * recipe.rollout.samples
    for n, work in works.items():
        messages = episodes * len(described["agents"][n]["seats"])
        # All weights lie there, cut evenly; decoding has the agent's whole, in its own type. Those
        # of agents that lie apart are whole.
        shared, lying = devices, memory["all_weights"] / devices
        if apart:
            own = described["places"]["agents"][n]["device"]
            shared, lying = 1, placed[own]["all_weights"]
        beside = 0 if shared == 1 and work.at_rest else work.weights
        fits = int((room - lying - beside) / max(work.cache * longest, 1))
        if fits < 1:
            raise UserError(
                f"describe: agent {n}: one {name} does not hold its weights and the keys and "
                f"values of one message of {longest:,} tokens beside what lies there; give a "
                "shorter --answer, more devices or a larger one"
            )
        rows[n] = min(fits, math.ceil(messages / shared))
        decode[n] = _decoding(work, messages, rows[n], shared, peak, device, assumed, answer)
        learn[n] = _learning(recipe, work, messages, assumed.prompt, answer) / (shared * peak)
    rollouts = schedule_of(recipe).rollouts(described["stage"]["steps"])
    certify = described["stage"]["certify_episodes"]
    rolled = [
        sum(decode.values()) * (count + extra / episodes)
        for count, extra in zip(rollouts, certify, strict=True)
    ]
    seconds = {
        "rollout": rolled,
        "learning": [sum(learn.values())] * 2,
        "stage": [each + sum(learn.values()) for each in rolled],
    }
    return {
        "device": name,
        "devices": devices,
        "apart": apart,
        "memory": {"held": held, "activations": most},
        "rows": rows,
        "seconds": seconds,
        "device_hours": [devices * recipe.stages * each / 3600 for each in seconds["stage"]],
        "assumed": {
            "prompt": assumed.prompt,
            "answer": answer,
            "precision": "16 bits" if half else "float32",
            "share_of_compute": assumed.compute,
            "share_of_bandwidth": assumed.bandwidth,
            "candidates": _CANDIDATES,
        },
    }


def _together(
    together: int, name: str, devices: int | None, room: float, activations: float
) -> int:
    """How many devices hold all weights and the largest step, cut evenly, each with ``room`` bytes:
    ``devices``, or the fewest. Raises UserError where those that were given do not."""
    if devices is None:
        fewest = together / (room - activations)
        return 1 << max(0, math.ceil(math.log2(fewest)))
    if together / devices + activations > room:
        raise UserError(
            f"describe: {devices} × {name} hold {devices * room / 1e9:,.0f} GB; weights and the "
            f"largest step are {together / 1e9:,.0f} GB, activations {activations / 1e9:,.1f} GB a "
            "device; give more devices"
        )
    return devices


def _apart(
    placed: Mapping[str, Mapping[str, Any]],
    name: str,
    devices: int | None,
    room: float,
    activations: Mapping[str, float],
) -> int:
    """How many devices agents lie on that have devices of their own. Raises UserError where another
    number was given, where one of them does not hold what lies there, and where one is a CPU."""
    if devices is not None and devices != len(placed):
        raise UserError(
            f"describe: the recipe puts its agents on {len(placed)} devices ({', '.join(placed)}); "
            "leave out --devices, or the agents' device"
        )
    for own, there in placed.items():
        if own == "cpu":
            raise UserError(
                f"describe: {', '.join(there['agents'])} on a CPU is not in a plan for {name}; "
                "give every agent's device a GPU, or leave out --on"
            )
        most = max(activations[agent] for agent in there["agents"])
        if there["together"] + most > room:
            raise UserError(
                f"describe: a {name} holds {room / 1e9:,.0f} GB; weights and the largest step of "
                f"{', '.join(there['agents'])} on {own} are {there['together'] / 1e9:,.0f} GB, "
                f"activations {most / 1e9:,.1f} GB; set optimizer.gradient_checkpointing, adapters "
                "(team.sharing=lora), or other devices"
            )
    return len(placed)


def _work(recipe: Recipe, name: str, agent: dict[str, Any], item: int) -> Work | None:
    section = recipe.team.resolved().agents[name]
    model = section.model
    if isinstance(model, ServedModel) or section.host is not None:
        return None
    if "parameters" not in agent:
        raise UserError(
            f"describe: agent {name}: the sizes of {model} are not known here; give a directory"
        )
    if "cache" not in agent:
        raise UserError(
            f"describe: agent {name}: what {model} keeps of a token is not known (its config.json "
            "has no num_key_value_heads, or it keeps something else); leave out --on"
        )
    text = _text_config(model)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Work(
        parameters=agent["parameters"],
        active=active_parameters(laid_out(model)),
        trained=agent["trained_parameters"],
        attention=4.0 * text.num_hidden_layers * text.num_attention_heads * width,
        weights=item * agent["parameters"],
        cache=item * (cached_numbers(text) or 0),
        at_rest=item == 4 or (section.lora is not None and recipe.optimizer.autocast is None),
    )


def _text_config(model: str) -> Any:
    config: Any = tiny_model(model, 0).config if is_tiny(model) else configuration(model)
    return config.get_text_config()


def _activations(recipe: Recipe, name: str, longest: int, item: int) -> float:
    """Bytes that a micro-batch holds for its backward pass: 17 numbers a layer, hidden unit and
    token (Korthikanti et al. 2022, attention's scores left out); one a layer where layers are
    recomputed, and one layer whole."""
    text = _text_config(str(recipe.team.resolved().agents[name].model))
    unit = max(recipe.optimizer.micro_batch_tokens, longest) * text.hidden_size * item
    if recipe.optimizer.gradient_checkpointing:
        return unit * (text.num_hidden_layers + 17)
    return unit * 17 * text.num_hidden_layers


def _decoding(
    work: Work, messages: int, rows: int, devices: int, peak: float, device: Device,
    assumed: Assumed, answer: int,
) -> float:  # fmt: skip
    """Seconds of one rollout of an agent's messages, each device with its share of them."""
    context = assumed.prompt + answer / 2
    rounds = math.ceil(messages / devices / rows)
    read = (work.weights + rows * work.cache * context) / (assumed.bandwidth * device.bandwidth)
    token = max(read, work.forward(rows, context) / peak)
    fed = work.forward(messages * assumed.prompt, assumed.prompt / 2) / (devices * peak)
    return rounds * answer * token + fed


def _learning(recipe: Recipe, work: Work, messages: int, prompt: int, answer: int) -> float:
    """Operations of one step: the anchor scored, the epochs, the candidates measured; of a batch
    that was drawn ahead also what its weights take, scored twice. A problem's prompt is fed once
    for its samples."""
    if not work.trained:
        return 0.0
    tokens = messages * (answer + prompt / recipe.rollout.samples)
    once = work.forward(tokens, prompt + answer / 2)
    back = 2.0 if work.trained == work.parameters else 1.0
    again = float(recipe.optimizer.gradient_checkpointing)
    epochs = recipe.optimizer.epochs * (1 + back + again)
    corrected = 2 * (recipe.rollout.ahead > 0)
    return once * (1 + epochs + _CANDIDATES + corrected)
