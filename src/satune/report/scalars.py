"""The figures of events, each number under a name of its own, as trackers are sent them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from satune.files.events import Event

_BOUNDS = {"interval": ("low", "high"), "difference": ("mean", "low", "high")}
_APART = {"event", "time", "stage", "agent", "greedy", "seats"}
"""What a figure is named by, or stands above."""
_STRANGE = re.compile(r"[^A-Za-z0-9 ._-]")


def scalars(event: Event) -> dict[str, float]:
    """Every finite number of an event by its dotted key's parts, after what it is a figure of:
    ``agent.NAME/kl/quantile``, ``held_out.sampled/reward``, ``swap.SEAT/after``, ``stage/reward``.
    True is 1, false 0. Of lists there are the intervals' ends alone, and of a run's beginning
    ``run/self_check``: the rest of it are settings and the machine's."""
    if event["event"] == "run":
        return dict(_numbers({"self_check": event["self_check"]}, "run"))
    if event["event"] == "swap":
        return {
            name: value
            for record in event["swaps"]
            for name, value in _numbers(record, f"swap.{_plain('_'.join(record['seats']))}")
        }
    kind: str = event["event"]
    if event["event"] == "update":
        kind = f"agent.{_plain(event['agent'])}"
    elif event["event"] == "eval":
        kind = f"held_out.{'greedy' if event['greedy'] else 'sampled'}"
    return dict(_numbers(event, kind))


def _numbers(held: Mapping[str, Any], at: str) -> Iterator[tuple[str, float]]:
    for key, value in held.items():
        name = f"{at}/{_plain(key)}"
        if key in _APART:
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, name)
        elif key in _BOUNDS and isinstance(value, list | tuple):
            yield from _numbers(dict(zip(_BOUNDS[key], value, strict=False)), name)
        elif isinstance(value, int | float) and math.isfinite(value):
            yield name, float(value)


def _plain(name: str) -> str:
    """Names come from data too: of groups of problems, of failures. Trackers refuse some."""
    plain = _STRANGE.sub("_", name).strip()
    return plain if plain.strip(".") else "_"
