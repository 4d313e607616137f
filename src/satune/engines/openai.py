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
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from satune.engines.answers import Answers
from satune.engines.client import Client, Session
from satune.engines.failures import (
    DOWN,
    OVERFLOW,
    REJECTED,
    Failed,
    Refused,
    is_mistake,
    kind_of,
    out_of_quota,
)
from satune.engines.replies import Reply
from satune.engines.settings import ServerSettings
from satune.types import Completion, EpisodeFailure, Key, Prompt, Sampling, UserError

FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0
"""Seconds before a request is repeated, doubling from the first to the longest; what is waited is
drawn between half and whole."""
_PLAIN = [{"role": "user", "content": "Hello"}]


class OpenAIEngine:
    """Asks ``base_url``/chat/completions for ``models[seat]``; prompts need messages only.

    The key is read from the environment variable that the settings name and goes nowhere but into
    the request. ``answers`` is the file of what was answered, or one that several engines share
    (None: nothing is written). Completions have no ids, so that training refuses their turns.
    ``reused`` counts answers that were held already, ``silent`` replies that held reasoning and no
    content. ``transport`` carries the requests and ``clock`` gives seconds, where neither the
    network nor the machine's time is meant.

    Raises UserError for an address that is none or holds a key.
    """

    def __init__(
        self,
        base_url: str,
        models: Mapping[str, str],
        settings: ServerSettings | None = None,
        *,
        answers: Answers | Path | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings or ServerSettings()
        self.models = dict(models)
        self.reused = self.silent = 0
        self._client = Client(base_url, self.settings, transport, clock)
        self.base_url = self._client.base_url
        self._clock = clock
        self._accepted: set[str] = set()  # requests, but for their prompts, that were answered
        self._answers = answers if isinstance(answers, Answers) else Answers(answers)

    @property
    def requests(self) -> int:
        """Requests sent."""
        return self._client.requests

    @property
    def repeated(self) -> int:
        """Those of the requests that were repetitions."""
        return self._client.repeated

    # -- what rollouts call ----------------------------------------------------------------------

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        """The seat's completion, from the file where it was answered before.

        A failure that may pass is asked again. Raises EpisodeFailure where that did not help, or
        cannot: the kinds are those of ``engines.failures``. Raises UserError for what every request
        would meet: a seat without a model; an address, a key or a model that is refused; options
        that are refused whatever the prompt; a server that was never there.
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
        session = self._client.session()
        async with session.gate:
            reply = await self._ask(session, body)
        self.silent += bool(reply.note)
        completion = Completion(
            reply.text,
            reply.finish_reason,
            version=0,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
        )
        self._answers.keep(identity, key, completion, reply.note)
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
        await self._client.close()

    # -- one request -----------------------------------------------------------------------------

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

    async def _ask(self, session: Session, body: Mapping[str, Any]) -> Reply:
        """Ask until there is an answer. Raises as ``generate`` does."""
        settings, begun = self.settings, self._clock()
        form = _form(body)
        attempt = 0
        while True:
            limit_field = self._client.limit_field
            try:
                reply = await self._client.send(body, again=attempt > 0)
            except Failed as error:
                failed = error
                if failed.kind.policy and failed.kind is not OVERFLOW:
                    self._accepted.add(form)
            except Refused as refused:
                # Newer models of one vendor know the limit by another name only.
                if self._renamed(refused, limit_field):
                    continue
                last = attempt >= settings.retries
                failed = await self._judge(refused, session, body, form, last=last)
            else:
                self._accepted.add(form)
                return reply
            attempt += 1
            if attempt > settings.retries or not failed.kind.again:
                break
            longest = min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(attempt - 1, 99))
            # Requests that failed together must not come back together.
            await asyncio.sleep(longest * random.uniform(0.5, 1.0))
        said = self._client.short(failed.said)
        if not failed.kind.policy and not self._client.met:
            raise UserError(
                f"{self.base_url}: no answer after {attempt} attempts in "
                f"{self._clock() - begun:.0f} s (last: {said}); see that the server runs and can "
                "be reached, then give the same command again"
            )
        attempts = f" ({attempt} attempts)" if attempt > 1 else ""
        raise EpisodeFailure(f"{failed.kind.name}: {said}{attempts}", policy=failed.kind.policy)

    # -- what a refusal means --------------------------------------------------------------------

    def _renamed(self, refused: Refused, field: str) -> bool:
        """Whether the server wants the limit of tokens, given as ``field``, under another name."""
        wanted = field == "max_tokens" and "max_completion_tokens" in refused.said
        if wanted and refused.status == 400 and kind_of(refused) is not OVERFLOW:
            self._client.limit_field = "max_completion_tokens"
            return True
        return False

    async def _judge(
        self, refused: Refused, session: Session, body: Mapping[str, Any], form: str, *, last: bool
    ) -> Failed:
        """The failure of one request by its status. ``last``: it will not be asked again.

        Raises UserError for the user's mistake: what speaks of the address, the key or the model
        before any such request was answered, and what is refused for the plainest prompt too.
        """
        kind, model = kind_of(refused), str(body["model"])
        said = f"status {refused.status}: {refused.said}"
        if kind not in (None, OVERFLOW):
            return Failed(kind, said)
        mistaken = is_mistake(refused)
        if out_of_quota(refused) or (mistaken and form not in self._accepted):
            raise self._mistake(refused, model)
        if mistaken and not last:
            return Failed(DOWN, said)  # a server that starts anew, or what stands before it
        async with session.trying:
            if mistaken or form not in self._accepted:
                await self._try_plain(refused, body, form)
        return Failed(kind or REJECTED, said)

    async def _try_plain(self, refused: Refused, body: Mapping[str, Any], form: str) -> None:
        """Ask the same for a prompt of one word: is the prompt at fault, or the rest? Raises
        UserError if that is refused too."""
        try:
            await self._client.send({**body, "messages": _PLAIN})
        except Failed:  # tells nothing
            return
        except Refused as plain:
            if kind_of(plain) in (None, OVERFLOW):
                raise self._mistake(refused, str(body["model"])) from None
            return
        self._accepted.add(form)

    def _mistake(self, refused: Refused, model: str) -> UserError:
        status, said = refused.status, self._client.short(refused.said)
        if status in (401, 403):
            held = os.environ.get(self.settings.api_key_env)
            state = "refuses the key in" if held else "wants a key; set"
            line = f"the server {state} ${self.settings.api_key_env} (status {status}: {said})"
        elif status in (404, 405):
            line = (
                f"status {status} for the model {model!r} ({said}); name a model that it serves, "
                "or mend the base URL (it mostly ends in /v1)"
            )
        elif status < 400:
            place = refused.location or "another address"
            line = f"it sends on to {place}; give that as the base URL"
        elif out_of_quota(refused):
            line = f"the quota is used up ({said}); raise it, then give the same command again"
        elif kind_of(refused) is OVERFLOW:
            line = (
                f"even a prompt of one word does not fit (status {status}: {said}); lower "
                "max_new_tokens, or serve the model with a longer context"
            )
        else:
            line = f"it refuses the request to {model!r} (status {status}: {said}); mend that"
        return UserError(self._client.clean(f"{self.base_url}: {line}"))


def _identity(body: Mapping[str, Any], key: Key, place: str) -> str:
    """Names a request by its key and content, and by where it goes if ``place`` says so."""
    drawn = {name: value for name, value in asdict(key).items() if name != "copy"}
    text = json.dumps([drawn, dict(body), *([place] if place else [])], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _form(body: Mapping[str, Any]) -> str:
    """Names what requests have in common that differ in their prompts."""
    return json.dumps({k: v for k, v in body.items() if k not in ("messages", "seed")})
