"""TensorBoard scalars of a run, by stage."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from satune.types import UserError


@contextmanager
def scalar_writer(directory: Path) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
    """A watcher of events that writes reward, KL, violation rate, scale and evaluations.

    Raises UserError where TensorBoard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("log.tensorboard: tensorboard is not installed; pip install tensorboard")
    from tensorboard.summary import Writer

    writer = Writer(str(directory))

    def watch(kind: str, fields: Mapping[str, Any]) -> None:
        step = fields.get("stage", 0)
        for name, value in _scalars(kind, fields).items():
            writer.add_scalar(name, value, step=step)

    try:
        yield watch
    finally:
        writer.close()


def _scalars(kind: str, fields: Mapping[str, Any]) -> dict[str, float]:
    if kind == "stage":
        return {"reward/training": fields["reward"], "time/stage": fields["seconds"]}
    if kind == "eval":
        decoding = "greedy" if fields["greedy"] else "sampled"
        return {f"reward/held_out_{decoding}": fields["reward"]}
    if kind == "swap":
        return {
            f"swap/{'_'.join(record['seats'])}_{name}": record[name]
            for record in fields["swaps"]
            for name in ("before", "naive", "after", "lower")
            if name in record
        }
    if kind != "update":
        return {}
    agent = fields["agent"]
    found = {
        f"{agent}/kl_{name}": fields["kl"][name]
        for name in ("mean", "quantile", "max", "violation_rate")
        if name in fields.get("kl", {})
    }
    statistical = fields.get("certificate", {}).get("statistical", {})
    found |= {
        f"{agent}/certificate_{name}": statistical[name]
        for name in ("mean", "lower")
        if name in statistical
    }
    for name in ("beta", "scale", "ess", "objective", "clip_fraction", "grad_norm"):
        if name in fields:
            found[f"{agent}/{name}"] = fields[name]
    return found
