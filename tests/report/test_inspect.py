"""What Inspect's own reader finds in the logs of a run."""

from __future__ import annotations

import json
import os
import random
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_world
from command_line import Run, refused
from report_runs import episode
from satune.report import inspect


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from satune.cli.train import run_training
    from satune.config.load import load_recipe

    folder = tmp_path_factory.mktemp("run")
    recipe = load_recipe(tiny_world.build(folder / "world"), ["stages=1"])
    run_training(recipe, folder / "run", resume=False, checkpoint=None, command="")
    return folder / "run"


@pytest.mark.trackers
def test_inspect_reads_back_every_evaluation(satune: Run, run: Path) -> None:
    pytest.importorskip("inspect_ai", reason="make test-trackers installs it")
    from inspect_ai.log import list_eval_logs, read_eval_log

    path = run / "episodes" / "evaluation-0001.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    # A text that no encoding to UTF-8 takes, an answer that was not given, an observation.
    row = json.loads(lines[0])
    row["turns"][0]["text"], row["answer"] = "half \ud83d <b>\x1b[31m", None
    row["observations"] = [[1, "the world"]]
    path.write_text("".join([json.dumps(row) + "\n", *lines[1:], "{damaged\n"]))

    code, stdout, stderr = satune("export", run, "--inspect", "--json")
    assert code == 0, stderr
    told = json.loads(stdout)
    (complaint,) = told["complaints"]
    assert complaint.endswith("evaluation-0001.jsonl, line 10: no readable line; left out")
    listed = list_eval_logs(str(run / "inspect"))
    assert len(listed) == len(told["logs"]) == 4

    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    evaluations = {(e["stage"], e["greedy"]): e for e in events if e["event"] == "eval"}
    seen = 0
    for info in listed:
        log = read_eval_log(info)
        event = evaluations.pop((log.eval.metadata["stage"], log.eval.metadata["greedy"]))
        assert log.status == "success" and log.eval.config.epochs == event["samples"]
        (score,) = log.results.scores
        assert score.metrics["mean"].value == event["reward"]
        # The figures are those of the samples in the log.
        rewards = [sample.scores["reward"].as_float() for sample in log.samples]
        assert sum(rewards) / len(rewards) == pytest.approx(event["reward"], abs=1e-12)
        held = [
            json.loads(text)
            for text in (run / f"episodes/evaluation-{event['stage']:04d}.jsonl")
            .read_text()
            .splitlines()[:9]
        ]
        rows = {
            (r["problem"]["id"], r["sample"] + 1): r for r in held if r["greedy"] == event["greedy"]
        }
        assert len(rows) == len(log.samples)
        for sample in log.samples:
            row = rows[sample.id, sample.epoch]
            said = [m.text for m in sample.messages if m.role == "assistant"]
            assert said == [
                f"{t['seat']}:\n{t['text'].encode(errors='replace').decode()}" for t in row["turns"]
            ]
            assert sample.target == row["problem"]["answer"]
            assert sample.output.completion == (row["answer"] or "")
            seen += 1
    assert seen == told["samples"] == 18 and not evaluations
    everything = b"".join(p.read_bytes() for p in (run / "inspect").iterdir())
    assert str(run.parent).encode() not in everything

    # Again into the same files.
    assert satune("export", run, "--inspect")[0] == 0
    assert len(list_eval_logs(str(run / "inspect"))) == 4


def test_what_cannot_be_exported_is_one_line(
    satune: Run, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused(satune("export", run)) == "export: nothing is asked for; add --inspect"
    assert "no run" in refused(satune("export", tmp_path, "--inspect"))
    (tmp_path / "events.jsonl").write_text("")
    assert "has no evaluation" in refused(satune("export", tmp_path, "--inspect"))
    for name in ("inspect_ai", "inspect_ai.log"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'satune[inspect]'" in refused(satune("export", run, "--inspect"))


class Kinds:
    """In place of a module of inspect-ai: whatever is made of it holds what it was made with."""

    def __getattr__(self, name: str) -> Any:
        def made(*parts: Any, **named: Any) -> SimpleNamespace:
            return SimpleNamespace(**named)

        made.from_content = made  # type: ignore[attr-defined]
        return made

    def write_eval_log(self, log: Any, path: str, format: str) -> None:
        Path(path).write_text(log.eval.created)


def evaluation(folder: Path, reward: float) -> Path:
    """What ``satune eval`` has written, at noon of a day."""
    folder.mkdir(parents=True)
    row = episode("p", 0, 0.0, ["solo"], random.Random(0))
    for turn in row["turns"]:
        turn |= {"prompt_ids": None, "completion_ids": None, "sampled_logprobs": None}
    (folder / "conversations.jsonl").write_text(json.dumps(row) + "\n{damaged\n")
    (folder / "settings.json").write_text('{"task": {"name": "relay"}}')
    found = {
        "problems": 1, "k": 1, "tokens": 9, "temperature": {"solo": 0.8},
        "team": {"avg_at_k": reward, "interval": None},
        "per_problem": [{"id": "p", "scores": [reward]}],
        "failures": {"policy": {}, "world": {}},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(found))
    noon = datetime(2026, 3, 4, 12, tzinfo=UTC).timestamp()
    os.utime(folder / "report.json", (noon, noon))
    return folder


def test_an_evaluation_of_its_own_goes_into_one_file_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "_library", lambda: inspect._Inspect(Kinds(), Kinds(), Kinds()))
    one, other = evaluation(tmp_path / "a" / "eval", 0.0), evaluation(tmp_path / "b" / "eval", 1.0)
    done = inspect.export_inspect(one, tmp_path / "logs")
    assert done.samples == 1 and done.logs[0].name.startswith("2026-03-04T12-00-00_relay")
    # Its conversations lie in a file of another name than those of a run.
    (complaint,) = done.complaints
    assert complaint.startswith(f"{one}/conversations.jsonl, line 2: no readable line")
    assert inspect.export_inspect(one, tmp_path / "logs").logs == done.logs
    # Another evaluation in a directory of the same name is another.
    assert inspect.export_inspect(other, tmp_path / "logs").logs != done.logs
    assert len(list((tmp_path / "logs").iterdir())) == 2
