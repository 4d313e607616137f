"""A training run in progress: its state, its collaborators, and what is written of it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

from satune.agents.ports import Learner
from satune.core.trust_region import TrustRegionSettings
from satune.files.interrupts import uninterrupted
from satune.training.certification import CertifyState
from satune.training.checkpoint import Checkpoints
from satune.training.run_directory import RunDirectory
from satune.training.schedules import Batch, Supply, needs_rollout
from satune.training.settings import TrainingSettings
from satune.training.update import Outcome
from satune.types import Episode, Key, count_failures


class World(Protocol):
    """What training needs done outside its room: playing, evaluating, publishing, serialising."""

    def publish(self, agent: str, version: int) -> None: ...

    def evaluate(self, *, greedy: bool, before: Sequence[float] | None) -> dict[str, Any]:
        """Held-out figures of the team as it is: reward, interval, problems, per_problem; and the
        paired difference to ``before``, an earlier per_problem."""
        ...

    @property
    def certifies(self) -> Literal["fresh", "finite"]:
        """Whether problems for certificates are generated, or drawn from a finite set."""
        ...

    def certify(self, key: Key, offset: int, problems: int, samples: int) -> list[Episode]:
        """Episodes of the team as the engine has it, on problems that give no gradient: drawn
        independently, the same ones for the same offset."""
        ...

    def to_row(self, episode: Episode) -> dict[str, Any]: ...

    def from_row(self, row: Mapping[str, Any]) -> Episode: ...

    def save_team(self) -> None: ...


class Watcher(Protocol):
    """Whoever shows progress: called with each event as it is written."""

    def __call__(self, kind: str, fields: Mapping[str, Any]) -> None: ...


@dataclass(slots=True)
class State:
    """Where a run is. ``stage`` counts finished stages, ``step`` finished steps of the next one;
    ``opening`` is what the stage event will say of its beginning, ``totals`` what the run cost and,
    under ``updates``, the steps that the team took and still has."""

    betas: dict[str, float]
    versions: dict[str, int]
    certify: CertifyState
    stage: int = 0
    step: int = 0
    order: list[str] = field(default_factory=list)
    batch: Batch | None = None
    opening: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, float] = field(
        default_factory=lambda: {
            "episodes": 0,
            "sampled_tokens": 0,
            "seconds": 0.0,
            "updates": 0,
        }
    )
    evaluations: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Training:
    """State and collaborators of a run. ``published``: the version the engine has of each agent."""

    settings: TrainingSettings
    learners: Mapping[str, Learner]
    seats: Mapping[str, list[str]]
    supply: Supply
    world: World
    directory: RunDirectory
    checkpoints: Checkpoints
    state: State
    watch: Watcher
    evaluates_greedy: bool = True
    published: dict[str, int] = field(default_factory=dict)
    _rollout_seconds: float = 0.0
    _stage_started: float = field(default_factory=time.perf_counter)

    # -- what a stage asks for -------------------------------------------------------------------

    def region(self, agent: str) -> TrustRegionSettings:
        """The trust region with the agent's own δ."""
        common = self.settings.update.trust_region
        return replace(common, delta=self.settings.deltas.get(agent, common.delta))

    def wants_rollout(self, batch: Batch, step: int) -> bool:
        return needs_rollout(self.settings.schedule, batch, step)

    def roll_out(self, stage: int, step: int) -> Batch:
        """A new batch under the team as it is, written to the run's episodes and events."""
        if step == 1:
            self._stage_started = time.perf_counter()
        started = time.perf_counter()
        batch = self.supply.batch(stage, step)
        self._rollout_seconds = time.perf_counter() - started
        drawn = self.supply.fresh_episodes
        self._check_versions(drawn)
        tokens = _tokens(drawn)
        self.state.totals["episodes"] += len(drawn)
        self.state.totals["sampled_tokens"] += tokens["sampled"]
        self.directory.append_episodes(
            stage, ({"stage": stage, "step": step, **self.world.to_row(e)} for e in drawn)
        )
        self.event(
            "rollout",
            stage=stage,
            step=step,
            episodes=len(drawn),
            reward=batch.reward,
            failures=count_failures(drawn),
            tokens=tokens,
            seconds={"rollout": self._rollout_seconds},
        )
        return batch

    def _check_versions(self, episodes: list[Episode]) -> None:
        for episode in episodes:
            for turn in episode.turns:
                expected = self.state.versions.get(turn.agent)
                if expected is not None and turn.version != expected:
                    raise RuntimeError(
                        f"seat {turn.seat} was sampled from version {turn.version} of agent "
                        f"{turn.agent}, the learner is at {expected}: the engine was not given "
                        "the new weights"
                    )

    def open_stage(self, scores: Mapping[str, float]) -> None:
        assert self.state.batch is not None
        self.state.opening = {"reward": self.state.batch.reward, "order": self.state.order}
        if scores:
            self.state.opening["order_scores"] = dict(scores)

    def take(self, agent: str, accepted: bool, *, last: bool) -> None:
        """The team takes an accepted update and the engine the new weights (simultaneous: all of
        them when the sweep is over, which no rollout can tell before)."""
        if accepted:
            self.state.versions[agent] += 1
            self.state.totals["updates"] += 1
        if self.settings.schedule.name != "simultaneous":
            self.publish(agent)
        elif last:
            for name in self.state.versions:
                self.publish(name)

    def publish(self, agent: str) -> None:
        self.published[agent] = self.state.versions[agent]
        self.world.publish(agent, self.published[agent])

    def record_update(self, stage: int, step: int, agent: str, outcome: Outcome) -> None:
        fields = dict(outcome.event)
        fields["seconds"] = {"rollout": self._rollout_seconds, **fields.get("seconds", {})}
        self._rollout_seconds = 0.0
        assert self.state.batch is not None
        if self.state.batch.drawn_before == step:
            fields["tokens"] = {**fields["tokens"], **_tokens(self.supply.fresh_episodes)}
        self.event(
            "update",
            stage=stage,
            step=step,
            agent=agent,
            seats=list(self.seats[agent]),
            schedule=self.settings.schedule.name,
            version=self.state.versions[agent],
            failures=count_failures(self.state.batch.episodes),
            **fields,
        )

    def close_stage(self) -> None:
        """The stage's event and, where due, its evaluation; then the stage's checkpoint."""
        state = self.state
        state.stage, state.step, state.batch = state.stage + 1, 0, None
        seconds = time.perf_counter() - self._stage_started
        if state.certify.held and self.settings.certify.problems:
            state.opening["uncertified"] = list(state.certify.held)
        state.totals["seconds"] += seconds
        self.event(
            "stage",
            stage=state.stage,
            **state.opening,
            seconds=seconds,
            peak_memory=peak_memory(),
        )
        every = self.settings.evaluate_every
        if every and state.stage % every == 0 and state.stage < self.settings.stages:
            self.evaluate(greedy=False)
        self.save(f"stage-{state.stage:04d}")

    def evaluate(self, *, greedy: bool) -> dict[str, Any]:
        """Evaluate on held-out problems, write the event and remember it for the summary."""
        started = time.perf_counter()
        earlier = [e for e in self.state.evaluations if e["greedy"] == greedy]
        figures = self.world.evaluate(
            greedy=greedy, before=earlier[0]["per_problem"] if earlier else None
        )
        self.state.evaluations.append({"stage": self.state.stage, "greedy": greedy, **figures})
        self.event(
            "eval",
            stage=self.state.stage,
            greedy=greedy,
            **figures,
            seconds=time.perf_counter() - started,
        )
        return figures

    # -- what is written -------------------------------------------------------------------------

    def event(self, kind: str, **fields: Any) -> None:
        self.directory.append_event(kind, **fields)
        self.watch(kind, fields)

    def save_step(self) -> None:
        if self.settings.checkpoint_steps:
            self.save(f"stage-{self.state.stage + 1:04d}-step-{self.state.step}")

    def save(self, name: str) -> None:
        """Write a checkpoint; what was not touched since the last one is linked."""
        with uninterrupted():
            self.checkpoints.write(name, self)


def _tokens(episodes: list[Episode]) -> dict[str, int]:
    return {
        "prompt": sum(t.prompt_tokens for e in episodes for t in e.turns),
        "sampled": sum(t.completion_tokens for e in episodes for t in e.turns),
        "environment": sum(e.environment_tokens for e in episodes),
    }


def peak_memory() -> int:
    """Largest memory held so far in bytes: of the accelerator where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
