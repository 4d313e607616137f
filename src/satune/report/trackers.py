"""Trackers, each spoken to through its own library, as that is configured on this machine.

What a library would add of its own accord (the machine's name, the command line, the state of a
repository, what is printed, the load of the processors) is switched off where it can be.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import io
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

from satune.types import UserError

_BATCH = 100
"""Parameters that MLflow takes at once; of each value it takes so many characters:"""
_LONGEST_PARAMETER = 6000


class Said(TypedDict):
    """A conversation as it is sent: who said what in order (the problem and what an environment
    told by "user"), the team's answer and what it was worth."""

    problem: str
    sample: int
    said: list[tuple[str, str]]
    answer: str
    reward: float
    verdict: str


@dataclass(frozen=True, slots=True)
class About:
    """What a tracker is told of a run. ``known`` is by which it knows the run from earlier on."""

    directory: Path
    project: str
    name: str
    recipe: Mapping[str, str]
    known: str | None


class Tracker(Protocol):
    """``id`` is by which the tracker knows the run; None: what was sent earlier is gone, and all is
    to be sent anew."""

    id: str | None

    def figures(self, values: Mapping[str, float], stage: int) -> None: ...

    def conversations(self, where: str, said: Sequence[Said], stage: int) -> None: ...

    def close(self, *, ended: bool) -> None:
        """Send what waits. ``ended``: the run came to its end, rather than to be cut off."""
        ...


class TensorBoard:
    """Event files in the run's ``tensorboard``, written from the beginning by every process."""

    id: str | None = None

    def __init__(self, about: About) -> None:
        _library("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        folder = about.directory / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))

    def figures(self, values: Mapping[str, float], stage: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, stage)
        self._writer.flush()

    def conversations(self, where: str, said: Sequence[Said], stage: int) -> None:
        # Markdown: what is indented is shown as it stands.
        for number, each in enumerate(said):
            text = "\n\n".join(
                f"{who}:\n\n" + "\n".join(f"    {line}" for line in what.splitlines())
                for who, what in each["said"]
            )
            text += f"\n\nreward {each['reward']:g} {each['verdict']}"
            self._writer.add_text(f"conversations/{where}/{number}", text, stage)
        self._writer.flush()

    def close(self, *, ended: bool) -> None:
        self._writer.close()


class WandB:
    """A run at Weights & Biases. What its library keeps here lies where WANDB_DIR says, else in the
    working directory's ``wandb``: it makes links, which have no place in a run's directory."""

    def __init__(self, about: About) -> None:
        self._wandb = _library("wandb", "wandb")
        settings = self._wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, save_code=False,
            host="withheld", x_disable_meta=True, x_disable_stats=True,
            x_disable_machine_info=True, x_save_requirements=False,
        )  # fmt: skip
        self._run = self._wandb.init(
            project=about.project, name=about.name, id=about.known, config=dict(about.recipe),
            resume="allow", settings=settings,
        )  # fmt: skip
        self._run.define_metric("stage")
        self._run.define_metric("*", step_metric="stage")
        self.id: str | None = self._run.id

    def figures(self, values: Mapping[str, float], stage: int) -> None:
        self._run.log({**values, "stage": stage})

    def conversations(self, where: str, said: Sequence[Said], stage: int) -> None:
        columns = ["problem", "sample", "conversation", "answer", "reward", "verdict"]
        rows = [
            [each["problem"], each["sample"], _script(each), each["answer"], each["reward"],
             each["verdict"]]
            for each in said
        ]  # fmt: skip
        table = self._wandb.Table(columns=columns, data=rows)
        self._run.log({f"conversations/{where}": table, "stage": stage})

    def close(self, *, ended: bool) -> None:
        self._run.finish(exit_code=0 if ended else 1)


class Trackio:
    """A run of trackio's, in its directory on this machine, or in the Space that its variables
    name, which is private unless it was there before."""

    def __init__(self, about: About) -> None:
        self._trackio = _library("trackio", "trackio")
        # Two runs of one name would be one to trackio.
        name = about.known or f"{about.name}-{time.time_ns():x}"
        # In a context of its own: trackio would finish the current one again at exit, and say so.
        with _unprinted():
            self._run = contextvars.copy_context().run(
                self._trackio.init,
                project=about.project, name=name, config=dict(about.recipe), resume="allow",
                private=True, embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        self.id: str | None = name

    def figures(self, values: Mapping[str, float], stage: int) -> None:
        self._run.log(dict(values), step=stage)

    def conversations(self, where: str, said: Sequence[Said], stage: int) -> None:
        traces = [
            self._trackio.Trace(
                [
                    {"role": "user", "content": what}
                    if who == "user"
                    else {"role": "assistant", "name": who, "content": what}
                    for who, what in each["said"]
                ],
                {key: each[key] for key in ("problem", "sample", "answer", "reward", "verdict")},
            )
            for each in said
        ]
        self._run.log({f"conversations/{where}": traces}, step=stage)

    def close(self, *, ended: bool) -> None:
        with _unprinted():
            self._run.finish()


class MLflow:
    """A run at the server, or in the store, that MLFLOW_TRACKING_URI names."""

    def __init__(self, about: About) -> None:
        for noisy in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        mlflow = _library("mlflow", "mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient()
        if about.known is not None:
            self._client.update_run(about.known, status="RUNNING")
            self.id: str | None = about.known
            return
        found = self._client.get_experiment_by_name(about.project)
        place = found.experiment_id if found else self._client.create_experiment(about.project)
        self.id = self._client.create_run(place, run_name=about.name).info.run_id
        parameters = [
            self._entities.Param(key, value[:_LONGEST_PARAMETER])
            for key, value in about.recipe.items()
        ]
        for start in range(0, len(parameters), _BATCH):
            self._client.log_batch(self.id, params=parameters[start : start + _BATCH])

    def figures(self, values: Mapping[str, float], stage: int) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [self._entities.Metric(name, value, now, stage) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def conversations(self, where: str, said: Sequence[Said], stage: int) -> None:
        rows = {"conversations": [dict(each) for each in said], "stage": stage}
        self._client.log_dict(self.id, rows, f"conversations/{where}-{stage:04d}.json")

    def close(self, *, ended: bool) -> None:
        self._client.set_terminated(self.id, status="FINISHED" if ended else "KILLED")


TRACKERS: dict[str, Callable[[About], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"log.report_to: {name} cannot be imported ({error}); pip install 'satune[{extra}]'"
        ) from None


@contextlib.contextmanager
def _unprinted() -> Iterator[None]:
    """Standard output is the command's own: what a library tells there is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _script(each: Said) -> str:
    return "\n\n".join(f"[{who}]\n{what}" for who, what in each["said"])
