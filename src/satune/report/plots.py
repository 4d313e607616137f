"""Figures of a run, drawn from the stage, eval and update events in its directory alone."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from satune.files.events import Event, UpdateEvent, read_events

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666600")
"""Told apart with every common kind of colour blindness (after Okabe and Ito)."""
_MARKERS = "osD^vPX"
_INK, _FAINT, _HELD_OUT = "#333333", "#999999", "#7A3E9D"


def plot_training(run: str | Path, out: str | Path) -> Path | None:
    """Draw reward, KL and violation rate by stage of the run directory ``run`` into a PNG.

    KL is the quantile over token states that the trust region bounds, nats; the dashed lines are
    its δ. A step that was reverted is drawn hollow. Gives the file's path, or None without
    matplotlib (``pip install 'satune[plots]'``).
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    # The class itself instead of pyplot: no window system and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = read_events(Path(run) / "events.jsonl")
    updates = [event for event in events if event["event"] == "update"]
    figure = Figure(figsize=(7.2, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    reward, divergence, violation = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    _draw_reward(reward, events)
    _draw_divergence(divergence, updates)
    _draw_violation(violation, updates)
    for axes in (reward, divergence, violation):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.tick_params(colors=_INK, labelsize=9)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.align_ylabels()
    violation.set_xlabel("stage", color=_INK)
    violation.xaxis.get_major_locator().set_params(integer=True)
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150, format="png")
    return target


def _draw_reward(axes: Any, events: Sequence[Event]) -> None:
    stages = [event for event in events if event["event"] == "stage"]
    evals = [event for event in events if event["event"] == "eval"]
    sampled = [event for event in evals if not event["greedy"]]
    greedy = [event for event in evals if event["greedy"]]
    if stages:
        axes.plot(
            [event["stage"] for event in stages],
            [float(event["reward"]) for event in stages],
            color=_INK,
            linewidth=1.6,
            label="training problems",
        )
    if sampled:
        axes.plot(
            [event["stage"] for event in sampled],
            [float(event["reward"]) for event in sampled],
            "o",
            color=_HELD_OUT,
            markersize=7,
            label="held-out problems",
            clip_on=False,
        )
    for event in sampled:
        if event["interval"]:
            low, high = map(float, event["interval"])
            axes.vlines(event["stage"], low, high, color=_HELD_OUT, linewidth=1.6)
        axes.annotate(
            f"{float(event['reward']):.2f}",
            (event["stage"], float(event["reward"])),
            xytext=(7, 5),
            textcoords="offset points",
            fontsize=9,
            color=_HELD_OUT,
        )
    if greedy:
        axes.plot(
            [event["stage"] for event in greedy],
            [float(event["reward"]) for event in greedy],
            "_",
            color=_HELD_OUT,
            markersize=12,
            markeredgewidth=1.6,
            label="held-out, greedy decoding",
            clip_on=False,
        )
    axes.set_ylim(0, 1.04)
    axes.set_ylabel("team reward", color=_INK)
    _legend(axes)


def _draw_divergence(axes: Any, updates: Sequence[UpdateEvent]) -> None:
    """The KL quantile of every step, by agent, against the agent's δ."""
    shown = _series(axes, updates, "quantile")
    deltas = sorted({float(event["delta"]) for event in updates})
    for delta in deltas:
        axes.axhline(delta, color=_FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"δ {delta:g}",
            (1, delta),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=_INK,
        )
    highest = max([*shown, *deltas], default=0.0)
    axes.set_ylim(0, highest * 1.2 if highest > 0 else 1)
    axes.set_ylabel("KL to the anchor,\nquantile (nats)", color=_INK)
    _legend(axes)


def _draw_violation(axes: Any, updates: Sequence[UpdateEvent]) -> None:
    """The share of problems with a visited state (or turn, or trajectory) whose KL exceeds δ."""
    highest = max(_series(axes, updates, "violation_rate"), default=0.0)
    axes.set_ylim(0, highest * 1.2 if highest > 0 else 0.01)
    axes.set_ylabel("problems beyond δ\n(share)", color=_INK)


def _series(axes: Any, updates: Sequence[UpdateEvent], key: str) -> list[float]:
    """Draw ``kl[key]`` by stage, a line an agent. Gives the finite values drawn.

    A value that is not finite is left out: the gap in the line shows it.
    """
    agents = list(dict.fromkeys(event["agent"] for event in updates))
    shown: list[float] = []
    for index, agent in enumerate(agents):
        own = [event for event in updates if event["agent"] == agent]
        x = [event["stage"] for event in own]
        # A step that ended before it was measured (a loss that is not finite) has no KL.
        y = [_finite(event.get("kl", {}).get(key)) for event in own]
        colour = _COLOURS[index % len(_COLOURS)]
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(x, y, color=colour, linewidth=1.2, marker=marker, markersize=3.5, label=agent)
        reverted = [at for at, event in enumerate(own) if not event["accepted"]]
        axes.plot(
            [x[at] for at in reverted],
            [y[at] for at in reverted],
            linestyle="none",
            marker=marker,
            markersize=6,
            markerfacecolor="white",
            markeredgecolor=colour,
        )
        shown.extend(value for value in y if math.isfinite(value))
    return shown


def _finite(value: Any) -> float:
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else math.nan


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
