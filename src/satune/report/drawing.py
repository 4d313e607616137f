"""Charts as files: PNG and SVG by matplotlib, from the same data that the page draws."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from satune.files.writing import write_atomically
from satune.report.charts import OUTCOMES, Chart, Lane, Number, Outcome, Series, Timeline
from satune.report.palette import INKS, MARKERS, light

_INK, _FAINT = INKS["ink"][0], INKS["faint"][0]
_GRID = "#e6e6e6"
_DASH = (0, (4, 3))


def can_draw() -> bool:
    """Whether matplotlib is there (``pip install 'satune[plots]'``)."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_files(
    drawn: Iterable[Chart | Timeline], folder: Path, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Write each chart that has something to show under its name. Needs ``can_draw``."""
    paths = []
    for chart in drawn:
        if chart.empty:
            continue
        height = 3.4 if isinstance(chart, Chart) else 1.4
        figure = _figure((7.2, height + 0.3 * len(chart.lanes)))
        draw(figure.add_subplot(), chart)
        paths += [_save(figure, folder / f"{chart.name}.{kind}") for kind in formats]
    return paths


def draw_together(charts: Sequence[Chart], out: Path) -> Path:
    """Several charts of one x axis, one above the other, in one file."""
    figure = _figure((7.2, 2.6 * len(charts)))
    rows = figure.subplots(len(charts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, chart in zip(rows, charts, strict=True):
        draw(axes, chart)
        if axes is not rows[-1]:
            axes.set_xlabel("")
    figure.align_ylabels()
    return _save(figure, out)


def _figure(size: tuple[float, float]) -> Any:
    # The class itself instead of pyplot: no window system and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> Path:
    import matplotlib

    # Without a date and with a fixed salt, equal runs give equal files.
    with matplotlib.rc_context({"svg.hashsalt": "satune", "svg.fonttype": "none"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, format=path.suffix[1:], metadata=metadata)
    write_atomically(path, drawn.getvalue())
    return path


def draw(axes: Any, chart: Chart | Timeline) -> None:
    """Draw into a matplotlib axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.set_axisbelow(True)
    axes.set_title(chart.title, loc="left", fontsize=10, color=_INK)
    if isinstance(chart, Timeline):
        _draw_timeline(axes, chart)
    else:
        _draw_chart(axes, chart)


def _draw_chart(axes: Any, chart: Chart) -> None:
    for series in chart.series:
        _draw_series(axes, series)
    for rule in chart.rules:
        axes.axhline(rule.y, color=_FAINT, linewidth=1.2, linestyle=_DASH)
        axes.annotate(
            rule.label, (1, rule.y), xycoords=("axes fraction", "data"), xytext=(-2, 3),
            textcoords="offset points", ha="right", fontsize=8, color=_INK,
        )  # fmt: skip
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    elif chart.floor is not None:
        _bound_from(axes, chart)
    axes.set_xlabel(chart.x_label, color=_INK)
    axes.set_ylabel(chart.y_label, color=_INK)
    if chart.lanes:
        _draw_lanes(axes, chart.lanes)
    told = {o for one in (*chart.series, *chart.lanes) for o in one.outcomes}
    for outcome in OUTCOMES if chart.explained else ():
        if outcome in told:
            _explain(axes, outcome)
    if axes.get_legend_handles_labels()[0] and (len(chart.series) > 1 or chart.lanes):
        axes.legend(
            frameon=False,
            fontsize=8,
            ncols=8,
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.99),
            handletextpad=0.3,
            columnspacing=1.0,
        )
        axes.set_title(axes.get_title(loc="left"), loc="left", pad=22, fontsize=10, color=_INK)


def _bound_from(axes: Any, chart: Chart) -> None:
    tops = [y for series in chart.series for y in (*series.y, *series.high) if y is not None]
    highest = max([*tops, *(rule.y for rule in chart.rules)], default=0.0)
    top = highest * 1.15 if highest > 0 else 1.0
    axes.set_ylim(chart.floor, chart.ceiling * 1.04 if chart.ceiling is not None else top)


def _draw_series(axes: Any, series: Series) -> None:
    colour = light(series.colour)
    y = [float("nan") if value is None else value for value in series.y]
    marker = None if series.marker is None else MARKERS[series.marker % len(MARKERS)]
    ends = [
        (x, low, high)
        for x, low, high in zip(series.x, series.low, series.high, strict=False)
        if low is not None and high is not None
    ]
    if ends and marker is None:
        x, low, high = zip(*ends, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    for x, low, high in ends if marker is not None else ():
        axes.vlines(x, low, high, color=colour, linewidth=1.2, alpha=0.6)
    style = {"solid": "-", "dashed": _DASH, "none": "none"}[series.line]
    axes.plot(
        series.x, y, color=colour, linestyle=style, linewidth=1.4, label=series.name,
        marker=None if series.outcomes else marker, markersize=5, clip_on=False,
    )  # fmt: skip
    if series.outcomes and marker is not None:
        _draw_outcomes(axes, series.x, series.y, series.outcomes, colour, marker)


def _draw_outcomes(
    axes: Any,
    xs: Sequence[float],
    ys: Sequence[Number],
    outcomes: Sequence[Outcome],
    colour: str,
    marker: str,
) -> None:
    for outcome in dict.fromkeys(outcomes):
        here = [
            (x, y)
            for x, y, each in zip(xs, ys, outcomes, strict=True)
            if each == outcome and y is not None
        ]
        x, y = zip(*here, strict=True) if here else ((), ())
        axes.plot(
            x, y, linestyle="none", marker="_" if outcome == "idle" else marker, markersize=5.5,
            fillstyle="full", color=colour, clip_on=False,
            markerfacecolor=colour if outcome == "accepted" else "white",
        )  # fmt: skip
        if outcome == "shrunk":
            axes.plot(
                x, y, linestyle="none", marker=marker, markersize=2.2, color=colour, clip_on=False
            )
        if outcome == "refused":
            axes.plot(x, y, linestyle="none", marker="x", markersize=8, color=_INK, clip_on=False)


def _explain(axes: Any, outcome: Outcome) -> None:
    """An entry of the legend for the mark of an outcome."""
    marker = {"idle": "_", "refused": "x"}.get(outcome, "o")
    face = _INK if outcome == "accepted" else _FAINT if outcome == "shrunk" else "white"
    axes.plot(
        [], [], linestyle="none", marker=marker, markersize=5.5, color=_INK, markerfacecolor=face,
        label=outcome,
    )  # fmt: skip


def _draw_lanes(axes: Any, lanes: Sequence[Lane]) -> None:
    """A lane an agent below the axis, over the same x."""
    low, high = axes.get_ylim()
    height = (high - low) * 0.09
    for row, lane in enumerate(lanes):
        y = low - (row + 0.6) * height
        colour, marker = light(lane.colour), MARKERS[lane.colour % len(MARKERS)]
        _draw_outcomes(axes, lane.x, [y] * len(lane.x), lane.outcomes, colour, marker)
    places = [low - (row + 0.6) * height for row in range(len(lanes))]
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    axes.set_yticks([*places, *shown], [*(lane.name for lane in lanes), *(f"{t:g}" for t in shown)])
    axes.set_ylim(low - (len(lanes) + 0.3) * height, high)
    axes.axhline(low, color=_FAINT, linewidth=0.8)


def _draw_timeline(axes: Any, chart: Timeline) -> None:
    for phase, colour in zip(chart.phases, chart.colours, strict=True):
        own = [bar for bar in chart.bars if bar.phase == phase]
        axes.barh(
            [bar.lane for bar in own], [bar.end - bar.start for bar in own], height=0.7,
            left=[bar.start for bar in own], color=light(colour), label=phase,
            alpha=0.4 if phase == "other" else 1.0, edgecolor="white", linewidth=0.2,
        )  # fmt: skip
    axes.set_yticks(range(len(chart.lanes)), chart.lanes)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of work", color=_INK)
    axes.legend(frameon=False, fontsize=8, ncols=7, loc="lower left", bbox_to_anchor=(0, 0.99))
    axes.set_title(chart.title, loc="left", pad=22, fontsize=10, color=_INK)
