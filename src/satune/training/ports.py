"""What training needs done outside its room, and who is told of what it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from satune.agents.ports import Learner
from satune.files.events import Event, Note
from satune.training.state import State
from satune.types import Episode, Key

Draw = Callable[[Key, int, int], list[Episode]]
"""(key, offset into the training problems, how many) -> whole groups of episodes."""


class World(Protocol):
    """Playing, evaluating, serialising, and handing weights to the engine."""

    def publish(self, agent: str, version: int, weights: Mapping[str, Tensor]) -> None:
        """Give the engine an agent's weights (names as ``Learner.export`` has them) and their
        version number. A number names one set of weights for ever; the same set may be given
        again. ``weights`` are good for as long as the call takes."""
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

    def write(self, name: str, saved: Saved, learners: Mapping[str, Learner], world: World) -> None:
        """Keep the run as it is now under ``name``. What changes after this call returns is not in
        it, even where the writing goes on in the background."""
        ...

    def finish(self) -> None:
        """Wait until what was given to ``write`` is safe. Raises what went wrong there."""
        ...

    def read(self, name: str, world: World) -> Saved: ...

    def load(self, name: str, learners: Mapping[str, Learner]) -> None:
        """Put the learners back to what they were, bit for bit."""
        ...

    def drop_after(self, name: str) -> None:
        """Remove what was kept after ``name``: the run goes on from there."""
        ...
