"""``satune chat``."""

from __future__ import annotations

import asyncio
import sys
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from satune.cli.common import AgentHost, AllowAddress, Overrides, TrustCode, open_console, say
from satune.cli.served import (
    MaxNewTokens,
    Protocol,
    ProtocolOption,
    Seed,
    TeamGiven,
    Temperature,
    load_served,
)
from satune.files.printing import printable
from satune.loading import nearest_hint
from satune.serve.settings import MODEL
from satune.types import Turn, UserError

if TYPE_CHECKING:  # its libraries take seconds to load
    from satune.serve.chat import Chat
    from satune.serve.served import Answer

HELP = "/new begins anew, /seats shows or hides the seats, ctrl-C stops an answer, ctrl-D ends"


def chat(
    team: TeamGiven,
    overrides: Overrides = None,
    seat: Annotated[
        str | None, typer.Option(help="this seat alone, without its team", show_default="the team")
    ] = None,
    seats: Annotated[
        bool | None,
        typer.Option(
            "--seats/--no-seats",
            help="show what the seats say to each other",
            show_default="on a terminal",
        ),
    ] = None,
    protocol: Protocol = None,
    protocol_option: ProtocolOption = None,
    temperature: Temperature = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
    trust: TrustCode = False,
    allow_address: AllowAddress = None,
    agent_host: AgentHost = None,
) -> None:
    """Talk to a team. Of what is no terminal each line is a message, and answered by its text."""
    wanted = {
        "protocol": protocol,
        "protocol_options": protocol_option,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
    }
    served = load_served(team, overrides, wanted, {}, trust, allow_address, agent_host)
    from satune.serve.chat import Chat

    model = MODEL if seat is None else f"{MODEL}/{seat}"
    if model not in served.models:
        known = [name.partition("/")[2] for name in served.models[1:]]
        raise UserError(f"--seat: no {seat!r}{nearest_hint(str(seat), known)}")
    typed = sys.stdin.isatty()
    shown = sys.stdout.isatty() if seats is None else seats
    with served.running():
        window = _Window(Chat(served, model, seed), open_console(), shown)
        if typed:
            _typed(window)
        else:
            _piped(window)


class _Window:
    """The chat on a console, whose width and colours are a terminal's or none."""

    def __init__(self, chat: Chat, console: Console, seats: bool) -> None:
        self.chat = chat
        self.seats = seats
        self._console = console

    def ask(self, text: str) -> None:
        """Show the answer, and before it what the seats say. Raises Refusal and KeyboardInterrupt,
        at which the conversation is given up."""
        busy = self._console.status("") if self._console.is_terminal else nullcontext()
        with busy:
            answer = asyncio.run(self._said(text))
        self._show(answer)

    async def _said(self, text: str) -> Answer:
        return await self.chat.say(text, self._turn)

    def note(self, text: str) -> None:
        self._console.print(Text(printable(text), "dim"), soft_wrap=True)

    def _turn(self, turn: Turn) -> None:
        if self.seats:
            self._print(f"{turn.seat}: {turn.text}", "dim")

    def _show(self, answer: Answer) -> None:
        self._print(answer.text, "bold" if self._console.is_terminal else "")
        if answer.finish_reason != "stop" and self._console.is_terminal:
            self.note(f"(ended by {answer.finish_reason})")

    def _print(self, text: str, style: str) -> None:
        lines = "\n".join(map(printable, text.split("\n")))
        self._console.print(Text(lines, style), soft_wrap=True, highlight=False)


def _typed(window: _Window) -> None:
    from satune.serve.refusal import Refusal

    with suppress(ModuleNotFoundError):
        import readline  # noqa: F401 - lines are edited with it where Python has it
    window.note(f"{', '.join(window.chat.served.models)}: asking {window.chat.model}; {HELP}")
    while True:
        try:
            text = input("> ").strip()
        except KeyboardInterrupt:
            print()
            window.note(HELP)
            continue
        except EOFError:
            print()
            return
        match text:
            case "":
                continue
            case "/new":
                window.chat.forget()
                window.note("begun anew")
            case "/seats":
                window.seats = not window.seats
                window.note(f"seats are {'shown' if window.seats else 'hidden'}")
            case _ if text.startswith("/"):
                window.note(HELP)
            case _:
                try:
                    window.ask(text)
                except KeyboardInterrupt:
                    window.note("(stopped; it is not remembered)")
                except (Refusal, UserError) as error:
                    say(f"error: {error}")


def _piped(window: _Window) -> None:
    from satune.serve.refusal import Refusal

    for number, line in enumerate(sys.stdin, 1):
        if text := line.strip():
            try:
                window.ask(text)
            except Refusal as refusal:
                raise UserError(f"standard input, line {number}: {refusal.message}") from None
