"""A stand-in for the Hugging Face hub: what creating a repository and committing to it take."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"
_INLINE = 1_000
"""Files of fewer bytes come in the commit itself, larger ones to the large-file store before."""


class Hub:
    """Repositories by name, each {"private", "files": {path: bytes}, "commits"}."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.address = ""
        self.refuse: tuple[int, str] | None = None

    def add(self, repo: str, *, private: bool, **files: str) -> None:
        self.repos[repo] = {
            "private": private, "commits": 0,
            "files": {name.replace("__", "."): text.encode() for name, text in files.items()},
        }  # fmt: skip

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        parts = path.partition("?")[0].strip("/").split("/")
        if self.refuse is not None and method == "POST":
            return self.refuse[0], {"error": self.refuse[1]}
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            self.add(name, private=bool(private))
            return 200, {"url": f"{self.address}/{name}", "id": name}
        if parts[:2] == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        if parts[:2] == ["api", "models"]:
            return self._of_model("/".join(parts[2:4]), parts[4:], method, body)
        if parts[-3:] == ["info", "lfs", "objects"] or parts[-1] == "batch":
            objects = json.loads(body)["objects"]
            upload = {"href": f"{self.address}/store/", "header": {}}
            return 200, {
                "transfer": "basic",
                "objects": [
                    {
                        **held,
                        "actions": {"upload": {**upload, "href": upload["href"] + held["oid"]}},
                    }
                    for held in objects
                ],
            }
        if method == "PUT" and parts[0] == "store":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self.blobs[parts[1]] = body
            return 200, {}
        return 404, {"error": f"nothing at {path}"}

    def _of_model(self, repo: str, rest: list[str], method: str, body: bytes) -> tuple[int, Any]:
        held = self.repos.get(repo)
        if held is None:
            return 404, {"error": "Repository not found"}
        if method == "GET" and (not rest or rest[0] == "revision"):
            names = [".gitattributes", *held["files"]]
            card = {"license": held["license"]} if "license" in held else None
            return 200, {
                "id": repo, "modelId": repo, "private": held["private"], "sha": "0" * 40,
                "siblings": [{"rfilename": name} for name in names], "cardData": card,
            }  # fmt: skip
        if rest[0] == "preupload":
            files = json.loads(body)["files"]
            return 200, {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "regular" if f["size"] < _INLINE else "lfs",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for f in files
                ]
            }
        if rest[0] == "commit":
            for line in body.decode().splitlines():
                said = json.loads(line)
                value = said["value"]
                if said["key"] == "file":
                    held["files"][value["path"]] = base64.b64decode(value["content"])
                elif said["key"] == "lfsFile":
                    held["files"][value["path"]] = self.blobs[value["oid"]]
                elif said["key"] == "deletedFile":
                    del held["files"][value["path"]]
            held["commits"] += 1
            return 200, {
                "success": True, "commitOid": "1" * 40,
                "commitUrl": f"{self.address}/{repo}/commit/{'1' * 40}", "hookOutput": "",
            }  # fmt: skip
        return 404, {"error": "nothing there"}


@contextmanager
def standing_in() -> Iterator[Hub]:
    """A hub on a port of this machine's for as long as the block takes."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            hub.requests.append(f"{self.command} {self.path}")
            hub.bodies.append(body)
            status, said = hub.answer(self.command, self.path, body)
            content = b"" if self.command == "HEAD" else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
