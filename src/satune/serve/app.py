"""The endpoint: what may be asked under which path, and how a request is answered.

GET  /v1/models, /v1/models/NAME     POST /v1/chat/completions
GET  /health                         GET  /metrics
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from satune.loading import nearest_hint
from satune.serve.gate import Gate
from satune.serve.metrics import CONTENT_TYPE, Metrics
from satune.serve.refusal import Refusal
from satune.serve.replies import KEPT_ALIVE, Reply, event
from satune.serve.requests import Request, read_request
from satune.serve.served import Answer, ServedTeam
from satune.types import Turn, UserError

QUIET = 15.0
"""Seconds after which a stream that has nothing to say shows that it lives."""
INTERNAL = "internal_error"
_LOG = logging.getLogger(__name__)
NOT_OFFERED = {
    "/v1/completions": "a team answers chats and gives no log-likelihoods of texts",
    "/v1/responses": "responses are not offered",
    "/v1/embeddings": "a team embeds nothing",
}


class Endpoint:
    """Answers requests to ``served``. ``seed`` is that of requests which give none (None: each has
    one of its own)."""

    def __init__(self, served: ServedTeam, seed: int | None = None) -> None:
        self.served = served
        self.seed = seed
        self.metrics = Metrics()
        self._created = int(time.time())

    async def models(self, request: HttpRequest) -> Response:
        listed = [self._model(name) for name in self.served.models]
        return JSONResponse({"object": "list", "data": listed})

    async def model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name not in self.served.models:
            near = nearest_hint(name, self.served.models)
            raise Refusal(404, f"no model {name[:200]!r}{near}", code="model_not_found")
        return JSONResponse(self._model(name))

    async def health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def counted(self, request: HttpRequest) -> Response:
        return Response(self.metrics.text(self.served.asked), media_type=CONTENT_TYPE)

    async def chat(self, request: HttpRequest) -> Response:
        begun = time.monotonic()
        settings = self.served.settings
        try:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            # A form in a page elsewhere can send anything but this type without being asked.
            if kind != "application/json":
                raise Refusal(415, "Content-Type: send application/json", code="bad_content_type")
            body = await _body(request, settings.body, settings.arrival)
            asked = read_request(body, self.served.models, settings.choices, self.seed)
            call = _Call(self, asked, begun)
        except Refusal as refusal:
            self.metrics.requests[str(refusal.status)] += 1
            raise
        except ClientDisconnect:
            self.metrics.requests["gone"] += 1
            return Response(status_code=499)
        return call

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "satune"}


class _Call(Response):
    """A chat request that the team is asked: called as a response, it gives the answer, whole or
    turn by turn, and ends the conversation where the client is gone first. Raises Refusal where the
    team has been asked too much already."""

    def __init__(self, endpoint: Endpoint, asked: Request, begun: float) -> None:
        self.background = None
        self._metrics = endpoint.metrics
        self._asked, self._begun = asked, begun
        self._reply = Reply(asked, endpoint.served.fingerprint)
        # What happens, in its order: a turn, or None for an end (of the client, or the answers).
        self._news: asyncio.Queue[tuple[int, Turn] | None] = asyncio.Queue()
        self._answers = endpoint.served.ask(asked.ask, self._tell)
        self._answers.add_done_callback(lambda _: self._news.put_nowait(None))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_left(receive))
        gone.add_done_callback(lambda _: self._news.put_nowait(None))
        try:
            if self._asked.stream:
                await self._in_pieces(scope, receive, send)
            else:
                await self._whole(scope, receive, send)
        finally:
            if not self._answers.done():
                self._metrics.requests["gone"] += 1
            for task in (self._answers, gone):
                task.cancel()
            await asyncio.gather(self._answers, gone, return_exceptions=True)

    def _tell(self, sample: int, turn: Turn) -> None:
        if self._asked.stream:
            self._news.put_nowait((sample, turn))

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._news.get()
        if not self._answers.done():
            return
        try:
            reply: Response = JSONResponse(self._reply.whole(self._ended()))
        except Refusal as refusal:
            reply = refused(refusal)
        await reply(scope, receive, send)

    async def _in_pieces(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def say(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            # A proxy that gathers the pieces would make one answer of them.
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await say(b"".join(self._reply.opening()))
        while True:
            try:
                news = await asyncio.wait_for(self._news.get(), QUIET)
            except TimeoutError:
                await say(KEPT_ALIVE)
                continue
            if news is None:
                break
            await say(self._reply.turn(*news))
        if not self._answers.done():
            return
        try:
            end = b"".join(self._reply.closing(self._ended()))
        except Refusal as refusal:
            end = event(refusal.body)
        await say(end, more=False)

    def _ended(self) -> list[Answer]:
        """The answers. Raises Refusal where there are none, whatever the reason."""
        try:
            answers = self._answers.result()
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.code == INTERNAL:
                _LOG.error("a conversation failed", exc_info=error)
            self._metrics.requests[str(refusal.status)] += 1
            raise refusal from error
        self._metrics.requests["200"] += 1
        self._metrics.answered(answers, time.monotonic() - self._begun)
        return answers


def endpoint(
    served: ServedTeam,
    *,
    seed: int | None = None,
    key: str | None = None,
    hosts: Collection[str] = (),
    numbers: bool = False,
) -> Starlette:
    """The application, which has ``served`` running. ``hosts`` are names that it is asked by beside
    this machine's own; ``numbers``, ``key``: see ``Gate``."""
    point = Endpoint(served, seed)
    routes = [
        Route("/v1/models", point.models),
        Route("/v1/models/{name:path}", point.model),
        Route("/v1/chat/completions", point.chat, methods=["POST"]),
        Route("/health", point.health),
        Route("/metrics", point.counted),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Gate, hosts=hosts, key=key, numbers=numbers)],
        exception_handlers={Refusal: _on_refusal, HTTPException: _on_http, Exception: _on_error},
    )
    app.router.redirect_slashes = False
    return app


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UserError):
        return Refusal(500, str(error), code="misconfigured")
    return Refusal(500, "the server failed; its log says why", code=INTERNAL)


def refused(refusal: Refusal) -> JSONResponse:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _on_refusal(request: HttpRequest, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return refused(refusal)


async def _on_http(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    said, code = NOT_OFFERED.get(path, "there is nothing here"), "not_found"
    if error.status_code == 405:
        said, code = "the method is not allowed", "method_not_allowed"
    said = f"{request.method} {path[:200]}: {said}; POST /v1/chat/completions asks a team"
    return refused(Refusal(error.status_code, said, code=code, headers=error.headers))


async def _on_error(request: HttpRequest, error: Exception) -> Response:
    return refused(refusal_of(error))


async def _body(request: HttpRequest, most: int, seconds: float) -> bytes:
    """Raises Refusal for a body that is too large or too slow."""
    # What is left of it is not read, so that the connection is of no more use.
    closed = {"Connection": "close"}
    too_large = Refusal(
        413, f"the body has more than {most} bytes", code="too_large", headers=closed
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > most):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        said = f"the body did not come within {seconds:g} s"
        raise Refusal(408, said, code="too_slow", headers=closed) from None
    return bytes(body)


async def _left(receive: Receive) -> None:
    """Waits until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
