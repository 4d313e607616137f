"""Grading responses that were written elsewhere: a file of them against a task's problems.

The 95% interval is by problem, that of ``play.statistics.score_interval``.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from satune.loading import missing_file, nearest_hint
from satune.play.conversation import plurality
from satune.play.evaluation import Scores, summary_of_graded
from satune.play.statistics import mean_components
from satune.task_parts import Indexed, is_fresh
from satune.tasks.catalog import load_task
from satune.tasks.pool import Failure, Workers
from satune.tasks.sources import read_bytes, read_json
from satune.thoughts import opened
from satune.types import Grade, Problem, Progress, Task, UserError, no_progress

_GENERATED = re.compile(r".+-([a-z]+)-([0-9]{1,9})")
_LONGEST = 500


@dataclass(frozen=True, slots=True)
class Responses:
    """One row of the file: where it stands, the problem it answers, and what was answered."""

    place: str
    id: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Graded:
    """A grade with what was read from the response."""

    grade: Grade
    extracted: str | None


def read_responses(path: str | Path) -> list[Responses]:
    """The rows ``{"id", "response"}`` or ``{"id", "responses": [...]}`` of a JSONL file.

    Raises UserError naming file and line for whatever is wrong with one.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise missing_file(file)
    rows: list[Responses] = []
    first: dict[str, str] = {}
    for number, line in enumerate(read_bytes(file).split(b"\n"), 1):
        if not line.strip():
            continue
        row = _responses(f"{path}, line {number}", line)
        if row.id in first:
            raise UserError(
                f"{row.place}: id {row.id!r} stands already in {first[row.id]}; "
                'give its samples together: "responses": [...]'
            )
        first[row.id] = row.place
        rows.append(row)
    if not rows:
        raise UserError(f'{path}: it holds no responses; write {{"id": ..., "response": ...}}')
    return rows


def _responses(place: str, line: bytes) -> Responses:
    row = read_json(place, line)
    if not isinstance(row, dict):
        raise UserError(f'{place}: the row is no object; write {{"id": ..., "response": ...}}')
    identity = row.get("id")
    if not isinstance(identity, (str, int)) or isinstance(identity, bool):
        was = "no id" if identity is None else f"the id is {identity!r}"
        raise UserError(f"{place}: {was}; give the problem's id as a text")
    given = [name for name in ("response", "responses") if name in row]
    if len(given) != 1:
        was = "both response and responses" if given else "no response"
        raise UserError(f'{place}: {was}; give "response": "..." or "responses": ["...", ...]')
    texts = [row["response"]] if given == ["response"] else row["responses"]
    if not isinstance(texts, list) or not texts:
        raise UserError(f"{place}: responses is {_short(texts)}; give a list with at least one")
    for position, text in enumerate(texts, 1):
        if not isinstance(text, str):
            where = "the response" if given == ["response"] else f"response {position}"
            raise UserError(f"{place}: {where} is {_short(text)}; give a text")
    return Responses(place, str(identity), tuple(texts))


def match(task: Task, rows: Sequence[Responses]) -> tuple[list[Problem], int]:
    """(the problem of each row, how many problems no row answers).

    A task that generates its problems is asked for those named in the ids (relay-eval-000003) and
    has none that is missing. Raises UserError naming file and line of an unknown id.
    """
    if is_fresh(task):
        return [_generated(task, row) for row in rows], 0
    known = {problem.id: problem for problem in _all_problems(task)}
    for row in rows:
        if row.id not in known:
            hint = (
                nearest_hint(row.id, known) if len(known) <= 20 else _nearest_of_many(row.id, known)
            )
            raise UserError(f"{row.place}: no problem {row.id!r} in the data{hint}")
    return [known[row.id] for row in rows], len(known) - len(rows)


def _all_problems(task: Task) -> list[Problem]:
    try:
        return list(task.problems("all"))
    except (KeyError, ValueError):
        # A user's task need not have a split of that name.
        found = [*task.problems("train"), *task.problems("eval")]
        return list({problem.id: problem for problem in found}.values())


def _nearest_of_many(name: str, known: Mapping[str, Problem]) -> str:
    hint = nearest_hint(name, known)
    shown, _, _ = hint.partition("; there are")
    return f"{shown})" if "nearest" in shown else f" ({len(known)} ids, first {next(iter(known))})"


def _generated(task: Task, row: Responses) -> Problem:
    found = _GENERATED.fullmatch(row.id)
    if found is None or not isinstance(task, Indexed):
        raise UserError(
            f"{row.place}: task {task.name} generates its problems, and {row.id!r} is not the id "
            f"of one; write {task.name}-eval-000000 or give data"
        )
    try:
        problem = task.problem_at(found[1], int(found[2]))
    except UserError as error:
        raise UserError(f"{row.place}: id {row.id!r}: {error}") from error
    if problem.id != row.id:
        raise UserError(f"{row.place}: no problem {row.id!r} (nearest: {problem.id})")
    return problem


class Grader:
    """What a worker process serves: one response graded, or the winner of several chosen."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, problem: Problem, texts: Sequence[str], vote: bool) -> Graded | int | None:
        if vote:
            return plurality(texts, self.task)
        (text,) = texts
        grade = self.task.grade(problem, text)
        if inspect.isawaitable(grade):
            grade = asyncio.run(_whole(grade))
        if not isinstance(grade, Grade) or not 0.0 <= grade.score <= 1.0:
            raise ValueError(f"the task's grade is {grade!r}; return a Grade with score 0 to 1")
        extracted = self.task.extract(text)
        return Graded(grade, None if extracted is None else str(extracted)[:_LONGEST])


async def _whole(awaitable: Awaitable[Grade]) -> Grade:
    return await awaitable


def build_grader(name: str, data: str | None, seed: int, options: Mapping[str, Any]) -> Grader:
    """The grader of a task by name, for a worker process."""
    return Grader(load_task(name, data, seed, None, **options))


def grade_file(
    name: str,
    path: str | Path,
    data: str | Path | None = None,
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    thinking: str | None = None,
    workers: int = 1,
    seconds: float = 30.0,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Grade the responses in ``path`` as answers to the problems of a task.

    Returns {"benchmark", "rows", "responses", "score", "interval", "missing", "failed",
    "components", "per_row"}; rows with several responses add "pass_at" (by k) and "majority". A row
    scores the mean over its responses. ``missing`` counts problems of the data without a row; they
    are in no figure but ``score_with_missing``, where each counts 0. ``thinking`` "open" says that
    the responses go on from a prompt that ends inside a thought: up to "</think>" they are thought,
    and one without it was cut and holds no answer. A response whose grading takes
    longer than ``seconds``, raises or ends its process scores 0 and is counted in ``failed``.

    Raises UserError for bad input, naming file and line.
    """
    given = dict(options or {})
    if thinking not in (None, "open"):
        raise UserError(f"thinking is {thinking!r}; give open, or leave it out")
    rows = read_responses(path)
    if thinking == "open":
        rows = [replace(row, texts=tuple(map(opened, row.texts))) for row in rows]
    task = load_task(name, data, seed, None, **given)
    problems, missing = match(task, rows)
    jobs: list[tuple[Problem, tuple[str, ...], bool]] = [
        (problem, (text,), False)
        for row, problem in zip(rows, problems, strict=True)
        for text in row.texts
    ]
    votes = [
        (problem, row.texts, True)
        for row, problem in zip(rows, problems, strict=True)
        if len(row.texts) > 1
    ]
    source = None if data is None else str(data)
    build = functools.partial(build_grader, name, source, seed, given)
    with Workers(build, min(workers, len(jobs)), seconds) as pool:
        graded = pool.map([*jobs, *votes], lambda done, of: progress(done, of, "grading"))
    ballots = iter(graded[len(jobs) :])
    outcomes = iter(graded[: len(jobs)])
    per_row = []
    for row in rows:
        results = [_outcome(next(outcomes)) for _ in row.texts]
        winner = next(ballots) if len(row.texts) > 1 else 0
        per_row.append(_row(row, results, winner))
    scores = Scores(
        tuple(tuple(r["score"] for r in row.get("responses", [row])) for row in per_row),
        tuple(row.get("majority", row["score"]) for row in per_row),
        failed=sum(row.pop("failed") for row in per_row),
    )
    components = [row["components"] for row in per_row]
    summary = summary_of_graded(scores, missing, components)
    return {"benchmark": task.name, **summary, "per_row": per_row}


def _outcome(result: Graded | Failure) -> dict[str, Any]:
    if isinstance(result, Failure):
        return {
            "score": 0.0,
            "extracted": None,
            "detail": f"not graded ({result.kind}): {result.text}",
            "components": {},
            "failed": True,
        }
    grade = result.grade
    return {
        "score": float(grade.score),
        "extracted": result.extracted,
        "detail": grade.detail,
        "components": {name: float(value) for name, value in grade.components.items()},
        "failed": False,
    }


def _row(row: Responses, results: list[dict[str, Any]], winner: Any) -> dict[str, Any]:
    failed = sum(result.pop("failed") for result in results)
    if len(results) == 1:
        return {"id": row.id, **results[0], "failed": failed}
    scores = [result["score"] for result in results]
    voted = isinstance(winner, int)
    return {
        "id": row.id,
        "score": fmean(scores),
        "extracted": results[winner]["extracted"] if voted else None,
        "detail": f"mean of {len(scores)} responses",
        "components": mean_components([result["components"] for result in results]),
        "majority": scores[winner] if voted else 0.0,
        "responses": results,
        "failed": failed,
    }


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
