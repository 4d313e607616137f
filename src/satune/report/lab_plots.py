"""Figures of the lab, drawn from its ``lab.json`` alone."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_INK, _FAINT = "#333333", "#999999"
_BLUE, _ORANGE, _GREEN, _PURPLE, _GOLD = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"


def plot_lab(source: str | Path, out: str | Path) -> list[Path] | None:
    """Draw tightness, growth with the team, the XOR team and the rate into PNGs under ``out``.

    Gives their paths, or None without matplotlib (``pip install 'satune[plots]'``).
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = json.loads(Path(source).read_text())
    series = found["series"]
    drawings = {
        "tightness": (_tightness, found["bounds"], (7.2, 8.4)),
        "growth": (_growth, series["growth"], (7.2, 4.4)),
        "xor": (_xor, series["xor"], (7.2, 3.8)),
        "rate": (_rate, series["rate"], (7.2, 3.8)),
    }
    paths = []
    for name, (draw, data, size) in drawings.items():
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes, data)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.tick_params(colors=_INK, labelsize=9)
        axes.set_axisbelow(True)
        paths.append(Path(out) / f"{name}.png")
        figure.savefig(paths[-1], dpi=150, format="png")
    return paths


def _tightness(axes: Any, bounds: Mapping[str, Mapping[str, Any]]) -> None:
    """How much of each bound the truth used, in the median."""
    known = {n: b["median_tightness"] for n, b in bounds.items() if b["median_tightness"]}
    names = sorted(known, key=lambda name: known[name])
    axes.barh([n.replace("_", " ") for n in names], [known[n] for n in names], color=_BLUE)
    axes.set_xscale("log")
    axes.set_xlim(right=1.0)
    axes.margins(y=0.01)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_xlabel("truth as a share of the bound, median over instances", color=_INK)


def _growth(axes: Any, growth: Mapping[str, Any]) -> None:
    shown = (
        ("penalty_stale", "penalty, stale states", _ORANGE, "-"),
        ("penalty_fresh", "penalty, fresh", _BLUE, "-"),
        ("actual_naive", "actual error, naive", _PURPLE, "--"),
        ("actual_stale", "actual error, stale states", _ORANGE, "--"),
        ("actual_fresh", "actual error, fresh", _BLUE, "--"),
    )
    for name, label, colour, style in shown:
        exponent = growth["exponents"][name]
        fitted = "" if exponent is None else f"  (∝ n^{exponent:.2f})"
        axes.plot(
            growth["agents"], growth["series"][name], style, color=colour, marker="o",
            markersize=4, linewidth=1.6, label=label + fitted,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_xlabel("agents in the team", color=_INK)
    axes.set_ylabel("of a stage, mean over instances", color=_INK)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _xor(axes: Any, xor: Mapping[str, Any]) -> None:
    axes.axhline(0, color=_FAINT, linewidth=1.0)
    axes.plot(xor["starts"], xor["fresh"], color=_BLUE, linewidth=1.8, label="fresh")
    axes.plot(xor["starts"], xor["stale"], color=_ORANGE, linewidth=1.8, label="stale")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_xlabel("both agents' chance of a 1 before the stage", color=_INK)
    axes.set_ylabel(f"change of the reward, δ {xor['delta']:g}", color=_INK)
    axes.legend(fontsize=9, frameon=False)


def _rate(axes: Any, rate: Mapping[str, Any]) -> None:
    steps, seen, limit = zip(*rate["curve"], strict=True)
    axes.plot(steps, limit, color=_FAINT, linewidth=1.6, label="bound 2L(G* - G₀)/K")
    axes.plot(steps, seen, color=_GREEN, linewidth=1.8, label="least squared gradient so far")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_xlabel("steps K of size 1/L", color=_INK)
    axes.set_ylabel("median over instances", color=_INK)
    axes.legend(fontsize=9, frameon=False)
