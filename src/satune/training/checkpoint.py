"""Checkpoints: complete or absent, unchanged files linked, damage noticed and named.

A checkpoint is a directory written beside and renamed: ``state.json``, an agent's weights and
optimiser as safetensors, and the experience still in use, text and arrays (``files.arrays``).
Nothing in it depends on the number of processes. state.json (``state_file.py``) lists every file
with its size and digest.

Tensors are copied when a checkpoint is asked for; the files are written in the background, while
the next rollout runs, and waited for before the next checkpoint.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from satune.agents.anchor import Snapshot
from satune.agents.ports import Learner
from satune.files.arrays import append_rows, files_of_rows
from satune.files.names import is_plain
from satune.files.writing import (
    WRITING,
    disk_errors,
    identity,
    link,
    remove_tree,
    written_beside,
)
from satune.training.ports import Agents, Host, Saved, World
from satune.training.state import State
from satune.training.state_file import (
    EXPERIENCE,
    STATE,
    agent_file,
    flat_snapshot,
    from_json,
    pair,
    past_file,
    read_state,
    to_json,
    write_state,
)
from satune.types import Episode, UserError

_NAME = re.compile(r"stage-\d+(-step-\d+)?")


@dataclass(frozen=True, slots=True)
class _Written:
    """What a checkpoint holds, so that the next one links to what has not changed since.

    ``agents`` has version number and optimiser steps, which tell an agent's weights and moments;
    ``windows`` since when an agent is held; ``batch`` the stage and step of the experience;
    ``files`` the identity of every file.
    """

    path: Path
    agents: Mapping[str, tuple[int, int]]
    windows: Mapping[str, tuple[int, int]]
    batch: tuple[int, int] | None
    files: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, state: State, steps: Mapping[str, int]) -> _Written:
        return cls(
            path,
            {agent: (state.versions[agent], count) for agent, count in steps.items()},
            {agent: held.since for agent, held in state.certify.held.items()},
            None if state.batch is None else (state.stage, state.batch.drawn_before),
        )


class Checkpoints:
    """The checkpoints of one run, a ``training.ports.Store``. ``keep`` bounds how many stay."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep
        self._last: _Written | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._hosts: Mapping[str, Host] = {}

    def names(self) -> list[str]:
        """Complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        found = [p.name for p in self.directory.iterdir() if (p / STATE).is_file()]
        return sorted((name for name in found if _NAME.fullmatch(name)), key=_place)

    # -- writing ---------------------------------------------------------------------------------

    def write(self, name: str, saved: Saved, learners: Agents, world: World) -> None:
        """Write a checkpoint of the run as it is now, in the background.

        Raises UserError where the disk refused the checkpoint before this one; ``finish`` raises
        it for this one. Checkpoints that are complete stay.
        """
        self.commit()
        state, last = saved.state, self._last
        steps = {agent: learner.steps for agent, learner in learners.items()}
        now = _Written.of(self.directory / name, state, steps)
        linked: list[str] = []
        tensors: dict[str, dict[str, Tensor]] = {}

        def keep(
            relative: str, same: bool, find: Callable[[], Mapping[str, Tensor] | None]
        ) -> None:
            if last is not None and same and relative in last.files:
                linked.append(relative)
            elif found := find():
                tensors[relative] = {n: t.detach().cpu().contiguous() for n, t in found.items()}

        hosts = _elsewhere(learners)
        references: dict[str, str] = {}
        for agent, host in hosts.items():
            held = state.certify.held.get(agent)
            references[agent] = host.keep(name, None if held is None else held.snapshot)
        for agent, learner in learners.items():
            if isinstance(learner, Host):
                continue
            same = last is not None and last.agents.get(agent) == now.agents[agent]
            for part, find in _PARTS.items():
                keep(agent_file(agent, part), same or part == "reference", partial(find, learner))
        for agent, held in state.certify.held.items():
            if agent in hosts:
                continue
            same = last is not None and last.windows.get(agent) == held.since
            keep(agent_file(agent, "held"), same, partial(flat_snapshot, held.snapshot))
        for agent, versions in state.past.items():
            for version, weights in versions.items():
                # A number names one set of weights for ever.
                keep(past_file(agent, version), True, partial(dict, weights))
        episodes: Sequence[Episode] | None = None
        if state.batch is not None and last is not None and last.batch == now.batch:
            linked += [path.name for path in files_of_rows(last.path / EXPERIENCE)]
        elif state.batch is not None:
            episodes = state.batch.episodes
        # The run goes on and changes its state while this is written.
        text = copy.deepcopy(to_json(saved, steps, references))
        self._hosts = hosts
        self._writing = self._writer.submit(
            self._write, now, last, linked, tensors, episodes, text, world
        )

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises UserError where the disk refused
        it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def commit(self) -> None:
        """Tell the hosts which checkpoints are complete."""
        self.finish()
        for host in self._hosts.values():
            host.commit(self.names())

    def _write(
        self,
        now: _Written,
        last: _Written | None,
        linked: Sequence[str],
        tensors: Mapping[str, dict[str, Tensor]],
        episodes: Sequence[Episode] | None,
        text: dict[str, Any],
        world: World,
    ) -> None:
        with written_beside(now.path) as beside:
            for relative in linked:
                assert last is not None
                link(last.path / relative, beside / relative)
                now.files[relative] = last.files[relative]
            for relative, named in tensors.items():
                save_file(named, beside / relative)
                now.files[relative] = identity(beside / relative)
            if episodes is not None:
                append_rows(beside / EXPERIENCE, (world.to_row(e) for e in episodes))
                for path in files_of_rows(beside / EXPERIENCE):
                    now.files[path.name] = identity(path)
            text["files"] = now.files
            write_state(beside, text)
        self._last = now
        self._prune()

    def _prune(self) -> None:
        """Remove all but the newest, and the pieces that a killed run left half-way."""
        kept = self.names()[-self.keep :]
        for path in sorted(self.directory.iterdir()):
            if path.name in kept or not _NAME.fullmatch(path.name.removesuffix(WRITING)):
                continue
            if not path.name.endswith(WRITING):
                remove_tree(path)
            elif path.exists():
                with disk_errors(path):
                    shutil.rmtree(path)

    # -- reading ---------------------------------------------------------------------------------

    def latest(self, wanted: str | None = None) -> tuple[str, list[str]] | None:
        """The newest undamaged checkpoint (or ``wanted``) and one line a damaged one passed over.

        None where there is none at all. Raises UserError if ``wanted`` is missing or damaged, or
        if every one is damaged.
        """
        names = self.names()
        if wanted is not None:
            if wanted not in names:
                there = ", ".join(names) or "none"
                raise UserError(f"{self.directory}: no checkpoint {wanted!r}; there are: {there}")
            damage = self.damage(wanted)
            if damage:
                raise UserError(damage)
            return wanted, []
        passed: list[str] = []
        for name in reversed(names):
            damage = self.damage(name)
            if damage is None:
                return name, passed
            passed.append(damage)
        if passed:
            raise UserError(
                f"{passed[0]}; no undamaged checkpoint is left, start anew in another --out"
            )
        return None

    def damage(self, name: str) -> str | None:
        """One line on what is wrong with a checkpoint; None where every file is as recorded."""
        path = self.directory / name
        try:
            state = read_state(path)
        except UserError as error:
            return str(error)
        if not _stays(state):
            return f"{path}/state.json: damaged checkpoint (a name or size in it is none)"
        for relative, recorded in state["files"].items():
            if not (path / relative).is_file():
                return f"{path / relative}: damaged checkpoint (missing file)"
            if identity(path / relative) != recorded:
                return f"{path / relative}: damaged checkpoint (content changed)"
        return None

    def read(self, name: str, world: World) -> Saved:
        """What a checkpoint holds beside the learners; it has to be undamaged."""
        path = self.directory / name
        return from_json(read_state(path), path, world)

    def recipe(self, name: str) -> dict[str, Any]:
        """The recipe that an undamaged checkpoint was made under, as plain values."""
        return read_state(self.directory / name)["recipe"]

    def load(self, name: str, learners: Agents) -> dict[str, Snapshot]:
        """Put weights, moments and references back bit for bit; agents that live elsewhere stand
        where their hosts kept them, before anything is done here. Gives what those held at the last
        certificate. Nothing is written. Raises UserError where a host cannot stand there."""
        path = self.directory / name
        text = read_state(path)
        held: dict[str, Snapshot] = {}
        for agent, host in _elsewhere(learners).items():
            reference = text.get("hosts", {}).get(agent)
            if reference is None:
                raise UserError(
                    f"{path}: agent {agent} was trained here; take its host out of the recipe"
                )
            stood = host.stand(name, reference)
            if stood is not None:
                held[agent] = stood
        for agent, learner in learners.items():
            if isinstance(learner, Host):
                continue
            if agent in text.get("hosts", {}):
                raise UserError(f"{path}: agent {agent} lives elsewhere; name its host")
            learner.load_weights(load_file(path / agent_file(agent, "weights")))
            moments = path / agent_file(agent, "optimizer")
            learner.load_optimizer_state(
                load_file(moments) if moments.is_file() else {}, text["learner_steps"][agent]
            )
            critic = path / agent_file(agent, "critic")
            if learner.critic is not None and critic.is_file():
                # A newcomer to the agent's seats has none: its critic begins.
                learner.critic.load(load_file(critic))
            reference = path / agent_file(agent, "reference")
            if reference.is_file():
                learner.keep_reference(load_file(reference))
        state, steps, batch = text["state"], text["learner_steps"], text["state"].get("batch")
        self._last = _Written(
            path,
            {agent: (state["versions"][agent], count) for agent, count in steps.items()},
            {agent: pair(held["since"]) for agent, held in state["certify"]["held"].items()},
            None if batch is None else (state["stage"], batch["drawn_before"]),
            text["files"],
        )
        return held

    def drop_after(self, name: str) -> None:
        """Remove the checkpoints that come after ``name``, the newest first, and what a killed run
        left half-way. Raises UserError where the disk refuses."""
        for other in reversed(self.names()):
            if _place(other) > _place(name):
                remove_tree(self.directory / other)
        self._prune()


def _elsewhere(learners: Agents) -> dict[str, Host]:
    return {name: learner for name, learner in learners.items() if isinstance(learner, Host)}


_PARTS: dict[str, Callable[[Learner], Mapping[str, Tensor] | None]] = {
    "weights": lambda learner: learner.export(),
    "optimizer": lambda learner: learner.optimizer_state(),
    "critic": lambda learner: None if learner.critic is None else learner.critic.state(),
    "reference": lambda learner: learner.reference_weights,
}
"""What a learner keeps between steps, as tensors that no later step writes to."""


def _stays(text: Mapping[str, Any]) -> bool:
    """Whether what a state names are files beside one another, with sizes that a file can have: a
    resume reads, cuts and removes them, and anybody may have written their names."""
    try:
        sizes = text["sizes"]
        names = [*text["files"], *sizes["episodes"], *text["state"]["certify"]["held"]]
        bytes_of = [sizes["events"], *sizes["episodes"].values()]
    except (KeyError, TypeError, AttributeError):
        return False
    return all(map(is_plain, names)) and all(type(n) is int and 0 <= n < 1 << 63 for n in bytes_of)


def _place(name: str) -> tuple[int, float]:
    """stage-0003-step-1 comes before stage-0003, which closes its stage."""
    parts = name.split("-")
    return int(parts[1]), float(parts[3]) if len(parts) > 3 else float("inf")
