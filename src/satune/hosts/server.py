"""Agents of one owner over HTTP: ``POST /AGENT/verb`` with a JSON object, one answer at a time;
whatever stands before them in the path is a proxy's.

What is asked without the agent's token is answered with 401 and does nothing. TLS is the business
of a proxy in front.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from satune.hosts.owner import Owner
from satune.hosts.wire import Estranged, Malformed, from_bytes, to_bytes
from satune.types import UserError

LARGEST = 1 << 30
"""No message has more bytes."""
_LOG = logging.getLogger(__name__)
_SECONDS = 600.0
"""So long a connection may send nothing, and take nothing; a run opens it anew."""


@dataclass(frozen=True, slots=True)
class Kept:
    """An agent with its owner, for whoever has its ``token``."""

    owner: Owner
    token: str

    def lets(self, given: str) -> bool:
        """Whether this is what a header says that has the token."""
        return hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode())


class HostServer(ThreadingHTTPServer):
    """Serves ``agents`` by their names at ``address``, (name, port). ``tell`` is shown a line a
    step. Raises UserError where the address cannot be had."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        address: tuple[str, int],
        agents: Mapping[str, Kept],
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.agents = dict(agents)
        self.tell = tell
        try:
            super().__init__(address, _Handler)
        except (OSError, OverflowError) as error:
            name, port = address
            raise UserError(
                f"{name}:{port}: cannot listen there ({error}); give another --address or --port"
            ) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        _LOG.info("%s: connection lost", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: HostServer
    protocol_version = "HTTP/1.1"
    server_version = "satune"
    sys_version = ""
    disable_nagle_algorithm = True
    timeout = _SECONDS

    def do_POST(self) -> None:
        given = self.headers.get("Authorization", "")
        length = self.headers.get("Content-Length", "")
        *_, agent, verb = ["", *map(unquote, self.path.split("/"))]
        kept, names = self.server.agents.get(agent), self._open_to(given)
        if kept is None and names:
            self._refuse(404, f"keeps no agent {agent!r}; there is {', '.join(names)}")
        elif kept is None or not kept.lets(given):
            self._refuse(401, "the token is not the owner's")
        elif not (length.isascii() and length.isdigit()):
            self._refuse(411, "a message needs a Content-Length")
        elif int(length) > LARGEST:
            self._refuse(413, f"a message has at most {LARGEST:,} bytes")
        else:
            self._answer(kept.owner, verb, self.rfile.read(int(length)))

    def _open_to(self, given: str) -> list[str]:
        """The agents whose token is given."""
        return [name for name, kept in self.server.agents.items() if kept.lets(given)]

    def _answer(self, owner: Owner, verb: str, body: bytes) -> None:
        try:
            message = from_bytes(body)
        except ValueError:
            return self._refuse(400, "the message is no JSON object")
        try:
            answer = owner.answer(verb, message)
        except Estranged as error:
            return self._reply(409, {"error": str(error)})
        except Malformed as error:
            _LOG.warning("%s: a message that has not its form", verb, exc_info=True)
            return self._reply(400, {"error": f"{verb}: {error}"})
        except UserError as error:
            return self._reply(400, {"error": str(error)})
        except Exception:  # its words may be of the owner's disk
            _LOG.exception("%s failed", verb)
            return self._reply(500, {"error": f"{verb} failed; its log says why"})
        if verb == "improve":
            self.server.tell(f"{owner.name}: {_line(answer['event'])}")
        self._reply(200, answer)

    def _refuse(self, status: int, why: str) -> None:
        """Answer without having read the message, which nothing behind it can be read after."""
        self.close_connection = True
        self._reply(status, {"error": why})

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        data = to_bytes(answer)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        _LOG.debug(format, *args)


def _line(event: dict[str, Any]) -> str:
    """What an owner is shown of a step."""
    if "kl" not in event:
        return f"step: {event['reason']}"
    word = "accepted" if event["accepted"] else f"reverted ({event['reason']})"
    return f"step: {word}, scale {event['scale']:.3g}, KL {event['kl']['quantile']:.3g}"
