"""The most that a stage's tensors take at once, before anything is loaded.

A mini-batch of each agent is gone through once with fake tensors, which have shapes and no values:
the agent's own model, the learner's way of feeding it, and a backward pass. What is counted is what
the real tensors would take. What a step holds beside that is a matter of copies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from satune.agents.architectures import cached_numbers, configuration
from satune.agents.live import LiveBytes
from satune.agents.packing import padded_budget
from satune.agents.policy import Policy
from satune.agents.prefixes import Level, shared_hidden, with_opening, worth_sharing
from satune.agents.pretrained import Precision, hollow_policy
from satune.agents.rendering import ChatRenderer
from satune.agents.sources import read_tokenizer, saved_adapter, source_of
from satune.commands.assemble import agent_spec, engine_of, load_tasks
from satune.commands.placement import bases, device_of, is_here
from satune.config.schema import AgentSection, Recipe, ResolvedTeam
from satune.core.logprobs import chunk_for, policy_logits
from satune.engines.base import LocalSettings
from satune.files.arrays import shared_prefix
from satune.tasks.catalog import take
from satune.tiny.zoo import is_tiny, tiny_model, tiny_tokenizer
from satune.types import Entry

_PROMPTS = 32
"""So many problems are looked at for the longest prompt."""
_ROWS = 256
"""So many conversations are decoded at a time by an engine that does not say how many."""
_UNTRACEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    NotImplementedError,
)
"""What a model raises that looks at the values of its tensors, as some mixtures of experts do."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """What is fed at once: ``rows`` of ``prompt`` + ``new`` tokens, of which ``own`` are scored, on
    up to ``prompts`` distinct prompts that all begin with the same ``opening`` tokens. ``whole``
    says that this is all of a mini-batch."""

    rows: int
    prompt: int
    opening: int
    new: int
    own: int
    prompts: int
    whole: bool

    @property
    def width(self) -> int:
        return self.prompt + self.new - 1  # the last token predicts nothing that is scored


def stage_bytes_by_device(recipe: Recipe) -> dict[str, dict[str, int]] | None:
    """The most bytes of tensors at once in each part of a stage, on each device on which agents lie
    (on a CPU with what rests there of its agents between steps, as it does from the second stage
    on).

    Counted for conversations in which every seat speaks once, as long as it may, and reads all of
    the others. Certificates, a reference KL, a hand-over, rollouts ahead, and the gauge of rounding
    below float32 come on top. None where a model or its tokenizer is not here, where a model looks
    at the values of its tensors, or where agents have critics.
    """
    if recipe.critic.kind != "none":
        return None
    team = recipe.team.resolved()
    models = {name: str(agent.model) for name, agent in team.agents.items() if is_here(agent)}
    found_prompts = [_prompts(recipe, team.agents[name], model) for name, model in models.items()]
    prompts = [lengths for lengths in found_prompts if lengths is not None]
    if not prompts or len(prompts) < len(models):
        return None
    there: dict[str, dict[str, dict[str, int]]] = {}
    base_of, counted = bases(recipe), set()
    for (name, model), lengths in zip(models.items(), prompts, strict=True):
        device = device_of(recipe, team.agents[name])
        try:
            found = _agent(recipe, team, name, model, lengths, device == "cpu")
        except _UNTRACEABLE:
            return None
        if base_of[name] in counted:
            found["frozen"] = 0
        counted.add(base_of[name])
        there.setdefault(device, {})[name] = found
    return {device: _phases(recipe, team, found, device) for device, found in there.items()}


def _phases(
    recipe: Recipe, team: ResolvedTeam, agents: Mapping[str, dict[str, int]], device: str
) -> dict[str, int]:
    """The most bytes in each part of a stage on a device on which these ``agents`` lie, and the
    ``peak`` of all."""
    here = device == "cpu"
    steps = {
        name: found
        for name, found in agents.items()
        if found["own"] and not team.agents[name].frozen and recipe.stages
    }
    held = sum(found["own"] + found["frozen"] for found in agents.values())
    # A step begins with moments of before, and keeps them for a revert; the others' rest.
    trained = sum(found["own"] for found in steps.values())
    resting = 2 * trained if here and recipe.optimizer.offload != "disk" else 0
    decoding = max(found["decoding"] for found in agents.values())
    phases = {"rollout": held + resting + decoding}
    for found in steps.values():
        own = found["own"]
        before = 2 * own if here and not resting else 0
        base = held + resting + before + own + 2 * own + (found["states"] if here else 0)
        # AdamW takes the root of a moment of every parameter at once.
        update = base + max(found["backward"], 2 * own)
        measure = base + own + max(found["forward"], found["mixing"])
        phases["update"] = max(phases.get("update", 0), update)
        phases["measure"] = max(phases.get("measure", 0), measure)
    return {**phases, "peak": max(phases.values())}


def _agent(
    recipe: Recipe,
    team: ResolvedTeam,
    name: str,
    model: str,
    lengths: tuple[int, int],
    on_cpu: bool,
) -> dict[str, int]:
    """Bytes of one agent: ``own`` and ``frozen`` parameters; ``backward``, what a mini-batch takes
    with its gradients; ``forward``, what measuring feeds at once; ``mixing``, what a proposal
    that is shrunk takes; ``states`` of the anchor; ``decoding``, keys and values of the
    conversations that are decoded at a time with what fills them."""
    section, (prompt, opening) = team.agents[name], lengths
    seats = sum(agent == name for agent in team.seats.values())
    new = recipe.rollout.max_new_tokens * len(team.seats)
    episodes = recipe.rollout.problems * recipe.rollout.samples
    device = torch.device("cpu" if on_cpu else "cuda")
    budget = padded_budget(recipe.optimizer.micro_batch_tokens, device)
    precision = Precision.of(recipe.team.dtype, recipe.optimizer.autocast)
    engine = engine_of(recipe)
    conversations = engine.max_rows if isinstance(engine, LocalSettings) else _ROWS

    def batch(count: int) -> _Batch:
        rows = max(1, min(count * seats, budget // (prompt + new)))
        missed = (1 - count / episodes) ** recipe.rollout.samples
        prompts = rows if seats > 1 else math.ceil(recipe.rollout.problems * (1 - missed))
        own = rows * recipe.rollout.max_new_tokens
        prompts = min(rows, prompts)
        return _Batch(rows, prompt, opening, new, own, prompts, rows == count * seats)

    config = tiny_model(model, 0).config if is_tiny(model) else configuration(model)
    assert config is not None
    with FakeTensorMode(), LiveBytes() as live:
        policy = hollow_policy(agent_spec(name, section, model), config, precision)
        own = list(policy.trainable().values())
        for parameter in policy.model.parameters():
            parameter.requires_grad_(False)
        for parameter in own:
            parameter.requires_grad_(True)
        share = not recipe.optimizer.gradient_checkpointing
        mini = batch(math.ceil(episodes / recipe.optimizer.mini_batches))
        with policy.checkpointing(recipe.optimizer.gradient_checkpointing):
            backward = _most(live, policy, mini, share)
            if not mini.whole:  # the gradient of the first is there when the second comes
                backward = _most(live, policy, mini, share)
        for parameter in own:
            parameter.grad = None
        conversations = min(episodes, conversations)
        prompts = torch.zeros(
            max(1, min(conversations, budget // prompt)), prompt, dtype=torch.long
        )
        with torch.no_grad():
            forward = _most(live, policy, batch(episodes), share)
            live.peak = before = live.now
            policy.hidden(prompts)
            prefill = live.peak - before
        parameters = sum(p.nbytes for p in {id(p): p for p in policy.model.parameters()}.values())
        mine = sum(p.nbytes for p in own)
        width = policy.config.hidden_size * (policy.autocast or own[0].dtype).itemsize
    numbers = cached_numbers(config) or 0
    item = (policy.autocast or own[0].dtype).itemsize
    return {
        "own": mine,
        "frozen": parameters - mine,
        "backward": backward,
        "forward": forward,
        "mixing": 3 * max(p.nbytes for p in own),
        "states": episodes * seats * recipe.rollout.max_new_tokens * width,
        "decoding": prefill + numbers * item * conversations * (prompt + new),
    }


def _most(live: LiveBytes, policy: Policy, batch: _Batch, share: bool) -> int:
    """The most bytes beside the parameters while a batch is fed, scored against an anchor and, with
    gradients, propagated back; the gradient stays."""
    parameters = sum(p.nbytes for p in {id(p): p for p in policy.model.parameters()}.values())
    live.peak = live.now
    ids = torch.zeros(batch.rows, batch.width, dtype=torch.long)
    plans: list[tuple[Level, ...] | None] = [None]
    if share and policy.attends_to_everything:
        # Shuffled mini-batches have fewer prompts too, which may be too few to share an opening.
        plans = [_levels(batch, ids, count) for count in range(1, batch.prompts + 1)]
    most = max(plans, key=lambda levels: _fed(levels) if levels else ids.numel())
    hidden = shared_hidden(policy, most) if most else policy.hidden(ids)[:, batch.prompt - 1 :]
    hidden_TH = hidden.reshape(-1, hidden.shape[-1])[: batch.own]
    del hidden
    loss = torch.zeros(())
    for rows_NH in hidden_TH.split(chunk_for(hidden_TH, policy.project)):
        loss = loss + _scored(rows_NH, policy)
    if torch.is_grad_enabled():
        loss.backward()
    return live.peak - parameters


def _fed(levels: tuple[Level, ...]) -> int:
    return sum(level.ids_RS.numel() for level in levels)


def _levels(batch: _Batch, ids: Tensor, prompts: int) -> tuple[Level, ...] | None:
    """What is fed of a batch on so many distinct prompts, as ``agents.prefixes`` plans it; None:
    every row whole."""
    first = batch.prompt - 1
    nothing_B = torch.zeros(batch.rows, dtype=torch.long)
    nothing_G = torch.zeros(prompts, dtype=torch.long)
    trunk_ids = torch.zeros(prompts, first, dtype=torch.long)
    trunk = Level(trunk_ids, nothing_G, nothing_G + first, alike=True)
    length_B = nothing_B + (batch.width - first)
    own = Level(ids[:, first:], nothing_B + first, length_B, nothing_B, alike=True)
    plain = trunk, own
    opened = with_opening(plain, batch.opening)
    if worth_sharing(_fed(plain) - _fed(opened), ids):
        return opened
    return plain if worth_sharing(ids.numel() - _fed(plain), ids) else None


def _scored(rows_NH: Tensor, policy: Policy) -> Tensor:
    """The shapes that ``score_tokens`` makes of a chunk, where ``exact_kl`` looks at values: it
    makes the derivative with the value, and without gradients goes by small blocks."""
    logits_NV = policy_logits(rows_NH, policy.project, policy.temperature)
    with torch.no_grad():
        other_NV = policy_logits(rows_NH.detach(), policy.project, policy.temperature)
        if not rows_NH.requires_grad:
            return other_NV.sum()
        pull_NV = torch.cat([other_NV - logits_NV.detach()])
    return (logits_NV * pull_NV).sum() + logits_NV.logsumexp(-1).sum()


def _prompts(recipe: Recipe, section: AgentSection, model: str) -> tuple[int, int] | None:
    """Tokens of the longest prompt that a seat of this agent begins with, and how many all of them
    begin with; None where the tokenizer is not here."""
    saved = saved_adapter(model)
    place = saved.base if saved else model
    if is_tiny(place):
        tokenizer: Any = tiny_tokenizer(place)
    elif Path(place).exists() and configuration(place) is not None:
        tokenizer = read_tokenizer(source_of(place))
    else:
        return None
    renderer = ChatRenderer(tokenizer, section.template, 1 << 30)
    task, _ = load_tasks(recipe)
    beginnings = [
        renderer.view("seat").prompt([Entry("problem", parts=problem.prompt)], 1).ids
        for problem in take(task, "train", _PROMPTS, 0)
    ]
    found = [ids for ids in beginnings if ids is not None]
    return max(map(len, found)), min(shared_prefix(found[0], ids) for ids in found)
