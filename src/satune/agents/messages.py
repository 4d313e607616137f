"""What a seat sees, as chat messages. Enough for a server that renders by itself; ``rendering``
builds the ids of a known tokenizer on it.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from satune.thoughts import without_thoughts
from satune.types import Completion, Entry, Message, Prompt, text_part

CONTINUE = "continue"
"""What a seat is told between two messages of its own, since chat templates want roles to
alternate and an empty message is shown differently by each of them."""


@dataclass(frozen=True, slots=True)
class TemplateSettings:
    """How an agent's chat template is used.

    ``enable_thinking`` is handed to the template (None: its own default). ``chat`` is Jinja text
    that takes the place of the tokenizer's template, or gives one to a base model that has none.
    ``show_thoughts`` leaves other seats' ``<think>`` blocks in what this agent reads; ``names``
    puts "seat: " before other seats' messages.
    """

    enable_thinking: bool | None = None
    chat: str | None = None
    show_thoughts: bool = False
    names: bool = True


class MessageBuilder:
    """From the entries of a transcript to chat messages whose roles alternate."""

    def __init__(self, template: TemplateSettings) -> None:
        self.template = template

    def message(self, entry: Entry) -> str | list[Any]:
        """One user-side entry as message content: text, or parts where not all are text."""
        if entry.kind == "problem":
            if all(part.get("type") == "text" for part in entry.parts):
                return "".join(part["text"] for part in entry.parts)
            return list(entry.parts)
        if entry.kind == "foreign":
            shown = entry.text if self.template.show_thoughts else without_thoughts(entry.text)
            return f"{entry.seat}: {shown}" if self.template.names else shown
        return entry.text

    def content(self, entries: Sequence[Entry]) -> str | list[Any]:
        """User-side entries merged into one message; with none, the seat is told to go on."""
        items = [self.message(entry) for entry in entries] or [CONTINUE]
        if all(isinstance(item, str) for item in items):
            return "\n".join(items)  # type: ignore[arg-type]
        parts: list[Any] = []
        for at, item in enumerate(items):
            parts += [text_part("\n")] if at else []
            parts += [text_part(item)] if isinstance(item, str) else item
        return parts

    def messages(self, entries: Sequence[Entry]) -> list[Message]:
        """Entries as chat messages whose roles alternate, user first and last."""
        messages: list[Message] = []
        waiting: list[Entry] = []
        for entry in entries:
            if entry.kind == "own":
                messages += [user_message(self.content(waiting)), own_message(entry.text)]
                waiting = []
            else:
                waiting.append(entry)
        return [*messages, user_message(self.content(waiting))]


class Transcript:
    """The entries that one seat has seen, in the order in which its model reads them."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def extend(self, entries: Sequence[Entry]) -> list[Entry]:
        """Takes all entries so far, those of the last call and new ones behind them; gives the new
        ones as they are read."""
        new = list(entries[len(self.entries) :])
        if self.entries:
            # The own message answers the last prompt, whatever was written at the same moment.
            new.sort(key=lambda entry: entry.kind != "own")
        self.entries += new
        return new


class MessageRenderer(MessageBuilder):
    """Renders for an agent whose tokenizer is not known here (types.Renderer): prompts hold
    messages only, and the turns cannot be trained on."""

    def view(self, seat: str) -> MessageView:
        """A fresh view of one conversation for ``seat``."""
        return MessageView(self)


class MessageView:
    """One seat's view of one conversation (types.View). Nothing is left out of a full context:
    only the server knows how long it is."""

    def __init__(self, builder: MessageBuilder) -> None:
        self._builder = builder
        self._transcript = Transcript()

    def prompt(self, entries: Sequence[Entry], max_new_tokens: int) -> Prompt:
        """The messages of what the seat has seen, oldest first."""
        self._transcript.extend(entries)
        return Prompt(tuple(self._builder.messages(self._transcript.entries)))

    def wrote(self, completion: Completion) -> None: ...


class EntryRenderer:
    """Renders nothing, for an agent that lives elsewhere (types.Renderer): a prompt is what the
    seat has seen since its last one, as one message ``{"at", "entries"}``. ``at`` counts the
    entries before them; 0 begins a conversation anew. The agent's host renders it."""

    def view(self, seat: str) -> EntryView:
        """A fresh view of one conversation for ``seat``."""
        return EntryView()


class EntryView:
    """One seat's view of one conversation (types.View), as its host is told of it."""

    def __init__(self) -> None:
        self._told = 0

    def prompt(self, entries: Sequence[Entry], max_new_tokens: int) -> Prompt:
        """The entries that are new, oldest first."""
        at, self._told = self._told, len(entries)
        return Prompt(({"at": at, "entries": tuple(entries[at:])},))

    def wrote(self, completion: Completion) -> None: ...


def user_message(content: Any) -> Message:
    return {"role": "user", "content": content}


def own_message(text: str) -> Message:
    return {"role": "assistant", "content": text}
