"""What satune asks of vLLM, answered in this process by a model of transformers.

It keeps what vLLM keeps: a cache of prefixes that an update of weights does not clear, adapters by
name. ``faults`` make it wrong in the ways in which servers were seen to be wrong.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

FAULTS = {"swallow every second", "stale cache", "half loaded", "untied head", "lies of digests"}


class StandIn:
    """A server of ``model``. ``asked`` has every body by path, ``salts`` those of completions."""

    def __init__(self, model: Any, faults: frozenset[str] = frozenset(), block: int = 16) -> None:
        assert faults <= FAULTS
        self.model = copy.deepcopy(model).eval()
        self.faults = faults
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.loads = 0
        self.dead = 0
        self.context = model.config.max_position_embeddings
        self._block = block
        self._cache: dict[tuple[Any, ...], torch.Tensor] = {}
        self._lock = threading.Lock()

    # -- answers ---------------------------------------------------------------------------------

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock, torch.no_grad():
            self.asked.append((path, body))
            if self.dead:
                self.dead -= 1
                return 500, {"error": {"message": "EngineCore encountered an issue"}}
            if path == "/v1/completions":
                return self._complete(body)
            if path == "/collective_rpc":
                return 200, {"results": [self._load(body["args"][0])]}
            if path == "/v1/load_lora_adapter":
                return self._adapter(body["lora_name"], body["lora_path"])
            if path == "/v1/unload_lora_adapter":
                self.model.delete_adapter(_key(body["lora_name"]))
                return 200, "Success"
        return 404, {"error": {"message": f"no {path}"}}

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids, limit = list(body["prompt"]), body["max_tokens"]
        if len(ids) + limit > self.context:
            said = f"This model's maximum context length is {self.context} tokens"
            return 400, {"error": {"message": said, "type": "BadRequestError"}}
        if "@" in body.get("cache_salt", ""):
            return 400, {"error": {"message": "'cache_salt' must not contain '@'"}}
        if isinstance(self.model, PeftModel):
            if body["model"] != "base" and _key(body["model"]) not in self.model.peft_config:
                return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
            self.model.set_adapter(_key(body["model"]))
        choice: dict[str, Any] = {"index": 0}
        if "prompt_logprobs" in body:
            rows = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            own = [{str(t): {"logprob": float(r[t])}} for t, r in zip(ids[1:], rows, strict=False)]
            choice["prompt_logprobs"] = [None, *own]
        draw = random.Random(body["seed"])
        stops = body.get("stop_token_ids", ())
        written: list[int] = []
        logprobs: list[float] = []
        tops: list[dict[str, float]] = []
        while len(written) < limit and (not written or written[-1] not in stops):
            scaled = self._next(body, ids + written) / (body["temperature"] or 1.0)
            row = scaled.log_softmax(-1)
            cdf = row.double().exp().cumsum(-1)
            token = int(torch.searchsorted(cdf, draw.random() * cdf[-1]))
            token = int(row.argmax()) if body["temperature"] == 0 else min(token, len(row) - 1)
            written.append(token)
            logprobs.append(float(row[token]))
            values, tokens = (each.tolist() for each in row.topk(5))
            tops.append({f"token_id:{t}": v for t, v in zip(tokens, values, strict=True)})
        ended = bool(written) and written[-1] in stops
        choice |= {
            "finish_reason": "stop" if ended else "length",
            "token_ids": written,
            "logprobs": {"token_logprobs": logprobs, "top_logprobs": tops},
        }
        return 200, {"choices": [choice]}

    def _next(self, body: Mapping[str, Any], ids: list[int]) -> torch.Tensor:
        """The next token's logits, from the cache where a whole number of blocks lies in it."""
        salt = "" if "stale cache" in self.faults else body.get("cache_salt")
        key = (body["model"] if "@" in body["model"] else "", salt, tuple(ids))
        if len(ids) > self._block and key in self._cache:
            return self._cache[key]
        found = self.model(torch.tensor([ids])).logits[0, -1].float()
        if len(ids) > self._block:
            self._cache[key] = found
        return found

    def _load(self, path: str) -> dict[str, str]:
        self.loads += 1
        digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
        if "swallow every second" in self.faults and self.loads % 2 == 0:
            return {"digest": digest}
        if "lies of digests" in self.faults:
            return {"digest": "0" * 32}
        held = load_file(path)
        if "half loaded" in self.faults:
            held = dict(list(held.items())[: len(held) // 2])
        if "untied head" in self.faults:
            held.pop("lm_head.weight")
        self.model.load_state_dict(held, strict=False)
        return {"digest": digest}

    def _adapter(self, name: str, path: str) -> tuple[int, Any]:
        if not isinstance(self.model, PeftModel):
            self.model = PeftModel.from_pretrained(self.model, path, adapter_name=_key(name))
            self.model.eval()
        elif _key(name) in self.model.peft_config:
            return 400, {
                "error": {"message": f"The lora adapter '{name}' has already been loaded."}
            }
        else:
            self.model.load_adapter(path, adapter_name=_key(name))
        return 200, "Success"


def _key(name: str) -> str:
    return name.replace(".", "_")


@contextmanager
def serving(standin: StandIn) -> Iterator[str]:
    """The address at which it answers inside the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*standin.answer(self.path, body))

        def _send(self, status: int, data: Any) -> None:
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
