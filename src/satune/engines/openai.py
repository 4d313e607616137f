"""Completions from any OpenAI-compatible server, through whatever goes wrong on the way.

Every answer is written to a file before it is used, under the request's key and content; an engine
that is given the same file again asks only for what is missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx

from satune.engines.pace import Pace
from satune.engines.replies import (
    Reply,
    Unreadable,
    error_text,
    read_reply,
    read_stream,
    retry_after,
)
from satune.files.lines import JsonLines
from satune.loading import KEY_VARIABLE
from satune.types import Completion, Key, Prompt, Sampling, UserError

_RETRIED = {408, 409, 425, 429}
_LONGEST_DELAY = 60.0


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How a server is asked.

    ``retries`` is how often a request is repeated after a failure that may pass, the delay doubling
    from ``first_delay`` seconds to a minute, drawn between half and whole. ``timeout`` is what one
    request may take, in seconds; with ``stream`` what may pass between two pieces of its answer.
    ``requests_per_minute`` and ``tokens_per_minute`` set no limit when None. ``seed`` sends a seed
    made from each request's key, so that a server that heeds it answers the same again.
    """

    concurrency: int = 32
    retries: int = 8
    first_delay: float = 0.5
    timeout: float = 1200.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    stream: bool = False
    seed: bool = True

    def __post_init__(self) -> None:
        lowest = {"concurrency": 1, "retries": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise UserError(f"server: {name} is {getattr(self, name)}; give at least {least}")
        for name in ("timeout", "first_delay", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"server: {name} is {value}; give a number above 0")


class Answers:
    """What servers answered, by request, on file (None: it is not kept). Engines may share one, if
    each is told apart by its ``place``."""

    def __init__(self, path: Path | None) -> None:
        self._file = JsonLines(path) if path is not None else None
        rows = self._file.read() if self._file is not None else []
        self._held = {row["request"]: Completion(**row["completion"]) for row in rows}

    def get(self, request: str) -> Completion | None:
        return self._held.get(request)

    def keep(self, request: str, key: Key, completion: Completion) -> None:
        if self._file is not None:
            self._file.append(
                {"request": request, "key": asdict(key), "completion": asdict(completion)}
            )
            self._held[request] = completion


@dataclass(slots=True)
class _Session:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    client: httpx.AsyncClient
    gate: asyncio.Semaphore


class OpenAIEngine:
    """Asks ``base_url``/chat/completions for ``models[seat]``; prompts need messages only.

    The key is read from the environment variable ``key_variable`` and goes nowhere but into the
    request. ``answers`` is the file of what was answered, or one that several engines share (None:
    nothing is written). Completions have no ids, so that training refuses their turns.
    ``requests``, ``repeated`` and ``reused`` count requests sent, those of them that were
    repetitions, and answers that were held already.

    Raises UserError for an address that is none or holds a key.
    """

    def __init__(
        self,
        base_url: str,
        models: Mapping[str, str],
        settings: ServerSettings | None = None,
        *,
        key_variable: str = KEY_VARIABLE,
        answers: Answers | Path | None = None,
    ) -> None:
        address = address_of(base_url)
        if address.username or address.password or address.query:
            raise UserError(
                f"base URL of {address.host}: it holds a key or a query; give the key in the "
                f"environment variable {key_variable}"
            )
        self.base_url = base_url.rstrip("/")
        self.models = dict(models)
        self.settings = settings or ServerSettings()
        self.requests = self.repeated = self.reused = 0
        self._url = f"{self.base_url}/chat/completions"
        self._local = address.host in ("localhost", "127.0.0.1", "::1")
        self.key_variable = key_variable
        self._session: _Session | None = None
        self._pace = Pace(self.settings.requests_per_minute, self.settings.tokens_per_minute)
        self._limit_field = "max_tokens"
        self._answers = answers if isinstance(answers, Answers) else Answers(answers)

    # -- what rollouts call ----------------------------------------------------------------------

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        """The seat's completion, from the file where it was answered before.

        Raises UserError for a seat without a model, for what the server refuses (no such model, no
        right, a bad request) and when it stays away.
        """
        if seat not in self.models:
            raise UserError(f"no model for the seat {seat!r}; there are: {', '.join(self.models)}")
        return await self.complete(self.models[seat], prompt, sampling, key)

    async def complete(
        self,
        model: str,
        prompt: Prompt,
        sampling: Sampling,
        key: Key,
        *,
        place: str = "",
        extra: Mapping[str, Any] | None = None,
    ) -> Completion:
        """``generate`` for whoever that ``model`` of the server plays. ``place`` tells its answers
        from those of a model of the same name elsewhere; ``extra`` goes into the request."""
        body = self._body(model, prompt, sampling, key) | dict(extra or {})
        identity = _identity(body, key, place)
        held = self._answers.get(identity)
        if held is not None:
            self.reused += 1
            return held
        session = self._open()
        async with session.gate:
            reply = await self._ask(session, body)
        completion = Completion(
            reply.text,
            reply.finish_reason,
            version=0,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
        )
        self._answers.keep(identity, key, completion)
        return completion

    def publish(self, agent: str, version: int, weights: Mapping[str, Any]) -> None:
        """Refused: the models are the server's."""
        raise UserError(
            f"agent {agent}: a server's model cannot be given new weights; train with engine: local"
        )

    def begin(self, key: Key) -> None: ...

    def end(self, key: Key) -> None: ...

    async def close(self) -> None:
        """Close the connections. An engine that is used again opens new ones."""
        if self._session is not None and self._session.loop is asyncio.get_running_loop():
            await self._session.client.aclose()
        self._session = None

    # -- one request -----------------------------------------------------------------------------

    def _open(self) -> _Session:
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            settings = self.settings
            self._session = _Session(
                loop,
                httpx.AsyncClient(
                    headers=self._headers(),
                    # The whole request has its own limit; here only what a stream waits for.
                    timeout=httpx.Timeout(settings.timeout, connect=min(30.0, settings.timeout)),
                    limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                    # A proxy from the environment does not know this machine's own servers.
                    trust_env=not self._local,
                    # Reading the certificates takes longer than many an answer.
                    verify=not (self._local and self.base_url.startswith("http:")),
                ),
                asyncio.Semaphore(settings.concurrency),
            )
        return self._session

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isascii() or not key.isprintable():
            raise UserError(f"${self.key_variable}: holds characters that no key has; set it anew")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _body(self, model: str, prompt: Prompt, sampling: Sampling, key: Key) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "messages": list(prompt.messages),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.top_p < 1.0:
            body["top_p"] = sampling.top_p
        if sampling.top_k > 0:
            body["top_k"] = sampling.top_k
        if self.settings.seed:
            body["seed"] = key.rng("server").getrandbits(31)
        return body

    async def _ask(self, session: _Session, body: Mapping[str, Any]) -> Reply:
        """Ask until there is an answer. Raises UserError as ``generate`` does."""
        settings = self.settings
        begun = time.monotonic()
        for attempt in range(settings.retries + 1):
            await self._pace.turn()
            self.requests += 1
            self.repeated += attempt > 0
            field = self._limit_field
            try:
                async with asyncio.timeout(None if settings.stream else settings.timeout):
                    response, reply = await self._send(session.client, body)
            except TimeoutError:
                trouble = f"no answer within {settings.timeout:g} s"
            except (httpx.TransportError, Unreadable, httpx.DecodingError) as error:
                trouble = self._short(_one_line(error))
            else:
                if reply is not None:
                    self._pace.spent(reply.prompt_tokens + reply.completion_tokens)
                    return reply
                trouble = self._passing(response, str(body["model"]), field)
                wanted = retry_after(response.headers.get("retry-after"))
                if wanted is not None:
                    self._pace.pause(min(wanted, 10 * _LONGEST_DELAY))
            if attempt < settings.retries:
                longest = min(_LONGEST_DELAY, settings.first_delay * 2.0**attempt)
                # Requests that failed together must not come back together.
                await asyncio.sleep(longest * random.uniform(0.5, 1.0))
        raise UserError(
            f"{self.base_url}: no answer after {settings.retries + 1} attempts in "
            f"{time.monotonic() - begun:.0f} s (last: {self._clean(trouble)}); see that the server "
            "runs and can be reached, then give the same command again"
        )

    async def _send(
        self, client: httpx.AsyncClient, body: Mapping[str, Any]
    ) -> tuple[httpx.Response, Reply | None]:
        """The response, and the reply in it unless its status is an error."""
        sent = {self._limit_field if k == "max_tokens" else k: v for k, v in body.items()}
        if self.settings.stream:
            sent |= {"stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", self._url, json=sent) as response:
            if response.status_code != 200:
                await response.aread()
                return response, None
            # A server that knows no streams answers with the whole.
            kind = response.headers.get("content-type", "")
            if kind.startswith("text/event-stream"):
                return response, await read_stream(response.aiter_lines())
            return response, read_reply(await response.aread())

    def _passing(self, response: httpx.Response, model: str, field: str) -> str:
        """What is wrong, in words, if it may pass. Raises UserError for what will not. ``field`` is
        the name under which the request gave its limit of tokens."""
        status = response.status_code
        said = self._short(_said(response))
        # Newer models of one vendor know the limit by another name only.
        if status == 400 and "max_completion_tokens" in said and field == "max_tokens":
            self._limit_field = "max_completion_tokens"
            return said
        exhausted = status == 429 and "insufficient_quota" in response.text
        if (status in _RETRIED or status >= 500) and not exhausted:
            return f"status {status}: {said}"
        self._refuse(status, said, model, response.headers.get("location", ""))

    def _refuse(self, status: int, said: str, model: str, location: str) -> NoReturn:
        if status in (401, 403):
            held = os.environ.get(self.key_variable)
            state = "refuses the key in" if held else "wants a key; set"
            line = f"the server {state} ${self.key_variable} (status {status}: {said})"
        elif status == 404:
            line = (
                f"status 404 for the model {model!r} ({said}); name a model that it serves, or "
                "mend the base URL (it mostly ends in /v1)"
            )
        elif 300 <= status < 400:
            line = f"it sends on to {location or 'another address'}; give that as the base URL"
        elif status == 429:
            line = f"the quota is used up ({said}); raise it, then give the same command again"
        else:
            line = f"it refuses the request to {model!r} (status {status}: {said}); mend that"
        raise UserError(self._clean(f"{self.base_url}: {line}"))

    def _clean(self, text: str) -> str:
        """``text`` on one line, without the key should the server have repeated it."""
        key = os.environ.get(self.key_variable, "").strip()
        text = " ".join(text.split())
        return text.replace(key, "***") if key else text

    def _short(self, text: str) -> str:
        """At most 300 characters of what a server said. Cleaned first: half a key is no key that
        can be found."""
        text = self._clean(text)
        return text if len(text) <= 300 else f"{text[:297]}..."


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


def _identity(body: Mapping[str, Any], key: Key, place: str) -> str:
    """Names a request by its key and content, and by where it goes if ``place`` says so."""
    text = json.dumps([asdict(key), dict(body), *([place] if place else [])], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _said(response: httpx.Response) -> str:
    try:
        return error_text(response.json())
    except ValueError:
        return error_text(response.text or response.reason_phrase)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
