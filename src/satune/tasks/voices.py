"""What a scripted player reads off a conversation: the prompt, and what the team said last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from satune.types import Entry

_T = TypeVar("_T")


def prompt_of(entries: Sequence[Entry]) -> str:
    """The text of the problem in ``entries``."""
    entry = next(entry for entry in entries if entry.kind == "problem")
    return entry.text or "".join(part.get("text", "") for part in entry.parts)


def last_said(
    entries: Sequence[Entry], read: Callable[[str], _T | None], size: Callable[[_T], int]
) -> _T | None:
    """What most seats said in the last round, the earliest of these on a tie; None if nobody did.

    ``read`` gives what a message says, None if nothing. A round is what different seats wrote one
    after the other with one ``size``, as in a moment of a debate.
    """
    voices: dict[str, _T] = {}
    for entry in reversed(entries):
        said = read(entry.text) if entry.kind in ("own", "foreign") else None
        if said is None:
            continue
        if entry.seat in voices or any(size(said) != size(other) for other in voices.values()):
            break
        voices[entry.seat] = said
    spoken = list(reversed(voices.values()))
    return max(spoken, key=spoken.count) if spoken else None
