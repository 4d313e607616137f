"""The training figure is drawn from files alone, whatever the run has got to."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from satune.report.plots import plot_training

PNG = b"\x89PNG\r\n\x1a\n"


def write(run: Path, *events: dict[str, Any], tail: str = "") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (run / "events.jsonl").write_text(lines + tail)
    return run


def update(stage: int, agent: str, quantile: float | str, accepted: bool = True) -> dict[str, Any]:
    kl = {"quantile": quantile, "violation_rate": 0.0}
    return {"event": "update", "stage": stage, "agent": agent, "delta": 0.05,
            "accepted": accepted, "kl": kl}  # fmt: skip


def test_a_whole_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = write(
        tmp_path / "run",
        {"event": "run", "seed": 0},
        {"event": "eval", "stage": 0, "reward": 0.3, "interval": [0.2, 0.4], "greedy": False},
        {"event": "eval", "stage": 0, "reward": 0.98, "interval": None, "greedy": True},
        update(1, "ada", 0.04),
        update(1, "ben", "inf", accepted=False),
        {"event": "stage", "stage": 1, "reward": 0.5},
        update(2, "ada", 0.03),
        update(2, "ben", 0.02),
        {"event": "stage", "stage": 2, "reward": 0.7},
        {"event": "eval", "stage": 2, "reward": 0.8, "interval": None, "greedy": False},
        tail='{"event": "upd',
    )
    out = plot_training(run, tmp_path / "figures" / "training.png")
    assert out == tmp_path / "figures" / "training.png"
    assert out.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [{"event": "eval", "stage": 0, "reward": 0.0, "interval": None, "greedy": False}],
        [update(1, "ada", "nan", accepted=False)],
        [update(1, "ada", 0.0)],
    ],
)
def test_a_run_that_has_only_begun(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    out = plot_training(write(tmp_path, *events), tmp_path / "training.png")
    assert out is not None
    assert out.read_bytes().startswith(PNG)


def test_a_directory_without_events(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot_training(tmp_path, tmp_path / "training.png") is not None


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    run = write(
        tmp_path,
        {"event": "eval", "stage": 0, "greedy": False, "reward": 0.25, "interval": None},
        {"event": "eval", "stage": 0, "greedy": True, "reward": 0.75, "interval": None},
        update(1, "ada", 0.04),
        update(1, "ben", "inf", accepted=False),
        {"event": "stage", "stage": 1, "reward": 0.5},
        update(2, "ada", 0.03),
    )
    plot_training(run, tmp_path / "training.png")
    reward, divergence, _ = drawn[0].axes
    assert [list(line.get_ydata()) for line in reward.lines] == [[0.5], [0.25], [0.75]]
    lines = {line.get_label(): line for line in divergence.lines}
    assert list(lines["ada"].get_xdata()) == [1, 2]
    assert list(lines["ada"].get_ydata()) == [0.04, 0.03]
    assert all(math.isnan(value) for value in lines["ben"].get_ydata())
    assert lines["ada"].get_color() != lines["ben"].get_color()
    assert any(list(line.get_ydata()) == [0.05, 0.05] for line in divergence.lines)  # δ
    low, high = divergence.get_ylim()
    assert low == 0
    assert high == pytest.approx(0.06)  # 1.2 times the highest finite value, which is δ


def test_without_matplotlib_there_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plot_training(write(tmp_path), tmp_path / "training.png") is None
    assert not (tmp_path / "training.png").exists()


def test_importing_the_module_loads_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, satune.report.plots;"
        "print([name for name in ('torch', 'matplotlib', 'transformers') if name in sys.modules])"
    )
    source = Path(__file__).resolve().parents[2] / "src"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=source, check=True
    )
    assert found.stdout.strip() == "[]"
