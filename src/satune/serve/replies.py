"""What is sent back: OpenAI's objects of a chat, whole or in pieces."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from satune.serve.requests import Request
from satune.serve.served import Answer
from satune.types import Turn

DONE = b"data: [DONE]\n\n"
KEPT_ALIVE = b": a message is being written\n\n"
"""A comment, which clients pass over."""


def shown(turn: Turn, *, first: bool) -> str:
    """A turn as it stands in ``reasoning_content``."""
    return f"{'' if first else chr(10) * 2}{turn.seat}: {turn.text}"


def reasoning(turns: Sequence[Turn]) -> str:
    """The seats' conversation."""
    return "".join(shown(turn, first=at == 0) for at, turn in enumerate(turns))


def cut_at(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of the stop sequences in it."""
    ends = [end for stop in stops if (end := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def usage_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens that all seats read and wrote for all answers. What they wrote beside the answers'
    own messages is counted as reasoning too."""
    turns = [turn for answer in answers for turn in answer.turns]
    read = sum(turn.prompt_tokens for turn in turns)
    written = sum(turn.completion_tokens for turn in turns)
    said = sum(answer.written.completion_tokens for answer in answers if answer.written)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "completion_tokens_details": {"reasoning_tokens": written - said},
    }


def event(data: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


@dataclass(slots=True)
class Reply:
    """The reply to one request. ``seed`` stands in every object, so that an answer whose seed the
    client did not choose can be had again."""

    request: Request
    fingerprint: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    _told: dict[int, set[tuple[int, str]]] = field(default_factory=dict)
    """What each answer's conversation has told: moment and seat."""

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": cut_at(answer.text, self.request.stop),
                    "reasoning_content": reasoning(answer.turns),
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return self._object("chat.completion", choices, usage=usage_of(answers))

    def opening(self) -> Iterator[bytes]:
        for index in range(self.request.ask.samples):
            yield self._piece(index, {"role": "assistant", "content": ""})

    def turn(self, index: int, turn: Turn) -> bytes:
        """One more turn of an answer's conversation. A turn that was told already says that the
        conversation was broken off: a seat speaks once in a moment."""
        told, place = self._told.setdefault(index, set()), (turn.moment, turn.seat)
        text = shown(turn, first=not told)
        if place in told:
            told.clear()
            text = f"\n\n(a server failed; the conversation begins anew){text}"
        told.add(place)
        return self._piece(index, {"reasoning_content": text})

    def closing(self, answers: Sequence[Answer]) -> Iterator[bytes]:
        for index, answer in enumerate(answers):
            text = cut_at(answer.text, self.request.stop)
            if text:
                yield self._piece(index, {"content": text})
            yield self._piece(index, {}, answer.finish_reason)
        if self.request.include_usage:
            yield event(self._object("chat.completion.chunk", [], usage=usage_of(answers)))
        yield DONE

    def _piece(self, index: int, delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        more = {"usage": None} if self.request.include_usage else {}
        return event(self._object("chat.completion.chunk", [choice], **more))

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.ask.model,
            "system_fingerprint": self.fingerprint,
            "seed": self.request.ask.seed,
            "choices": choices,
            **more,
        }
