"""The endpoint on a port, from its start to its end by ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from satune.types import UserError


class Server(uvicorn.Server):
    """A server that leaves signals to whoever runs it; ``drain`` lets it end."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                app, http="h11", ws="none", loop="asyncio", lifespan="off",
                access_log=False, log_level="error", server_header=False,
            )
        )  # fmt: skip

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def drain(self) -> None:
        """Take no more connections, answer what was asked, and end."""
        self.should_exit = True


def listening(host: str, port: int) -> socket.socket:
    """A socket at the address. Raises UserError where it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=2048)  # type: ignore[arg-type]
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: {said}; give another one") from None


def address_of(place: socket.socket) -> str:
    """Where a client finds a socket of ``listening``."""
    host, port = place.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


async def serve_until_told(
    app: Starlette, place: socket.socket, draining: Callable[[], None]
) -> None:
    """Serve until ctrl-C or SIGTERM; ``draining`` is called then, what was asked is answered, and
    this returns. A second one ends the process at once, with 130."""
    server = Server(app)

    def told() -> None:
        if server.should_exit:
            sys.stdout.flush()
            sys.stderr.flush()
            # Nothing is waited for, be it a forward of an hour.
            os._exit(130)
        server.drain()
        draining()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told)
    await server.serve([place])
