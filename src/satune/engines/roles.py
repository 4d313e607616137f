"""Who speaks for the roles of an environment (suspects, a puzzle's host) beside a team's engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from satune.agents.policy import Policy
from satune.agents.pretrained import AgentSpec, Precision, load_policies
from satune.engines.base import LocalSettings
from satune.thoughts import opened_by
from satune.types import (
    Completion,
    Engine,
    EpisodeFailure,
    Ids,
    Key,
    Message,
    Prompt,
    Sampling,
    ServedModel,
    UserError,
    ids_of,
)

_ROLE = "environment"

OpenServer = Callable[[ServedModel], Engine]
"""What asks a model at its server."""


def with_roles(
    team: Engine,
    player: str | ServedModel | None,
    *,
    precision: Precision,
    device: str,
    open_server: OpenServer,
) -> Engine:
    """``team``, and beside it an engine for the model ``player`` (a directory, file or hub id, or a
    served one); None: the roles need no model.

    Raises UserError for a model that cannot be loaded, and as ``open_server`` does.
    """
    if player is None:
        return team
    if isinstance(player, ServedModel):
        return WithRoles(team, open_server(player))
    spec = AgentSpec("host", player)
    policies = load_policies([spec], shared_base=False, precision=precision, device=device, seed=0)
    return WithRoles(team, LocalRole(policies["host"]))


class WithRoles:
    """An engine that sends what an environment asks for to ``roles`` and all else to ``team``.

    ``roles`` is told of no conversation's begin or end: it answers as soon as it is asked, while a
    local engine for the team waits until every conversation is back at it.
    """

    def __init__(self, team: Engine, roles: Engine) -> None:
        self.team = team
        self.roles = roles

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        chosen = self.roles if key.purpose == _ROLE else self.team
        return await chosen.generate(seat, prompt, sampling, key)

    def publish(self, agent: str, version: int, weights: Mapping[str, Any]) -> Any:
        return self.team.publish(agent, version, weights)

    def begin(self, key: Key) -> None:
        self.team.begin(key)

    def end(self, key: Key) -> None:
        self.team.end(key)

    async def close(self) -> None:
        await self.team.close()
        await self.roles.close()


class LocalRole:
    """A model in this process that answers prompts of messages, rendered by its own chat template.

    Where the context is full, the oldest question and answer after the instructions go first.

    Raises UserError for a tokenizer without a chat template, and the policy's EpisodeFailure for a
    prompt that does not fit even so.
    """

    def __init__(self, policy: Policy) -> None:
        if not policy.tokenizer.chat_template:
            raise UserError("task.host: the model's tokenizer has no chat template; give another")
        self._policy = policy
        self._engine = LocalSettings().make({_ROLE: policy}, {_ROLE: _ROLE})
        probe: list[Message] = [
            {"role": "system", "content": "a"},
            {"role": "user", "content": "b"},
        ]
        try:
            self._takes_system = "a" in self._render(probe)
        except TemplateError:  # some templates refuse a system message; its text then leads
            self._takes_system = False

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        messages = list(prompt.messages)
        room = self._policy.context_limit - sampling.max_new_tokens
        while len(ids := self._ids(text := self._text(messages))) > room:
            if len(messages) < 4:
                raise EpisodeFailure(
                    f"context: task.host: {len(ids)} tokens of a prompt and "
                    f"{sampling.max_new_tokens} new ones exceed its context of "
                    f"{self._policy.context_limit}; take another model",
                    policy=True,
                )
            del messages[1:3]
        ready = Prompt(tuple(messages), ids)
        completion = await self._engine.generate(_ROLE, ready, sampling, key)
        return replace(completion, text=opened_by(text) + completion.text)

    def publish(self, agent: str, version: int, weights: Mapping[str, Any]) -> None:
        raise AssertionError("a role is not trained")

    def begin(self, key: Key) -> None: ...

    def end(self, key: Key) -> None: ...

    async def close(self) -> None: ...

    def _text(self, messages: Sequence[Message]) -> str:
        if not self._takes_system and messages[0]["role"] == "system" and len(messages) > 1:
            led = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            messages = [{"role": "user", "content": led}, *messages[2:]]
        return self._render(messages)

    def _ids(self, text: str) -> Ids:
        return ids_of(self._policy.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Sequence[Message]) -> str:
        text = self._policy.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        return text
