"""Figures as files: drawn from files alone, whatever the run has got to."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from report_runs import write_run
from satune.report.charts import Chart, Lane, Series, Timeline
from satune.report.drawing import draw_files
from satune.report.plots import plot_training
from satune.report.write import write_report

PNG = b"\x89PNG\r\n\x1a\n"


def begun(run: Path, *events: dict[str, Any], tail: str = "") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (run / "events.jsonl").write_text(lines + tail)
    return run


def test_a_whole_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = plot_training(write_run(tmp_path / "run"), tmp_path / "figures" / "training.png")
    assert out == tmp_path / "figures" / "training.png"
    assert out.read_bytes().startswith(PNG)


@pytest.mark.parametrize("lines", [0, 1, 2, 4, 5])
def test_a_run_that_has_only_begun(tmp_path: Path, lines: int) -> None:
    pytest.importorskip("matplotlib")
    whole = (write_run(tmp_path / "whole") / "events.jsonl").read_text().splitlines()
    run = begun(tmp_path / "run", *map(json.loads, whole[:lines]), tail=whole[lines][:40])
    out = plot_training(run, tmp_path / "training.png")
    assert out is not None
    assert out.read_bytes().startswith(PNG)


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    series = [
        Series("line", [0.0, 1.0, 2.0], [0.5, None, 0.75], 0, low=[0.4, None, 0.7],
               high=[0.6, None, 0.8]),
        Series("steps", [0.5, 1.0, 1.5], [0.1, 0.2, 0.3], 1, marker=1,
               outcomes=["accepted", "reverted", "refused"]),
    ]  # fmt: skip
    lane = Lane("ada", 0, [1.0, 2.0], ["accepted", "idle"], ["", ""])
    draw_files([Chart("x", "X", "sweeps", "y", series, lanes=[lane])], tmp_path, ["png"])
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["line"].get_ydata())[::2] == [0.5, 0.75]
    assert math.isnan(lines["line"].get_ydata()[1])
    assert lines["line"].get_color() != lines["steps"].get_color()
    faces = {
        (line.get_marker(), *line.get_xdata()): line.get_markerfacecolor() for line in axes.lines
    }
    assert faces["s", 0.5] == lines["steps"].get_color()
    assert faces["s", 1.0] == faces["s", 1.5] == "white"
    assert any(line.get_marker() == "x" and list(line.get_xdata()) == [1.5] for line in axes.lines)
    assert "ada" in [label.get_text() for label in axes.get_yticklabels()]


@pytest.mark.slow
def test_every_chart_that_has_something_to_show(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    empty = Chart("empty", "E", "x", "y", [Series("s", [1.0], [None])])
    idle = Timeline("idle", "I", ["ada"], [], [], [])
    assert draw_files([empty, idle], tmp_path) == []
    report = write_report([write_run(tmp_path / "run", stages=2)])
    names = {path.name for path in report.figures}
    assert {"reward.png", "reward.svg", "timeline.svg", "certificates.png"} <= names
    for path in report.figures:
        head = path.read_bytes()[:600]
        assert head.startswith(PNG) if path.suffix == ".png" else b"<svg" in head


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chart = Chart("x", "X", "sweeps", "y", [Series("s", [0.0, 1.0], [0.5, 1.0], marker=0)])
    pair = []
    for name in "ab":
        (tmp_path / name).mkdir()
        pair.append([path.read_bytes() for path in draw_files([chart], tmp_path / name)])
    assert pair[0] == pair[1]


def test_without_matplotlib_there_is_no_figure_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = write_run(tmp_path / "run", stages=1)
    assert plot_training(run, tmp_path / "training.png") is None
    assert not (tmp_path / "training.png").exists()
    report = write_report([run])
    assert report.figures == []
    assert report.page.is_file()
    assert not (run / "report-files").exists()


def test_importing_the_modules_loads_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, satune.report.plots, satune.report.write;"
        "print([name for name in ('torch', 'matplotlib', 'transformers', 'tokenizers')"
        " if name in sys.modules])"
    )
    source = Path(__file__).resolve().parents[2] / "src"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=source, check=True
    )
    assert found.stdout.strip() == "[]"
