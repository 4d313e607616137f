"""A process that is started as vLLM's server is, answers without a model, and dies when told to.

Tokens are a function of the seed. Every start, with its arguments, and every digest that it was
given is written to the file that the environment variable STARTS names.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STARTS = Path(os.environ["STARTS"])


def arguments() -> dict[str, str]:
    words = sys.argv[1:]
    return {a: b for a, b in zip(words, [*words[1:], "--"], strict=True) if a.startswith("--")}


def note(**what: Any) -> None:
    with STARTS.open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), **what}) + "\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mortal = Path(os.environ["STARTS"] + ".die")
        if mortal.exists() and mortal.read_text() == self.path:
            mortal.unlink()
            os._exit(1)
        if self.path == "/collective_rpc":
            data = Path(body["args"][0]).read_bytes()
            digest = hashlib.blake2b(data, digest_size=16).hexdigest()
            note(loaded=digest)
            self._send({"results": [{"digest": digest}]})
            return
        draw = random.Random(body["seed"])
        written = [draw.randrange(1, 13) for _ in range(body["max_tokens"])]
        logprobs = {"token_logprobs": [-1.0] * len(written)}
        choice = {"finish_reason": "length", "token_ids": written, "logprobs": logprobs}
        self._send({"choices": [choice]})

    def _send(self, data: Any) -> None:
        content = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


if __name__ == "__main__":
    given = arguments()
    if os.environ.get("BROKEN"):
        print("INFO starting\nImportError: no module named torch\n")
        sys.exit(3)
    weights = Path(given["--model"], "model.safetensors")
    digest = hashlib.blake2b(weights.read_bytes(), digest_size=16).hexdigest()
    note(arguments=given, digest=digest)
    ThreadingHTTPServer(("127.0.0.1", int(given["--port"])), Handler).serve_forever()
