"""A training run over several processes: rank 0 trains, the others hold their shards of its agents.

Rank 0 has each agent twice: in one piece, for the engine and the team's directory, and as its
shard, for the learner. A publish brings the first up to the second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from satune.agents.policy import Policy
from satune.agents.ports import Learner
from satune.agents.pretrained import AgentSpec, Precision, load_policies
from satune.agents.processes import Lost, Processes, started_by_torchrun
from satune.agents.sharded import Crew, ShardedLearner, ShardLearner
from satune.agents.shards import shard
from satune.agents.specs import OptimizerSettings, ShardingSettings
from satune.agents.weights import weights_digest
from satune.commands.assemble import Cast
from satune.commands.train import LocalWorld, load_objective, optimizer_settings
from satune.config.schema import Recipe
from satune.types import UserError


@dataclass(frozen=True, slots=True)
class _Plan:
    """What every process makes its parts of: models by agent and how they are trained. ``digests``
    tell rank 0's weights."""

    specs: tuple[AgentSpec, ...]
    shared_base: bool
    precision: Precision
    seed: int
    optimizers: Mapping[str, OptimizerSettings]
    frozen: Mapping[str, bool]
    digests: Mapping[str, str]
    scratch: Path


@contextmanager
def processes_of(recipe: Recipe) -> Iterator[Processes | None]:
    """The processes of the run, for as long as the block runs; None where the recipe shards
    nothing. Raises UserError where several were started for such a recipe, or for one that cannot
    be sharded."""
    if recipe.sharding is None:
        if started_by_torchrun() and os.environ["WORLD_SIZE"] != "1":
            raise UserError(
                f"{os.environ['WORLD_SIZE']} processes were started, and the recipe has no"
                " sharding; add `sharding: {}`, or start one process"
            )
        yield None
        return
    processes = Processes(recipe.sharding, _kind(recipe.team.device))
    with processes.ended_by_signal():
        yield processes


def _kind(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UserError(
            f"team.device: {device}, and every process of a sharded run takes its own; give auto,"
            " cpu or cuda"
        )
    return device
