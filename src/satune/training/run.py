"""A training run in progress: its state, its collaborators, and what is written of it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from satune.agents.weights import Weights
from satune.files.events import Event, RolloutEvent, count_failures
from satune.files.interrupts import uninterrupted
from satune.training.ahead import Ahead, correction
from satune.training.certification import Verdict
from satune.training.ledger import Ledger
from satune.training.ports import Agents, Host, Saved, Store, Watcher, World
from satune.training.run_directory import RunDirectory
from satune.training.schedules import needs_rollout
from satune.training.settings import TrainingSettings
from satune.training.state import Batch, Early, State
from satune.training.supply import Supply, mean_reward
from satune.types import Episode, Progress, no_progress

_FIRST_ONLY = {"per_problem", "groups", "figures"}
"""What the state keeps of the first evaluation alone: it is written with every checkpoint."""


@dataclass(slots=True)
class Training:
    """State and collaborators of a run. ``recipe`` has the effective recipe as plain values, for
    checkpoints; ``save_recipe`` writes it where a person finds it."""

    settings: TrainingSettings
    learners: Agents
    seats: Mapping[str, list[str]]
    supply: Supply
    world: World
    directory: RunDirectory
    store: Store
    ledger: Ledger
    state: State
    watch: Watcher
    recipe: Mapping[str, Any]
    save_recipe: Callable[[], None]
    ahead: Ahead = field(default_factory=Ahead)
    evaluates_greedy: bool = True
    progress: Progress = no_progress
    _rollout_seconds: float = 0.0
    _arrivals: dict[str, tuple[Any, float]] = field(default_factory=dict)
    _stage_started: float = field(default_factory=time.perf_counter)

    # -- what a stage asks for -------------------------------------------------------------------

    def open_batch(self, stage: int) -> Batch:
        """What a stage begins with: the batch that was drawn for it ahead, where there is one that
        the schedule keeps, else a new rollout. Batches of later stages are then begun."""
        self._stage_started = time.perf_counter()
        batch = self._drawn_ahead(stage)
        if batch is None or needs_rollout(self.settings.schedule, batch, step=1):
            batch = self.roll_out(stage, step=1)
        self._draw_ahead(stage)
        return batch

    def roll_out(self, stage: int, step: int) -> Batch:
        """A new batch under the team as it is, written to the run's episodes and events."""
        started = time.perf_counter()
        batch = self.supply.batch(stage, step)
        seconds = {"rollout": time.perf_counter() - started}
        self._check_versions(self.supply.fresh_episodes, self.state.versions)
        self._record_rollout(stage, step, batch.reward, seconds)
        return batch

    def _draw_ahead(self, stage: int) -> None:
        """Begin the batches that are missing of the next stages, by the team as it is."""
        state = self.state
        for later in self.ahead.missing(state.early, stage, self.settings.ahead):
            state.early.append(Early(later, self.supply.reserve(), dict(state.versions)))
        state.past = self.ahead.weights_of(state, self.learners)
        self.ahead.begin(state, self.settings)

    def _drawn_ahead(self, stage: int) -> Batch | None:
        """The batch that was drawn for a stage before it, its weights those of the team as it is;
        None where there is none."""
        state, started = self.state, time.perf_counter()
        early = next((each for each in state.early if each.stage == stage), None)
        if early is None:
            return None
        episodes = self.ahead.drawn(early)
        self._check_versions(episodes, early.versions)
        seconds = {"rollout": time.perf_counter() - started}
        found = correction(self.learners, episodes, state.versions, state.past)
        seconds["score"] = time.perf_counter() - started - seconds["rollout"]
        state.early.remove(early)
        batch = Batch(episodes, found.log_weights_E.tolist(), 0, mean_reward(episodes))
        self.supply.fresh_episodes = episodes
        # Step 0: no step learns from it.
        step = 0 if needs_rollout(self.settings.schedule, batch, step=1) else 1
        self._record_rollout(
            stage,
            step,
            batch.reward,
            seconds,
            {"versions": early.versions, "ess": batch.effective_size, **found.figures},
        )
        return batch

    def _record_rollout(
        self,
        stage: int,
        step: int,
        reward: float,
        seconds: dict[str, float],
        ahead: dict[str, Any] | None = None,
    ) -> None:
        """Write the episodes drawn last, and count them."""
        self._rollout_seconds += sum(seconds.values())
        drawn = self.supply.fresh_episodes
        tokens = _tokens_played(drawn)
        self.state.totals["episodes"] += len(drawn)
        self.state.totals["sampled_tokens"] += tokens["sampled"]
        self.directory.append_episodes(
            stage, ({"stage": stage, "step": step, **self.world.to_row(e)} for e in drawn)
        )
        event: RolloutEvent = {
            "event": "rollout",
            "stage": stage,
            "step": step,
            "episodes": len(drawn),
            "reward": reward,
            "failures": count_failures(drawn),
            "tokens": tokens,
            "seconds": seconds,
        }
        if ahead is not None:
            event["ahead"] = ahead
        self.tell(event)

    def _check_versions(self, episodes: list[Episode], versions: Mapping[str, int]) -> None:
        for episode in episodes:
            for turn in episode.turns:
                expected = versions.get(turn.agent)
                if expected is not None and turn.version != expected:
                    raise RuntimeError(
                        f"seat {turn.seat} was sampled from version {turn.version} of agent "
                        f"{turn.agent}, the learner is at {expected}: the engine was not given "
                        "the new weights"
                    )

    def open_stage(self, order: Sequence[str], scores: Mapping[str, float]) -> None:
        """Note the order of the sweep, and the scores that it was chosen by where it was."""
        state = self.state
        assert state.batch is not None
        state.order, state.accepted = list(order), {}
        state.opening = {"reward": state.batch.reward, "order": state.order}
        if scores:
            state.opening["order_scores"] = dict(scores)

    def take(self, agent: str, verdict: Verdict) -> None:
        """Write what became of the agent's step into the run's state, and give the engine the
        weights that it does not have under their number yet."""
        state = self.state
        assert state.batch is not None
        state.betas[agent] = verdict.beta
        state.accepted[agent] = verdict.accepted
        # Of earlier steps of the sweep as well: the team no longer has what they changed.
        state.accepted |= {name: False for name in verdict.reverted if name in state.accepted}
        state.batch.reweight(verdict.log_ratio_E)
        if verdict.log_ratio_H is not None:
            state.batch.note_ratios(agent, verdict.log_ratio_H)
        state.batch.spent |= verdict.spent
        if verdict.spent:
            dropped = self.ahead.drop(state.early, state.certify.held)
            state.early = [early for early in state.early if early not in dropped]
            if dropped:
                state.opening.setdefault("ahead_dropped", []).extend(e.stage for e in dropped)
        state.certify, state.issued = verdict.certify, verdict.issued
        if verdict.claim is not None:
            state.opening["certificate"] = verdict.claim
        for name, count in verdict.totals.items():
            state.totals[name] = state.totals.get(name, 0) + count
        self._arrivals.clear()
        for name, version in verdict.versions.items():
            state.versions[name] = version
            started = time.perf_counter()
            arrived = self.publish(name)
            self._arrivals[name] = arrived, time.perf_counter() - started

    def publish(self, agent: str) -> Any:
        """Give the engine the agent's weights, under the number that the state has for them; gives
        what it says of that."""
        weights = Weights(self.learners[agent].export)
        return self.world.publish(agent, self.state.versions[agent], weights)

    def record_update(self, stage: int, step: int, agent: str, verdict: Verdict) -> None:
        known = dict(verdict.event)
        spent = {"rollout": self._rollout_seconds, "update": 0.0, "measure": 0.0}
        self._rollout_seconds = 0.0
        assert self.state.batch is not None
        if self.state.batch.drawn_before == 0:
            # The anchor did not write it; who did was held against the engine at the rollout.
            known.pop("mismatch", None)
        if max(1, self.state.batch.drawn_before) == step:
            known["tokens"] = {**known["tokens"], **_tokens_played(self.supply.fresh_episodes)}
        moved = dict.fromkeys([agent, *known.get("gate", {}).get("agents", ())])
        reported = [name for name in moved if isinstance(self.learners[name], Host)]
        if reported:
            # Nobody here can look whether it is so.
            known["host"] = {"as_reported": reported}
        arrived, spent["publish"] = self._arrivals.pop(agent, (None, 0.0))
        if arrived is not None:
            known["publish"] = arrived
        fields = {
            "event": "update",
            "stage": stage,
            "step": step,
            "agent": agent,
            "seats": list(self.seats[agent]),
            "schedule": self.settings.schedule.name,
            "version": self.state.versions[agent],
            "failures": count_failures(self.state.batch.episodes),
            **known,
            "seconds": {**spent, **known.get("seconds", {})},
        }
        self.tell(cast(Event, fields))
        warning = known.get("rounding", {}).get("warning")
        if warning:
            self.watch({"event": "note", "text": warning})

    def close_stage(self) -> None:
        """The stage's event and, where due, its evaluation; then the stage's checkpoint where it is
        due."""
        state = self.state
        state.stage, state.step, state.batch = state.stage + 1, 0, None
        seconds = time.perf_counter() - self._stage_started
        if state.certify.held and self.settings.certify.problems:
            state.opening["uncertified"] = list(state.certify.held)
        state.totals["seconds"] += seconds
        fields = {
            "event": "stage",
            "stage": state.stage,
            **state.opening,
            "seconds": seconds,
            "memory": {"peak": peak_memory()},
        }
        self.tell(cast(Event, fields))
        self.evaluate_between()
        if self.settings.checkpoint.due(state.stage, last=state.stage == self.settings.stages):
            self.save(f"stage-{state.stage:04d}")

    def evaluate_between(self) -> None:
        """The evaluation between this stage and the next, where it is due and not made yet."""
        state, every = self.state, self.settings.evaluate_every
        if not every or state.stage % every or state.step or state.stage >= self.settings.stages:
            return
        if not any(e["stage"] == state.stage and not e["greedy"] for e in state.evaluations):
            self.evaluate(greedy=False)

    def evaluate(self, *, greedy: bool) -> dict[str, Any]:
        """Evaluate on held-out problems, write conversations and event and remember the figures for
        the summary; of each problem only the first ones, which later ones are compared with."""
        started = time.perf_counter()
        earlier = [e for e in self.state.evaluations if e["greedy"] == greedy]
        about = {"stage": self.state.stage, "greedy": greedy}

        def keep(episodes: Sequence[Episode]) -> None:
            rows = ({**about, **self.world.to_row(e)} for e in episodes)
            self.directory.append_evaluation(self.state.stage, rows)

        figures = self.world.evaluate(
            greedy=greedy, before=earlier[0]["per_problem"] if earlier else None, keep=keep
        )
        found = {**about, **figures}
        known = {k: v for k, v in found.items() if not earlier or k not in _FIRST_ONLY}
        self.state.evaluations.append(known)
        seconds = time.perf_counter() - started
        self.tell(cast(Event, {"event": "eval", **found, "seconds": seconds}))
        return figures

    # -- what is written -------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Write an event and show it to whoever watches."""
        self.directory.append_event(event)
        self.watch(event)

    def save_step(self) -> None:
        if self.settings.checkpoint.every == "step":
            self.save(f"stage-{self.state.stage + 1:04d}-step-{self.state.step}")

    def save(self, name: str) -> None:
        """Write a checkpoint; what was not touched since the last one is linked, and experience
        that no step will learn from again is left out."""
        state = self.state
        if state.batch and needs_rollout(self.settings.schedule, state.batch, state.step + 1):
            state = replace(state, batch=None)
        with uninterrupted():
            saved = Saved(state, self.supply.offset, self.directory.sizes(), self.recipe)
            self.store.write(name, saved, self.learners, self.world)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises UserError where it is not."""
        with uninterrupted():
            self.store.finish()

    def commit(self) -> None:
        """``finish_saving``, and tell the hosts of agents that live elsewhere."""
        with uninterrupted():
            self.store.commit()

    def restore(self, name: str, saved: Saved) -> None:
        """Go back to a checkpoint: learners, state, stream of problems, events and episodes. The
        engine is given all weights anew, whatever it has.

        What is meant stands in the directory before anything is removed: a resume after a cut
        finds it there and carries it out."""
        hosted = self.store.load(name, self.learners)
        self.state, self.supply.offset = saved.state, saved.offset
        held = self.state.certify.held
        held |= {agent: replace(held[agent], snapshot=found) for agent, found in hosted.items()}
        with uninterrupted(), self.directory.going_back(name):
            self.save_recipe()
            self.store.drop_after(name)
            for line in self.directory.truncate(saved.sizes):
                self.watch({"event": "note", "text": line})
        # What is drawn ahead is drawn with the agents that rest as they are, and with those that
        # learn as they were.
        for agent, learner in self.learners.items():
            if learner.frozen:
                self.publish(agent)
        self.ahead.begin(self.state, self.settings)
        for agent, learner in self.learners.items():
            if not learner.frozen:
                self.publish(agent)


def _tokens_played(episodes: list[Episode]) -> dict[str, int]:
    return {
        "prompt": sum(t.prompt_tokens for e in episodes for t in e.turns),
        "sampled": sum(t.completion_tokens for e in episodes for t in e.turns),
        "environment": sum(e.environment_tokens for e in episodes),
    }


def peak_memory() -> int:
    """Largest memory held so far in bytes: of the fullest accelerator where there is one."""
    if torch.cuda.is_available():
        return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
