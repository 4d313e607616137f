"""An agent that lives with its owner, as the run that trains it sees it: every verb is a question
to the host."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from satune.agents.anchor import Snapshot
from satune.core.trust_region import TrustRegionSettings
from satune.engines.hosted import Answer, HostedRequest, Turned
from satune.hosts.client import Client
from satune.hosts.wire import (
    FORMAT,
    Plain,
    answer_from,
    entry_to,
    episodes_to,
    experience_to,
    key_to,
    sampling_to,
    tensor,
)
from satune.training.ports import Outcome, TurnSums
from satune.types import Episode, Experience, Key, UserError


class HostedWeights(Mapping[str, Tensor]):
    """The ``name`` of weights that a host holds. It has no tensors."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, key: str) -> Tensor:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class HostedSnapshot(Snapshot):
    """The name of a snapshot that a host holds."""

    def __init__(self, weights: HostedWeights, steps: int) -> None:
        super().__init__(weights, {}, steps)

    def rest(self) -> None:
        """The owner has moved it to the CPU."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What both sides have to agree on: the package's version, and the digest of the recipe without
    what is each side's own."""

    satune: str
    recipe: str


class HostedAgent:
    """The agent ``agent`` at the host behind ``client``: a ``training.ports.Host``, and the
    ``engines.hosted.Decoder`` of its engine.

    Its host is asked who it is when this is made. Raises UserError where it keeps another agent, or
    is of another version or recipe.
    """

    def __init__(self, agent: str, client: Client, facts: Facts) -> None:
        self.agent = agent
        self.client = client
        self.facts = facts
        self._run = secrets.token_hex(8)
        self._begun = False
        self._gone: list[str] = []
        self.meet()

    def meet(self, within: float | None = None) -> None:
        """Ask the host who it is, and wait ``within`` seconds at most. Raises HostLost where it
        does not answer, UserError where it does not fit."""
        said = self.client.ask("hello", {"format": FORMAT}, timeout=within)
        where = f"agent {self.agent}: its host {self.client.url}"
        for what, ours in {
            "format": FORMAT,
            "agent": self.agent,
            "satune": self.facts.satune,
            "recipe": self.facts.recipe,
        }.items():
            if said.get(what) == ours:
                continue
            if what == "recipe":
                raise UserError(
                    f"{where} was started with another recipe; start both with the same one (model,"
                    " device, host and delta may differ)"
                )
            raise UserError(f"{where} has {what} {said.get(what)!r}, this run {ours!r}")
        self.frozen: bool = said["frozen"]
        self.steps: int = said["steps"]
        self._device: str = said["device"]
        self._region = TrustRegionSettings(**said["region"])

    @property
    def device(self) -> str:
        return self._device

    @property
    def region(self) -> TrustRegionSettings:
        return self._region

    @property
    def wire(self) -> Mapping[str, Sequence[int]]:
        return self.client.wire

    def _ask(self, verb: str, **message: Any) -> Plain:
        """Ask as this run; what is no longer named here is forgotten there."""
        if not self._begun:
            self.client.ask("begin", {"run": self._run})
            self._begun = True
        gone = self._gone[:]
        del self._gone[: len(gone)]
        answer = self.client.ask(verb, {"run": self._run, "forget": gone, **message})
        self.steps = answer.pop("steps", self.steps)
        return answer

    def _named(self, name: str) -> HostedWeights:
        weights = HostedWeights(name)
        weakref.finalize(weights, self._gone.append, name)
        return weights

    def _snapshot(self, plain: Mapping[str, Any]) -> HostedSnapshot:
        return HostedSnapshot(self._named(plain["name"]), plain["steps"])

    # -- its engine ------------------------------------------------------------------------------

    def decode(
        self, news: Sequence[Turned], requests: Sequence[HostedRequest], *, decode: bool
    ) -> list[Answer]:
        answer = self._ask(
            "decode",
            news=[[*turned.conversation, turned.begun] for turned in news],
            requests=[asked(request) for request in requests],
            decode=decode,
        )
        return [answer_from(each) for each in answer["answers"]]

    def publish(self, version: int) -> None:
        self._ask("publish", version=version)

    def cut(self) -> None:
        self.client.cut()

    def leave(self) -> None:
        """The agent is this run's still when a rollout is over."""

    # -- its learner -----------------------------------------------------------------------------

    def improve(
        self, experience: Experience, *, beta: float, cap: float | None, key: Key
    ) -> Outcome:
        said = self._ask(
            "improve",
            experience=experience_to(experience, self.agent),
            beta=beta,
            cap=cap,
            key=key_to(key),
        )
        by_turn = said["log_ratio_H"]
        return Outcome(
            said["accepted"],
            said["beta"],
            tensor(said["log_ratio_E"]),
            said["event"],
            None if said["before"] is None else self._snapshot(said["before"]),
            None if by_turn is None else tensor(by_turn),
        )

    def check(self, episodes: Sequence[Episode]) -> dict[str, float] | None:
        return self._ask("check", episodes=episodes_to(episodes, self.agent))["figures"]

    def gain(self, episodes: Sequence[Episode], key: Key) -> float:
        told = episodes_to(episodes, self.agent)
        return self._ask("gain", episodes=told, key=key_to(key))["gain"]

    def log_ratios(self, before: Snapshot, episodes: Sequence[Episode]) -> Tensor:
        told = episodes_to(episodes, self.agent)
        said = self._ask("log_ratios", before=_name(before.weights), episodes=told)
        return tensor(said["log_ratio_E"])

    def turn_sums(self, before: Snapshot, episodes: Sequence[Episode]) -> TurnSums:
        told = episodes_to(episodes, self.agent)
        said = self._ask("turn_sums", before=_name(before.weights), episodes=told)
        log_ratio_K, kl_K = tensor(said["log_ratio_K"]), tensor(said["kl_K"])
        return TurnSums(log_ratio_K, kl_K, said["largest_token_kl"])

    # -- its weights -----------------------------------------------------------------------------

    def digest(self, weights: Mapping[str, Tensor]) -> str:
        return self._ask("digest", name=_name(weights))["digest"]

    def export(self) -> HostedWeights:
        return self._named(self._ask("hold")["name"])

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self._ask("place", name=_name(weights))

    def restore(self, snapshot: Snapshot) -> None:
        self._ask("revert", name=_name(snapshot.weights))

    def interpolate(
        self, anchor: Mapping[str, Tensor], target: Mapping[str, Tensor], scale: float
    ) -> None:
        self._ask("place", anchor=_name(anchor), name=_name(target), scale=scale)

    def keep_reference(self) -> None:
        self._ask("keep_reference")

    # -- checkpoints -----------------------------------------------------------------------------

    def keep(self, name: str, held: Snapshot | None) -> str:
        said = self._ask("keep", name=name, held=None if held is None else _name(held.weights))
        return f"{self._run}:{said['digest']}"

    def commit(self, names: Sequence[str]) -> None:
        self._ask("commit", names=list(names))

    def stand(self, name: str, digest: str) -> Snapshot | None:
        self._run, _, owners = digest.partition(":")
        self._begun = True
        self._gone.clear()
        said = self._ask("stand", name=name, digest=owners)
        return None if said["held"] is None else self._snapshot(said["held"])

    def save(self) -> str:
        """Have the owner write the agent for good; its digest."""
        return self._ask("save")["digest"]


def _name(weights: Mapping[str, Tensor]) -> str:
    assert isinstance(weights, HostedWeights), "weights of another place"
    return weights.name


def asked(request: HostedRequest) -> Plain:
    """A request as a host is told of it."""
    (message,) = request.prompt.messages
    return {
        "number": request.number,
        "key": key_to(request.key),
        "sampling": sampling_to(request.sampling),
        "at": message["at"],
        "entries": [entry_to(entry) for entry in message["entries"]],
    }
