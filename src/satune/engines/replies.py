"""Reading what an OpenAI-compatible server replies, whole or as a stream of events.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

from satune.engines.failures import (
    BROKEN,
    FILTERED,
    MALFORMED,
    OVERFLOW,
    REFUSAL,
    TOOL_CALL,
    Failed,
    Kind,
    error_text,
    overflowed,
)
from satune.engines.wire import Lines, mended, parsed
from satune.types import FinishReason

MOST_TOKENS = 10_000_000
"""No model reads or writes more in one request; a larger count is none."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A message and what it cost; tokens are 0 where the server did not count them.

    ``note`` says what stood in the reply in place of a text, if something did.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    note: str = ""


class ReplyReader:
    """Reads a body as it comes, in whatever pieces: one JSON object, or a stream of server-sent
    events. Its first character tells which, for servers that know no streams answer with the whole,
    and types of contents are wrong too often.

    ``done`` is true once a stream has said that it is; what follows need not be waited for.
    ``feed`` and ``end`` raise Failed for what is no completion.
    """

    def __init__(self, charset: str = "utf-8") -> None:
        self.done = False
        self._charset = charset
        self._whole: list[bytes] | None = None
        self._lines: Lines | None = None
        self._data: list[bytes] = []  # of the event under way
        self._message = _Message()
        self._events = 0

    def feed(self, piece: bytes) -> None:
        if self._whole is None and self._lines is None:
            piece = piece.lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte order mark, blanks
            if not piece:
                return
            if piece[0] in b"{[\xff\xfe\0":  # JSON, or what begins a mark of UTF-16
                self._whole = []
            else:
                self._lines = Lines()
        if self._whole is not None:
            self._whole.append(piece)
        elif self._lines is not None:
            for line in self._lines.feed(piece):
                self._read(line)

    def end(self) -> Reply:
        """The reply, nothing more having come. A message is whole once its finish reason has."""
        if self._whole is not None:
            self._message.add(parsed(b"".join(self._whole), self._charset))
            if not self._message.chosen:
                raise Failed(MALFORMED, "a reply without choices")
        elif self._lines is not None:
            for line in self._lines.end():
                self._read(line)
            self._dispatch()
            if not self._events:
                raise Failed(MALFORMED, "a reply that is neither JSON nor a stream of events")
        else:
            raise Failed(MALFORMED, "an empty reply")
        return self._message.reply()

    def _read(self, line: bytes) -> None:
        if self.done:
            return
        field, _, value = line.partition(b":")
        if not line:
            self._dispatch()
        elif field == b"data" and value.strip():
            self._data.append(value.strip())
            if self._data[-1] == b"[DONE]":
                self._dispatch()
        elif field == b"error" and value.strip():  # no field of the standard, but of a server
            self._data.append(b'{"error":' + value + b"}")

    def _dispatch(self) -> None:
        """Take the event whose lines of data are held. Some servers end events with one line end
        only, so that lines which are no JSON together are taken one by one."""
        lines, self._data = self._data, []
        if len(lines) > 1:
            try:
                data = parsed(b"\n".join(lines), self._charset)
            except Failed:
                for line in lines:
                    self._event(line)
            else:
                self._take(data)
        elif lines:
            self._event(lines[0])

    def _event(self, line: bytes) -> None:
        if line == b"[DONE]":
            self.done = True
            self._events += 1
        elif not self.done:
            self._take(parsed(line, self._charset))

    def _take(self, data: Any) -> None:
        self._events += 1
        self._message.add(data)


class _Message:
    """The first choice of a reply, gathered from one object or from many."""

    def __init__(self) -> None:
        self.chosen = False
        self._text: list[str] = []
        self._thoughts: list[str] = []
        self._refusal: list[str] = []
        self._calls = False
        self._finish: Any = None
        self._error: Any = None
        self._usage: Any = None

    def add(self, data: Any) -> None:
        if not isinstance(data, Mapping):
            raise Failed(MALFORMED, "a reply that is no JSON object")
        if data.get("error") or data.get("object") == "error":  # told of under a good status
            said = error_text(data)
            raise Failed(OVERFLOW if overflowed(said) else BROKEN, said)
        self._usage = data.get("usage") or self._usage
        choices = data.get("choices")
        if not choices:  # the last event may hold the usage alone
            return
        if not isinstance(choices, list) or not isinstance(choices[0], Mapping):
            raise Failed(MALFORMED, "a reply without choices")
        choice = choices[0]
        if choice.get("index") not in (0, None):
            return
        self.chosen = True
        self._finish = choice.get("finish_reason") or self._finish
        self._error = choice.get("error") or self._error
        message = choice.get("delta")
        message = choice.get("message") if message is None else message
        if message is None:
            return
        if not isinstance(message, Mapping):
            raise Failed(MALFORMED, "a choice whose message is no object")
        self._content(message.get("content"))
        for name in ("reasoning_content", "reasoning"):
            if isinstance(message.get(name), str):
                self._thoughts.append(message[name])
                break
        self._calls = self._calls or bool(message.get("tool_calls"))
        if isinstance(message.get("refusal"), str):
            self._refusal.append(message["refusal"])

    def _content(self, content: Any) -> None:
        """Text, or a list of parts; thoughts that stand among the parts are not the answer's."""
        for part in content if isinstance(content, list) else [content]:
            named = part if isinstance(part, Mapping) else {"text": part or ""}
            if named.get("type") in ("thinking", "reasoning"):
                self._thoughts.append("(a part)")
            elif isinstance(named.get("refusal"), str):
                self._refusal.append(named["refusal"])
            elif isinstance(named.get("text"), str):
                self._text.append(named["text"])
            else:
                raise Failed(MALFORMED, "a message whose content is no text")

    def reply(self) -> Reply:
        """Raises Failed where the message is not whole, or says that it failed."""
        usage = self._usage if isinstance(self._usage, Mapping) else {}
        read, written = (_count(usage.get(k)) for k in ("prompt_tokens", "completion_tokens"))
        if self._error:
            raise Failed(BROKEN, error_text({"error": self._error}), read + written)
        text, thoughts, refusal = (
            mended("".join(pieces)) for pieces in (self._text, self._thoughts, self._refusal)
        )
        if refusal and not text:
            raise Failed(REFUSAL, refusal, read + written)
        if not isinstance(self._finish, str):
            raise Failed(MALFORMED, "a reply without a finish reason", read + written)
        if self._calls and not text:
            raise Failed(TOOL_CALL, "a call in place of a text", read + written)
        finish = _finished(self._finish, text, read + written)
        note = ""
        if thoughts and not text.strip():
            note = f"no content, reasoning alone ({len(thoughts)} characters)"
        return Reply(text, finish, read, written, note)


_LENGTH = {"length", "max_tokens", "max_length", "max_output_tokens", "model_length"}
_STOP = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed"}
_FAILED: dict[str, Kind] = {
    **dict.fromkeys(("tool_calls", "tool_call", "tool_use", "function_call"), TOOL_CALL),
    "malformed_function_call": TOOL_CALL,
    **dict.fromkeys(("content_filter", "safety", "sensitive", "recitation"), FILTERED),
    **dict.fromkeys(("blocklist", "prohibited_content", "guardrail_intervened"), FILTERED),
    "refusal": REFUSAL,
    **dict.fromkeys(("error", "failed", "abort", "aborted", "cancelled", "canceled"), BROKEN),
    "insufficient_system_resource": BROKEN,
}


def _finished(reason: str, text: str, tokens: int) -> FinishReason:
    """How a message ended. A reason that nobody knows is believed to be an end where there is a
    text. Raises Failed where it is a failure."""
    word = reason.strip().lower().partition(":")[0]
    kind = _FAILED.get(word)
    if kind is None and word not in _LENGTH | _STOP and not text:
        kind = BROKEN
    if kind is not None:
        raise Failed(kind, f"finish reason {reason[:60]!r}", tokens)
    return "length" if word in _LENGTH else "stop"


def _count(value: Any) -> int:
    """A count of tokens, 0 for what can be none."""
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else 0


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; None if none."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except (ValueError, TypeError, OverflowError, OSError):  # no date, or in no year
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
