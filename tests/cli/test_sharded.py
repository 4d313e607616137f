"""``satune train`` over several processes: the run of one process, resumes at other numbers of
them, and processes that are killed."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from command_line import ENVIRONMENT, Run, refused
from processes import environment, free_port
from tiny_world import build, command, events

if TYPE_CHECKING:
    from io import TextIOWrapper

SECONDS = 600.0


class Processes:
    """``satune`` in several processes, with what torchrun would tell them. They are forked of a
    process that has loaded the libraries and done nothing else: of the test's own they would
    inherit whatever its threads hold at that moment, locks too."""

    def __init__(self, count: int, arguments: Sequence[str | Path], logs: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["satune.commands.train", "transformers", "peft"])
        logs.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.logs = [logs / f"{rank}.log" for rank in range(count)]
        self.children: list[Any] = []
        for rank in range(count):
            surroundings = environment(rank, count, port)
            target = (surroundings, [*map(str, arguments)], str(self.logs[rank]))
            child = context.Process(target=_satune, args=target)
            child.start()
            self.children.append(child)

    def end(self, within: float = SECONDS) -> list[int | None]:
        """The exit codes, once all have ended."""
        until = time.monotonic() + within
        for child in self.children:
            child.join(max(0.0, until - time.monotonic()))
        codes = [child.exitcode for child in self.children]
        for child in self.children:
            if child.is_alive():
                child.kill()
        return codes

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def stuck(self) -> str:
        """Where each process stands, once it has been there for long."""
        stacks = [Path(f"{log}.stacks") for log in self.logs]
        return "\n".join(file.read_text() for file in stacks if file.exists())


def _satune(surroundings: dict[str, str], arguments: list[str], log: str) -> None:
    os.environ |= surroundings
    # One that is stuck says where before the test gives up.
    stacks = os.open(f"{log}.stacks", os.O_WRONLY | os.O_CREAT)
    faulthandler.dump_traceback_later(SECONDS - 30, file=stacks)
    for stream in (sys.stdout, sys.stderr):
        cast("TextIOWrapper", stream).reconfigure(line_buffering=True)
    try:
        command(arguments, log)
    except SystemExit as ended:
        os._exit(int(ended.code or 0))


def updates(out: Path) -> list[dict[str, Any]]:
    return events(out, "update")


def assert_same_run(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> None:
    """The same steps are accepted, and KL agrees within 1%."""
    assert [e["accepted"] for e in one] == [e["accepted"] for e in other]
    assert any(e["accepted"] for e in one)
    for a, b in zip(one, other, strict=True):
        for figure in ("mean", "quantile", "max", "reverse_quantile"):
            assert b["kl"][figure] == pytest.approx(a["kl"][figure], rel=0.01)
        assert b["scale"] == pytest.approx(a["scale"], rel=0.01)


LORA = ["team.sharing=lora", "team.agents.ann.model={0}", "team.agents.bob.model={0}"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_over_processes_is_that_of_one(kind: str, satune: Run, tmp_path: Path) -> None:
    recipe = build(tmp_path / "world")
    model = tmp_path / "world" / "model-0"
    words = [word.format(model) for word in LORA] if kind == "lora" else []
    given = ["train", recipe, "--trust", *words]
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert satune(*given, "--out", one)[0] == 0
    run = Processes(2, [*given, "sharding={}", "--out", two], tmp_path / "logs")
    assert run.end() == [0, 0], run.said(0) + run.said(1)
    assert run.said(1) == "" or "error" not in run.said(1)
    assert_same_run(updates(one), updates(two))

    # A checkpoint of two processes, gone on with by one, by one that shards nothing, by three.
    shutil.copytree(two, three)
    on = [*given, "stages=3", "--resume"]
    assert satune(*on, "--out", two)[0] == 0
    run = Processes(3, [*on, "sharding={}", "--out", three], tmp_path / "logs-3")
    assert run.end() == [0, 0, 0], run.said(0)
    assert len(updates(two)) == 6
    assert_same_run(updates(two), updates(three))
    shutil.rmtree(three)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_of_a_killed_process_end(killed: int, satune: Run, tmp_path: Path) -> None:
    recipe, out = build(tmp_path / "world"), tmp_path / "run"
    sharding = "sharding={timeout: 30}"
    given = ["train", recipe, "--trust", "stages=500", "--out", out]
    run = Processes(3, [*given, sharding], tmp_path / "logs")
    wait_for_an_update(run, out)
    run.children[killed].kill()
    started = time.monotonic()
    codes = run.end(within=90)
    assert time.monotonic() - started < 80
    for rank, code in enumerate(codes):
        if rank == killed:
            continue
        assert code == 2, run.said(rank)
        last = run.said(rank).splitlines()[-1]
        assert last.startswith("error: process") and "--nproc-per-node 3 -m satune train" in last
        assert run.said(rank).count("error: ") == 1 and "Traceback" not in run.said(rank)
    done = max(e["stage"] for e in updates(out))
    code, _, said = satune(*given, "--resume", f"stages={done + 1}", "sharding={}")
    assert code == 0, said
    assert max(e["stage"] for e in updates(out)) == done + 1


@pytest.mark.slow
def test_ctrl_c_ends_all_and_one_says_how_to_go_on(tmp_path: Path) -> None:
    recipe, out = build(tmp_path / "world"), tmp_path / "run"
    given = ["train", recipe, "--trust", "stages=500", "sharding={}", "--out", out]
    run = Processes(2, given, tmp_path / "logs")
    wait_for_an_update(run, out)
    for child in run.children:
        os.kill(child.pid, signal.SIGINT)
    assert run.end(within=90) == [130, 0], run.said(0) + run.said(1)
    assert "torchrun --nproc-per-node 2 -m satune train" in run.said(0).splitlines()[-1]
    assert run.said(1) == ""


def wait_for_an_update(run: Processes, out: Path) -> None:
    until = time.monotonic() + SECONDS
    while not (out / "events.jsonl").exists() or not updates(out):
        going = time.monotonic() < until and run.children[0].is_alive()
        assert going, run.said(0) + run.said(1) + run.stuck()
        time.sleep(0.1)


@pytest.mark.slow
def test_torchrun_starts_it_and_one_line_says_what_is_wrong(tmp_path: Path) -> None:
    recipe = build(tmp_path / "world")
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    given = [*started, "satune", "train", str(recipe), "--trust", "stages=1"]
    out = ["--out", str(tmp_path / "run")]

    def end(*words: str) -> tuple[int, str]:
        run = subprocess.run(
            [*given, *words, *out], capture_output=True, text=True, env=ENVIRONMENT, timeout=SECONDS
        )
        return run.returncode, run.stdout + run.stderr

    code, said = end("sharding={}")
    assert code == 0, said
    assert len(updates(tmp_path / "run")) == 2
    # The directory holds a run now.
    code, said = end("sharding={}")
    # torchrun adds a report of its own.
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(lines) == 1 and "already holds a run" in lines[0], said


def test_several_processes_need_a_recipe_that_shards(
    satune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build(tmp_path / "world")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(satune("train", recipe, "--trust", "--out", tmp_path / "run"))
    assert said.startswith("2 processes were started") and "sharding: {}" in said
    assert not (tmp_path / "run").exists()


def test_what_is_not_sharded_is_refused(satune: Run, tmp_path: Path) -> None:
    recipe = build(tmp_path / "world")
    given = ["train", recipe, "--trust", "--out", tmp_path / "run", "sharding={}"]
    said = refused(satune(*given, "credit=gae", "critic.kind=head"))
    assert "sharding" in said and "critic" in said
    said = refused(satune(*given, "team.device=cuda:1"))
    assert "team.device" in said
