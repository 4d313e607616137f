"""Progress on a terminal: bars with rate and remaining time, and a line a stage."""

from __future__ import annotations

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

from satune.files.events import EvalEvent, Event, Notice, UpdateEvent
from satune.files.printing import printable


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="dim")


class Display:
    """Shows what goes on, on standard error. Without a terminal only the lines are written."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._done, self._total = 0, 0
        self._stages: TaskID | None = None

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def note(self, text: str | Text) -> None:
        """One line for a person; of a plain text nothing is markup."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def progress(self, done: int, total: int, message: str) -> None:
        """(done, of how many, of what). The message may change on the way; a bar ends where all is
        done, and a new one begins where another total is told of, or less is done than before."""
        if self._task is not None and (total != self._total or done < self._done):
            self._bars.remove_task(self._task)
            self._task = None
        if self._task is None:
            self._task = self._bars.add_task(printable(message), total=total)
        self._done, self._total = done, total
        self._bars.update(self._task, completed=done, description=printable(message))
        if done >= total:
            self._bars.remove_task(self._task)
            self._task = None

    def stages(self, done: int, total: int, reward: float) -> None:
        """How many sweeps are over, and the reward of the rollout that the last began with."""
        if self._stages is None:
            # Those of a resumed run that were done before are no part of the rate.
            self._stages = self._bars.add_task("", total=total, completed=done)
        told = f"stages, reward {reward:.3f}"
        self._bars.update(self._stages, completed=done, description=told)

    def watch(self, event: Event | Notice) -> None:
        """One line for each event that a person wants to see while a run goes on."""
        match event["event"]:
            case "eval":
                decoding = "greedy" if event["greedy"] else "sampled"
                told = (
                    f" {event['reward']:.3f}{_interval(event)} "
                    f"({decoding}, after {event['stage']} stages, {event['problems']} problems"
                    f"{_groups(event)})"
                )
                self.note(Text.assemble(("held-out reward", "bold"), told))
            case "update":
                moved = ""
                if "kl" in event:
                    moved = f"KL {event['kl']['quantile']:.4f} of {event['delta']:g}, "
                taken = event["accepted"]
                step = f"  stage {event['stage']} step {event['step']} {event['agent']}: {moved}"
                reason = "" if taken else printable(f" ({event['reason']})")
                verdict = f"scale {event['scale']:.2f}" if taken else ("reverted", "red")
                self.note(Text.assemble(printable(step), verdict, reason, _certified(event)))
            case "look":
                self.note(
                    f"  hand-over of {', '.join(event['seats'])}: {event['problems']} problems, "
                    f"reward {event['mean']:+.4f}, at least {event['lower']:+.4f}; "
                    f"the newcomer may have {event['allowed']:.1%}"
                )
            case "alignment":
                if "alignment" not in event:
                    return
                found = event["alignment"]
                error = found["standard_error"]
                self.note(
                    f"  newcomer of {event['seat']}: alignment {found['score']:+.4f}"
                    + ("" if error is None else f" (standard error {error:.4f})")
                )
            case "distillation":
                self.note(
                    f"  distillation of {event['seat']}, round {event['round']}: "
                    f"KL {event['kl']['quantile']:.4g}, reward {event['reward']:.3f}"
                )
            case "swap":
                self.note(f"swap of {', '.join(event['seats'])} after {event['stage']} stages")
            case "note":
                self.note(event["text"])
            case "stage":
                self.note(
                    f"stage {event['stage']}: reward {event['reward']:.3f}, "
                    f"{event['seconds']:.1f} s"
                )


def _certified(event: UpdateEvent) -> str:
    if "certificate" not in event:
        return ""
    found = event["certificate"]["statistical"]
    return f", reward {found['mean']:+.4f}, certified at least {found['lower']:+.4f}"


def _groups(event: EvalEvent) -> str:
    groups = event.get("groups", {})
    return "".join(f"; {printable(name)} {of['reward']:.3f}" for name, of in groups.items())


def _interval(event: EvalEvent) -> str:
    bounds = event["interval"]
    return f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
