"""Checkpoints: complete or absent, unchanged files linked, damage noticed and named.

A checkpoint is a directory written beside and renamed: ``state.json``, an agent's weights and
optimiser as safetensors, and the experience still in use, text and arrays (``files.arrays``).
Nothing in it depends on the number of processes. state.json lists every file with its size and
digest.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from satune.agents.anchor import Snapshot
from satune.core.confidence import Spending
from satune.files.arrays import append_rows, read_rows
from satune.files.writing import (
    WRITING,
    identity,
    link,
    strict_json,
    write_atomically,
    written_beside,
)
from satune.training.certification import CertifyState, Held, tests_left
from satune.training.schedules import Batch
from satune.types import Episode, UserError

if TYPE_CHECKING:
    from satune.training.run import State, Training

FORMAT = 4
_NAME = re.compile(r"stage-\d+(-step-\d+)?")


class Checkpoints:
    """The checkpoints of one run. ``keep`` bounds how many stay."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep
        self._last: Path | None = None
        self._held: dict[str, tuple[int, int]] = {}
        self._windows: dict[str, tuple[int, int]] = {}

    def names(self) -> list[str]:
        """Complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        found = [p.name for p in self.directory.iterdir() if (p / "state.json").is_file()]
        return sorted((name for name in found if _NAME.fullmatch(name)), key=_place)

    def write(self, name: str, training: Training) -> None:
        """Write a checkpoint of the run as it is. Raises UserError where the disk refuses; the
        checkpoints that were there stay."""
        state, previous = training.state, self._last
        target = self.directory / name
        files: dict[str, list[Any]] = {}
        known = _listed(previous) if previous is not None else {}
        held: dict[str, tuple[int, int]] = {}
        with written_beside(target) as beside:
            for agent, learner in training.learners.items():
                held[agent] = (state.versions[agent], learner.steps)
                unchanged = previous is not None and self._held.get(agent) == held[agent]
                for part in ("weights", "optimizer", "reference"):
                    relative = f"{agent}.{part}.safetensors"
                    linkable = unchanged or (part == "reference" and previous is not None)
                    if linkable and relative in known and previous is not None:
                        link(previous / relative, beside / relative)
                        files[relative] = known[relative]
                        continue
                    tensors = _tensors(learner, part)
                    if tensors:
                        save_file(tensors, beside / relative)
                        files[relative] = identity(beside / relative)
            for agent, before in state.certify.held.items():
                relative = f"{agent}.held.safetensors"
                if previous is not None and self._windows.get(agent) == before.since:
                    link(previous / relative, beside / relative)
                    files[relative] = known[relative]
                    continue
                save_file(_flat(before.snapshot), beside / relative)
                files[relative] = identity(beside / relative)
            if state.batch is not None:
                rows = (training.world.to_row(e) for e in state.batch.episodes)
                append_rows(beside / "experience.jsonl", rows)
                for path in sorted(beside.glob("experience.*")):
                    files[path.name] = identity(path)
            write_atomically(
                beside / "state.json",
                strict_json(_state_to_json(training, files)) + "\n",
            )
        self._last, self._held = target, held
        self._windows = _windows(state)
        self._prune()

    def _prune(self) -> None:
        """Remove all but the newest, and the pieces that a killed run left half-way."""
        kept = self.names()[-self.keep :]
        for path in self.directory.iterdir():
            name = path.name.removesuffix(WRITING)
            if _NAME.fullmatch(name) and path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

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
            state = json.loads((path / "state.json").read_text())
            files = state["files"]
        except (OSError, ValueError, KeyError, TypeError):
            return f"{path}/state.json: damaged checkpoint (unreadable)"
        if state.get("format") != FORMAT:
            return f"{path}: checkpoint format {state.get('format')!r}, this satune reads {FORMAT}"
        for relative, recorded in files.items():
            if not (path / relative).is_file():
                return f"{path / relative}: damaged checkpoint (missing file)"
            if identity(path / relative) != recorded:
                return f"{path / relative}: damaged checkpoint (content changed)"
        return None

    def restore(self, name: str, training: Training) -> None:
        """Put the run back to a checkpoint: weights, optimisers, state, events and episodes."""
        path = self.directory / name
        state = json.loads((path / "state.json").read_text())
        agents = list(training.learners)
        if sorted(state["state"]["versions"]) != sorted(agents):
            raise UserError(
                f"{path}: holds agents {', '.join(sorted(state['state']['versions']))}, the recipe "
                f"has {', '.join(sorted(agents))}; resume with the recipe the run was started with"
            )
        _check_decisions(path, state["state"], training)
        held: dict[str, tuple[int, int]] = {}
        for agent, learner in training.learners.items():
            learner.load_weights(load_file(path / f"{agent}.weights.safetensors"))
            optimizer = path / f"{agent}.optimizer.safetensors"
            moments = load_file(optimizer) if optimizer.is_file() else {}
            learner.load_optimizer_state(moments, state["learner_steps"][agent])
            reference = path / f"{agent}.reference.safetensors"
            if reference.is_file():
                learner.keep_reference(load_file(reference))
            version = state["state"]["versions"][agent]
            held[agent] = (version, learner.steps)
            training.published[agent] = state["published"][agent]
            training.world.publish(agent, training.published[agent])
        _state_from_json(state["state"], path, training)
        training.supply.offset = state["offset"]
        training.directory.truncate(state["sizes"])
        self._last, self._held = path, held
        self._windows = _windows(training.state)
        for other in self.names():
            if _place(other) > _place(name):
                shutil.rmtree(self.directory / other, ignore_errors=True)
        self._prune()


def _windows(state: State) -> dict[str, tuple[int, int]]:
    """Since when each agent is held: a later change holds another one."""
    return {agent: held.since for agent, held in state.certify.held.items()}


def _check_decisions(path: Path, state: Mapping[str, Any], training: Training) -> None:
    """A gate that has too few tests left for more stages would refuse all that they bring."""
    settings, certify = training.settings, state["certify"]
    declared, used = certify["spending"]["decisions"], certify["spending"]["used"]
    gated = settings.certify.problems > 0 and settings.certify.accept == "certified"
    if not gated or declared is None:
        return
    agents = sum(not learner.frozen for learner in training.learners.values())
    left = tests_left(settings, agents, state["stage"], state["step"], certify["steps"])
    if used + left > declared:
        raise UserError(
            f"{path}: the run declared {declared} tests of its confidence and has used {used}, more"
            f" stages may need another {left}; a new run with certify.decisions: open has no such"
            " end"
        )


def _place(name: str) -> tuple[int, float]:
    """stage-0003-step-1 comes before stage-0003, which closes its stage."""
    parts = name.split("-")
    return int(parts[1]), float(parts[3]) if len(parts) > 3 else float("inf")


def _tensors(learner: Any, part: str) -> dict[str, Tensor]:
    found: Mapping[str, Tensor] = {
        "weights": learner.export,
        "optimizer": learner.optimizer_state,
        "reference": lambda: learner.reference_weights or {},
    }[part]()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def _flat(snapshot: Snapshot) -> dict[str, Tensor]:
    parts = {"weights": snapshot.weights, "optimizer": snapshot.optimizer}
    return {
        f"{part}|{name}": tensor.detach().cpu().contiguous()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def _snapshot(path: Path, steps: int) -> Snapshot:
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
    for name, tensor in load_file(path).items():
        part, inner = name.split("|", 1)
        parts[part][inner] = tensor
    return Snapshot(parts["weights"], parts["optimizer"], steps)


def _listed(path: Path) -> dict[str, list[Any]]:
    return json.loads((path / "state.json").read_text())["files"]


def _state_to_json(training: Training, files: Mapping[str, Any]) -> dict[str, Any]:
    state = training.state
    fields: dict[str, Any] = {
        "stage": state.stage,
        "step": state.step,
        "order": state.order,
        "betas": state.betas,
        "versions": state.versions,
        "opening": state.opening,
        "totals": state.totals,
        "evaluations": state.evaluations,
        "certify": {
            "spending": state.certify.spending.to_dict(),
            "offset": state.certify.offset,
            "steps": state.certify.steps,
            "held": {
                name: {
                    "version": held.version,
                    "since": list(held.since),
                    "steps": held.snapshot.steps,
                }
                for name, held in state.certify.held.items()
            },
        },
    }
    if state.batch is not None:
        # repr of a float reads back to the same float, so JSON keeps log w bit for bit.
        fields["batch"] = {
            "log_weights": state.batch.log_weights,
            "drawn_before": state.batch.drawn_before,
            "reward": state.batch.reward,
            "spent": state.batch.spent,
        }
    return {
        "format": FORMAT,
        "state": fields,
        "offset": training.supply.offset,
        "learner_steps": {name: learner.steps for name, learner in training.learners.items()},
        "published": training.published,
        "sizes": training.directory.sizes(),
        "files": dict(files),
    }


def _state_from_json(fields: Mapping[str, Any], path: Path, training: Training) -> None:
    state: State = training.state
    for name in ("stage", "step", "order", "betas", "versions", "opening", "totals", "evaluations"):
        setattr(state, name, fields[name])
    certify = fields["certify"]
    state.certify = CertifyState(
        Spending.from_dict(certify["spending"]),
        certify["offset"],
        certify["steps"],
        {
            name: Held(
                _snapshot(path / f"{name}.held.safetensors", held["steps"]),
                held["version"],
                (held["since"][0], held["since"][1]),
            )
            for name, held in certify["held"].items()
        },
    )
    batch = fields.get("batch")
    state.batch = None
    if batch is not None:
        episodes: list[Episode] = [
            training.world.from_row(row) for row in read_rows(path / "experience.jsonl")
        ]
        state.batch = Batch(
            episodes,
            [float(w) for w in batch["log_weights"]],
            batch["drawn_before"],
            float(batch["reward"]),
            batch["spent"],
        )
