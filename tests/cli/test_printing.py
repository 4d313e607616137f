"""What is printed is text: nothing that a person, a server or a model wrote steers the terminal."""

from __future__ import annotations

from io import StringIO
from typing import Any, cast

import pytest
from rich.table import Table

from satune.cli.common import PlainConsole, open_console, say
from satune.cli.grade import show_grades
from satune.cli.progress import Display
from satune.files.events import Event, Notice

NASTY = "[red]a[/] [link=http://x]b[/link] :smile: \x1b[2J\x1b]0;t\x07 \u202e\x9b1m \\[x]"
SHOWN = "[red]a[/] [link=http://x]b[/link] :smile: \ufffd[2J\ufffd]0;t\ufffd \ufffd\ufffd1m \\[x]"


def console(*, terminal: bool = False) -> tuple[PlainConsole, StringIO]:
    file = StringIO()
    return PlainConsole(file=file, force_terminal=terminal, width=500), file


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_and_tables_show_a_text_as_it_stands(terminal: bool) -> None:
    made, file = console(terminal=terminal)
    made.print(NASTY, highlight=False, soft_wrap=True)
    assert file.getvalue() == SHOWN + "\n"
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row(NASTY)
    made, file = console(terminal=terminal)
    made.print(table)
    assert file.getvalue().rstrip() == SHOWN


def test_a_closing_tag_without_an_opening_one_is_a_text() -> None:
    """It would end the command as an error of rich's."""
    made, file = console()
    made.print("[/nothing] [/]")
    assert file.getvalue() == "[/nothing] [/]\n"


def test_the_head_of_grades_is_bold_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, Any] = {
        "benchmark": NASTY, "score": 0.5, "interval": None, "rows": 2, "responses": 2,
        "components": {},
    }  # fmt: skip
    show_grades(shown)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{SHOWN} ") and first.rstrip().endswith(" 0.5000")


EVENTS: list[dict[str, Any]] = [
    {"event": "note", "text": NASTY},
    {"event": "swap", "seats": [NASTY], "stage": 1},
    {
        "event": "update", "stage": 1, "step": 1, "agent": NASTY, "accepted": False,
        "reason": NASTY,
    },
    {"event": "update", "stage": 1, "step": 1, "agent": NASTY, "accepted": True, "scale": 1.0},
    {
        "event": "look", "seats": [NASTY], "problems": 1, "mean": 0.0, "lower": 0.0,
        "allowed": 0.0,
    },
    {"event": "distillation", "seat": NASTY, "round": 1, "kl": {"quantile": 0.1}, "reward": 0.5},
    {"event": "alignment", "seat": NASTY, "alignment": {"score": 0.0, "standard_error": None}},
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event["event"])
def test_progress_shows_names_and_reasons_as_they_stand(event: dict[str, Any]) -> None:
    made, file = console()
    with Display(made) as display:
        display.watch(cast(Event | Notice, event))
    assert SHOWN in file.getvalue()
    assert file.getvalue().replace("\n", "").isprintable()


def test_a_bar_shows_its_message_as_it_stands() -> None:
    made, file = console(terminal=True)
    with Display(made) as display:
        display.progress(1, 2, NASTY)
        display._bars.refresh()
    assert SHOWN in file.getvalue()


def test_a_bar_goes_on_while_its_message_changes() -> None:
    made, _ = console(terminal=True)
    with Display(made) as display:
        display.stages(3, 8, 0.25)
        for done in (1, 2, 3):
            display.progress(done, 4, f"rollout, reward 0.{done}")
        stages, rollout = display._bars.tasks
        # One bar, so that its rate and its time left are of all that was done.
        assert rollout.completed == 3 and rollout.description == "rollout, reward 0.3"
        assert rollout.remaining == 1 and rollout.elapsed is not None
        assert stages.description == "stages, reward 0.250" and stages.completed == 3
        display.progress(0, 5, "update of ann")
        assert [task.description for task in display._bars.tasks][1:] == ["update of ann"]
        display.progress(5, 5, "update of ann")
        assert len(display._bars.tasks) == 1


def test_without_a_terminal_nothing_moves() -> None:
    made, file = console()
    with Display(made) as display:
        for done in range(5):
            display.progress(done, 4, "rollout")
        display.stages(1, 2, 0.5)
    assert file.getvalue() == ""


def test_a_style_of_our_own_is_kept() -> None:
    made, file = console(terminal=True)
    fields = {"greedy": False, "reward": 0.5, "interval": None, "stage": 0, "problems": 2}
    with Display(made) as display:
        display.watch(cast(Event, {"event": "eval", **fields}))
    assert "\x1b[1mheld-out reward\x1b[0m 0.500" in file.getvalue()


def test_an_evaluation_tells_groups_apart() -> None:
    made, file = console()
    fields = {"greedy": True, "reward": 0.5, "interval": None, "stage": 3, "problems": 2}
    groups = {"seen": {"reward": 0.75}, NASTY: {"reward": 0.25}}
    with Display(made) as display:
        display.watch(cast(Event, {"event": "eval", **fields, "groups": groups}))
    shown = " ".join(file.getvalue().split())
    assert "(greedy, after 3 stages, 2 problems; seen 0.750; " in shown
    assert f"{' '.join(SHOWN.split())} 0.250)" in shown


def test_errors_are_one_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"error: {NASTY}\nsecond")
    assert capsys.readouterr().err == f"error: {SHOWN} second\n"


def test_the_commands_have_such_a_console() -> None:
    assert isinstance(open_console(), PlainConsole)
    assert isinstance(open_console(stderr=True), PlainConsole)
