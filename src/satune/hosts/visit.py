"""An agent that lives with its owner, as whoever asks it and does not train it sees it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from satune.engines.hosted import Answer, HostedRequest, Turned
from satune.engines.request import ConversationId
from satune.hosts.agent import asked
from satune.hosts.client import Client, HostLost
from satune.hosts.wire import FORMAT, answer_from
from satune.types import EpisodeFailure, UserError

_LOG = logging.getLogger(__name__)
_PATIENCE = 10.0
"""Seconds that an end waits for a host which is busy."""


class VisitedAgent:
    """The agent ``agent`` at the host behind ``client``, which speaks for ``seats`` of a team: an
    ``engines.hosted.Decoder``. ``satune`` is the version of the package here.

    ``digest`` is that of the weights which the team was saved with (None: those that the host has
    when this is made, from then on), ``template`` how the team's agent reads. The host is asked
    when this is made, and again whenever it was lost.

    Raises UserError, one line, where the host is not there, or has another agent, version,
    template or other weights.
    """

    def __init__(
        self,
        agent: str,
        client: Client,
        seats: Sequence[str],
        satune: str,
        template: Mapping[str, Any],
        digest: str | None = None,
    ) -> None:
        self.agent = agent
        self.client = client
        self.seats = list(seats)
        self.satune = satune
        self.template = dict(template)
        self._busy = threading.Lock()
        self._visit: str | None = None
        self._open: set[ConversationId] = set()
        self._waits: dict[int, ConversationId] = {}
        self.digest = self._enter(digest)

    def _enter(self, digest: str | None) -> str:
        """Be let in, by a host whose weights have this digest (None: any); the digest that it
        says."""
        said: dict[str, Any] = {"template": None, "digest": None, "visit": None}
        said |= self.client.ask("visit", {"seats": self.seats})
        where = f"agent {self.agent}: its host {self.client.url}"
        ours = {"format": FORMAT, "agent": self.agent, "satune": self.satune}
        for what, value in ours.items():
            if said.get(what) != value:
                raise UserError(f"{where} has {what} {said.get(what)!r}, this team {value!r}")
        if said["template"] != self.template:
            raise UserError(
                f"{where} was started with another template; ask the owner for the team's "
                f"(team.agents.{self.agent}.template)"
            )
        if digest is not None and said["digest"] != digest:
            raise UserError(
                f"{where} has weights with the digest {said['digest']}, the team was saved with "
                f"{digest}; ask the owner to start it with the agent of that run"
            )
        self._visit = said["visit"]
        self._open.clear()
        self._waits.clear()
        return str(said["digest"])

    def decode(
        self, news: Sequence[Turned], requests: Sequence[HostedRequest], *, decode: bool
    ) -> list[Answer]:
        """As ``engines.hosted.Decoder``. Where the host is lost, all that it was asked for fails,
        as the world's doing: the conversations are played anew. Raises UserError for what it
        refuses, and where its weights have become others."""
        with self._busy:
            try:
                return self._decode(news, requests, decode=decode)
            except HostLost as lost:
                _LOG.warning("%s", lost)
                self._visit = None
                numbers = dict.fromkeys([*self._waits, *(request.number for request in requests)])
                self._waits.clear()
                return [self._failed(number) for number in numbers]

    def _decode(
        self, news: Sequence[Turned], requests: Sequence[HostedRequest], *, decode: bool
    ) -> list[Answer]:
        if self._visit is None:
            self._enter(self.digest)
        for turned in news:
            self._turn(turned)
        # What the host has read of a conversation is gone with the visit in which it began.
        torn = [request for request in requests if request.conversation not in self._open]
        told = [request for request in requests if request.conversation in self._open]
        self._waits.update({request.number: request.conversation for request in told})
        said = self.client.ask(
            "speak",
            {
                "visit": self._visit,
                "digest": self.digest,
                "news": [[*turned.conversation, turned.begun] for turned in news],
                "requests": [asked(request) for request in told],
                "decode": decode and not torn,
            },
        )
        try:
            answers = [answer_from(each) for each in said["answers"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"agent {self.agent}: its host {self.client.url} answers in a form that is none of "
                "satune's; see that the address is a host's"
            ) from error
        for number, _ in answers:
            self._waits.pop(number, None)
        return [*(self._failed(request.number) for request in torn), *answers]

    def _turn(self, turned: Turned) -> None:
        if turned.begun:
            self._open.add(turned.conversation)
        else:
            self._open.discard(turned.conversation)
        waits = self._waits.items()
        self._waits = {n: place for n, place in waits if place != turned.conversation}

    def _failed(self, number: int) -> Answer:
        return number, EpisodeFailure(f"the host of agent {self.agent} is lost", policy=False)

    def publish(self, version: int) -> None:
        """The weights are the owner's: nobody here gives them a number."""

    def cut(self) -> None:
        self.client.cut()

    def leave(self) -> None:
        """Have the host forget this visit. A host that is lost has forgotten it."""
        with self._busy:
            visit, self._visit = self._visit, None
            if visit is not None:
                with suppress(HostLost):
                    self.client.ask("leave", {"visit": visit}, timeout=_PATIENCE)
