"""Served teams without a server: a scripted one, a trained tiny one, and requests to either."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from satune.cli.served import load_served
from satune.play.match import Match
from satune.protocols.named import load_protocol
from satune.serve.app import endpoint
from satune.serve.served import Reading, ServedTeam
from satune.serve.server import Server, address_of, listening
from satune.serve.settings import ServeSettings
from satune.types import Engine
from scripted import EntriesRenderer, Letters, ScriptedEngine, Writer, team

CHAT = "/v1/chat/completions"


def spoken(seat: str, entries: Sequence[Any], key: Any) -> str:
    """Tells which draw of what it is: so short that every difference is seen."""
    return f"{seat}{key.own_index} of {key.seed}.{key.sample}"


@contextmanager
def scripted(
    write: Writer = spoken,
    protocol: str = "chain",
    seats: Sequence[str] = ("ann", "bob"),
    engine: Engine | None = None,
    **limits: Any,
) -> Iterator[ServedTeam]:
    """A running team whose messages ``write`` gives."""
    match = Match(
        team(*seats, renderer=EntriesRenderer()),
        load_protocol(protocol, list(seats)) if isinstance(protocol, str) else protocol,
        engine or ScriptedEngine(write),
        Reading(Letters()),
    )
    served = ServedTeam(match, ServeSettings(**limits), "fp_test")
    with served.running():
        yield served


def tiny(run: Path, *overrides: str, **more: Any) -> ServedTeam:
    """The team of a run directory as ``satune serve`` loads it."""
    wanted = {"protocol": None, "protocol_options": None, **more.pop("wanted", {})}
    return load_served(str(run), list(overrides), wanted, more, False, None)


class Stuck(ScriptedEngine):
    """Writes nothing until it is let go; tells how many wait."""

    def __init__(self) -> None:
        super().__init__(lambda *_: "a")
        self.waiting = 0
        self.go = False

    async def generate(self, seat, prompt, sampling, key):
        self.waiting += 1
        try:
            while not self.go:
                await asyncio.sleep(0.001)
        finally:
            self.waiting -= 1
        return await super().generate(seat, prompt, sampling, key)


def asked(text: str = "3+4", model: str = "team", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


class Client:
    """Sends requests to an ASGI application, byte by byte as they are given."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def send(
        self,
        method: str = "POST",
        path: str = CHAT,
        body: bytes | dict[str, Any] = b"",
        headers: Sequence[tuple[bytes, bytes]] | None = None,
        hear: Callable[[bytes], object] = lambda piece: None,
        leave: asyncio.Event | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body); ``hear`` is given each piece of it. The client goes away once
        ``leave`` is set: status 0 where nothing came before."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if headers is None:
            headers = [(b"host", b"localhost:8000"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1", "method": method, "scheme": "http", "path": path,
            "raw_path": path.encode("utf-8", "replace"), "query_string": b"", "root_path": "",
            "headers": list(headers), "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        messages = iter([{"type": "http.request", "body": data, "more_body": False}])
        left, ended = leave or asyncio.Event(), asyncio.Event()
        status = 0
        found: dict[str, str] = {}
        pieces: list[bytes] = []

        async def receive() -> dict[str, Any]:
            message = next(messages, None)
            if message is not None:
                return message
            waiting = [asyncio.ensure_future(each.wait()) for each in (left, ended)]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in waiting:
                    each.cancel()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                found.update(
                    (k.decode().lower(), v.decode("latin-1")) for k, v in message["headers"]
                )
            else:
                pieces.append(message.get("body", b""))
                if not message.get("more_body"):
                    ended.set()
                hear(pieces[-1])

        await self.app(scope, receive, send)
        return status, found, b"".join(pieces)

    async def ask(self, **fields: Any) -> dict[str, Any]:
        """The object that answers ``asked(**fields)``; the status stands in it under "status"."""
        status, headers, body = await self.send(body=asked(**fields))
        assert headers["content-type"] == "application/json"
        return json.loads(body) | {"status": status}

    async def stream(self, **fields: Any) -> list[dict[str, Any]]:
        """The events of a streamed answer, but for the last word."""
        status, headers, body = await self.send(body=asked(stream=True, **fields))
        assert status == 200 and headers["content-type"].startswith("text/event-stream")
        return events(body)


def events(body: bytes) -> list[dict[str, Any]]:
    """Of a stream that is whole: each event is one line of data, and the last one says so."""
    assert body.endswith(b"\n\n")
    lines = [part for part in body.split(b"\n\n") if part and not part.startswith(b":")]
    assert all(line.startswith(b"data: ") and b"\n" not in line for line in lines)
    found = [line.removeprefix(b"data: ") for line in lines]
    if b'"error"' not in found[-1]:
        assert found.pop() == b"[DONE]"
    return [json.loads(line) for line in found]


def client(served: ServedTeam, **more: Any) -> Client:
    return Client(endpoint(served, **more))


@contextmanager
def on_a_port(served: ServedTeam, **more: Any) -> Iterator[str]:
    """The address of ``served``, which is running."""
    with listening("127.0.0.1", 0) as place:
        address = address_of(place)
        server = Server(endpoint(served, **more))
        thread = threading.Thread(target=asyncio.run, args=(server.serve([place]),))
        thread.start()
        try:
            yield address
        finally:
            server.drain()
            thread.join()
