"""Text of strangers (servers, models, files) as a terminal may be shown it."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` for one line of a terminal: each line end or other blank becomes a space, whatever
    could steer the terminal or cannot be written (control and direction characters, half a
    surrogate pair) U+FFFD. Joiners stay, scripts and emoji need them."""
    return "".join(
        c if c.isprintable() or c in "\u200c\u200d" else " " if c.isspace() else "\ufffd"
        for c in text
    )


def encodable(text: str) -> str:
    """``text`` as it can be written anywhere: half a surrogate pair, which UTF-8 lacks, is "?"."""
    return text.encode(errors="replace").decode()
