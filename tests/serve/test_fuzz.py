"""Whatever is sent: an answer, or an error in OpenAI's shape; and the next one is answered too."""

from __future__ import annotations

import asyncio
import json
import random
from copy import deepcopy
from typing import Any

import pytest

from serving import CHAT, Client, asked, client, events, scripted

PATHS = [CHAT] * 30 + ["/v1/models", "/v1/models/team/ann", "/health", "/metrics", "/", "//", "/v1"]
PATHS += ["/v1/models/\x00\udcff", "/v1/completions", "/v1/chat/completions/", "/../etc/passwd"]
METHODS = ["POST"] * 30 + ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "X" * 300]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e308, -0.0, "", "a",
    "team", "team/bob", "user", "system", "assistant", "tool", "stop", "\x00", "\ud800", "\u202e",
    "7" * 3000, [], [[]], {}, {"type": "text"}, {"type": "text", "text": "3+4"}, ["a", ""],
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, {"include_usage": True},
    {"role": "user", "content": "3+4"}, [{"role": "user", "content": "3+4"}], "{", "[DONE]\n\n",
    "data: x\n\n", [[[[[[[[[]]]]]]]]], {"a": {"b": {"c": [1, {}]}}},
]  # fmt: skip
FIELDS = [
    "model", "messages", "n", "seed", "stop", "stream", "stream_options", "temperature", "top_p",
    "top_k", "max_tokens", "max_completion_tokens", "tools", "tool_choice", "functions", "logprobs",
    "top_logprobs", "logit_bias", "response_format", "audio", "modalities", "user", "metadata",
    "presence_penalty", "frequency_penalty", "prediction", "nonsense", "\ud800", "",
]  # fmt: skip


def body_of(rng: random.Random) -> bytes:
    """A request with a few things wrong; now and then none, or nothing of a request."""
    match rng.randrange(8):
        case 0:
            return rng.randbytes(rng.randrange(200))
        case 1:
            return rng.choice([b"", b"{", b"[" * 5000, b"null", b"9" * 6000, b"NaN", b'"\xff"'])
    body = asked(rng.choice(["3+4", "\x00", "\ud83d", "7" * 50]))
    for _ in range(min(rng.randrange(4), rng.randrange(4))):
        body[rng.choice(FIELDS)] = deepcopy(rng.choice(VALUES))
    if rng.random() < 0.3:
        body["stream"] = True
    if rng.random() < 0.3 and isinstance(body["messages"], list):
        message = {
            name: deepcopy(rng.choice(VALUES))
            for name in rng.sample(["role", "content", "name", "tool_calls", "audio"], 3)
        }
        body["messages"].insert(rng.randrange(len(body["messages"]) + 1), message)
    data = json.dumps(body).encode()
    if rng.random() < 0.1:
        cut = rng.randrange(len(data))
        data = data[:cut] + rng.randbytes(rng.randrange(3)) + data[cut + rng.randrange(3) :]
    return data


def headers_of(rng: random.Random) -> list[tuple[bytes, bytes]]:
    found = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    if rng.random() < 0.1:
        at = rng.randrange(len(found))
        found[at] = (found[at][0], rng.choice([b"", b"\xff", b"evil.example", b"text/plain", b"["]))
    if rng.random() < 0.1:
        length = rng.choice([b"-1", b"x", b"9" * 400, b"0", b"\xb2"])
        found.append((b"content-length", length))
    return found


def check(status: int, headers: dict[str, str], body: bytes) -> str:
    """Hold an answer against the forms that there are; gives which one it has."""
    kind = headers["content-type"].partition(";")[0]
    if kind == "text/plain":
        assert status == 200 and body.startswith(b"# HELP")
        return "metrics"
    if kind == "text/event-stream":
        assert status == 200
        found = events(body)
        if "error" in found[-1]:
            check(400, {"content-type": "application/json"}, json.dumps(found[-1]).encode())
            return "broken stream"
        assert all(piece["object"] == "chat.completion.chunk" for piece in found)
        return "stream"
    assert kind == "application/json"
    reply = json.loads(body)
    if status == 200:
        assert reply.get("status") == "ok" or reply["object"] in (
            "chat.completion",
            "list",
            "model",
        )
        return "answer" if "choices" in reply else "list"
    assert 400 <= status < 500, reply
    error = reply["error"]
    assert list(reply) == ["error"] and set(error) == {"message", "type", "param", "code"}
    assert error["message"] and len(error["message"]) < 2000
    return "refusal"


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_request_has_a_well_formed_answer(count: int) -> None:
    rng = random.Random(count)
    seen: dict[str, int] = {}

    async def script(c: Client) -> None:
        for number in range(count):
            method, path = rng.choice(METHODS), rng.choice(PATHS)
            body, headers = body_of(rng), headers_of(rng)
            try:
                async with asyncio.timeout(30):
                    kind = check(*await c.send(method, path, body, headers))
            except Exception as error:
                raise AssertionError(f"{number}: {method} {path!r} {headers} {body!r}") from error
            seen[kind] = seen.get(kind, 0) + 1
        assert (await c.ask())["status"] == 200

    with scripted(choices=8, body=20_000) as served:
        asyncio.run(script(client(served)))
        assert served.asked == 0
    # Enough of it came through to where answers are made.
    assert seen["answer"] > count / 20 and seen["stream"] > count / 40
    assert seen["refusal"] > count / 4
