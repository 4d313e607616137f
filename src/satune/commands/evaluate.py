"""A team's evaluation on a benchmark, at a matched sample budget, that survives interruption.

``out`` holds settings.json (what must be the same when it is gone on with), conversations.jsonl
(every finished one), answers.jsonl (what a server answered) and report.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from satune.commands.contestant import Contestant
from satune.commands.identity import file_identity
from satune.engines.roles import with_roles
from satune.files.lines import JsonLines
from satune.files.lock import LOCK, locked
from satune.files.writing import disk_errors, is_partial, write_atomically
from satune.play.evaluation import report, summarise
from satune.play.keys import text_digest
from satune.play.match import Match
from satune.play.rollout import rollout
from satune.play.rows import episode_from_row, episode_to_row
from satune.protocols.named import load_protocol
from satune.task_parts import is_fresh, role_player_of
from satune.tasks.catalog import load_task, take, takes
from satune.types import Episode, Key, Problem, Progress, Seat, Task, UserError

SAMPLES = {
    "aime24": 64, "aime25": 64, "zebralogic": 64, "math500": 4, "arbench_dc": 25, "arbench_sp": 25,
    "arbench_gn": 25, "planbench_bw": 8, "planbench_logistics": 8,
}  # fmt: skip
"""K of the paper by benchmark."""
OTHER_SAMPLES = 8
_FILES = ("settings.json", "conversations.jsonl", "answers.jsonl")
GENERATED = 128
"""Problems of a task that generates them without end."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to evaluate on and how, as it was asked for; None: what the team or benchmark has."""

    benchmark: str | None = None
    data: str | None = None
    samples: int | None = None
    protocol: str | None = None
    protocol_options: Mapping[str, Any] | None = None
    limit: int | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    concurrency: int | None = None
    keys: Literal["id", "text"] = "id"
    """What a conversation's draws depend on beside seed and sample: the problem's id, or its text,
    as those of a served team do."""

    def __post_init__(self) -> None:
        for option in ("samples", "limit", "max_new_tokens", "concurrency"):
            value = getattr(self, option)
            name = "-k" if option == "samples" else f"--{option.replace('_', '-')}"
            if value is not None and value < 1:
                raise UserError(f"{name}: is {value}; give at least 1")
        if self.temperature is not None and not self.temperature >= 0:
            raise UserError(f"--temperature: is {self.temperature}; give 0 (greedy) or more")


@contextmanager
def place(out: Path, *, break_lock: bool = False) -> Iterator[None]:
    """The directory of an evaluation, made where it is not there, and kept to this process. One
    that is left by an exception before anything was answered is left as it was found.

    Raises UserError for a directory with contents that an evaluation would mix with, and where
    another process works in it.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    _check_place(out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out / LOCK, str(out), break_lock=break_lock):
            _check_place(out)
            found = {path.name: path.stat().st_size for path in out.iterdir()}
            try:
                yield
            except BaseException:
                _leave_as(out, found)
                raise
    except BaseException:
        for folder in made:
            if not any(folder.iterdir()):
                folder.rmdir()
        raise


def _check_place(out: Path) -> None:
    with disk_errors(out):
        names = {path.name for path in out.iterdir()} if out.is_dir() else set[str]()
    others = [name for name in names - {"answers.jsonl", LOCK} if not is_partial(name)]
    if "settings.json" not in names and others:
        raise UserError(f"{out}: is not empty and holds no evaluation; give another --out")


def _leave_as(out: Path, found: Mapping[str, int]) -> None:
    """Take away what an evaluation has begun in ``out`` since ``found`` was there (name to size),
    where no answer is lost by it."""
    ours = [path for path in map(out.joinpath, _FILES) if path.exists()]
    grown = any(p.stat().st_size > found.get(p.name, 0) for p in ours if p.suffix == ".jsonl")
    if "settings.json" not in found and not grown:
        for path in ours:
            if path.name not in found:
                path.unlink()


async def examine(
    contestant: Contestant, wanted: Wanted, out: Path, progress: Progress
) -> dict[str, Any]:
    """Play what is not in ``out`` yet (in its ``place``), and give the report, which is written
    there too.

    Raises UserError for what cannot be had, and for an ``out`` that holds another evaluation.
    """
    seed = contestant.seed if wanted.seed is None else wanted.seed
    task, split, named = chosen_task(contestant, wanted, seed)
    engine = with_roles(
        contestant.engine,
        role_player_of(task),
        precision=contestant.precision,
        device=contestant.device,
        open_server=contestant.open_server,
    )
    seats = contestant.sampled(wanted.temperature, wanted.max_new_tokens)
    protocol = chosen_protocol(contestant, wanted, seats)
    contestant.admit({"protocol": protocol})
    match = Match(
        seats,
        load_protocol(
            protocol["name"],
            [seat.name for seat in seats],
            None,
            **{key: value for key, value in protocol.items() if key != "name"},
        ),
        engine,
        task,
        progress=progress,
        failures=contestant.failures,
        grading_seconds=contestant.grading_seconds,
        concurrency=wanted.concurrency or contestant.conversations,
        keep_ids=False,
    )
    problems = _problems(task, split, wanted.limit)
    samples = wanted.samples
    if samples is None:
        greedy = all(seat.sampling.temperature == 0 for seat in seats)
        samples = 1 if greedy else SAMPLES.get(named["name"], OTHER_SAMPLES)
    settings = {
        "team": contestant.identity,
        "benchmark": {**named, "data": file_identity(named["data"]), "split": split},
        "protocol": {**protocol, "name": file_identity(protocol["name"])},
        "sampling": {seat.name: asdict(seat.sampling) for seat in seats},
        "seed": seed,
    }
    by_text = wanted.keys == "text"
    if by_text:
        settings["keys"] = "text"
    _hold_against(out, settings)
    file = JsonLines(out / "conversations.jsonl")
    finished: dict[tuple[str, int], Episode] = {}
    for row in file.read():
        episode = episode_from_row(row)
        finished.setdefault((episode.problem.id, episode.sample), episode)

    def keep(episode: Episode) -> None:
        # What the world ended is played again by the next call of the same command.
        if not episode.masked:
            file.append(episode_to_row(episode))

    episodes = await rollout(
        match,
        problems,
        samples,
        Key(seed, "serve" if by_text else "evaluate"),
        label=named["name"],
        finished=finished,
        keep=keep,
        **({"name": text_digest} if by_text else {}),
    )
    # In an environment a message is no answer, and a seat that never spoke has nothing to grade.
    spoke = {turn.seat for episode in episodes for turn in episode.turns}
    graded = [] if match.acting else [seat.name for seat in seats if seat.name in spoke]
    found = {
        "benchmark": named["name"],
        **report(await summarise(episodes, samples, match, graded)),
        "protocol": protocol,
        "split": split,
        "seed": seed,
        "temperature": {seat.name: seat.sampling.temperature for seat in seats},
        "max_new_tokens": seats[0].sampling.max_new_tokens,
    }
    write_atomically(out / "report.json", json.dumps(found, indent=1) + "\n")
    return found


def chosen_task(
    contestant: Contestant, wanted: Wanted, seed: int
) -> tuple[Task, str, dict[str, Any]]:
    """The task, the split to play, and the task's name, data and options.

    A team's own task is played on what was held out of its training; any other, and data given
    here, whole.
    """
    own = dict(contestant.task)
    name = wanted.benchmark or own.get("name")
    if name is None:
        raise UserError("--benchmark: is needed, the team has no task of its own; give its name")
    itself = own.get("name") in (name, None)
    kept = own if itself else contestant.asked_task
    options = {k: v for k, v in kept.items() if k not in ("name", "data")}
    data, split = wanted.data, "all"
    if data is None and itself:
        data = contestant.held_out or own.get("data")
        split = "all" if contestant.held_out or "name" not in own else "eval"
    if contestant.host is not None and takes(name, "host"):
        options = {**options, "host": contestant.asked_task.get("host", contestant.host)}
    contestant.admit({"task": {"name": name, "data": data and str(data), **options}})
    task = load_task(name, data, seed, None, **options)
    if is_fresh(task):
        split = "eval"
    return task, split, {"name": name, "data": data, "options": options}


def _problems(task: Task, split: str, limit: int | None) -> list[Problem]:
    if is_fresh(task):
        return take(task, split, limit or GENERATED)
    rows = list(task.problems(split))
    # Some benchmarks are sorted; the first few of them would be a sample of their own kind.
    return rows if limit is None else take(task, split, min(limit, max(1, len(rows))))


def chosen_protocol(
    contestant: Contestant, wanted: Wanted, seats: Sequence[Seat]
) -> dict[str, Any]:
    own, asked = contestant.protocol, contestant.asked
    usual = "solo" if len(seats) == 1 else "vote"
    name = wanted.protocol or asked.get("name") or own.get("name") or usual
    kept = own if own.get("name", name) == name else {}
    return {**kept, **asked, "name": name, **(wanted.protocol_options or {})}


def _hold_against(out: Path, settings: dict[str, Any]) -> None:
    """Compare with what ``out`` was begun with, or begin it."""
    path = out / "settings.json"
    now = json.loads(json.dumps(settings))
    if not path.is_file():
        write_atomically(path, json.dumps(now, indent=1) + "\n")
        return
    try:
        held = json.loads(path.read_text())
    except ValueError:
        held = None
    if not isinstance(held, dict):
        raise UserError(f"{path}: damaged (not JSON); give another --out") from None
    for key in dict.fromkeys((*now, *held)):
        value = now.get(key)
        if held.get(key) != value:
            raise UserError(
                f"{out}: holds an evaluation with another {key} ({_short(held.get(key))}; now "
                f"{_short(value)}); give another --out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
