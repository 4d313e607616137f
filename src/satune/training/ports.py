"""What training needs done outside its room, and who is told of what it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from satune.agents.anchor import Snapshot
from satune.agents.ports import Learner
from satune.core.trust_region import TrustRegionSettings
from satune.files.events import Event, Note
from satune.training.state import State
from satune.types import Episode, Experience, Key

Draw = Callable[[Key, int, int], list[Episode]]
"""(key, offset into the training problems, how many) -> whole groups of episodes."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step did. ``log_ratio_E`` is log r of the accepted update on each episode, 0 after a
    revert; ``event`` the fields of the update event that are known here; ``before`` the agent
    before the step (None where no step was tried). ``log_ratio_H`` has log r of each own turn of
    all episodes where the credit rule wants traces and the update was accepted."""

    accepted: bool
    beta: float
    log_ratio_E: Tensor
    event: dict[str, Any]
    before: Snapshot | None = None
    log_ratio_H: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TurnSums:
    """What a change of one agent did to each of its own turns: log(new/old) and KL(old‖new), summed
    over the turn's tokens [K] in float64, and the largest KL(old‖new) of a token state."""

    log_ratio_K: Tensor
    kl_K: Tensor
    largest_token_kl: float


@runtime_checkable
class Host(Protocol):
    """Where an agent lives that is not here: with an owner who holds its learner and its engine.

    It takes whole steps there. What comes back is sums a turn, figures and digests. Weights and
    snapshots that it gives are names of what it holds: they have no tensors, and it alone can do
    something with them. ``hosts.agent.HostedAgent`` asks an owner over HTTP; of an agent that lives
    in this process the training room asks the same of its ``Learner``, by the functions named here.
    """

    frozen: bool
    steps: int

    @property
    def device(self) -> str: ...

    @property
    def wire(self) -> Mapping[str, Sequence[int]]:
        """Calls, bytes sent and bytes received by verb."""
        ...

    @property
    def region(self) -> TrustRegionSettings:
        """The trust region that the owner holds the agent's steps to."""
        ...

    def improve(
        self, experience: Experience, *, beta: float, cap: float | None, key: Key
    ) -> Outcome:
        """``training.update.improve``."""
        ...

    def check(self, episodes: Sequence[Episode]) -> dict[str, float] | None:
        """``training.self_check.held_against``."""
        ...

    def gain(self, episodes: Sequence[Episode], key: Key) -> float:
        """``training.sweep.gain_of``."""
        ...

    def log_ratios(self, before: Snapshot, episodes: Sequence[Episode]) -> Tensor:
        """``training.change.log_ratios_of``."""
        ...

    def turn_sums(self, before: Snapshot, episodes: Sequence[Episode]) -> TurnSums:
        """``training.own_steps.turn_sums``."""
        ...

    def digest(self, weights: Mapping[str, Tensor]) -> str: ...

    def export(self) -> Mapping[str, Tensor]: ...

    def load_weights(self, weights: Mapping[str, Tensor]) -> None: ...

    def restore(self, snapshot: Snapshot) -> None: ...

    def interpolate(
        self, anchor: Mapping[str, Tensor], target: Mapping[str, Tensor], scale: float
    ) -> None: ...

    def keep_reference(self) -> None: ...

    def keep(self, name: str, held: Snapshot | None) -> str:
        """Have the owner write a checkpoint of that name, with the agent as it was at the last
        certificate where it is ``held``; its digest."""
        ...

    def commit(self, names: Sequence[str]) -> None:
        """The run has these checkpoints: of all others the owner needs the newest two only."""
        ...

    def stand(self, name: str, digest: str) -> Snapshot | None:
        """Have the agent stand at a checkpoint, bit for bit; what was ``held`` in it. Raises
        UserError where the owner does not have the one of that digest."""
        ...


Agents = Mapping[str, Learner | Host]
"""The agents of a run by name, wherever they live."""


class World(Protocol):
    """Playing, evaluating, serialising, and handing weights to the engine."""

    def publish(self, agent: str, version: int, weights: Mapping[str, Tensor]) -> Any:
        """Give the engine an agent's weights (names as ``Learner.export`` has them) and their
        version number; gives what ``Engine.publish`` does. A number names one set of weights for
        ever; the same set may be given again. ``weights`` are good for as long as the call
        takes."""
        ...

    def evaluate(
        self,
        *,
        greedy: bool,
        before: Sequence[float] | None,
        keep: Callable[[Sequence[Episode]], None],
    ) -> dict[str, Any]:
        """Held-out figures of the team as it is: reward, interval, problems, per_problem; and the
        paired difference to ``before``, an earlier per_problem. ``keep`` is given the
        conversations, without ids."""
        ...

    @property
    def certifies(self) -> Literal["fresh", "finite"]:
        """Whether problems for certificates are generated, or drawn from a finite set."""
        ...

    def certify(self, key: Key, offset: int, problems: int, samples: int) -> list[Episode]:
        """Episodes of the team as the engine has it, on problems that give no gradient. The
        problems are drawn independently; the same ``offset`` gives the same ones."""
        ...

    def to_row(self, episode: Episode) -> dict[str, Any]:
        """The episode as ``files.arrays.append_rows`` takes it."""
        ...

    def from_row(self, row: Mapping[str, Any]) -> Episode: ...

    def save_team(self) -> None: ...


TeamWeights = Mapping[str, tuple[int, Mapping[str, Tensor]]]
"""Of each agent the number of its weights and the weights, on the CPU, which nobody changes."""


class Drawer(Protocol):
    """Draws training episodes while the learners change. A ``World`` that can do so waits for what
    is under way before it uses the engine otherwise, and then gives it the team as it is."""

    def draw_ahead(
        self, key: Key, offset: int, problems: int, team: TeamWeights
    ) -> Future[list[Episode]]:
        """Begin to draw whole groups by ``team``, after what was begun before. Agents that are not
        in it are as they were published last. It has to be asked before the present weights of its
        agents are published again."""
        ...

    def stop_drawing(self) -> None:
        """Give up what is under way. Nothing is drawn ahead after this."""
        ...


class Watcher(Protocol):
    """Whoever shows progress: called with each event as it is written, and with notes, which are
    not."""

    def __call__(self, event: Event | Note, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint holds beside the learners: the run's state, how many training problems
    were drawn, the byte lengths of events and episodes (``RunDirectory.sizes``), and the recipe as
    plain values."""

    state: State
    offset: int
    sizes: Mapping[str, Any]
    recipe: Mapping[str, Any]


class Store(Protocol):
    """Where checkpoints are kept; ``training.checkpoint.Checkpoints`` keeps them on the disk."""

    def write(self, name: str, saved: Saved, learners: Agents, world: World) -> None:
        """Keep the run as it is now under ``name``. What changes after this call returns is not in
        it, even where the writing goes on in the background."""
        ...

    def finish(self) -> None:
        """Wait until what was given to ``write`` is safe. Raises what went wrong there."""
        ...

    def commit(self) -> None:
        """``finish``, and tell the hosts of agents that live elsewhere what is safe."""
        ...

    def read(self, name: str, world: World) -> Saved: ...

    def load(self, name: str, learners: Agents) -> Mapping[str, Snapshot]:
        """Put the learners back to what they were, bit for bit; of agents that live elsewhere, what
        they held at the last certificate."""
        ...

    def drop_after(self, name: str) -> None:
        """Remove what was kept after ``name``: the run goes on from there."""
        ...
