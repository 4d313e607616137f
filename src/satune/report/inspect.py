"""Evaluations of a run as logs that Inspect's viewer opens, by inspect-ai's own writer."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from satune.files.events import EvalEvent
from satune.files.lines import scan_lines
from satune.files.printing import encodable
from satune.files.shapes import misfit
from satune.files.writing import disk_errors
from satune.report.public import without_places
from satune.report.source import EpisodeRow, Source, read_source
from satune.types import UserError


@dataclass(slots=True)
class Exported:
    """``complaints`` are lines about what could not be read."""

    logs: list[Path] = field(default_factory=list)
    samples: int = 0
    complaints: list[str] = field(default_factory=list)


def export_inspect(run: Path, out: Path) -> Exported:
    """Write a log for each evaluation of ``run`` (a run, or what ``satune eval`` has written) whose
    conversations are there into ``out``; the same evaluation always goes into the same file.

    Raises UserError where ``run`` is neither or has no evaluation, where inspect-ai is not
    installed and where the disk refuses.
    """
    source = read_source(run)
    events = source.of(EvalEvent)
    if not events:
        raise UserError(f"{run}: has no evaluation that could be exported")
    library = _library()
    done = Exported(complaints=list(source.complaints))
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for event in events:
        decoding = "greedy" if event["greedy"] else "sampled"
        rows = list(_rows(run, event, done.complaints))
        if not rows:
            done.complaints.append(
                f"{run}: no conversations of the {decoding} evaluation after stage {event['stage']}"
            )
            continue
        log = _log(library, source, event, rows)
        path = out / _name(log, event, decoding)
        beside = path.with_name(f".{path.name}.partial")
        with disk_errors(path):
            library.log.write_eval_log(log, str(beside), format="eval")
            os.replace(beside, path)
        done.logs.append(path)
        done.samples += len(rows)
    # A file holds two evaluations, and is read for each.
    done.complaints = list(dict.fromkeys(done.complaints))
    return done


@dataclass(frozen=True, slots=True)
class _Inspect:
    """The modules of inspect-ai that a log is made with."""

    log: Any
    model: Any
    scorer: Any


def _library() -> _Inspect:
    try:
        return _Inspect(
            *(importlib.import_module(f"inspect_ai.{f.name}") for f in fields(_Inspect))
        )
    except ImportError as error:
        raise UserError(
            f"--inspect: inspect_ai cannot be imported ({error}); pip install 'satune[inspect]'"
        ) from None


def _rows(run: Path, event: EvalEvent, complaints: list[str]) -> Iterator[EpisodeRow]:
    """The conversations of an evaluation, texts alone."""
    path = run / "conversations.jsonl"
    if not path.is_file():
        path = run / "episodes" / f"evaluation-{event['stage']:04d}.jsonl"
    for number, row in scan_lines(path):
        place = "line" if row is None else misfit(row, EpisodeRow)
        if row is None or place is not None:
            complaints.append(f"{path}, line {number}: no readable {place}; left out")
        elif row.get("greedy", event["greedy"]) == event["greedy"]:
            yield cast(EpisodeRow, row)


def _log(library: _Inspect, source: Source, event: EvalEvent, rows: Sequence[EpisodeRow]) -> Any:
    task = without_places(source.recipe.get("task.name", "") or "team")
    # Directories of one name may hold different evaluations: their figures tell them apart.
    named = json.dumps([source.name, event], sort_keys=True)
    digest = hashlib.blake2b(named.encode(), digest_size=11).hexdigest()
    created = event.get("time") or datetime.now(UTC).isoformat(timespec="seconds")
    model = f"satune/{source.name}"
    figures = {"mean": event["reward"]} | {
        name: value
        for name, value in event["figures"].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if event["interval"]:
        figures |= {"low": event["interval"][0], "high": event["interval"][1]}
    spec = library.log.EvalSpec(
        eval_id=digest,
        run_id=digest,
        task_id=digest,
        created=created,
        task=task,
        model=model,
        dataset=library.log.EvalDataset(
            name=task,
            samples=event["problems"],
            sample_ids=list(dict.fromkeys(row["problem"]["id"] for row in rows)),
        ),
        config=library.log.EvalConfig(epochs=event["samples"]),
        packages={"satune": version("satune")},
        metadata={"stage": event["stage"], "greedy": event["greedy"], "tokens": event["tokens"]},
    )
    metrics = {
        name: library.log.EvalMetric(name=name, value=value) for name, value in figures.items()
    }
    return library.log.EvalLog(
        status="success",
        eval=spec,
        stats=library.log.EvalStats(started_at=created, completed_at=created),
        results=library.log.EvalResults(
            total_samples=event["problems"] * event["samples"],
            completed_samples=len(rows),
            scores=[library.log.EvalScore(name="reward", scorer="satune", metrics=metrics)],
        ),
        samples=[_sample(library, row, model) for row in rows],
    )


def _sample(library: _Inspect, row: EpisodeRow, model: str) -> Any:
    """A conversation as a sample: each message begins with the seat that wrote it."""
    problem, answer = row["problem"], encodable(row["answer"] or "")
    text = encodable("".join(str(part.get("text", "")) for part in problem["prompt"]))
    messages: list[Any] = [library.model.ChatMessageUser(content=text)]
    observed = list(row["observations"])

    def tell(turns: int) -> None:
        while observed and observed[0][0] <= turns:
            messages.append(library.model.ChatMessageUser(content=encodable(observed.pop(0)[1])))

    for number, turn in enumerate(row["turns"]):
        tell(number)
        messages.append(
            library.model.ChatMessageAssistant(
                content=f"{turn['seat']}:\n{encodable(turn['text'])}",
                model=turn["agent"],
                metadata={k: turn[k] for k in ("seat", "moment", "version", "finish_reason")},
            )
        )
    tell(len(row["turns"]))
    target = problem["answer"]
    failure = row["failure"]
    return library.log.EvalSample(
        id=problem["id"],
        epoch=row["sample"] + 1,
        input=text,
        target=encodable(target if isinstance(target, str) else _plain(target)),
        messages=messages,
        output=library.model.ModelOutput.from_content(model, answer),
        scores={
            "reward": library.scorer.Score(
                value=row["grade"]["score"],
                answer=answer or None,
                explanation=encodable(failure["reason"] if failure else row["grade"]["detail"]),
                metadata=_numbers(row["grade"]["components"]),
            )
        },
    )


def _plain(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _numbers(components: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in components.items()}


def _name(log: Any, event: EvalEvent, decoding: str) -> str:
    """As Inspect names its own: time, task, id."""
    time = re.sub(r"[^0-9T-]", "-", str(log.eval.created)[:19])
    task = re.sub(r"[^A-Za-z0-9]+", "-", f"{log.eval.task} stage {event['stage']:04d} {decoding}")
    return f"{time}_{task}_{log.eval.eval_id}.eval"
