"""How the processes of one run are started: on this machine, or by Slurm on several.

torchrun starts them (``python -m torch.distributed.run``, so that it is this environment's) and
ends all of them where one ends badly; the first one drives the run. A run that was cut off goes on
from its last checkpoint, so the command is the same the first time and every time after.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from satune.types import UserError

PORT = 29_500
"""Where the processes of several machines find one another, at the first of them."""


@dataclass(frozen=True, slots=True)
class Job:
    """What Slurm is told of a run; ``options`` are further ones of sbatch (``--partition=gpu``)."""

    name: str
    log: Path
    minutes: int | None = None
    options: Sequence[str] = ()

    def script(self, nodes: int, interrupted: str, lines: Sequence[str]) -> str:
        """A batch script that runs ``lines`` of bash, on the first of ``nodes`` machines.

        ``interrupted`` (INT: the steps that srun starts, B:INT: the script) is told two minutes
        before the time is over, and the job may be put into the queue again: the run then goes on
        from its last checkpoint.

        Raises UserError for an option that is none, or in more than one line.
        """
        for option in self.options:
            if not option.startswith("--") or "\n" in option:
                raise UserError(f"launch: --sbatch {option!r} is no option; give --NAME=VALUE")
        directives = [
            f"--job-name={shlex.quote(self.name)}",
            f"--nodes={nodes}",
            "--ntasks-per-node=1",
            f"--output={shlex.quote(str(self.log))}",
            "--open-mode=append",
            "--requeue",
            f"--signal={interrupted}@120",
            *([] if self.minutes is None else [f"--time={self.minutes}"]),
            *self.options,
        ]
        return "\n".join(
            [
                "#!/usr/bin/env bash",
                *(f"#SBATCH {directive}" for directive in directives),
                "set -euo pipefail",
                f"cd {shlex.quote(str(Path.cwd()))}",
                *lines,
                "",
            ]
        )


@dataclass(frozen=True, slots=True)
class Launch:
    """``satune train`` with these words, by ``processes`` processes on each of ``nodes`` machines.

    Raises UserError for numbers below 1.
    """

    words: Sequence[str]
    processes: int
    nodes: int = 1

    def __post_init__(self) -> None:
        for name in ("processes", "nodes"):
            if getattr(self, name) < 1:
                raise UserError(f"launch: --{name} is {getattr(self, name)}; give 1 or more")

    def command(self) -> list[str]:
        """What is run on this machine; one process needs no torchrun."""
        if self.processes == 1:
            return [sys.executable, "-m", "satune", "train", *self.words]
        return [*self._torchrun("--standalone"), "-m", "satune", "train", *self.words]

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """The variables of the processes: each has its share of the cores, where nobody said."""
        if self.processes == 1 or "OMP_NUM_THREADS" in given:
            return dict(given)
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        return {**given, "OMP_NUM_THREADS": str(threads)}

    def script(self, job: Job) -> str:
        """A batch script for Slurm, as ``Job.script``."""
        run = [
            *self._torchrun(
                "--nnodes", str(self.nodes), "--master-port", str(PORT), "--rdzv-backend", "static"
            ),
            "--master-addr", "$MASTER", "--node-rank", "$SLURM_NODEID",
            "-m", "satune", "train", *self.words,
        ]  # fmt: skip
        shell = {"$MASTER": '"$MASTER"', "$SLURM_NODEID": '"$SLURM_NODEID"'}
        line = " ".join(shell.get(word) or shlex.quote(word) for word in run)
        return job.script(
            self.nodes,
            "INT",
            [
                # The batch shell knows the machines, each of the tasks its own number among them.
                'MASTER="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
                "export MASTER",
                f"srun bash -c {shlex.quote('exec ' + line)}",
            ],
        )

    def _torchrun(self, *options: str) -> list[str]:
        run = [sys.executable, "-m", "torch.distributed.run", *options]
        return [*run, "--nproc-per-node", str(self.processes)]


def usual_processes() -> int:
    """One a device that computes here, or one."""
    return max(1, torch.cuda.device_count())
