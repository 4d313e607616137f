"""A chat as one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from satune.types import Part, text_part


def chat_parts(messages: Sequence[Mapping[str, Any]]) -> tuple[Part, ...]:
    """Chat messages, each with its role and its content (text, or a list of parts), as the content
    of one prompt.

    A chat of one user message is taken as it is. A longer one has a blank line between its
    messages, and each stands after a line with its role, but for a system message and for the only
    one of the user.
    """
    parts: list[Part] = []
    alone = sum(message["role"] == "user" for message in messages) == 1
    for message in messages:
        role, content = message["role"], message["content"]
        body = [text_part(content)] if isinstance(content, str) else list(content)
        heading = role != "system" and not (role == "user" and alone)
        between = "\n\n" if parts else ""
        start = f"{between}{role}:\n" if heading else between
        parts += ([text_part(start)] if start else []) + body
    return tuple(parts)
