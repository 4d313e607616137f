"""A server in the same process that plays whatever servers and what stands before them were seen to
do, as a transport for httpx: no sockets, no time. Its models are those of ``faulty_server``.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import httpx

from faulty_server import written

Fault = Callable[[str], httpx.Response]
"""What is sent in place of a text."""
FOR_EVER = 1e9
TYPE = {"content-type": "application/json"}
EVENTS = {"content-type": "text/event-stream"}


class Pieces(httpx.AsyncByteStream):
    """A body in pieces; then it ends, breaks with ``error``, or hangs if that is None."""

    def __init__(self, pieces: Iterable[bytes], error: Exception | str | None = "end") -> None:
        self._pieces = pieces
        self._error = error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
            await asyncio.sleep(0)
        if self._error is None:
            await asyncio.sleep(FOR_EVER)
        if isinstance(self._error, Exception):
            raise self._error


class Trickle(httpx.AsyncByteStream):
    """A comment a second, for ever."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b": still here\n\n"
            await asyncio.sleep(1.0)


def respond(
    body: Any, status: int = 200, headers: Mapping[str, str] = TYPE, then: Any = "end"
) -> httpx.Response:
    data = body if isinstance(body, bytes) else body.encode()
    cut = [data[i : i + 7000] for i in range(0, len(data), 7000)]
    return httpx.Response(status, headers=headers, stream=Pieces(cut, then))


def refusal(status: int, message: Any, headers: Mapping[str, str] = TYPE, **more: Any) -> Fault:
    body = json.dumps({"error": {"message": message, **more}})
    return lambda text: respond(body, status, headers)


def whole(content: Any, finish: Any = "stop", **more: Any) -> str:
    choice = {"index": 0, "message": {"content": content}, "finish_reason": finish}
    return json.dumps({"choices": [choice], **more})


def events(*deltas: Any, finish: Any = "stop", end: str = "\n") -> str:
    made = [{"choices": [{"delta": {"content": d}, "finish_reason": None}]} for d in deltas]
    made.append({"choices": [{"delta": {}, "finish_reason": finish}]})
    lines = [f"data: {json.dumps(e, ensure_ascii=False)}\n\n" for e in made]
    return "".join([*lines, "data: [DONE]\n\n"]).replace("\n", end)


def split(text: str, headers: Mapping[str, str] = EVENTS, **more: Any) -> httpx.Response:
    return respond(events(text[:2], text[2:], **more), 200, headers)


def raising(error: Exception) -> Fault:
    def fault(text: str) -> httpx.Response:
        raise error

    return fault


def two_lines(text: str) -> httpx.Response:
    event = json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]})
    return respond(f"data:\n\ndata: {event[:12]}\ndata:{event[12:]}\n\n", 200, EVENTS)


def told(usage: Any) -> Fault:
    counts = {"prompt_tokens": usage, "completion_tokens": usage}
    return lambda text: respond(whole(text, usage=counts))


BOMB = gzip.compress(b"{" * 2**25)
GZIP = {**TYPE, "content-encoding": "gzip"}
PARTS: Any = [{"type": "text", "text": ""}]

HARMLESS: dict[str, Fault] = {
    "events": split,
    "events as JSON": lambda text: split(text, TYPE),
    "events as nothing": lambda text: split(text, {}),
    "JSON as events": lambda text: respond(whole(text), 200, EVENTS),
    "JSON as a page": lambda text: respond(whole(text), 200, {"content-type": "text/html"}),
    "odd charset": lambda text: respond(whole(text), 200, {"content-type": "a; charset=punycode"}),
    "UTF-16": lambda text: respond(whole(text).encode("utf-16")),
    "a mark first": lambda text: respond(b"\xef\xbb\xbf\n" + whole(text).encode()),
    "a mark before events": lambda text: respond(b"\xef\xbb\xbf" + events(text).encode()),
    "line ends of Windows": lambda text: split(text, end="\r\n"),
    "line ends of old Macs": lambda text: split(text, end="\r"),
    "comments": lambda text: respond(": a\u2028b\x85\n\n" + events(text) + ":\n", 200, EVENTS),
    "several lines of data": two_lines,
    "parts": lambda text: respond(whole([*PARTS, {"type": "text", "text": text}])),
    "packed": lambda text: respond(gzip.compress(whole(text).encode()), 200, GZIP),
    "eos": lambda text: respond(whole(text, "eos")),
    "vast counts": told(10**30),
    "negative counts": told(-5),
    "counts as text": told("12"),
    "thoughts too": lambda text: respond(
        json.dumps({"choices": [{"message": {"content": text, "reasoning_content": "hm"},
                                 "finish_reason": "stop"}]})
    ),
    "created": lambda text: respond(whole(text), 201),
    "null deltas": lambda text: respond(
        'data: {"choices": null}\n\ndata: {"choices": [{"delta": null}]}\n\n' + events(text)
    ),
}  # fmt: skip
"""By which the answer comes nevertheless."""

PASSING: dict[str, Fault] = {
    "500": refusal(500, "out of order"),
    "502": lambda text: respond("<html>Bad gateway</html>", 502, {"content-type": "text/html"}),
    "503": refusal(503, ["loading", {"model": [[[1]]]}]),
    "529": refusal(529, None),
    "408": refusal(408, "too late"),
    "429": refusal(429, "slow", {"retry-after": "1"}),
    "429 for ever": refusal(429, "slow", {"retry-after": "1e999"}),
    "429 till then": refusal(429, "slow", {"retry-after": "Wed, 21 Oct 9999 07:28:00 GMT"}),
    "429 of old": refusal(429, "slow", {"retry-after": "-7"}),
    "429 of nonsense": refusal(429, "slow", {"retry-after": "soon"}),
    "204": lambda text: respond("", 204),
    "empty": lambda text: respond(""),
    "half": lambda text: respond(whole(text)[:30]),
    "page": lambda text: respond("<html>Welcome</html>", 200, {"content-type": "text/html"}),
    "null": lambda text: respond("null"),
    "deep": lambda text: respond("[" * 100_000),
    "digits": lambda text: respond('{"choices": ' + "1" * 5000 + "}"),
    "no choices": lambda text: respond('{"choices": []}'),
    "odd choices": lambda text: respond('{"choices": [null]}'),
    "odd delta": lambda text: respond(
        'data: {"choices": [{"delta": "a", "finish_reason": "stop"}]}\n\n', 200, EVENTS
    ),
    "deep event": lambda text: respond("data: " + '{"a":' * 100_000 + "\n\n", 200, EVENTS),
    "no end": lambda text: respond(events(text)[:60] + "\n\n", 200, EVENTS),
    "odd end": lambda text: respond(whole(text, 7)),
    "no finish": lambda text: respond(whole(text, None)),
    "finish error": lambda text: respond(whole("", "error")),
    "filtered": lambda text: respond(whole("I", "content_filter")),
    "tool": lambda text: respond(whole(None, "tool_calls")),
    "refuses": lambda text: respond(whole("No.", "refusal")),
    "choice's error": lambda text: respond(
        '{"choices": [{"message": {"content": ""}, "finish_reason": "stop", "error": {"code": 5}}]}'
    ),
    "error": lambda text: respond('{"error": "engine is dead"}'),
    "error event": lambda text: respond('data: {"error": {"message": "dead"}}\n\n', 200, EVENTS),
    "reset": raising(httpx.ReadError("reset")),
    "unreached": raising(httpx.ConnectError("nobody there")),
    "no HTTP": raising(httpx.RemoteProtocolError("what is that")),
    "reset on the way": lambda text: respond(
        events(text)[:50], 200, EVENTS, httpx.ReadError("connection reset")
    ),
    "hangs": lambda text: respond(events(text)[:50], 200, EVENTS, None),
    "trickles": lambda text: httpx.Response(200, headers=EVENTS, stream=Trickle()),
    "bomb": lambda text: respond(BOMB, 200, GZIP),
    "damaged": lambda text: respond(gzip.compress(whole(text).encode())[:-9], 200, GZIP),
    "unknown packing": lambda text: respond(whole(text), 200, {"content-encoding": "br"}),
}  # fmt: skip
"""After which the same request may be answered."""

BLIPS: dict[str, Fault] = {
    "307": lambda text: respond("", 307, {"location": "https://evil.example/v1?key=1"}),
    "302 to nowhere": lambda text: respond("", 302, {"location": "http://[::bad"}),
    "401": refusal(401, "who are you?"),
    "403": refusal(403, "blocked"),
    "404": refusal(404, "no such model"),
}
"""The user's mistake at first; where a model has answered already, trouble that may pass."""

Play = Callable[[dict[str, Any], int], Fault | None]
"""What meets a request, given how often it was asked before. None: its answer."""


class HostileServer(httpx.AsyncBaseTransport):
    """``seen`` counts requests by the name of what was asked, ``hosts`` where they went."""

    def __init__(self, play: Play = lambda body, before: None) -> None:
        self.play = play
        self.seen: Counter[str] = Counter()
        self.hosts: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.hosts[request.url.host] += 1
        text, name = written(body)
        before = self.seen[name]
        self.seen[name] += 1
        fault = self.play(body, before)
        return respond(whole(text)) if fault is None else fault(text)


def storm(seed: int, most: int = 5, rate: float = 0.6) -> Play:
    """Faults of every kind, at most ``most`` for one request; blips once a model has answered."""
    answered: Counter[str] = Counter()
    ordinary = [*HARMLESS.values(), *PASSING.values()]

    def play(body: dict[str, Any], before: int) -> Fault | None:
        rng = random.Random(f"{seed} {json.dumps(body, sort_keys=True)} {before}")
        if before < most and rng.random() < rate:
            # Replies to the requests that are under way may not have been read yet.
            late = answered[body["model"]] > 100
            return rng.choice([*ordinary, *BLIPS.values()] if late else ordinary)
        answered[body["model"]] += 1
        return None

    return play
