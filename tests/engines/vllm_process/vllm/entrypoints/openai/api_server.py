"""A process that is started as vLLM's server is, answers without a model, and dies when told to.

Tokens are a function of the seed. Every start, with its arguments, and every digest that it was
given or asked for is written to the file that the environment variable STARTS names. A file beside
it, whose name ends in .ends, has one line for each start that does not come to answer: how it ends.
With SLOW in the environment one that is started where no file .ready lies says that it is not ready
until it does.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STARTS = Path(os.environ["STARTS"])
READY = Path(os.environ["STARTS"] + ".ready")
SLOW = bool(os.environ.get("SLOW")) and not READY.exists()


def arguments() -> dict[str, str]:
    words = sys.argv[1:]
    return {a: b for a, b in zip(words, [*words[1:], "--"], strict=True) if a.startswith("--")}


def note(**what: Any) -> None:
    with STARTS.open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), **what}) + "\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    digest = ""

    def do_GET(self) -> None:
        slow = SLOW and not READY.exists()
        models = {"data": [{"id": "base", "root": given["--model"]}]}
        self._send(models if self.path == "/v1/models" else None, 503 if slow else 200)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mortal = Path(os.environ["STARTS"] + ".die")
        if mortal.exists() and mortal.read_text() == self.path:
            mortal.unlink()
            os._exit(1)
        if self.path == "/collective_rpc" and body["method"] == "satune_has":
            said = "0" * 32 if Path(os.environ["STARTS"] + ".lies").exists() else Handler.digest
            note(has=said)
            self._send({"results": [{"digest": said}]})
            return
        if self.path == "/collective_rpc":
            data = Path(body["args"][0]).read_bytes()
            digest = hashlib.blake2b(data, digest_size=16).hexdigest()
            note(loaded=digest)
            Handler.digest = digest
            self._send({"results": [{"digest": digest}]})
            return
        draw = random.Random(body["seed"])
        written = [draw.randrange(1, 13) for _ in range(body["max_tokens"])]
        logprobs = {"token_logprobs": [-1.0] * len(written)}
        choice = {"finish_reason": "length", "token_ids": written, "logprobs": logprobs}
        self._send({"choices": [choice]})

    def _send(self, data: Any, status: int = 200) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


ERRORS = {
    "error": "ImportError: no module named torch",
    "core killed": "RuntimeError: Engine core initialization failed. See root cause above. "
    "Failed core proc(s): {'EngineCore_DP0': -9}",
    "silent": "",
}


def ends() -> None:
    """End as the next line of the file says, if there is one."""
    file = Path(os.environ["STARTS"] + ".ends")
    how, _, rest = file.read_text().partition("\n") if file.exists() else ("", "", "")
    if not how:
        return
    file.write_text(rest)
    note(ends=how)
    print("INFO starting", flush=True)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print(ERRORS[how], flush=True)
    sys.exit(3)


if __name__ == "__main__":
    given = arguments()
    ends()
    weights = Path(given["--model"], "model.safetensors")
    digest = hashlib.blake2b(weights.read_bytes(), digest_size=16).hexdigest()
    note(arguments=given, digest=digest)
    Handler.digest = digest
    ThreadingHTTPServer(("127.0.0.1", int(given["--port"])), Handler).serve_forever()
