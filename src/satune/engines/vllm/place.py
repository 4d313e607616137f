"""A model as one server has it: started, given weights, asked, and started again when it dies.

Weights are there before the next request. Whoever asks for a completion when the server dies asks
again, with the same key: the seed is the key's, so that the same tokens come.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from torch import Tensor

from satune.agents.policy import Policy
from satune.engines.failures import OVERFLOW, Refused, kind_of
from satune.engines.vllm.arguments import arguments_of, context_of, dtype_of
from satune.engines.vllm.files import (
    Published,
    holds_weights,
    link_weights,
    write_model,
    write_weights,
)
from satune.engines.vllm.proof import Finding, Said, ask, hold, judge, probe_of
from satune.engines.vllm.requests import asked, completion_of
from satune.engines.vllm.scratch import scratch_errors
from satune.engines.vllm.server import Gone, Server, answer
from satune.engines.vllm.settings import VLLMSettings
from satune.types import (
    Completion,
    EpisodeFailure,
    Ids,
    Key,
    Sampling,
    UserError,
)

_ATTEMPTS = 5
"""How often a server that says that it is well may fail to answer one request."""


class Place:
    """``policies`` of the agents that share a model: one alone, or adapters on one base. ``number``
    is this place's among all ``places``."""

    def __init__(
        self,
        policies: Mapping[str, Policy],
        settings: VLLMSettings,
        directory: Path,
        number: int,
        places: int,
    ) -> None:
        self.policies = dict(policies)
        self.settings = settings
        self._first = next(iter(policies.values()))
        self._directory = directory
        self._number, self._places = number, places
        self._dtype = dtype_of(self._first)
        given = settings.servers[number] if settings.servers else None
        label = f"agent {', '.join(policies)}"
        self.server = Server(label, given, settings.timeout, settings.start_seconds)
        self._published: dict[str, Published] = {}
        self._proved: set[str] = set()
        self._begins: Published | None = None  # what a start begins with, where it is a whole model
        self._has = ""  # the digest of a whole model's weights that the server has now
        self._written: dict[str, deque[int]] = {
            name: deque(maxlen=max(settings.probe, 1)) for name in policies
        }
        self._deaths = self._waiting = 0
        self._changing = threading.RLock()

    @property
    def _adapters(self) -> bool:
        return self._first.adapter is not None

    # -- weights ---------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the server with the weights that the policies hold; ``publish`` waits for it."""
        with self._changing:
            if self.server.started:
                return
            with scratch_errors(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
            if self.server.given is None:
                if not self._adapters:
                    self._begins = self._written_as(self._first, 0, self._first.export())
                write_model(self._directory, self._first, self._dtype, self._begins)
            self._start()

    def wait(self) -> None:
        """Have the server there. Raises UserError where it does not start, or dies too often."""
        self._again(self.server.wait)

    def has(self, agent: str) -> bool:
        """Whether the server has weights of the agent."""
        return agent in self._proved

    def publish(self, agent: str, version: int, weights: Mapping[str, Tensor]) -> Finding | None:
        """Give the server an agent's weights under their number, and see that it has them; what
        that showed (None: nothing was asked). Raises UserError where it has others."""
        with self._changing:
            self.launch()
            policy, old = self.policies[agent], self._published.get(agent)
            new = self._written_as(policy, version, weights)
            if old is not None and old.name == new.name:
                return None
            probe = self._probe(agent)
            self.server.uncut()
            self.wait()
            self._confirm()
            before = self._said(old, probe) if old is not None and probe else None
            self._proved.discard(agent)
            self._published[agent] = new
            try:
                self._again(lambda: self._give(new))
                found = self._proven(new, old, probe, before) if probe else None
            except BaseException:
                del self._published[agent]  # nobody knows what the server has
                if self._begins is None or self._begins.path != new.path:
                    new.remove()
                raise
            self._proved.add(agent)
            self._drop(old, new)
            self._deaths = 0
            self._written[agent].clear()
            return found

    def _proven(
        self, new: Published, old: Published | None, probe: Ids, before: Said | None
    ) -> Finding:
        """What the server's answers show. Raises UserError where it has other weights."""
        policy = self.policies[new.agent]
        found = hold(policy, new, old, probe, self._said(new, probe), before)
        judge(found, new, old, self._dtype, self.settings.tolerance)
        return found

    def _drop(self, old: Published | None, new: Published) -> None:
        """Have nobody keep weights that were replaced."""
        if self._begins is not None:
            # Whenever it is started from now on, it starts with the new ones.
            link_weights(self._directory / "model", new)
            old, self._begins = self._begins, new
        if old is None or old.path == new.path:
            return
        if self._adapters:
            with contextlib.suppress(Gone, Refused):  # it may have been started since
                self.server.post("/v1/unload_lora_adapter", {"lora_name": old.name})
        old.remove()

    def _written_as(self, policy: Policy, version: int, weights: Mapping[str, Tensor]) -> Published:
        """The weights under their number, in a file: that which a start begins with, where it has
        the same ones."""
        begins = self._begins
        if begins is not None and holds_weights(begins, weights, self._dtype):
            return replace(begins, agent=policy.name, version=version)
        return write_weights(self._directory, policy, version, weights, self._dtype)

    def _give(self, new: Published) -> None:
        """Have the server load these weights, unless it has them; then it has to say so itself."""
        if new.digest == self._has:
            self._check_digest(new, self._called("satune_has"))
        else:
            self._load(new)

    def _load(self, new: Published) -> None:
        """Have the server load these weights. Raises Gone, and UserError where it refuses or says
        that it has others."""
        if not self._adapters:
            self._has = ""
            self._check_digest(new, self._called("satune_load", str(new.path.resolve())))
            if self.server.given is None:
                self._has = new.digest
            return
        body = {"lora_name": new.name, "lora_path": str(new.path.resolve())}
        try:
            self.server.post("/v1/load_lora_adapter", body)
        except Refused as refused:
            if "already" in refused.said:  # by this name it is the same
                return
            raise self._refusal(refused) from refused
        except Gone as gone:
            if self.server.well():
                raise UserError(
                    f"{self.server.label}: vLLM takes no such adapter ({gone})"
                ) from gone
            raise

    def _called(self, method: str, *arguments: str) -> Sequence[Any]:
        """What the workers answer to a call. Raises Gone, and UserError where it refuses."""
        body = {"method": method, "args": list(arguments)}
        try:
            return self.server.post("/collective_rpc", body)["results"]
        except Refused as refused:
            raise self._refusal(refused) from refused

    def _check_digest(self, new: Published, results: Sequence[Any]) -> None:
        """Raise UserError where one of the server's workers says that it has loaded other weights
        than these."""
        for found in results:
            said = found if isinstance(found, dict) else {}
            if said.get("digest") != new.digest:
                what = said.get("fault") or f"it has {said.get('digest') or 'nothing'}"
                raise UserError(
                    f"{self.server.label}: vLLM did not take the weights {new.name}: {what}; start "
                    "the server from the same model as the run"
                )

    def _confirm(self) -> None:
        """Give a server that others start its weights again, where it was started anew."""
        if self.server.given is None:
            return
        for published in self._published.values():
            if self._adapters or self._again(self._loaded) != published.digest:
                self._again(partial(self._load, published))

    def _loaded(self) -> str:
        """The digest of the weights that the server has loaded; empty where it has those that it
        was started with."""
        return self._called("satune_loaded")[0]["digest"]

    async def confirm(self) -> None:
        """``_confirm``, before the requests of an event loop."""
        await self._elsewhere(self._confirm)

    def _start(self) -> None:
        settings = self.settings
        devices = settings.devices
        own = {"CUDA_VISIBLE_DEVICES": str(devices[self._number % len(devices)])} if devices else {}
        model = self._directory / "model"
        sharing = settings.sharing(self._number, self._places)
        arguments = arguments_of(self.policies, settings, model, sharing)
        self._has = "" if self._begins is None else self._begins.digest
        self.server.launch(arguments, self._directory / "server.log", own)

    def _probe(self, agent: str) -> Ids:
        """Tokens that the agent has read and written last, or, before it has written any, some of
        its vocabulary."""
        limit = context_of(self._first, self.settings) or self.settings.probe + 1
        length = min(self.settings.probe, limit - 1)
        return probe_of(self._written[agent], length, self.policies[agent].config.vocab_size)

    def _said(self, published: Published, probe: Ids) -> Said:
        def complete(body: Mapping[str, Any]) -> Any:
            return self._again(lambda: self.server.post("/v1/completions", body))

        return ask(complete, self._named(published), probe)

    def _named(self, published: Published) -> dict[str, Any]:
        """The model of a request, and the salt that keeps its cached prefixes from those of other
        weights."""
        model = published.name if self._adapters else "base"
        return {"model": model, "cache_salt": published.salt}

    # -- completions -----------------------------------------------------------------------------

    async def complete(
        self, client: httpx.AsyncClient, agent: str, ids: Ids, sampling: Sampling, key: Key
    ) -> Completion:
        """Draw a completion. Raises EpisodeFailure where the prompt has no room, UserError for a
        request that is refused whatever the prompt, and for a server that will not live."""
        policy, attempts = self.policies[agent], 0
        while True:
            published, starts = self._published[agent], self.server.starts
            body = {**self._named(published), **asked(policy, ids, sampling, key)}
            try:
                response = await client.post(f"{self.server.address}/v1/completions", json=body)
                choice = answer(response)["choices"][0]
                if choice["finish_reason"] not in ("stop", "length"):
                    raise Gone(f"finish reason {choice['finish_reason']}")
                self._written[agent].extend([*ids, *choice["token_ids"]])
                return completion_of(policy, published.version, ids, sampling, choice)
            except Refused as refused:
                if kind_of(refused) is OVERFLOW:
                    said = f"context overflow: {refused.said}"
                    raise EpisodeFailure(said, policy=True) from refused
                raise self._refusal(refused) from refused
            except (httpx.HTTPError, Gone) as error:
                gone = error
            attempts += 1
            await self._elsewhere(partial(self._revive, starts, gone, attempts))

    async def ready(self, agent: str) -> None:
        """Have the server there with weights of the agent: its policy's, where none were given."""
        if not self.has(agent):
            await self._elsewhere(partial(self._first_weights, agent))

    def _first_weights(self, agent: str) -> None:
        with self._changing:
            if not self.has(agent):
                self.publish(agent, 0, self.policies[agent].export())

    async def _elsewhere(self, work: Callable[[], None]) -> None:
        """Do it in a thread; when the last who waits for the server gives up, it ends."""
        if self._waiting == 0:
            self.server.uncut()
        self._waiting += 1
        try:
            await asyncio.to_thread(work)
        except asyncio.CancelledError:
            if self._waiting == 1:
                self.server.cut()
            raise
        finally:
            self._waiting -= 1

    # -- deaths ----------------------------------------------------------------------------------

    def _again(self, ask: Callable[[], Any]) -> Any:
        """What is answered, by a server that is started again as often as it dies meanwhile. Raises
        UserError where it refuses, or dies or does not answer too often, and Cut."""
        for attempt in itertools.count(1):
            starts = self.server.starts
            try:
                return ask()
            except Refused as refused:
                raise self._refusal(refused) from refused
            except Gone as error:
                self._revive(starts, error, attempt)

    def _revive(self, starts: int, error: Exception, attempt: int) -> None:
        """Start the server again, unless somebody has since it was started ``starts`` times or it
        is well and only this one ``attempt`` has failed, and give it all weights that it had.
        Raises UserError where that was done too often."""
        with self._changing:
            if self.server.starts != starts:
                return
            if self.server.well() and attempt < _ATTEMPTS:
                time.sleep(0.1 * 2**attempt)
                return
            while True:
                self._deaths += 1
                if self._deaths > self.settings.restarts:
                    raise UserError(
                        f"{self.server.label}: vLLM died or did not answer {self._deaths} times "
                        f"(last: {error}); mend that, then give the same command again"
                        f"{self.server.log()}"
                    ) from error
                self.server.stop()
                self._start()
                try:
                    self.server.wait()
                    for published in self._published.values():
                        self._give(published)
                    return
                except Gone as again:
                    error = again

    def _refusal(self, refused: Refused) -> UserError:
        return UserError(
            f"{self.server.label}: vLLM refuses the request (status {refused.status}: "
            f"{refused.said})"
        )
