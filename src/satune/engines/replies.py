"""Reading what an OpenAI-compatible server replies, whole or as a stream of events.

Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

from satune.types import FinishReason


class Unreadable(Exception):
    """A reply that broke off or is not what the protocol says; asking again may mend it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A message and what it cost; tokens are 0 where the server did not count them."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


def read_reply(body: bytes) -> Reply:
    """The reply in a whole body. Raises Unreadable."""
    data = _object(body)
    choice = _choice(data)
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise Unreadable("a choice without a message")
    return _reply(_text(message), choice.get("finish_reason"), data.get("usage"))


async def read_stream(lines: AsyncIterator[str]) -> Reply:
    """The reply in a stream of server-sent events. Raises Unreadable if it breaks off: a message is
    whole once its finish reason has come (the usage may follow)."""
    text, finish, usage = "", None, None
    async for line in lines:
        if not line.startswith("data:"):
            continue
        payload = line[5:].strip()
        if payload == "[DONE]":
            break
        data = _object(payload)
        usage = data.get("usage") or usage
        if data.get("choices"):  # the last event may hold the usage alone
            choice = _choice(data)
            text += _text(choice.get("delta") or {})
            finish = choice.get("finish_reason") or finish
    return _reply(text, finish, usage)


def _object(text: bytes | str) -> Mapping[str, Any]:
    try:
        data = json.loads(text)
    except ValueError:
        raise Unreadable("a reply that is not JSON") from None
    if not isinstance(data, Mapping):
        raise Unreadable("a reply that is no JSON object")
    if data.get("error"):  # some servers tell of a failure under status 200
        raise Unreadable(f"an error in place of a reply: {error_text(data)}")
    return data


def _choice(data: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise Unreadable("a reply without choices")
    return choices[0]


def _text(message: Mapping[str, Any]) -> str:
    # A message that a length limit cut inside its thoughts has no content.
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise Unreadable("a message whose content is no text")
    return content or ""


def _reply(text: str, finish: Any, usage: Any) -> Reply:
    if not isinstance(finish, str):
        raise Unreadable("a reply without a finish reason")
    counted = usage if isinstance(usage, Mapping) else {}
    prompt, completion = counted.get("prompt_tokens"), counted.get("completion_tokens")
    return Reply(
        text,
        "length" if finish == "length" else "stop",
        prompt if isinstance(prompt, int) else 0,
        completion if isinstance(completion, int) else 0,
    )


def error_text(data: Any) -> str:
    """The message of an error body on one line."""
    error = data.get("error", data.get("detail", data)) if isinstance(data, Mapping) else data
    message = error.get("message", error) if isinstance(error, Mapping) else error
    return " ".join(str(message).split())


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; None if none."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return None
