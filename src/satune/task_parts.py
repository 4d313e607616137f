"""What a task may have beside the parts of ``types.Task``, each as a protocol of its own.

A class has a part by having its members; nothing is inherited or registered. Whether a task has one
is asked by ``isinstance``, which on some versions of Python sees only what the object or its class
really holds: a task that wraps another takes over its parts as attributes (``PARTS``), for what a
``__getattr__`` answers may go unseen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from satune.types import Entry, Environment, Generate, Problem, ServedModel, Task

PARTS = ("fresh", "problem_at", "environment", "role_player", "expert", "seed", "validate")
"""The members of the protocols below."""


@runtime_checkable
class Procedural(Protocol):
    """May generate its problems. Where ``fresh`` is true ``problems(split)`` is an endless stream
    of independent draws, the same each time it is asked for, and has no split "all"."""

    fresh: bool


@runtime_checkable
class Indexed(Protocol):
    """Gives a generated problem by its place, so that what lies before it need not be generated."""

    def problem_at(self, split: str, index: int) -> Problem:
        """What ``problems(split)`` gives at ``index``, from 0."""
        ...


@runtime_checkable
class HasEnvironment(Protocol):
    """Is played in a world: the protocol's answers are the team's actions."""

    def environment(self, problem: Problem, rng: random.Random, generate: Generate) -> Environment:
        """The world of one conversation. ``rng`` is its own randomness, the same whenever the
        conversation is played again; ``generate(messages, sampling)`` asks the model that speaks
        for its roles, whose tokens are counted apart."""
        ...


@runtime_checkable
class HasRolePlayer(Protocol):
    """Says which model speaks for the roles of its environment: a directory, a file or hub id, a
    served model, or None where none is needed."""

    role_player: str | ServedModel | None


@runtime_checkable
class HasExpert(Protocol):
    """Can write messages itself, from which tiny agents are taught."""

    def expert(self, entries: Sequence[Entry], rng: random.Random, error: float) -> str:
        """The message of a seat that sees ``entries``; with probability ``error`` a wrong one."""
        ...


@runtime_checkable
class Seeded(Protocol):
    """Orders and draws its rows by a seed of its own; a task without one does so by 0."""

    seed: int


@runtime_checkable
class Validated(Protocol):
    """Can check the rows it was given."""

    def validate(self) -> None:
        """Hold that gold answers score 1 and damaged ones do not. Raises UserError naming the place
        of what fails."""
        ...


def is_fresh(task: Task) -> bool:
    """Whether the task generates its problems."""
    return isinstance(task, Procedural) and task.fresh


def seed_of(task: Task) -> int:
    """What the task's rows are ordered and drawn by."""
    return task.seed if isinstance(task, Seeded) else 0


def role_player_of(task: Task) -> str | ServedModel | None:
    """The model that speaks for the roles of the task's environment; None: none is needed."""
    return task.role_player if isinstance(task, HasRolePlayer) else None
