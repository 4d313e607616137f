"""TensorBoard scalars of a run, by stage."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from satune.files.events import Event, Note, UpdateEvent
from satune.types import UserError


@contextmanager
def scalar_writer(directory: Path) -> Iterator[Callable[[Event | Note], None]]:
    """A watcher of events that writes reward, KL, violation rate, scale and evaluations.

    Raises UserError where TensorBoard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("log.tensorboard: tensorboard is not installed; pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory))

    def watch(event: Event | Note) -> None:
        if event["event"] == "note":
            return
        step = 0 if event["event"] == "run" else event["stage"]
        for name, value in _scalars(event).items():
            writer.add_scalar(name, value, step)

    try:
        yield watch
    finally:
        writer.close()


def _scalars(event: Event) -> dict[str, float]:
    match event["event"]:
        case "stage":
            return {"reward/training": event["reward"], "time/stage": event["seconds"]}
        case "eval":
            decoding = "greedy" if event["greedy"] else "sampled"
            return {f"reward/held_out_{decoding}": event["reward"]}
        case "swap":
            return {
                f"swap/{'_'.join(record['seats'])}_{name}": value
                for record in event["swaps"]
                for name, value in cast(dict[str, Any], record).items()
                if name in ("before", "naive", "after", "lower")
            }
        case "update":
            return _of_update(event)
    return {}


def _of_update(event: UpdateEvent) -> dict[str, float]:
    agent, found = event["agent"], dict[str, float]()
    if "kl" in event:
        for name in ("mean", "quantile", "max", "violation_rate"):
            found[f"{agent}/kl_{name}"] = event["kl"][name]
    if "certificate" in event:
        statistical = event["certificate"]["statistical"]
        found |= {f"{agent}/certificate_{name}": statistical[name] for name in ("mean", "lower")}
    for name in ("beta", "scale", "ess", "objective", "clip_fraction", "grad_norm"):
        value = event.get(name)
        if isinstance(value, int | float):
            found[f"{agent}/{name}"] = value
    return found
