"""What trackers are sent is what events.jsonl holds: read back from each one's own local store."""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import fake_run
from command_line import Run
from satune.report import tracking as tracking_module
from satune.report.scalars import scalars
from satune.report.settings import LogSettings
from satune.report.tracking import tracking
from satune.types import UserError

Points = Counter[tuple[str, int, float]]


def written(run: Path, *, float32: bool = False) -> Points:
    """Every number of the run's events as (name, stage, value), by reading the file alone."""
    found: Points = Counter()

    def walk(value: Any, name: str, stage: int) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key not in ("event", "time", "stage", "agent", "greedy", "seats"):
                    walk(inner, f"{name}/{key}", stage)
        elif isinstance(value, list):
            last = name.rpartition("/")[2]
            ends = {"interval": ["low", "high"], "difference": ["mean", "low", "high"]}.get(last)
            for end, inner in zip(ends or [], value, strict=bool(ends)):
                walk(inner, f"{name}/{end}", stage)
        elif isinstance(value, int | float) and math.isfinite(value):
            number = struct.unpack("f", struct.pack("f", value))[0] if float32 else float(value)
            found[name, stage, number] += 1

    for line in (run / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        kind = event["event"]
        if kind == "run":
            walk(event["self_check"], "run/self_check", 0)
            continue
        if kind == "update":
            kind = f"agent.{event['agent']}"
        if kind == "eval":
            kind = "held_out.greedy" if event["greedy"] else "held_out.sampled"
        walk(event, kind, event["stage"])
    assert sum(found.values()) > 40
    return found


def in_tensorboard(run: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return Counter(
        (tag, event.step, event.value)
        for tag in read.Tags()["scalars"]
        for event in read.Scalars(tag)
    )


def in_trackio(run: Path) -> Points:
    found: Points = Counter()
    for database in Path(os.environ["TRACKIO_DIR"]).glob("*.db"):
        with sqlite3.connect(database) as connection:
            rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
        for name, stage, metrics in rows:
            if name.rpartition("-")[0] == run.name:
                numbers = {k: v for k, v in json.loads(metrics).items() if not isinstance(v, list)}
                found.update((key, stage, float(value)) for key, value in numbers.items())
    return found


def in_mlflow(run: Path) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient()
    (held,) = client.search_runs(
        [e.experiment_id for e in client.search_experiments()], f"run_name = '{run.name}'"
    )
    found: Points = Counter()
    for name in held.data.metrics:
        for point in client.get_metric_history(held.info.run_id, name):
            found[name, point.step, point.value] += 1
    return found


def wandb_records(run: Path) -> Iterator[Any]:
    """The records of the run's offline files: protocol buffers in LevelDB's log format, blocks of
    32 KiB behind a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(run.parent.glob("wandb/offline-run-*/run-*.wandb")):
        data, at, parts = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last of several
                record = Record()
                record.ParseFromString(parts)
                parts = b""
                yield record


def in_wandb(run: Path) -> Points:
    found: Points = Counter()
    for record in wandb_records(run):
        if record.WhichOneof("record_type") != "history":
            continue
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        stage = row.pop("stage")
        found.update(
            (name, stage, float(value))
            for name, value in row.items()
            if not name.startswith(("_", "conversations/"))
        )
    return found


READERS: dict[str, Callable[[Path], Points]] = {
    "tensorboard": in_tensorboard, "trackio": in_trackio, "mlflow": in_mlflow, "wandb": in_wandb,
}  # fmt: skip
HEAVY = [pytest.param(name, marks=pytest.mark.trackers) for name in ("wandb", "mlflow")]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place for what the libraries keep, which some of them settle when they are imported."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        for name in [n for n in sys.modules if n.partition(".")[0] in ("trackio", "wandb")]:
            patch.delitem(sys.modules, name)
        yield folder


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run that computes nothing, whose recipe names places."""
    fake_run.fake(monkeypatch)
    path = fake_run.write_recipe(tmp_path)
    text = path.read_text().replace("tiny:qwen3-s", "/home/of-ann/models/base-of-ann", 1)
    path.write_text(text)
    return path


def everything(name: str, run: Path, stores: Path) -> bytes:
    """All bytes that a tracker keeps of the run, but for its library's own log."""
    place = {"tensorboard": run / "tensorboard", "wandb": run.parent / "wandb"}.get(name, stores)
    files = [p for p in place.rglob("*") if p.is_file() and p.suffix != ".log"]
    return b"".join(p.read_bytes() for p in files)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", *HEAVY])
def test_a_tracker_has_the_figures_of_the_events(
    satune: Run, recipe: Path, tmp_path: Path, stores: Path, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip(name, reason=f"{name} is not installed; make test-trackers installs it")
    work = tmp_path / "work"  # where the libraries keep what they keep
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(socket, "gethostname", lambda: "machine-of-mine")
    run = work / f"run-{name}"
    words = ["train", recipe, f"log.report_to={name}", "log.report_conversations=1"]
    code, stdout, stderr = satune(*words, "stages=1", "--out", run, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["stages"] == 1
    # Standard error is the run's own.
    told = ("held-out reward", "  stage 1 step", "stage 1: reward")
    assert [line for line in stderr.splitlines() if not line.startswith(told)] == []
    exact = name == "tensorboard"  # which holds four bytes a number
    first = written(run, float32=exact)
    assert READERS[name](run) == first

    # A resume goes on in the same run and sends nothing twice. The evaluation after the last stage
    # is the last one's no more: event files are written anew, elsewhere it stays.
    ids = run / "trackers.json"
    before = ids.read_bytes() if ids.exists() else b""
    code, _, stderr = satune(*words, "stages=2", "--resume", "--out", run)
    assert code == 0, stderr
    assert (ids.read_bytes() if ids.exists() else b"") == before
    both = written(run, float32=exact)
    assert READERS[name](run) == (both if name == "tensorboard" else first | both)
    assert {stage for _, stage, _ in both} == {0, 1, 2}

    # Neither where the run lies nor whose machine it is.
    kept = everything(name, run, stores)
    assert b"base-of-ann" in kept or name == "tensorboard"
    for private in ("/home/of-ann", str(recipe), "machine-of-mine"):
        assert private.encode() not in kept, private
    # One conversation of every rollout and evaluation, as it was asked for.
    assert b"conversations" in kept or name == "mlflow"


def test_a_tracker_that_joins_later_is_sent_all_there_is(
    satune: Run, recipe: Path, tmp_path: Path, stores: Path
) -> None:
    run = tmp_path / "run"
    assert satune("train", recipe, "stages=1", "--out", run)[0] == 0
    more = ["stages=2", "log.report_to=tensorboard", "--resume", "--out", run]
    assert satune("train", recipe, *more)[0] == 0
    assert in_tensorboard(run) == written(run, float32=True)


# What goes wrong


class Broken:
    """A tracker that takes one event and no more."""

    def __init__(self, about: Any) -> None:
        self.about, self.id, self.taken = about, "x", 0

    def figures(self, values: Any, stage: int) -> None:
        self.taken += 1
        if self.taken > 1:
            raise ConnectionError("the\nserver is\x1b gone")

    def conversations(self, where: str, said: Sequence[Any], stage: int) -> None: ...

    def close(self, *, ended: bool) -> None:
        raise AssertionError("not reached once it has failed")


def stage_event(stage: int) -> Any:
    return {"event": "stage", "stage": stage, "reward": 0.5, "order": [], "seconds": 1.0,
            "memory": {"peak": 1}}  # fmt: skip


SETTINGS = LogSettings(report_to=("tensorboard",))


def test_a_failure_is_said_once_and_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking_module.TRACKERS, "tensorboard", Broken)
    lines: list[str] = []
    (tmp_path / "trackers.json").write_text('{"tensorboard": "x"}')
    with tracking(SETTINGS, tmp_path, {}, lines.append) as watch:
        for stage in range(1, 5):
            watch(stage_event(stage))
    (line,) = lines
    assert line.startswith("tensorboard: ConnectionError: the server is\ufffd gone; the run goes")


def test_one_that_hangs_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    released = threading.Event()

    class Hanging(Broken):
        def figures(self, values: Any, stage: int) -> None:
            released.wait(60)

        def close(self, *, ended: bool) -> None: ...

    monkeypatch.setitem(tracking_module.TRACKERS, "tensorboard", Hanging)
    monkeypatch.setattr(tracking_module, "GRACE", 0.05)
    lines: list[str] = []
    (tmp_path / "trackers.json").write_text('{"tensorboard": "x"}')
    with tracking(SETTINGS, tmp_path, {}, lines.append) as watch:
        watch(stage_event(1))
    released.set()
    assert lines == ["tensorboard: has not taken everything within 0.05 s"]


def test_what_stands_in_the_way_is_one_line_before_anything_is_trained(
    satune: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shut(Broken):
        def __init__(self, about: Any) -> None:
            raise PermissionError("not logged in")

    monkeypatch.setitem(tracking_module.TRACKERS, "mlflow", Shut)
    run = tmp_path / "run"
    code, stdout, stderr = satune("train", recipe, "log.report_to=mlflow", "--out", run)
    assert (code, stdout) == (2, "")
    assert stderr == (
        "error: log.report_to: mlflow: PermissionError: not logged in; mend that, or leave mlflow "
        "out\n"
    )
    # And nothing of the attempt is in the way of the next.
    assert satune("train", recipe, "stages=0", "--out", run)[0] == 0


def test_a_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(
            UserError, match=r"wandb cannot be imported .*; pip install 'satune\[wandb\]"
        ),
        tracking(LogSettings(("wandb",)), tmp_path, {}, print),
    ):
        raise AssertionError("not reached")
    (tmp_path / "trackers.json").write_text("[]")
    with (
        pytest.raises(UserError, match=r"trackers\.json: damaged; remove it"),
        tracking(SETTINGS, tmp_path, {}, print),
    ):
        raise AssertionError("not reached")


def test_names_that_come_from_data_are_ones_that_any_tracker_takes() -> None:
    event = {
        "event": "eval", "stage": 3, "greedy": False, "reward": 0.5, "per_problem": [0.5],
        "interval": [0.25, 0.75], "difference": (0.125, None, 1),
        "groups": {"a/b\n": {"reward": 1.0}, "..": {"reward": 0.0}},
        "figures": {"nothing": float("nan"), "text": "nan", "most": float("inf"), "ok": True},
    }  # fmt: skip
    begun = {"event": "run", "seed": 7, "stages": 2, "agents": {}, "host": {"threads": 2},
             "self_check": {"an/n": {"ratio": 0.5, "kl": "nan"}}}  # fmt: skip
    assert scalars(begun) == {"run/self_check/an_n/ratio": 0.5}  # type: ignore[arg-type]
    assert scalars(event) == {  # type: ignore[arg-type]
        "held_out.sampled/reward": 0.5,
        "held_out.sampled/interval/low": 0.25,
        "held_out.sampled/interval/high": 0.75,
        "held_out.sampled/difference/mean": 0.125,
        "held_out.sampled/difference/high": 1.0,
        "held_out.sampled/groups/a_b_/reward": 1.0,
        "held_out.sampled/groups/_/reward": 0.0,
        "held_out.sampled/figures/ok": 1.0,
    }
