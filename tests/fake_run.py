"""A run whose agents are three numbers each: all of a run's writing, none of its computing."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import tiny_world
from satune.agents.anchor import Snapshot
from satune.cli.train import run_training
from satune.commands import train as commands
from satune.config.load import load_recipe
from satune.files.writing import written_beside
from satune.play.rows import episode_from_row, episode_to_row
from satune.training import certification
from satune.training import checkpoint as checkpoint_module
from satune.training import stage as stage_module
from satune.training.run import Training
from satune.training.run_directory import RunDirectory
from satune.training.update import Outcome
from satune.types import Episode, Grade, Key, Problem, no_progress

AGENTS = ("ann", "bob")
RECIPE = {
    "team": {"agents": {name: {"model": "tiny:qwen3-s"} for name in AGENTS}},
    "task": {"name": "relay"},
    "protocol": "chain",
    "rollout": {"problems": 2, "samples": 2, "max_new_tokens": 4},
    "schedule": "reuse",
    "certify": {
        "problems": 2, "samples": 2, "theory": False, "accept": "certified", "tolerance": 0.0,
        "backtracks": 1, "decisions": "open",
    },
    "stages": 2,
    "evaluate": {"problems": 2, "greedy": False},
    "checkpoint": {"keep": 9},
}  # fmt: skip


def number(*parts: object) -> float:
    """A number in [0, 1) that these parts decide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


class Learner:
    frozen, device, reference_weights, critic = False, "cpu", None, None

    def __init__(self, seed: int) -> None:
        self.weights = torch.full((3,), float(seed))
        self.moments = torch.zeros(3)
        self.steps = 0

    def wake(self) -> None: ...

    def export(self) -> dict[str, Tensor]:
        return {"w": self.weights.clone()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights["w"].clone()

    def optimizer_state(self, *, copy: bool = False) -> dict[str, Tensor]:
        return {"m": self.moments.clone()} if self.steps else {}

    def load_optimizer_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        self.moments = state["m"].clone() if steps else torch.zeros(3)
        self.steps = steps

    def snapshot(self) -> Snapshot:
        return Snapshot(self.export(), self.optimizer_state(), self.steps)

    def restore(self, snapshot: Snapshot) -> None:
        self.load_weights(snapshot.weights)
        self.load_optimizer_state(snapshot.optimizer, snapshot.steps)

    def interpolate(
        self, anchor: Mapping[str, Tensor], target: Mapping[str, Tensor], scale: float
    ) -> None:
        self.weights = anchor["w"] + scale * (target["w"] - anchor["w"])


def improve(learner: Any, agent: str, experience: Any, *rest: Any, key: Key, **named: Any) -> Any:
    """A step that the weights, the experience and the key decide."""
    before = learner.snapshot()
    moved = number(key, before.weights["w"].tolist(), [e.reward for e in experience.episodes])
    learner.weights = learner.weights + moved
    learner.moments = learner.moments / 2 + moved
    learner.steps += 1
    log_ratio_E = torch.full((len(experience.episodes),), moved / 100, dtype=torch.float64)
    event = {"accepted": True, "scale": 1.0, "reason": "", "tokens": {"own": 0}, "moved": moved}
    return Outcome(True, named["beta"] / 2, log_ratio_E, event, before)


class World:
    """Rewards are decided by the key and by the weights that were published."""

    certifies = "fresh"

    def __init__(self, directory: RunDirectory, learners: Mapping[str, Learner]) -> None:
        self.directory, self.learners = directory, learners
        self.engine: dict[str, list[float]] = {}

    def publish(self, agent: str, version: int, weights: Mapping[str, Tensor]) -> None:
        self.engine[agent] = weights["w"].tolist()

    def draw(self, key: Key, offset: int, count: int, samples: int = 2) -> list[Episode]:
        return [
            Episode(
                Problem.of(f"p{offset + index}", "?"),
                sample,
                (),
                "!",
                Grade(number(key, offset + index, sample, sorted(self.engine.items()))),
            )
            for index in range(count)
            for sample in range(samples)
        ]

    def certify(self, key: Key, offset: int, problems: int, samples: int) -> list[Episode]:
        return self.draw(key, offset, problems, samples)

    def evaluate(
        self,
        *,
        greedy: bool,
        before: Sequence[float] | None,
        keep: Callable[[Sequence[Episode]], None],
    ) -> dict[str, Any]:
        keep(self.draw(Key(0, "evaluate"), 0, 1))
        reward = number(greedy, sorted(self.engine.items()))
        return {"reward": reward, "interval": None, "problems": 1, "per_problem": [reward]}

    def to_row(self, episode: Episode) -> dict[str, Any]:
        return episode_to_row(episode)

    def from_row(self, row: Mapping[str, Any]) -> Episode:
        return episode_from_row(row)

    def save_team(self) -> None:
        common = {"temperature": 1.0, "template": {}, "sharing": "separate", "delta": None}
        manifest = {"format": 1, "seats": {n: n for n in AGENTS}, "protocol": {}, "task": {}}
        agents = {name: {"dir": name, **common} for name in AGENTS}
        with written_beside(self.directory.team) as beside:
            for name, learner in self.learners.items():
                (beside / name).mkdir()
                save_file(learner.export(), beside / name / "model.safetensors")
            (beside / "manifest.json").write_text(json.dumps({**manifest, "agents": agents}))


def start_training(cast: Any, directory: RunDirectory, watch: Any, parts: Any = None) -> Training:
    """As ``commands.train.start_training``, over agents of three numbers."""
    recipe = cast.recipe
    learners = {name: Learner(seed) for seed, name in enumerate(AGENTS)}
    world = World(directory, learners)
    team = SimpleNamespace(seats_of=lambda name: [name])
    ours = SimpleNamespace(recipe=recipe, team=team, task=cast.task, progress=no_progress)
    made = _start(ours, directory, watch, lambda cast, directory: (learners, world))
    state = commands.State.beginning(list(AGENTS), 1.0, made.state.certify.spending)
    return replace(made, state=state)


_start = commands.start_training


class AtOnce:
    """An executor without threads: what it is given is done when ``submit`` returns."""

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def submit(self, do: Callable[..., None], *arguments: Any) -> Future[None]:
        future: Future[None] = Future()
        try:
            future.set_result(do(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future


def fake(patch: pytest.MonkeyPatch) -> None:
    """Let ``run_training`` train agents of three numbers, with no thread of its own."""
    cast = lambda recipe, progress, **named: SimpleNamespace(  # noqa: E731
        recipe=recipe, task=None, held_out=None, hosts={}
    )
    patch.setattr("satune.commands.assemble.assemble", cast)
    patch.setattr("satune.commands.assemble.overlap_note", lambda *_: None)
    patch.setattr("satune.report.plots.plot_training", lambda run, out: out)
    patch.setattr(commands, "start_training", start_training)
    patch.setattr(commands, "check_held_out", lambda task: None)
    patch.setattr(stage_module, "improve", improve)
    real = certification.certify

    def certify(*arguments: Any, **named: Any) -> Any:
        # Of so few problems every bound is -1; with means some changes stay and some do not.
        found = real(*arguments, **named)
        return replace(found, lower=found.mean)

    patch.setattr(certification, "certify", certify)
    patch.setattr(checkpoint_module, "ThreadPoolExecutor", AtOnce)


def write_recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


def go(
    recipe: Path,
    out: Path,
    *overrides: str,
    resume: bool = False,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """``satune train`` of the fake run."""
    loaded = load_recipe(recipe, overrides)
    resume = resume or checkpoint is not None
    return run_training(loaded, out, resume=resume, checkpoint=checkpoint, command="")


def left(out: Path) -> dict[str, Any]:
    """Everything that a run leaves but the time."""
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    timed = ("events.jsonl", "summary.json", "state.json")
    found: dict[str, Any] = {
        name: path.read_bytes() for name, path in files.items() if not name.endswith(timed)
    }
    summary = json.loads((out / "summary.json").read_text())
    for key in ("seconds", "team", "certificates"):
        summary.pop(key)
    return found | {
        "events": tiny_world.events(out),
        "names": sorted(files),
        "summary": summary,
        "finished": RunDirectory(out).unfinished() is None,
    }


# Faults


class Killed(BaseException):
    """What a process is after SIGKILL: nothing of it goes on, handlers included."""


class _Writing:
    """A file open for writing, whose writes may be cut off in the middle."""

    def __init__(self, file: Any, fault: Callable[[], None]) -> None:
        self._file, self._fault = file, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: Any) -> Any:
        try:
            self._fault()
        except BaseException:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise
        return self._file.write(data)


GROWING = {"open", "write", "mkdir", "link", "replace", "rename", "fsync", "save_file", "ftruncate"}
"""What a full disk refuses; to remove and to shorten it allows."""


class Faults:
    """Counts file operations below a folder; from the ``at``-th one on they fail: by ``Killed``, or
    where ``full`` by ENOSPC if they need room."""

    def __init__(self, at: int | None = None, *, full: bool = False) -> None:
        self.at, self.full, self.count = at, full, 0
        self.failed: list[str] = []

    def __call__(self, kind: str) -> None:
        self.count += 1
        if self.at is None or self.count < self.at:
            return
        if not self.full:
            self.failed.append(kind)
            raise Killed(kind)
        if kind in GROWING:
            self.failed.append(kind)
            raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """Let every file operation of this process ask ``faults`` first."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "replace", "rename", "unlink", "remove", "rmdir", "mkdir", "link", "truncate",
            "ftruncate",
        ):  # fmt: skip
            real = getattr(os, name)

            def called(*arguments: Any, _real: Any = real, _name: str = name, **named: Any) -> Any:
                faults(_name)
                return _real(*arguments, **named)

            patch.setattr(os, name, called)
        # Nothing is lost without it here, and a test does not wait for the disk.
        patch.setattr(os, "fsync", lambda handle: faults("fsync"))
        open_handle, open_file, save = os.open, io.open, checkpoint_module.save_file

        def opened_handle(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & os.O_CREAT:
                faults("open")
            return open_handle(path, flags, *rest, **named)

        def opened(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            writes = bool(set("wa+x") & set(mode)) and not isinstance(path, int)
            if writes:
                faults("open")
            file = open_file(path, mode, *rest, **named)
            return _Writing(file, lambda: faults("write")) if writes else file

        def saved(tensors: Any, path: Any) -> None:
            try:
                faults("save_file")
            except BaseException:
                Path(path).touch()
                raise
            save(tensors, path)

        patch.setattr(os, "open", opened_handle)
        patch.setattr("builtins.open", opened)
        patch.setattr(io, "open", opened)
        patch.setattr(checkpoint_module, "save_file", saved)
        yield faults
