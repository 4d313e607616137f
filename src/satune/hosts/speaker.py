"""The seats of an agent at its owner: what they have seen of their conversations, what they are
asked to write, and the ids of what they wrote."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from satune.engines.local import LocalEngine
from satune.engines.request import ConversationId, Request, conversation_id
from satune.hosts.wire import Plain, answer_to, entry_from, key_from, reading, sampling_from
from satune.hosts.written import Written
from satune.types import (
    Completion,
    Entry,
    EpisodeFailure,
    Key,
    Prompt,
    Renderer,
    Sampling,
    UserError,
    View,
)


@dataclass(slots=True)
class _Seen:
    """What a seat has seen of a conversation so far."""

    view: View
    entries: list[Entry]


@dataclass(frozen=True, slots=True)
class _Question:
    """What a run asks for, under a ``number``: a message of a seat that has seen ``at`` entries
    before these."""

    number: int
    key: Key
    sampling: Sampling
    at: int
    entries: list[Entry]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A completion that is waited for."""

    prompt: Prompt
    view: View
    request: Request


class Speaker:
    """The agent ``name`` as its seats speak: through ``engine``, in messages of at most
    ``max_new_tokens``. ``written`` holds the ids."""

    def __init__(
        self, name: str, engine: LocalEngine, renderer: Renderer, max_new_tokens: int
    ) -> None:
        self.name = name
        self.engine = engine
        self.renderer = renderer
        self.max_new_tokens = max_new_tokens
        self.written = Written()
        self._seen: dict[tuple[object, ...], _Seen] = {}
        self._asked: dict[int, _Asked] = {}
        self._shown: list[Request] = []
        self._ended: list[tuple[int, Key, Completion]] = []

    def forget(self) -> None:
        """Forget every conversation."""
        self.engine.drop()
        self.written.clear()
        for held in (self._seen, self._asked, self._shown, self._ended):
            held.clear()

    def decode(
        self,
        news: Sequence[Sequence[Any]],
        requests: Sequence[Mapping[str, Any]],
        *,
        decode: bool,
    ) -> list[Plain]:
        """What a run is told once it has said ``news`` of conversations and asked ``requests``
        (``engines.hosted.Decoder.decode``)."""
        with reading():
            turned = [(_conversation(*place), bool(begun)) for *place, begun in news]
            asked = [_question(each) for each in requests]
        for key, begun in turned:
            self._turn(key, begun)
        failed = [answer for each in asked if (answer := self._show(each))]
        if not failed and decode:
            shown, self._shown = self._shown, []
            self.engine.decode(self.name, shown)
        ended, self._ended = self._ended, []
        return failed + [self._said(*each) for each in ended]

    def _turn(self, key: Key, begun: bool) -> None:
        conversation = conversation_id(key)
        self._give_up(conversation)
        for seat in self.engine.seats:
            self._seen.pop((*conversation, seat), None)
        (self.engine.begin if begun else self.engine.end)(key)

    def _give_up(self, conversation: ConversationId) -> None:
        """Write on at nothing that was asked for in a conversation that is over: played again, it
        asks with the same keys."""
        for number, asked in list(self._asked.items()):
            if asked.request.conversation == conversation and asked.request.future.cancel():
                del self._asked[number]
        self._shown = [request for request in self._shown if not request.future.done()]

    def _show(self, asked: _Question) -> Plain | None:
        """Take a request; its failure, where its prompt has no place in the context."""
        number, key, sampling = asked.number, asked.key, asked.sampling
        if key.seat not in self.engine.seats:
            raise UserError(f"has no seat {key.seat}; enter with the seats that it is to fill")
        if sampling.max_new_tokens > self.max_new_tokens:
            raise UserError(
                f"writes at most {self.max_new_tokens} tokens a message; ask for no more "
                "(--max-new-tokens)"
            )
        place = (*conversation_id(key), key.seat)
        if asked.at == 0:
            self._seen[place] = _Seen(self.renderer.view(key.seat), [])
        seen = self._seen.get(place)
        if seen is None or len(seen.entries) != asked.at:
            raise UserError("does not know the conversation that it is asked about; resume the run")
        seen.entries += asked.entries
        try:
            prompt = seen.view.prompt(seen.entries, sampling.max_new_tokens)
        except EpisodeFailure as failure:
            return answer_to(number, failure)
        assert prompt.ids is not None
        future: concurrent.futures.Future[Completion] = concurrent.futures.Future()
        request = Request(key, prompt.ids, sampling, future, key)
        self._asked[number] = _Asked(prompt, seen.view, request)

        def end(done: concurrent.futures.Future[Completion]) -> None:
            if not done.cancelled():
                self._ended.append((number, key, done.result()))

        future.add_done_callback(end)
        self._shown.append(request)
        return None

    def _said(self, number: int, key: Key, completion: Completion) -> Plain:
        asked = self._asked.pop(number)
        asked.view.wrote(completion)
        assert asked.prompt.ids is not None
        handle = self.written.add(key, asked.prompt.ids, completion)
        text, dropped = asked.prompt.opening + completion.text, asked.prompt.dropped
        return answer_to(number, replace(completion, text=text, dropped=dropped, handle=handle))


def _question(plain: Mapping[str, Any]) -> _Question:
    key, sampling = key_from(plain["key"]), sampling_from(plain["sampling"])
    entries = [entry_from(each) for each in plain["entries"]]
    return _Question(int(plain["number"]), key, sampling, int(plain["at"]), entries)


def _conversation(stage: int, step: int, draw: int, problem: str, sample: int, copy: int) -> Key:
    return Key(0, "", stage, step, draw, problem, sample, copy=copy)
