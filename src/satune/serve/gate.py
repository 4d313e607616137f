"""Who is let in: requests that name this server's own host and, where one is set, the key."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from satune.serve.refusal import Refusal
from satune.serve.settings import LOOPBACK

NAMES = frozenset({LOOPBACK, "localhost", "::1"})
"""What this machine is called by itself."""


class Gate:
    """Refuses requests whose Host is none of ``hosts`` (None: any address in numbers passes too),
    and those without ``key``.

    A page elsewhere whose name resolves to this machine names its own host: its requests would else
    be answered, and read by it. A name that is an address in numbers resolves to nothing else.
    """

    def __init__(
        self, app: ASGIApp, hosts: Collection[str], key: str | None, *, numbers: bool = False
    ) -> None:
        self._app = app
        self._hosts = NAMES | {host.lower() for host in hosts}
        self._key = key.encode() if key else None
        self._numbers = numbers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            reply = JSONResponse(refusal.body, refusal.status, refusal.headers)
            await reply(scope, receive, send)

    def _refusal(self, headers: Headers) -> Refusal | None:
        given = headers.getlist("host")
        host = host_of(given[0]) if len(given) == 1 else ""
        if host not in self._hosts and not (self._numbers and _is_address(host)):
            return Refusal(
                421, "Host: is not this server's name; ask it by its own", code="wrong_host"
            )
        if self._key is None:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        sent = key.strip().encode("latin-1", "replace")
        if scheme.lower() != "bearer" or not secrets.compare_digest(sent, self._key):
            said = "the key is missing or wrong; send Authorization: Bearer KEY"
            wanted = {"WWW-Authenticate": "Bearer"}
            return Refusal(401, said, code="invalid_api_key", headers=wanted)
        return None


def host_of(header: str) -> str:
    """The host in a Host header, without its port and brackets, in lower case."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
