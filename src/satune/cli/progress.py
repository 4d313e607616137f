"""Progress on a terminal: bars with rate and remaining time, and a line a stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="dim")


class Display:
    """Shows what goes on, on standard error. Without a terminal only the lines are written."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._message = ""
        self._stages: TaskID | None = None

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def progress(self, done: int, total: int, message: str) -> None:
        """(done, of how many, of what); a new message starts a new bar."""
        if self._task is None or message != self._message:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(message, total=total)
            self._message = message
        self._bars.update(self._task, completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._task)
            self._task = None

    def stages(self, done: int, total: int) -> None:
        if self._stages is None:
            self._stages = self._bars.add_task("stages", total=total)
        self._bars.update(self._stages, completed=done)

    def watch(self, kind: str, fields: Mapping[str, Any]) -> None:
        """One line for each event that a person wants to see while a run goes on."""
        if kind == "eval":
            decoding = "greedy" if fields["greedy"] else "sampled"
            self.note(
                f"[bold]held-out reward[/] {fields['reward']:.3f}{_interval(fields)} "
                f"({decoding}, after {fields['stage']} stages, {fields['problems']} problems)"
            )
        elif kind == "update":
            divergence = fields.get("kl", {}).get("quantile")
            moved = "" if divergence is None else f"KL {divergence:.4f} of {fields['delta']:g}, "
            verdict = f"scale {fields['scale']:.2f}" if fields["accepted"] else "[red]reverted[/]"
            reason = "" if fields["accepted"] else f" ({fields['reason']})"
            self.note(
                f"  stage {fields['stage']} step {fields['step']} {fields['agent']}: "
                f"{moved}{verdict}{reason}{_certified(fields)}"
            )
        elif kind == "look":
            self.note(
                f"  hand-over of {', '.join(fields['seats'])}: {fields['problems']} problems, "
                f"reward {fields['mean']:+.4f}, at least {fields['lower']:+.4f}; "
                f"the newcomer may have {fields['allowed']:.1%}"
            )
        elif kind == "alignment" and "alignment" in fields:
            found = fields["alignment"]
            error = found["standard_error"]
            self.note(
                f"  newcomer of {fields['seat']}: alignment {found['score']:+.4f}"
                + ("" if error is None else f" (standard error {error:.4f})")
            )
        elif kind == "distillation":
            self.note(
                f"  distillation of {fields['seat']}, round {fields['round']}: "
                f"KL {fields['kl']['quantile']:.4g}, reward {fields['reward']:.3f}"
            )
        elif kind == "swap":
            self.note(f"swap of {', '.join(fields['seats'])} after {fields['stage']} stages")
        elif kind == "note":
            self.note(fields["text"])
        elif kind == "stage":
            self.note(
                f"stage {fields['stage']}: reward {fields['reward']:.3f}, {fields['seconds']:.1f} s"
            )


def _certified(fields: Mapping[str, Any]) -> str:
    found = fields.get("certificate", {}).get("statistical")
    if found is None:
        return ""
    return f", reward {found['mean']:+.4f}, certified at least {found['lower']:+.4f}"


def _interval(fields: Mapping[str, Any]) -> str:
    bounds = fields.get("interval")
    return f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
