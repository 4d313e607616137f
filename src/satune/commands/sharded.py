"""A training run over several processes: rank 0 trains, the others hold their shards of its agents.

Rank 0 has each agent twice: in one piece, for the engine and the team's directory, and as its
shard, for the learner. A publish brings the first up to the second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from satune.agents.crew import Crew, ShardLearner
from satune.agents.policy import Policy
from satune.agents.ports import Learner
from satune.agents.pretrained import AgentSpec, Precision, load_policies
from satune.agents.processes import Processes
from satune.agents.sharded import ShardedLearner
from satune.agents.shards import check_layers, shard
from satune.agents.specs import OptimizerSettings
from satune.agents.weights import weights_digest
from satune.commands.assemble import Cast
from satune.commands.train import Parts, load_objective, optimizer_settings
from satune.commands.world import LocalWorld
from satune.config.schema import Recipe
from satune.files.interrupts import Lost
from satune.training.run_directory import RunDirectory
from satune.types import UserError


@dataclass(frozen=True, slots=True)
class _Plan:
    """What every process makes its parts of the learners from."""

    specs: tuple[AgentSpec, ...]
    shared_base: bool
    precision: Precision
    seed: int
    optimizers: Mapping[str, OptimizerSettings]
    frozen: Mapping[str, bool]
    scratch: Path


@contextmanager
def processes_of(recipe: Recipe) -> Iterator[Processes]:
    """The processes of a run, for as long as the block runs. Raises UserError where the recipe
    shards nothing, and Lost."""
    if recipe.sharding is None:
        raise UserError(
            f"{os.environ.get('WORLD_SIZE')} processes were started, and the recipe has no "
            "sharding; add sharding: {} to it, or start one process"
        )
    device = recipe.team.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    processes = Processes(recipe.sharding, device)
    with processes.ended_by_signal():
        try:
            yield processes
        except Lost:
            raise
        except BaseException:
            with suppress(Lost):
                processes.dismiss()
            if processes.count == 1:  # others may be anywhere in a collective
                processes.close()
            raise
        processes.dismiss()
        processes.close()


class ShardedWorld(LocalWorld):
    """The world on rank 0, whose engine has models apart from the learners' shards."""

    def publish(self, agent: str, version: int, weights: Mapping[str, Tensor]) -> Any:
        self.cast.team.policies[agent].load_weights(weights)
        return super().publish(agent, version, weights)


def sharded_parts(processes: Processes) -> Parts:
    """What makes learners and world of a run that ``processes`` share, on rank 0."""
    return partial(_drive, processes)


def _drive(
    processes: Processes, cast: Cast, directory: RunDirectory
) -> tuple[dict[str, Learner], ShardedWorld]:
    recipe, team = cast.recipe, cast.team
    sections = recipe.team.resolved().agents
    for policy in team.policies.values():
        check_layers(policy)
    plan = _Plan(
        tuple(team.specs[name] for name in team.policies),
        team.sharing == "lora",
        Precision.of(recipe.team.dtype, recipe.optimizer.autocast),
        recipe.seed,
        {name: optimizer_settings(recipe, sections[name]) for name in team.policies},
        {name: sections[name].frozen for name in team.policies},
        directory.path / "optimizers",
    )
    processes.tell(plan)
    crew = _crew(processes, plan, recipe)
    learners: dict[str, Learner] = {
        name: ShardedLearner(crew, name, policy) for name, policy in team.policies.items()
    }
    return learners, ShardedWorld(cast, directory)


def follow(processes: Processes, recipe: Recipe) -> None:
    """Any process but rank 0: take part until that says that the run is over. Raises Lost, and
    UserError where the models cannot be loaded or are others than rank 0's."""
    plan = processes.hear()
    if isinstance(plan, _Plan):
        _crew(processes, plan, recipe).follow()


def _crew(processes: Processes, plan: _Plan, recipe: Recipe) -> Crew:
    parts: dict[str, ShardLearner] = {}
    for policies in _models(plan):
        _check_same(processes, policies)
        for name, cut in shard(policies, plan.frozen, processes).items():
            parts[name] = ShardLearner(
                cut,
                plan.optimizers[name],
                frozen=plan.frozen[name],
                scratch=plan.scratch / f"process-{processes.rank}",
            )
    return Crew(processes, parts, load_objective(recipe.objective).loss)


def _models(plan: _Plan) -> Iterator[dict[str, Policy]]:
    """The agents of one model after the other, on the CPU."""
    together = [plan.specs] if plan.shared_base else [(spec,) for spec in plan.specs]
    for specs in together:
        loaded = load_policies(
            specs,
            shared_base=plan.shared_base,
            precision=plan.precision,
            device="cpu",
            seed=plan.seed,
        )
        by_model: dict[int, dict[str, Policy]] = {}
        for name, policy in loaded.items():
            by_model.setdefault(id(policy.model), {})[name] = policy
        yield from by_model.values()


def _check_same(processes: Processes, policies: Mapping[str, Policy]) -> None:
    """Raise UserError, in every process, where they have not all read the same weights."""
    name, policy = next(iter(policies.items()))
    digest = weights_digest(dict(policy.model.named_parameters()))
    with processes.talking:  # no "still here" between the two
        if processes.drives:
            processes.tell(digest)
        same = processes.drives or processes.hear() == digest
        with processes.noticing():
            if processes.everywhere(same):
                return
    raise UserError(
        f"agent {name}: the processes read different weights; give every machine the same files"
    )
