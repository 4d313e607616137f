"""A report that follows its runs: served to this machine alone, at an address nobody can guess."""

from __future__ import annotations

import secrets
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from satune.files.names import is_plain
from satune.report.source import read_sources
from satune.report.write import write_report
from satune.types import UserError

LOOPBACK = "127.0.0.1"
PAGE = "report.html"
_STAMP = "stamp"
_KINDS = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8"}


class Watched:
    """The report of ``runs`` in ``folder``, written anew when it is asked for and they have
    grown."""

    def __init__(self, runs: Sequence[Path], folder: Path) -> None:
        self.folder = folder
        self._runs = runs
        self._written = ""
        self._lock = threading.Lock()

    def stamp(self) -> str:
        """Changes whenever a file does that a report is made of."""
        sizes = []
        for run in self._runs:
            for path in sorted((*run.glob("*.*"), *run.glob("episodes/*"))):
                if path.is_file() and path.suffix in (".jsonl", ".json", ".yaml", ".arrays"):
                    status = path.stat()
                    sizes.append((path.name, status.st_size, status.st_mtime_ns))
        return f"{hash(tuple(sizes)):x}"

    def page(self) -> Path:
        with self._lock:
            stamp = self.stamp()
            if stamp != self._written:
                page = self.folder / PAGE
                write_report(self._runs, page, figures=False, stamp=stamp)
                self._written = stamp
            return self.folder / PAGE


@contextmanager
def watching(runs: Sequence[Path], port: int = 0) -> Iterator[tuple[str, ThreadingHTTPServer]]:
    """The address of a server that shows the report of ``runs``, and the server, which waits to be
    told to ``serve_forever``. Everything else than that address is refused.

    Raises UserError where a path is no run, and where the port is taken.
    """
    read_sources(runs)
    token = secrets.token_urlsafe(16)
    with tempfile.TemporaryDirectory(prefix="satune-report-") as folder:
        handler = _handler(Watched(runs, Path(folder)), token)
        try:
            server = ThreadingHTTPServer((LOOPBACK, port), handler)
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; give another one") from None
        with server:
            yield f"http://{LOOPBACK}:{server.server_port}/{token}/{PAGE}", server


def _handler(watched: Watched, token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _, given, *parts = f"{self.path}/".split("/")[:-1]
            # A page elsewhere that resolves to this machine names its own host.
            here = (self.headers.get("Host") or "").partition(":")[0] in (LOOPBACK, "localhost")
            if not here or not secrets.compare_digest(given.encode(), token.encode()):
                self.send_error(HTTPStatus.NOT_FOUND)
            elif parts == [_STAMP]:
                self._give(watched.stamp().encode(), "text/plain")
            elif parts == [PAGE]:
                self._give(watched.page().read_bytes(), _KINDS[".html"])
            else:
                path = watched.folder.joinpath(*parts)
                if all(map(is_plain, parts)) and path.suffix == ".js" and path.is_file():
                    self._give(path.read_bytes(), _KINDS[".js"])
                else:
                    self.send_error(HTTPStatus.NOT_FOUND)

        def _give(self, content: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Addresses hold the token: they are written nowhere."""

    return Handler
