"""One server as requests reach it: its settings, its connections, one request and its reply."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from satune.engines.failures import LATE, UNREACHED, Failed, Refused
from satune.engines.pace import Pace
from satune.engines.replies import Reply, ReplyReader, retry_after
from satune.engines.settings import ServerSettings
from satune.engines.wire import Unpacker, known_charset, mended, parsed
from satune.files.printing import printable
from satune.types import UserError

STREAM = 10
"""How many times ``timeout`` of its settings a whole stream may take."""


@dataclass(slots=True)
class Session:
    """What belongs to one event loop: connections, how many may be in use, who tries a server."""

    loop: asyncio.AbstractEventLoop
    connections: httpx.AsyncClient
    gate: asyncio.Semaphore
    trying: asyncio.Lock = field(default_factory=asyncio.Lock)


class Client:
    """Sends requests to ``base_url``/chat/completions, at the pace that the settings allow.

    ``requests`` and ``repeated`` count those sent, and those of them that were repetitions. ``met``
    says whether a server, and no gateway in its place, ever said anything. ``limit_field`` is its
    name for the limit of tokens. Raises UserError for an address that is none or holds a key.
    """

    def __init__(
        self,
        base_url: str,
        settings: ServerSettings,
        transport: httpx.AsyncBaseTransport | None,
        clock: Callable[[], float],
    ) -> None:
        address = address_of(base_url)
        if address.username or address.password or address.query:
            raise UserError(
                f"base URL of {address.host}: it holds a key or a query; give the key in the "
                f"environment variable {settings.api_key_env}"
            )
        self.base_url = base_url.rstrip("/")
        self.settings = settings
        self.requests = self.repeated = 0
        self.met = False
        self.limit_field = "max_tokens"
        self._url = f"{self.base_url}/chat/completions"
        self._local = address.host in ("localhost", "127.0.0.1", "::1")
        self._transport = transport
        self._pace = Pace(settings.requests_per_minute, settings.tokens_per_minute, clock=clock)
        self._session: Session | None = None

    def session(self) -> Session:
        """What belongs to the running event loop, made where there is none."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            settings = self.settings
            connections = httpx.AsyncClient(
                headers=self._headers(),
                transport=self._transport,
                # The key goes to no other address.
                follow_redirects=False,
                # The whole request has its own limit; here only what a stream waits for.
                timeout=httpx.Timeout(settings.timeout, connect=min(30.0, settings.timeout)),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                # A proxy from the environment does not know this machine's own servers.
                trust_env=not self._local,
                # Reading the certificates takes longer than many an answer.
                verify=not (self._local and self.base_url.startswith("http:")),
            )
            self._session = Session(loop, connections, asyncio.Semaphore(settings.concurrency))
        return self._session

    async def close(self) -> None:
        """Close the connections. A client that is used again opens new ones."""
        if self._session is not None and self._session.loop is asyncio.get_running_loop():
            await self._session.connections.aclose()
        self._session = None

    async def send(self, body: Mapping[str, Any], *, again: bool = False) -> Reply:
        """The reply to one request. Raises Failed, and Refused for a status that is an error."""
        await self._pace.turn()
        self.requests += 1
        self.repeated += again
        settings = self.settings
        limit = settings.timeout * (STREAM if settings.stream else 1)
        try:
            async with asyncio.timeout(limit):
                reply = await self._exchange(body)
        except TimeoutError:
            raise Failed(LATE, f"no answer within {limit:g} s") from None
        except httpx.RequestError as error:
            late = isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout)
            raise Failed(LATE if late else UNREACHED, _one_line(error)) from None
        except Failed as failed:
            self.met = True
            self._pace.spent(failed.tokens)
            raise
        except Refused as refused:
            self.met = self.met or not refused.gateway
            if refused.wait is not None:
                self._pace.pause(refused.wait)
            raise
        self.met = True
        self._pace.spent(reply.prompt_tokens + reply.completion_tokens)
        return reply

    async def _exchange(self, body: Mapping[str, Any]) -> Reply:
        sent = {self.limit_field if k == "max_tokens" else k: v for k, v in body.items()}
        if self.settings.stream:
            sent |= {"stream": True, "stream_options": {"include_usage": True}}
        content = mended(json.dumps(sent, ensure_ascii=False)).encode()
        kind = {"Content-Type": "application/json"}
        connections = self.session().connections
        async with connections.stream("POST", self._url, content=content, headers=kind) as response:
            if not response.is_success:
                raise await _refusal(response)
            unpacker = Unpacker(response.headers.get("content-encoding", ""))
            reader = ReplyReader(known_charset(response.headers.get("content-type", "")))
            async for raw in response.aiter_raw():
                for piece in unpacker.feed(raw):
                    reader.feed(piece)
                if reader.done:
                    return reader.end()
            unpacker.end()
            return reader.end()

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.settings.api_key_env, "").strip()
        if not key.isascii() or not key.isprintable():
            raise UserError(
                f"${self.settings.api_key_env}: holds characters that no key has; set it anew"
            )
        # What is not compressed cannot swell.
        return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def clean(self, text: str) -> str:
        """``text`` on one printable line, without the key should the server have repeated it."""
        key = os.environ.get(self.settings.api_key_env, "").strip()
        text = printable(" ".join(text.split()))
        return text.replace(key, "***") if key else text

    def short(self, text: str) -> str:
        """At most 300 characters of what a server said. Cleaned first: half a key is no key that
        can be found."""
        text = self.clean(text)
        return text if len(text) <= 300 else f"{text[:297]}..."


async def _refusal(response: httpx.Response) -> Refused:
    """What a status means together with its body, in which a page may stand, or nothing."""
    charset = known_charset(response.headers.get("content-type", ""))
    data: Any = response.reason_phrase
    try:
        unpacker = Unpacker(response.headers.get("content-encoding", ""))
        whole = b"".join([p async for raw in response.aiter_raw() for p in unpacker.feed(raw)])
        data = whole.decode(charset, "replace")[:2000].strip() or data
        data = parsed(whole, charset)
    except (Failed, httpx.RequestError):
        pass  # the status has come, and says enough
    wait = retry_after(response.headers.get("retry-after"))
    return Refused(response.status_code, data, response.headers.get("location", ""), wait)


def address_of(base_url: str) -> httpx.URL:
    """``base_url``, read. Raises UserError for what is no address."""
    try:
        address = httpx.URL(base_url)
    except httpx.InvalidURL:
        address = httpx.URL()
    if address.scheme not in ("http", "https") or not address.host:
        # Not shown: what cannot be read may hold a key.
        raise UserError("base URL: not an address; give one like http://localhost:8000/v1")
    return address


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
