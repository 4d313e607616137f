"""The one figure that a training run leaves behind; ``satune report`` draws the others."""

from __future__ import annotations

from pathlib import Path

from satune.files.events import read_events
from satune.report.drawing import can_draw, draw_together
from satune.report.source import read_source
from satune.report.training import Rewards, divergence_chart, reward_chart, violation_chart


def plot_training(run: str | Path, out: str | Path) -> Path | None:
    """Draw reward, KL and violation rate by sweep of the run directory ``run`` into a PNG.

    Gives the file's path, or None without matplotlib (``pip install 'satune[plots]'``). Raises
    UserError, with file and line, for damaged events, and where ``run`` holds no run.
    """
    if not can_draw():
        return None
    source = read_source(Path(run))
    read_events(source.path / "events.jsonl")  # a damaged line is told, not drawn around
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    charts = [reward_chart(source, Rewards()), divergence_chart(source), violation_chart(source)]
    return draw_together(charts, target)
