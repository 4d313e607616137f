"""A small OpenAI-compatible server as a process of its own on loopback, which fails on demand.

Its models reduce arithmetic expressions as ``tasks.relay`` wants it, or play a detective and the
suspects of ``tasks.arbench_dc``; an answer is a function of model, messages and seed. Faults come
by the number of the request. Standard library and relay only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from satune.tasks.relay import last_expression, reduce_once

ERRORS = {"good": 0.1, "poor": 0.5}
ACTORS = ("detective", "suspect")
KINDS = (
    "429", "500", "truncate", "garbage", "empty", "slow", "reset", "error", "503", "refuse"
)  # fmt: skip
FAULTS = tuple(fault for kind in KINDS for fault in (kind, "", ""))
CLOSED = 0.15
"""Seconds that nobody listens after a "refuse"."""
SLOW = 1.2


SEEN = ("requests", "answered", "bodies", "most", "times", "keys", "connections")


class State:
    faults: tuple[str, ...] = ()
    key = ""
    delay = 0.0
    requests = 0
    answered: list[str] = []  # noqa: RUF012
    bodies: list[dict[str, Any]] = []  # noqa: RUF012
    times: list[float] = []  # noqa: RUF012
    keys: list[str] = []  # noqa: RUF012
    most = open = 0
    connections = 0
    limit: int | None = None
    """Requests after so many are answered only once the limit is taken away."""
    errors: dict[str, float] = {}  # noqa: RUF012
    lock = threading.Lock()
    server: ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None: ...

    def do_GET(self) -> None:
        found = {n: getattr(State, n) for n in SEEN}
        self.reply(200, json.dumps(found))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            for name, value in body.items():
                setattr(State, name, value)
            return self.reply(200, "{}")
        with State.lock:
            number = State.requests
            State.requests += 1
            State.open += 1
            State.most = max(State.most, State.open)
            State.bodies.append(body)
            State.times.append(time.monotonic())
            State.keys.append(self.headers.get("Authorization") or "")
        try:
            while State.limit is not None and number >= State.limit:
                time.sleep(0.01)
            fault = State.faults[number % len(State.faults)] if State.faults else ""
            self.answer(body, fault)
        finally:
            with State.lock:
                State.open -= 1

    def answer(self, body: dict[str, Any], fault: str) -> None:
        if self.path != "/v1/chat/completions":
            return self.error(404, "Not Found")
        if State.key and self.headers.get("Authorization") != f"Bearer {State.key}":
            return self.error(401, f"Incorrect key: {self.headers.get('Authorization')}")
        if body["model"] not in (*ERRORS, *ACTORS):
            return self.error(404, f"The model `{body['model']}` does not exist.")
        if "max_tokens" in body and fault == "renamed":
            return self.error(400, "Unsupported 'max_tokens'. Use 'max_completion_tokens' instead.")
        if fault == "400":
            return self.error(400, "maximum context\nlength is 10 tokens")
        if fault == "quota":
            return self.error(429, "pay", code="insufficient_quota")
        if fault == "429":
            return self.error(429, "slow down", {"Retry-After": "0.05"})
        if fault in ("500", "503"):
            return self.error(int(fault), "out of order")
        if fault == "slow":
            time.sleep(SLOW)
        time.sleep(State.delay)
        if fault in ("reset", "refuse"):
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
            if fault == "refuse":
                State.server.shutdown()
            return None
        text, seed = written(body)
        usage = {"prompt_tokens": len(json.dumps(body["messages"])), "completion_tokens": len(text)}
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if len(text) > body.get("max_tokens", 99):
            text, choice["finish_reason"] = text[: body["max_tokens"]], "length"
        if body.get("stream") and fault not in ("garbage", "empty", "error"):
            self.stream(text, choice, usage, broken=fault == "truncate")
        else:
            choice["message"] = {"role": "assistant", "content": text}
            whole = json.dumps({"choices": [choice], "usage": usage})
            whole = {
                "garbage": whole[: len(whole) // 2],
                "empty": json.dumps({"choices": []}),
                "error": json.dumps({"error": {"message": "engine is dead"}}),
            }.get(fault, whole)
            self.reply(200, whole, broken=fault == "truncate")
        if fault in ("", "renamed"):
            State.answered.append(seed)

    def stream(self, text: str, choice: Any, usage: Any, *, broken: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        pieces = [text[:1], text[1:]]
        events = [{"choices": [{"delta": {"content": p}, "finish_reason": None}]} for p in pieces]
        events += [{"choices": [{"delta": {}, "finish_reason": choice["finish_reason"]}]}]
        events += [{"choices": [], "usage": usage}]
        lines = [": a comment\n\n"] + [f"data: {json.dumps(e)}\n\n" for e in events]
        for line in lines[:2] if broken else [*lines, "data: [DONE]\n\n"]:
            self.wfile.write(f"{len(line):x}\r\n{line}\r\n".encode())
            self.wfile.flush()
        if not broken:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = broken

    def error(
        self, status: int, message: str, headers: dict[str, str] | None = None, **more: str
    ) -> None:
        self.reply(status, json.dumps({"error": {"message": message, **more}}), headers)

    def reply(
        self, status: int, text: str, headers: dict[str, str] | None = None, *, broken: bool = False
    ) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if broken else data)
        self.close_connection = broken


def written(body: dict[str, Any]) -> tuple[str, str]:
    """What a model writes, and a name for what it was asked."""
    asked = json.dumps([body["model"], body["messages"], body.get("seed")], sort_keys=True)
    name = hashlib.sha256(asked.encode()).hexdigest()[:16]
    rng = random.Random(name)
    if body["model"] in ACTORS:
        return acted(body, rng), name
    expression = reduce_once(last_expression(body["messages"][-1]["content"]) or "0")
    if rng.random() < {**ERRORS, **State.errors}[body["model"]]:
        head = expression.split("+")[0].split("-")[0]
        expression = str(int(head or 0) + 1) + expression[len(head) :]
    return expression, name


def acted(body: dict[str, Any], rng: random.Random) -> str:
    """A suspect's sentence, or a detective's choice, or question: one in four is put to nobody."""
    if body["model"] == "suspect":
        return f"I saw {rng.choice(['nothing', 'the cook', 'a light'])} at {rng.randrange(1, 13)}."
    asked = "\n".join(m["content"] for m in body["messages"] if m["role"] == "user")
    if "That was the last question." in asked:
        return f"Answer: {rng.choice('ABCDE')}"
    names = re.findall(r"^- (.+?): ", asked.partition("\nsuspects:\n")[2], re.MULTILINE)[:5]
    name = rng.choice(names) if names and rng.random() < 0.75 else "Nobody"
    return f"Question for {name}: what did you see at {rng.randrange(1, 13)}?"


class Listener(ThreadingHTTPServer):
    request_queue_size = 128

    def process_request(self, request: Any, client_address: Any) -> None:
        with State.lock:
            State.connections += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with State.lock:
            State.connections -= 1
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that gave up are what this server is for."""


def serve() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    port = parser.parse_args().port
    # A test that dies closes the pipe, and must not leave its server behind.
    threading.Thread(target=lambda: os._exit(len(sys.stdin.buffer.read()) + 1), daemon=True).start()
    first = True
    while True:
        State.server = Listener(("127.0.0.1", port), Handler)
        port = State.server.server_address[1]
        if first:
            print(port, flush=True)
        first = False
        State.server.serve_forever(poll_interval=0.01)
        State.server.server_close()
        time.sleep(CLOSED)


class Server:
    """The server as its tests see it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self._control = f"http://127.0.0.1:{port}/control"

    def set(self, **values: Any) -> None:
        """Set ``faults``, ``key``, ``delay``, ``limit``, or put back what was counted."""
        self._call(json.dumps(values).encode())

    def fresh(self, faults: Sequence[str] = (), **values: Any) -> None:
        start = {"requests": 0, "most": 0, "key": "", "delay": 0.0, "limit": None}
        start |= {"answered": [], "bodies": [], "times": [], "keys": []}
        self.set(**{**start, **values}, faults=list(faults))

    def seen(self) -> dict[str, Any]:
        return self._call()

    def idle(self) -> None:
        """Take the limit away and wait until nobody but the caller is connected. Connections are
        taken in their order, so whatever was sent before this call has been counted then."""
        self.set(limit=None)
        while self.seen()["connections"] > 1:
            time.sleep(0.01)

    def _call(self, data: bytes | None = None) -> dict[str, Any]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(100):
            try:
                return json.loads(opener.open(self._control, data, timeout=10).read())
            except OSError:  # it may not listen just now
                time.sleep(0.05)
        raise AssertionError("the server is gone")


@contextmanager
def running(port: int = 0) -> Iterator[Server]:
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, __file__, "--port", str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield Server(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


if __name__ == "__main__":
    serve()
