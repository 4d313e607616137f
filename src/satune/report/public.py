"""What of a recipe may be told to others: its values without the places and addresses in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from satune.report.source import flat

WITHHELD = "(withheld)"
_LEFT_OUT = {"cache", "api_key_env", "host_token_env", "chat"}
"""Keys that say where things lie here, what a secret is called, or pages of text."""
_ADDRESS = re.compile(r"\w+://[^\s#]*")
_BEGINS = r"(?:(?:~|\.{1,2})/[^\s:,/]+|/[^\s:,/]+/[^\s:,/]+)"
_PATH = re.compile(rf"(?<![^\s:=,(\"']){_BEGINS}(?:/[^\s:,/]+)*/?|\b[A-Za-z]:\\[^\s:,]+")
_WHOLE = re.compile(r"(\w+:)?((?:~|\.{1,2})?/[^:\n]*/?[^:\n]*)((?::\w+)?)")
_FILE = re.compile(r"\.(?:jsonl?|parquet|csv|txt|ya?ml|py|gguf|jinja|safetensors)")
"""A path in the middle of a text has two names at least: "/no_think" is none. A text that is one
altogether may have blanks in it."""


def public(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The values of a recipe by dotted key, as texts. A path is its last name, an address is
    withheld; what servers are asked by and where caches lie is left out."""
    return {key: value for key, value in flat(told(recipe)) if not _LEFT_OUT & set(key.split("."))}


def told(value: Any) -> Any:
    """The value with every text in it ``without_places``: each item of a list by itself."""
    if isinstance(value, Mapping):
        return {key: told(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [told(inner) for inner in value]
    return without_places(value) if isinstance(value, str) else value


def without_places(text: str) -> str:
    """The text with each address withheld, and of each path the last name. A relative path is known
    by its dots, its depth, the kind of its file, or by being there: "org/name" is the hub's."""
    whole = _WHOLE.fullmatch(text)
    if whole is not None and _PATH.match(whole[2]):
        return (whole[1] or "") + _last(whole[2]) + whole[3]
    head, colon, rest = text.partition(":")
    if _is_relative_path(head) and not rest.startswith("//"):
        return Path(head).name + colon + rest
    text = _ADDRESS.sub(WITHHELD, text)
    return _PATH.sub(lambda found: _last(found.group()), text)


def _is_relative_path(head: str) -> bool:
    if "/" not in head or head.startswith("/") or any(c.isspace() for c in head):
        return False
    deep = head.count("/") > 1
    return deep or _FILE.fullmatch(Path(head).suffix) is not None or Path(head).exists()


def _last(path: str) -> str:
    return (PureWindowsPath(path) if "\\" in path else Path(path)).name or WITHHELD
