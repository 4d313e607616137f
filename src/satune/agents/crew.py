"""The same objects in every process, which rank 0 calls: a part of each agent's learner, and what
the parts keep."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from satune.agents.anchor import Anchor, Snapshot
from satune.agents.learner import LocalLearner
from satune.agents.memory import allowed_bytes
from satune.agents.packing import PackedTurns
from satune.agents.ports import NonFinite
from satune.agents.processes import Processes
from satune.agents.scoring import Scorer
from satune.agents.shards import ShardedPolicy
from satune.agents.split import SplitScorer
from satune.core.settings import ObjectiveSettings, Per
from satune.files.interrupts import uninterrupted


@dataclass(slots=True)
class ShardLearner(LocalLearner):
    """One process's part of a learner; its policy is a ``ShardedPolicy``. All processes make every
    call together."""

    @property
    def _cut(self) -> ShardedPolicy:
        assert isinstance(self.policy, ShardedPolicy)
        return self.policy

    @property
    def _loss_scale(self) -> float:
        # FSDP makes the mean over the processes of what is to be their sum.
        return self._scale * self._cut.processes.count

    def _make_scorer(self, budget: int) -> Scorer:
        return SplitScorer(self.policy, budget, False, self._cut.processes)

    def _anchor_room(self) -> int:
        everyone = allowed_bytes(self.settings.anchor_memory, torch.device("cpu"))
        return everyone // self._cut.processes.on_this_host

    def _norm(self, gradients: Sequence[Tensor]) -> float:
        processes = self._cut.processes
        own = torch.tensor(LocalLearner._norm(self, gradients), dtype=torch.float64)
        # Every replica has all of the shards.
        total = processes.sum(own * own) / processes.settings.replicas
        return processes.decided(math.sqrt(float(total)))

    def accumulate(
        self,
        anchor: Anchor,
        episodes: Sequence[int],
        advantages_U: Tensor,
        weights_U: Tensor,
        objective: ObjectiveSettings,
        per: Per = "episode",
    ) -> dict[str, float]:
        metrics = LocalLearner.accumulate(
            self, anchor, episodes, advantages_U, weights_U, objective, per
        )
        self._cut.collect_gradients()
        return metrics

    def drop_gradients(self) -> None:
        LocalLearner.drop_gradients(self)
        self._cut.drop_gradients()

    def _take_gradients(self) -> dict[str, Tensor]:
        self._cut.collect_gradients()
        return LocalLearner._take_gradients(self)

    # -- what rank 0 asks for --------------------------------------------------------------------

    def hold_anchor(
        self, packed: PackedTurns, weights: Mapping[str, Tensor] | None, reference: bool
    ) -> Anchor:
        return self.anchor(packed, weights, reference=reference)

    def hold_reference(self, weights: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        self.keep_reference(weights)
        assert self.reference_weights is not None
        return self.reference_weights

    def rest_snapshot(self, snapshot: Snapshot) -> None:
        snapshot.rest()

    def let_go(self) -> None:
        """Have nothing gathered: what is written to the shards would not be seen."""
        self._cut.reshard()

    def gathered(self, held: Mapping[str, Tensor], name: str) -> Tensor | None:
        """The whole of a shard among ``held``, on rank 0's CPU."""
        whole = self._cut.gathered(name, held[name])
        return whole.cpu() if self._cut.processes.drives else None

    def scattered(self, whole: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """This process's shards of tensors, which only rank 0 has; numbers are told to all."""
        return {
            name: tensor
            if tensor is not None and tensor.dim() == 0
            else self._cut.scattered(name, tensor)
            for name, tensor in whole.items()
        }

    def put_back(
        self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], steps: int
    ) -> None:
        self.restore(Snapshot(weights, optimizer, steps))


# -- calls ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ref:
    """Something that every process keeps under ``number``, or its attribute ``part``."""

    number: int
    part: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """``method`` of an agent's part with ``arguments``. What comes out is kept under the number
    ``keep``, if any; what is kept under the numbers of ``forget`` is let go before."""

    agent: str
    method: str
    arguments: tuple[Any, ...]
    keep: int | None
    forget: tuple[int, ...]


@dataclass(slots=True)
class Crew:
    """The parts of all learners in this process, and what they keep for rank 0.

    ``loss`` is the recipe's own objective, where it has one: functions are not sent.
    """

    processes: Processes
    parts: Mapping[str, ShardLearner]
    loss: Callable[..., Any] | None = None
    _kept: dict[int, Any] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _forgotten: list[int] = field(default_factory=list)

    def ask(
        self, agent: str, method: str, *arguments: Any, keep: bool = False, own: Any = None
    ) -> Any:
        """Rank 0: have all processes call a method of the agent's part; what came out here, or with
        ``keep`` the ``Held`` of what came out everywhere. ``own`` takes the place of the last
        argument in this process. Raises NonFinite where all of them do, and Lost."""
        # Ctrl-C waits: whoever left a call half-way would leave the others waiting in it.
        with self.processes.talking, uninterrupted():
            forget, self._forgotten = tuple(self._forgotten), []
            number = next(self._numbers) if keep else None
            # The arguments themselves are held until the call is over, and what they stand for.
            told = tuple(map(_told, arguments))
            call = Call(agent, method, told, number, forget)
            self.processes.tell(call)
            if own is not None:
                call = replace(call, arguments=(*told[:-1], own))
            found = self._perform(call)
            return found if number is None else Held(self, number)

    def kept(self, number: int) -> Any:
        return self._kept[number]

    def forget(self, number: int) -> None:
        """Rank 0: let go of what is kept under a number, with the next call."""
        self._forgotten.append(number)

    def follow(self) -> None:
        """Any other process: do what rank 0 says until it dismisses all. Raises Lost."""
        while isinstance(call := self.processes.hear(), Call):
            # All find the same, and rank 0 goes on from there.
            with suppress(NonFinite):
                self._perform(call)

    def _perform(self, call: Call) -> Any:
        for number in call.forget:
            self._kept.pop(number, None)
        part = self.parts[call.agent]
        with self.processes.noticing():
            found = getattr(part, call.method)(*map(self._resolved, call.arguments))
        part.let_go()
        if call.keep is not None:
            self._kept[call.keep] = found
        return found

    def _resolved(self, argument: Any) -> Any:
        if isinstance(argument, Ref):
            kept = self._kept[argument.number]
            return getattr(kept, argument.part) if argument.part else kept
        if isinstance(argument, ObjectiveSettings) and ":" in argument.name:
            return replace(argument, loss=self.loss)
        return argument


class Held:
    """Rank 0's hold on what every process keeps; it is forgotten with the last reference."""

    def __init__(self, crew: Crew, number: int) -> None:
        self.crew, self.number = crew, number
        weakref.finalize(self, crew.forget, number)


class Shards(Mapping[str, Tensor]):
    """Tensors by name whose shards lie in all processes, as rank 0 has them. Looking at one gathers
    it there, on the CPU."""

    def __init__(self, agent: str, held: Held, part: str = "") -> None:
        self.agent, self.held = agent, held
        self.reference = Ref(held.number, part)
        kept = held.crew.kept(held.number)
        self._names = tuple(getattr(kept, part) if part else kept)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self.held.crew.ask(self.agent, "gathered", self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(slots=True)
class SharedAnchor(Anchor):
    """Rank 0's anchor, whose flat columns are those of all processes."""

    held: Held | None = None


def _told(argument: Any) -> Any:
    """An argument as it is sent."""
    if isinstance(argument, Shards):
        return argument.reference
    held = argument.held if isinstance(argument, SharedAnchor) else argument
    return Ref(held.number) if isinstance(held, Held) else argument
