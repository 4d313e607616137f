"""``satune chat`` as a person meets it, and as a pipe does."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

import swapped_teams
import tiny_world
from command_line import ENVIRONMENT, Run, refused


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    recipe = tiny_world.build(folder)
    return swapped_teams.trained(recipe, folder / "run", ["stages=1"])


@pytest.fixture
def piped(satune: Run, monkeypatch: pytest.MonkeyPatch, run: Path):
    def chat(text: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return satune("chat", run, *words)

    return chat


def test_each_line_of_a_pipe_is_answered_by_a_text(piped) -> None:
    code, out, err = piped("3+4\n\n", "--seed", "5")
    assert (code, err) == (0, "")
    assert out and piped("3+4", "--seed", "5") == (0, out, "")
    assert piped("3+4", "--seed", "6")[1] != out
    # With the seats: Ann's message, Bob's, and the answer, which is Bob's.
    shown = piped("3+4", "--seed", "5", "--seats")[1]
    assert shown.startswith("ann: ") and shown.endswith(f"\nbob: {out}{out}")
    # Of a seat alone: another conversation.
    assert piped("3+4", "--seed", "5", "--seat", "ann", "--seats")[1].startswith("ann: ")


def test_what_was_said_is_part_of_the_next_problem(piped) -> None:
    one = piped("3+4", "--seed", "5")[1]
    two = piped("3+4\n3+4", "--seed", "5")[1]
    assert two.startswith(one) and two != one + one


def test_what_cannot_be_is_one_line(piped) -> None:
    assert "nearest: bob" in refused(piped("3+4", "--seat", "bo"))
    code, out, err = piped("3+4 " * 400 + "\n")
    assert (code, out) == (2, "")
    assert err.startswith("error: standard input, line 1: messages: context: ")
    assert err.count("\n") == 1


WAITS = """
import asyncio

async def waits(talk):
    for seat in talk.seats:
        turn = await talk.say(seat)
    if "wait" in talk.problem.text:
        await asyncio.Event().wait()
    return turn.text
"""


@pytest.mark.slow
def test_a_terminal(run: Path, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "satune", "chat", str(run), "--seed", "5", "--protocol",
         f"{tmp_path / 'waits.py'}:waits"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "100"},
        preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([ours], [], [], 120)[0], seen
            seen += os.read(ours, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        until("> ")
        os.write(ours, b"\x03")
        until("ctrl-D ends")
        until("> ")
        os.write(ours, b"3+4\n")
        until("ann: ")
        until("bob: ")
        until("> ")
        os.write(ours, b"wait\n")
        until("bob: ")
        os.write(ours, b"\x03")
        until("stopped; it is not remembered")
        until("> ")
        os.write(ours, b"3+4\n")
        until("bob: ")
        until("> ")
        os.write(ours, b"/seats\n")
        until("seats are hidden")
        os.write(ours, b"/new\n")
        until("begun anew")
        os.write(ours, b"/what\n")
        until("ctrl-C stops an answer")
        until("> ")
        os.write(ours, b"\x04")
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
