"""Why a server gave no completion: the kinds of failure, and how a status or a wording tells them.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import Repr
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Kind:
    """``policy``: the failure is the policy's own, else the world's. ``again``: asking again may
    help, since a server draws anew or comes back."""

    name: str
    policy: bool
    again: bool


OVERFLOW = Kind("context overflow", policy=True, again=False)
REJECTED = Kind("prompt rejected", policy=True, again=False)
PROMPT_FILTERED = Kind("content filter", policy=True, again=False)
FILTERED = Kind("content filter", policy=True, again=True)
REFUSAL = Kind("refusal", policy=True, again=True)
TOOL_CALL = Kind("tool call", policy=True, again=True)
BROKEN = Kind("failed reply", policy=False, again=True)
MALFORMED = Kind("malformed reply", policy=False, again=True)
OVERSIZED = Kind("oversized reply", policy=False, again=True)
UNREACHED = Kind("connection", policy=False, again=True)
LATE = Kind("timeout", policy=False, again=True)
BUSY = Kind("busy server", policy=False, again=True)
DOWN = Kind("server error", policy=False, again=True)


class Failed(Exception):
    """No completion came. ``said`` are the words for it; ``tokens`` what it cost all the same, by
    the server's count."""

    def __init__(self, kind: Kind, said: str, tokens: int = 0) -> None:
        super().__init__(f"{kind.name}: {said}")
        self.kind = kind
        self.said = said
        self.tokens = tokens


class Refused(Exception):
    """A status that is none of success. ``said`` is the server's message on one line, ``code`` its
    own words for the kind of error."""

    def __init__(self, status: int, data: Any, location: str = "", wait: float | None = None):
        super().__init__(f"status {status}")
        self.status = status
        self.said = error_text(data)
        self.code = error_code(data)
        self.location = bare(location)
        self.wait = wait

    @property
    def gateway(self) -> bool:
        """Whether something answered for a server that is not there."""
        return self.status in (502, 503, 504)


_OVERFLOW = re.compile(
    r"context[ _-]?(?:length|size|window)|context the overflows|exceed_context|n_ctx"
    r"|maximum (?:model|input|sequence|prompt) length|max_model_len"
    r"|(?:input|prompt)\b.{0,60}\b(?:too long|longer than)"
    r"|(?:input|prompt|payload|request|entity) (?:is )?too large"
    r"|(?:input|prompt) tokens? (?:count |length )?.{0,30}\bexceed"
    r"|inputs`? tokens \+ `?max_new_tokens|reduce the length of the (?:messages|prompt|input)"
)
_FILTER = re.compile(
    r"content[ _-]?(?:filter|policy|management)|responsibleai|data_inspection|safety"
)
_RETRIED = {408, 409, 425, 429}
_MISTAKES = {401, 402, 403, 404, 405}


def kind_of(refused: Refused) -> Kind | None:
    """The kind of failure that a status and its wording tell. None where they tell none: the server
    does not take the request, which may be the user's mistake or this prompt's fault."""
    status = refused.status
    words = f"{refused.said[:2000]} {refused.code}".lower()
    if is_mistake(refused):
        return None
    if status in _RETRIED:
        return BUSY
    if status == 413 or _OVERFLOW.search(words):  # one server says so under 500
        return OVERFLOW
    if status == 451 or (status < 500 and _FILTER.search(words)):
        return PROMPT_FILTERED
    return DOWN if status >= 500 else None


def out_of_quota(refused: Refused) -> bool:
    """Whether what the user has paid for is used up: waiting does not bring it back."""
    words = f"{refused.said[:2000]} {refused.code}"
    return refused.status == 402 or (refused.status == 429 and "insufficient_quota" in words)


def is_mistake(refused: Refused) -> bool:
    """Whether a status speaks of the address, the key or the model, and not of the request."""
    return refused.status in _MISTAKES or refused.status < 400 or out_of_quota(refused)


def overflowed(said: str) -> bool:
    """Whether a message says that the prompt does not fit into the server's context."""
    return _OVERFLOW.search(said[:2000].lower()) is not None


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 300
_SHORT.maxdict = _SHORT.maxlist = 20


def error_text(data: Any) -> str:
    """The message of an error body on one line, whatever its form."""
    for key in ("error", "detail", "message"):
        if isinstance(data, Mapping) and data.get(key):
            data = data[key]
    # Not str: the data may be nested deeper than Python can show.
    return " ".join((data if isinstance(data, str) else _SHORT.repr(data)).split())


def error_code(data: Any) -> str:
    """The names that an error body gives its kind."""
    error = data.get("error", data) if isinstance(data, Mapping) else {}
    named = [error.get(k) for k in ("code", "type")] if isinstance(error, Mapping) else []
    return " ".join(name for name in named if isinstance(name, str))


def bare(location: str) -> str:
    """An address without what could be a secret in it: name, password, query."""
    try:
        parts = urlsplit(location)
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if host else parts.path
