"""What of a recipe may be told to others: its values without the places and addresses in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from satune.report.source import flat

WITHHELD = "(withheld)"
_LEFT_OUT = {"cache", "api_key_env", "chat"}
"""Keys that say where things lie here, what a secret is called, or pages of text."""
_ADDRESS = re.compile(r"\w+://[^\s#]*")
_PATH = re.compile(r"(?<![^\s:=,(\"'])(?:~|\.{1,2})?(?:/[^\s:,/]+)+/?|\b[A-Za-z]:\\[^\s:,]+")


def public(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The values of a recipe by dotted key, as texts. A path is its last name, an address is
    withheld; what servers are asked by and where caches lie is left out."""
    return {
        key: without_places(value)
        for key, value in flat(recipe)
        if not _LEFT_OUT & set(key.split("."))
    }


def without_places(text: str) -> str:
    """The text with each address withheld, and of each path the last name. A relative path is known
    by its dots, or by being there."""
    head, colon, rest = text.partition(":")
    if "/" in head and "://" not in text and Path(head).exists():
        return Path(head).name + colon + rest
    text = _ADDRESS.sub(WITHHELD, text)
    return _PATH.sub(lambda found: _last(found.group()), text)


def _last(path: str) -> str:
    return (PureWindowsPath(path) if "\\" in path else Path(path)).name or WITHHELD
