"""The JSON object that a message ends with, found in one pass over the text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

Group = tuple[int, int, bool]
"""Start, end, and whether it is whole: it does not stand inside braces that never close."""

# A string (an unfinished one reaches to the end, so that no quote is looked at twice) or a brace.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[{}]', re.DOTALL)
_BRACE = re.compile(r"[{}]")
_LOOKS_LIKE_JSON = re.compile(r'\{\s*["}]')


def last_object(text: str, key: str) -> dict[str, Any] | None:
    """The last complete JSON object of a text, None if there is none.

    Objects within an object belong to it. Braces that no member follows ("{House}", "{x | x > 1}")
    are prose. What looks like JSON and is damaged (a trailing comma, single quotes inside) is not
    repaired, and no earlier object takes its place. An object inside one that never closes counts
    if it has ``key``. A line end inside a string is dropped, as the evaluation of ZebraLogic does.

    Linear in the length of the text, whatever it holds.
    """
    groups, quoted = _groups(text, _TOKEN)
    found = _last(text, groups, key)
    if found is None and quoted:
        # A lone quotation mark inverts what is a string; then braces alone are counted.
        found = _last(text, _groups(text, _BRACE)[0], key)
    return found


def _last(text: str, groups: Sequence[Group], key: str) -> dict[str, Any] | None:
    for start, end, whole in reversed(groups):
        # Cutting a group out and reading it costs its length; groups of one list do not overlap.
        if whole:
            return _loaded(text[start:end])
        if key in (inner := _loaded(text[start:end]) or {}):
            return inner
    return None


def _groups(text: str, tokens: re.Pattern[str]) -> tuple[list[Group], bool]:
    """The outermost balanced groups in order, and whether some string holds a brace."""
    groups: list[tuple[int, int]] = []
    opened: list[int] = []
    quoted, at = False, 0
    while (first := _LOOKS_LIKE_JSON.search(text, at)) is not None:
        # Outside of braces a quotation mark is prose, so the search for tokens starts anew there.
        for found in tokens.finditer(text, first.start()):
            token, at = found[0], found.end()
            if token == "{":
                opened.append(at - 1)
            elif token == "}":
                start = opened.pop()
                while groups and groups[-1][0] > start:
                    groups.pop()
                groups.append((start, at))
                if not opened and not _LOOKS_LIKE_JSON.match(text, at):
                    break
            elif not quoted:
                quoted = "{" in token or "}" in token
        else:
            break
    unclosed = opened[0] if opened else len(text)
    return [
        (start, end, start < unclosed)
        for start, end in groups
        if start < unclosed or _LOOKS_LIKE_JSON.match(text, start)
    ], quoted


def _loaded(text: str) -> dict[str, Any] | None:
    try:
        loaded = json.loads(text.replace("\n", ""))
    except (ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None
