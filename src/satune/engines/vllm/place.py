"""A model as one server has it: started, given weights, asked, and started again when it dies.

Weights are there before the next request. Whoever asks for a completion when the server dies asks
again, with the same key: the seed is the key's, so that the same tokens come.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from torch import Tensor

from satune.agents.policy import Policy
from satune.engines.failures import OVERFLOW, Refused, kind_of
from satune.engines.vllm.arguments import arguments_of, dtype_of
from satune.engines.vllm.files import Published, link_weights, write_model, write_weights
from satune.engines.vllm.proof import Finding, Said, ask, hold, judge
from satune.engines.vllm.server import Gone, Server, answer
from satune.engines.vllm.settings import VLLMSettings
from satune.types import (
    Completion,
    EpisodeFailure,
    Ids,
    Key,
    Sampling,
    UserError,
    ids_of,
    logprobs_of,
)


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
        self._begun_with: Published | None = None
        self._written: dict[str, deque[int]] = {
            name: deque(maxlen=max(settings.probe, 1)) for name in policies
        }
        self._deaths = 0
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
            self._directory.mkdir(parents=True, exist_ok=True)
            if self.server.given is None:
                if not self._adapters:
                    self._begun_with = self._write(self._first, 0, self._first.export())
                write_model(self._directory, self._first, self._dtype, self._begun_with)
            self._start()

    def has(self, agent: str) -> bool:
        """Whether the server was given weights of the agent."""
        return agent in self._published

    def publish(self, agent: str, version: int, weights: Mapping[str, Tensor]) -> Finding | None:
        """Give the server an agent's weights under their number, and see that it has them; what
        that showed (None: nothing was asked). Raises UserError where it has others."""
        with self._changing:
            self.launch()
            policy, old = self.policies[agent], self._published.get(agent)
            new = self._write(policy, version, weights)
            if old is not None and old.name == new.name:
                return None
            probe = self._probe(agent)
            self._again(self.server.wait)
            before = self._said(old, probe) if old is not None and probe else None
            self._published[agent] = new
            try:
                self._again(lambda: self._load(new))
                found = self._proven(new, old, probe, before) if probe else None
            except BaseException:
                del self._published[agent]  # nobody knows what the server has
                raise
            if self.server.given is None and not self._adapters:
                # Whenever it is started from now on, it starts with these.
                link_weights(self._directory / "model", new)
            self._drop(old or self._begun_with, new)
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
        if old is None or old.path == new.path:
            return
        if self._adapters:
            with contextlib.suppress(Gone, Refused):  # it may have been started since
                self.server.post("/v1/unload_lora_adapter", {"lora_name": old.name})
        old.remove()

    def _write(self, policy: Policy, version: int, weights: Mapping[str, Tensor]) -> Published:
        return write_weights(self._directory, policy, version, weights, self._dtype)

    def _load(self, new: Published) -> None:
        """Have the server load these weights. Raises Gone, Refused, and UserError where it says
        that it has others."""
        if self._adapters:
            body = {"lora_name": new.name, "lora_path": str(new.path.resolve())}
            try:
                self.server.post("/v1/load_lora_adapter", body)
            except Refused as refused:
                if "already" not in refused.said:  # by this name it is the same
                    raise
            return
        body = {"method": "satune_load", "args": [str(new.path.resolve())]}
        for found in self.server.post("/collective_rpc", body)["results"]:
            said = found if isinstance(found, dict) else {}
            if said.get("digest") != new.digest:
                what = said.get("fault") or f"it has {said.get('digest') or 'nothing'}"
                raise UserError(
                    f"{self.server.label}: vLLM did not take the weights {new.name}: {what}"
                )

    def _start(self) -> None:
        settings = self.settings
        device = settings.devices[self._number % len(settings.devices)] if settings.devices else ""
        environment = {"CUDA_VISIBLE_DEVICES": device} if device else {}
        model = self._directory / "model"
        arguments = arguments_of(self.policies, settings, model, self._places)
        self.server.launch(arguments, self._directory / "server.log", environment)

    def _probe(self, agent: str) -> Ids:
        """Tokens that the agent has read and written last, or, before it has written any, some of
        its vocabulary."""
        room = min(self.settings.context or 1 << 62, self._first.context_limit) - 1
        length = min(self.settings.probe, room)
        if length < 2:
            return ids_of()
        written = list(self._written[agent])[-length:]
        vocabulary = self.policies[agent].config.vocab_size
        filling = range(length - len(written))
        return ids_of([*written, *((7919 * place + 13) % vocabulary for place in filling)])

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
        policy = self.policies[agent]
        while True:
            published, starts = self._published[agent], self.server.starts
            body = {
                **self._named(published), **_drawn(sampling, key), "prompt": list(ids),
                "stop_token_ids": sorted(policy.eos_ids), "ignore_eos": True,
                "logprobs": 0, "return_token_ids": True,
            }  # fmt: skip
            try:
                response = await client.post(f"{self.server.address}/v1/completions", json=body)
                choice = answer(response)["choices"][0]
                if choice["finish_reason"] not in ("stop", "length"):
                    raise Gone(f"finish reason {choice['finish_reason']}")
                return self._completion(policy, published, ids, choice)
            except Refused as refused:
                if kind_of(refused) is OVERFLOW:
                    said = f"context overflow: {refused.said}"
                    raise EpisodeFailure(said, policy=True) from refused
                raise UserError(
                    f"{self.server.label}: vLLM refuses the request (status {refused.status}: "
                    f"{refused.said})"
                ) from refused
            except (httpx.HTTPError, Gone) as error:
                gone = error
            await self._elsewhere(partial(self._revive, starts, gone))

    def _completion(
        self, policy: Policy, published: Published, ids: Ids, choice: Mapping[str, Any]
    ) -> Completion:
        written: list[int] = choice["token_ids"]
        self._written[policy.name].extend([*ids, *written])
        return Completion(
            text=policy.tokenizer.decode(written, skip_special_tokens=True),
            finish_reason="stop" if written and written[-1] in policy.eos_ids else "length",
            version=published.version,
            ids=ids_of(written),
            logprobs=logprobs_of(choice["logprobs"]["token_logprobs"]),
            prompt_tokens=len(ids),
            completion_tokens=len(written),
        )

    async def ready(self, agent: str) -> None:
        """Have the server there with weights of the agent: its policy's, where none were given."""
        if not self.has(agent):
            await self._elsewhere(partial(self._first_weights, agent))

    def _first_weights(self, agent: str) -> None:
        with self._changing:
            if not self.has(agent):
                self.publish(agent, 0, self.policies[agent].export())

    async def _elsewhere(self, work: Any) -> Any:
        """Do it in a thread; who gives up waiting makes it end."""
        self.server.uncut()
        try:
            return await asyncio.to_thread(work)
        except asyncio.CancelledError:
            self.server.cut()
            raise

    # -- deaths ----------------------------------------------------------------------------------

    def _again(self, ask: Any) -> Any:
        """What is answered, by a server that is started again as often as it dies meanwhile."""
        while True:
            starts = self.server.starts
            try:
                return ask()
            except (Gone, Refused) as error:
                if isinstance(error, Refused):
                    raise UserError(
                        f"{self.server.label}: vLLM refuses (status {error.status}: {error.said})"
                    ) from error
                self._revive(starts, error)

    def _revive(self, starts: int, error: Exception) -> None:
        """Start the server again, unless somebody has since it was started ``starts`` times, and
        give it all weights that it had. Raises UserError where that was done too often."""
        with self._changing:
            if self.server.starts != starts:
                return
            self._deaths += 1
            if self._deaths > self.settings.restarts:
                raise UserError(
                    f"{self.server.label}: vLLM died or did not answer {self._deaths} times "
                    f"(last: {error}); mend that, then give the same command again"
                ) from error
            if self.server.given is None:
                self.server.stop()
            self._start()
            self.server.wait()
            for published in self._published.values():
                with contextlib.suppress(Gone):  # whoever asks next finds out
                    self._load(published)


def _drawn(sampling: Sampling, key: Key) -> dict[str, Any]:
    """How a completion is drawn, in the server's words."""
    body: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": key.rng("server").getrandbits(31),
    }
    if sampling.top_p < 1.0:
        body["top_p"] = sampling.top_p
    if sampling.top_k > 0:
        body["top_k"] = sampling.top_k
    return body


def places_of(policies: Mapping[str, Policy]) -> Sequence[dict[str, Policy]]:
    """The agents of each model: those whose adapters lie on one base together."""
    found: dict[int, dict[str, Policy]] = {}
    for name, policy in policies.items():
        found.setdefault(id(policy.model), {})[name] = policy
    return list(found.values())
