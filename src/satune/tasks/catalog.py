"""The tasks by name, and access to the problems of their splits."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from satune.loading import check_options, load_object, nearest_hint
from satune.task_parts import Indexed, is_fresh, seed_of
from satune.tasks.arbench_dc import DetectiveCases
from satune.tasks.arbench_sp import SituationPuzzles
from satune.tasks.autologi import AutoLogi
from satune.tasks.blocksworld import Blocksworld
from satune.tasks.guess_number import ArbenchGN, GuessNumber
from satune.tasks.gym import ReasoningGym
from satune.tasks.maths.task import Aime24, Aime25, Math500, Maths
from satune.tasks.planbench import PlanBenchBlocksworld, PlanBenchLogistics
from satune.tasks.relay import Relay
from satune.tasks.rows import Rows
from satune.tasks.sums import Sums
from satune.tasks.zebralogic import ZebraLogic
from satune.types import Key, Problem, Task, UserError

TASKS: dict[str, Callable[..., Task]] = {
    "relay": Relay,
    "sums": Sums,
    "reasoning_gym": ReasoningGym,
    "guess_number": GuessNumber,
    "rows": Rows,
    "maths": Maths,
    "aime24": Aime24,
    "aime25": Aime25,
    "math500": Math500,
    "arbench_dc": DetectiveCases,
    "arbench_gn": ArbenchGN,
    "arbench_sp": SituationPuzzles,
    "autologi": AutoLogi,
    "blocksworld": Blocksworld,
    "planbench_bw": PlanBenchBlocksworld,
    "planbench_logistics": PlanBenchLogistics,
    "zebralogic": ZebraLogic,
}

_PARTS = ("name", "problems", "extract", "equal", "grade")


def load_task(
    name_or_path: str,
    data: str | Path | None = None,
    seed: int = 0,
    base: Path | None = None,
    /,
    **options: Any,
) -> Task:
    """The task of that name, or the user's own class or function (``file.py:name``,
    ``package.module:name``), built from ``data``, ``seed`` and its options. ``base`` is where
    relative files of ``name_or_path`` are sought.

    Raises UserError as ``find_task`` does, and for a user's task that lacks a part of
    ``types.Task``.
    """
    task = find_task(name_or_path, data, seed, base, **options)()
    for part in _PARTS:
        if not hasattr(task, part):
            raise UserError(f"task {name_or_path}: it has no {part!r}; see satune.types.Task")
    return task


def find_task(
    name_or_path: str,
    data: str | Path | None = None,
    seed: int = 0,
    base: Path | None = None,
    /,
    **options: Any,
) -> Callable[[], Task]:
    """What builds the task that ``load_task`` would; nothing is read but the user's own code.

    Raises UserError for an unknown task or option (naming the nearest), and for data given to a
    task that reads none.
    """
    if ":" in name_or_path:
        build = load_object(name_or_path, base)
    elif name_or_path in TASKS:
        build = TASKS[name_or_path]
    else:
        hint = nearest_hint(name_or_path, TASKS)
        raise UserError(f"unknown task {name_or_path!r}{hint}; or give path/to/file.py:name")
    parameters = inspect.signature(build).parameters
    given = dict(options)
    if data is not None:
        if "data" not in parameters:
            raise UserError(f"task {name_or_path}: it reads no data; drop data: {data}")
        given["data"] = data
    if "seed" in parameters:
        given.setdefault("seed", seed)
    check_options(f"task {name_or_path}", build, given)
    return functools.partial(build, **given)


def takes(name: str, option: str) -> bool:
    """Whether the task of that name has an option; a user's own is not asked."""
    return name in TASKS and option in inspect.signature(TASKS[name]).parameters


def take(task: Task, split: str, n: int, offset: int = 0) -> list[Problem]:
    """``n`` problems of a split's stream from position ``offset`` on; positions are stable, so that
    a resumed run sees what an uninterrupted one does.

    A task that generates (``fresh``) gives its endless stream. A finite split is cycled in epochs,
    each in an order shuffled by the task's seed; should a problem come up twice in one take, its
    later ids get "#2", "#3" and so on, as far as no problem of the split has such an id itself. A
    user's task must have finite splits or ``problem_at``.
    """
    if is_fresh(task):
        if isinstance(task, Indexed):
            return [task.problem_at(split, index) for index in range(offset, offset + n)]
        return list(itertools.islice(task.problems(split), offset, offset + n))
    rows = list(task.problems(split))
    if not rows:
        raise UserError(f"task {task.name}: the split {split!r} holds no problems")
    chosen: list[Problem] = []
    epoch, order = -1, list(range(len(rows)))
    for position in range(offset, offset + n):
        if position // len(rows) != epoch:
            epoch = position // len(rows)
            order = list(range(len(rows)))
            Key(seed_of(task), "order", problem=split, sample=epoch).rng().shuffle(order)
        chosen.append(rows[order[position % len(rows)]])
    return _numbered(chosen, rows)


def draw(task: Task, split: str, n: int, offset: int = 0) -> list[Problem]:
    """``n`` independent draws of problems, from position ``offset`` of an endless sequence on.

    A task that generates gives its stream, as ``take`` does; from a finite split problems are
    drawn at random with replacement, so that their mean is the split's mean.
    """
    if is_fresh(task):
        return take(task, split, n, offset)
    rows = list(task.problems(split))
    if not rows:
        raise UserError(f"task {task.name}: the split {split!r} holds no problems")
    seed = seed_of(task)
    keys = (Key(seed, "draw", problem=split, sample=i) for i in range(offset, offset + n))
    return _numbered([key.rng().choice(rows) for key in keys], rows)


def _numbered(problems: Sequence[Problem], rows: Sequence[Problem]) -> list[Problem]:
    """The problems, later ones of an id with the next of "#2", "#3" and so on behind it that gives
    no id of ``rows``."""
    own = {row.id for row in rows}
    taken: list[Problem] = []
    times: dict[str, int] = {}
    for problem in problems:
        name = problem.id
        if name in times:
            suffix = times[name] + 1
            while f"{name}#{suffix}" in own:
                suffix += 1
            times[name] = suffix
            problem = replace(problem, id=f"{name}#{suffix}")
        else:
            times[name] = 1
        taken.append(problem)
    return taken
