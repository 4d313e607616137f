"""One host over HTTP: what it is asked, how long that may take, and what it came to in bytes."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

from satune.hosts.wire import Plain, from_bytes, to_bytes
from satune.loading import LAUNCH_VARIABLE
from satune.types import UserError

_SAID = 2000
"""So much of what is no answer is read."""
_IDLE = 5.0
"""A connection that was not used for so many seconds may have been closed by whoever lies between,
and is opened anew."""


_MEETINGS = ("hello", "visit")
"""What a host that was lost is asked all the same, to see whether it is there again."""
_LOST = (409, 502, 503, 504)
"""It was started anew, or a proxy says that there is nobody behind it."""


class HostLost(UserError):
    """A host that cannot be reached, or gave no answer in time."""


class HostSilent(HostLost):
    """A host that gave no answer in time."""


class Client:
    """The agent ``agent`` at a host, which ``url`` names (http or https, with or without a path);
    ``token`` is sent to it and nobody else. An answer may take ``timeout`` seconds. ``wire`` counts
    calls, bytes sent and bytes received by verb, bodies only. Raises UserError for what is no
    address.
    """

    def __init__(self, agent: str, url: str, token: str, timeout: float) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise UserError(f"team.agents.{agent}.host: {url!r} is no http or https address")
        self.agent = agent
        self.url = url
        self.wire: dict[str, list[int]] = {}
        self._token = token
        self._timeout = timeout
        self._used = time.monotonic()
        self._gone: HostLost | None = None
        self._path = f"{parts.path.rstrip('/')}/{quote(agent, safe='')}"
        if parts.scheme == "https":
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, port, timeout=timeout, context=ssl.create_default_context()
            )
        else:
            self._connection = http.client.HTTPConnection(parts.hostname, port, timeout=timeout)

    def ask(
        self,
        verb: str,
        message: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Plain:
        """The host's answer, in ``timeout`` seconds where that is sooner. Raises HostLost where
        there is none, UserError for what it refuses."""
        body = to_bytes(message or {})
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        if self._gone is not None and verb not in _MEETINGS:
            raise self._gone  # nobody waits for it twice
        if time.monotonic() - self._used > _IDLE:
            self._connection.close()
        limit = self._timeout if timeout is None else min(timeout, self._timeout)
        try:
            self._limit(limit)
            self._connection.request("POST", f"{self._path}/{verb}", body, headers)
            response = self._connection.getresponse()
            status, data = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            self._gone = self._lost(verb, error, limit)
            raise self._gone from error
        except BaseException:
            self._connection.close()  # with the answer that nobody waits for any more
            raise
        self._used, self._gone = time.monotonic(), None
        count = self.wire.setdefault(verb, [0, 0, 0])
        for place, more in enumerate((1, len(body), len(data))):
            count[place] += more
        return self._read(verb, status, data)

    def _limit(self, seconds: float) -> None:
        """Have the connection, open or not, wait so long."""
        self._connection.timeout = seconds
        if self._connection.sock is not None:
            self._connection.sock.settimeout(seconds)

    def _read(self, verb: str, status: int, data: bytes) -> Plain:
        try:
            answer = from_bytes(data)
        except ValueError:
            if status in _LOST:  # in the words of a proxy
                raise self._away(f"status {status}") from None
            said = " ".join(data[:_SAID].decode("utf-8", "replace").split())[:120]
            raise UserError(
                f"agent {self.agent}: {self.url} is no satune host (status {status}: {said}); give "
                "the address that `satune host` serves"
            ) from None
        if status == 200:
            return answer
        said = str(answer.get("error", status))
        if status in _LOST:
            raise self._away(said)
        raise UserError(f"agent {self.agent}: its host {self.url}: {said}")

    def _away(self, why: str) -> HostLost:
        return HostLost(f"agent {self.agent}: its host {self.url} is lost ({why})")

    def _lost(self, verb: str, error: Exception, limit: float) -> HostLost:
        silent = isinstance(error, TimeoutError)
        if silent:
            setting = "hosts.timeout" if limit == self._timeout else "hosts.wait"
            why = f"no answer to {verb} in {limit:g} s ({setting})"
        else:
            why = f"{verb}: {str(error) or type(error).__name__}"
        return (HostSilent if silent else HostLost)(
            f"agent {self.agent}: its host {self.url} is lost ({why}); see that it runs and can be "
            "reached"
        )

    def cut(self) -> None:
        """Have a call that is under way in another thread end with HostLost."""
        sock = self._connection.sock
        if sock is not None:
            with suppress(OSError):  # it may have ended by itself
                sock.shutdown(socket.SHUT_RDWR)


def token_in(variable: str, agent: str) -> str:
    """The token in an environment variable. Raises UserError where it holds none."""
    token = os.environ.get(variable, "").strip()
    if variable == LAUNCH_VARIABLE and not token:
        raise UserError(
            f"team.agents.{agent}.host: `satune launch --hosts N` keeps this agent while it "
            "trains; give that command again"
        )
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(
            f"team.agents.{agent}.host_token_env: ${variable} holds no token; set it to the one "
            "that the agent's owner gave"
        )
    return token
