"""What training needs done outside its room, over a cast: playing, grading, publishing, saving."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from satune.agents.critic import LocalCritic
from satune.commands.assemble import Cast
from satune.engines.base import MayWait
from satune.play.progress import progress_of
from satune.play.rollout import End, rollout_sync
from satune.play.rows import episode_from_row, episode_to_row
from satune.task_parts import is_fresh
from satune.tasks.catalog import draw
from satune.training.ports import TeamWeights
from satune.training.run_directory import RunDirectory
from satune.types import Episode, Key, no_progress


class LocalWorld:
    """What training needs done outside its room, over a cast in this process."""

    def __init__(
        self, cast: Cast, directory: RunDirectory, critics: Mapping[str, LocalCritic] | None = None
    ) -> None:
        self.cast = cast
        self.directory = directory
        self.critics = critics or {}

    def draw(self, key: Key, offset: int, count: int) -> list[Episode]:
        problems = self.cast.train_problems(count, offset)
        return rollout_sync(self.cast.match(), problems, self.cast.recipe.rollout.samples, key)

    def publish(self, agent: str, version: int, weights: Mapping[str, Tensor]) -> Any:
        return self.cast.engine.publish(agent, version, weights)

    def evaluate(
        self,
        *,
        greedy: bool,
        before: Sequence[float] | None,
        keep: Callable[[Sequence[Episode]], None],
    ) -> dict[str, Any]:
        # The same key each time: the same problems and the same uniforms.
        key = Key(self.cast.recipe.seed, "evaluate", draw=int(greedy))
        evaluation = self.cast.evaluate(greedy=greedy, key=key)
        keep(evaluation.episodes)
        return progress_of(evaluation, before)

    @property
    def certifies(self) -> Literal["fresh", "finite"]:
        return "fresh" if is_fresh(self.cast.task) else "finite"

    def certify(self, key: Key, offset: int, problems: int, samples: int) -> list[Episode]:
        drawn = draw(self.cast.task, "certify", problems, offset)
        return rollout_sync(self.cast.match(), drawn, samples, key, label="certificate")

    def to_row(self, episode: Episode) -> dict[str, Any]:
        return episode_to_row(episode)

    def from_row(self, row: Mapping[str, Any]) -> Episode:
        return episode_from_row(row)

    def save_team(self) -> None:
        critics = {name: critic.weights() for name, critic in self.critics.items()}
        digests = {name: agent.save() for name, agent in self.cast.hosts.items()}
        self.cast.team.save(self.directory.team, critics=critics, digests=digests)


class AheadWorld(LocalWorld):
    """A world whose engine draws training episodes in a thread of its own while learners change: a
    ``training.ports.Drawer``.

    The engine has one team at a time. What is published while a batch is being drawn it is given
    after that, and whoever asks it for something else waits so long. What it says of the arrival is
    told to nobody: it may come after the step's event is written.
    """

    def __init__(
        self, cast: Cast, directory: RunDirectory, critics: Mapping[str, LocalCritic] | None = None
    ) -> None:
        super().__init__(cast, directory, critics)
        # A thread does not have the number of threads that was set in another.
        self._thread = ThreadPoolExecutor(
            1, "ahead", initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        )
        self._under_way: list[Future[list[Episode]]] = []
        self._present: dict[str, int] = {}
        self._given: dict[str, int] = {}
        self._due: dict[str, tuple[int, Mapping[str, Tensor]]] = {}
        self._end: End = lambda: None
        self._stopped = False

    def draw_ahead(
        self, key: Key, offset: int, problems: int, team: TeamWeights
    ) -> Future[list[Episode]]:
        if not self._given and all(each.done() for each in self._under_way):
            # Here, where ctrl-C ends it: an engine may have to be started for it.
            self._give(self._lacking(team))
        found = self._thread.submit(self._draw_by, key, offset, problems, team)
        # What is over is not kept: it holds its episodes.
        self._under_way = [*(each for each in self._under_way if not each.done()), found]
        return found

    def stop_drawing(self) -> None:
        self._stopped = True
        with suppress(RuntimeError):  # its event loop has just been closed
            self._end()
        self._thread.shutdown(wait=False, cancel_futures=True)
        engine = self.cast.engine
        # More than once: it may be about to wait, for one server after another.
        while under_way := [each for each in self._under_way if not each.done()]:
            if isinstance(engine, MayWait):
                engine.cut()
            wait(under_way, timeout=0.1)
        self._thread.shutdown()

    def _draw_by(self, key: Key, offset: int, count: int, team: TeamWeights) -> list[Episode]:
        self._give(self._lacking(team))
        problems = self.cast.train_problems(count, offset)
        samples = self.cast.recipe.rollout.samples
        # Whoever shows progress shows that of the updates.
        match = replace(self.cast.match(), progress=no_progress)
        return rollout_sync(match, problems, samples, key, label="rollout ahead", begun=self._begun)

    def _begun(self, end: End) -> None:
        self._end = end
        if self._stopped:
            end()

    def _lacking(self, team: TeamWeights) -> TeamWeights:
        """Those of these weights in whose place the engine has others."""
        return {a: given for a, given in team.items() if self._given.get(a) != given[0]}

    def _give(self, team: TeamWeights) -> None:
        """Let the engine have these weights. All are in the copies before the first is published:
        an engine may begin with what it finds there."""
        for agent, (_, weights) in team.items():
            self._given.pop(agent, None)
            if agent in self.cast.copies:
                self.cast.copies[agent].load_weights(weights)
        for agent, (version, weights) in team.items():
            super().publish(agent, version, weights)
            self._given[agent] = version

    def _settle(self) -> None:
        """Wait for what is under way, and let the engine have the team as it is."""
        wait(self._under_way)
        self._under_way.clear()
        self._give(self._due)
        self._due.clear()
        assert self._given == self._present, "the engine has another team"

    # -- what a world does beside ------------------------------------------------------------------

    def publish(self, agent: str, version: int, weights: Mapping[str, Tensor]) -> None:
        self._present[agent] = version
        if all(found.done() for found in self._under_way):
            self._due.pop(agent, None)
            self._give({agent: (version, weights)})
        else:
            self._due[agent] = version, {n: t.to("cpu", copy=True) for n, t in weights.items()}

    def draw(self, key: Key, offset: int, count: int) -> list[Episode]:
        self._settle()
        return super().draw(key, offset, count)

    def evaluate(
        self,
        *,
        greedy: bool,
        before: Sequence[float] | None,
        keep: Callable[[Sequence[Episode]], None],
    ) -> dict[str, Any]:
        self._settle()
        return super().evaluate(greedy=greedy, before=before, keep=keep)

    def certify(self, key: Key, offset: int, problems: int, samples: int) -> list[Episode]:
        self._settle()
        return super().certify(key, offset, problems, samples)
