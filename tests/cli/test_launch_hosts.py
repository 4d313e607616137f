"""A team whose agents are dealt over hosts by one command: here, and by the script for Slurm with
stand-ins for its commands."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_world
from command_line import ENVIRONMENT, Run, refused
from owners import alone
from satune.loading import LAUNCH_VARIABLE

STAGES = "stages=2"
WORDS = ("team.agents.ann.delta=0.1", STAGES, "--hosts", "2")
STAND_INS = {
    "scontrol": "echo localhost; echo 127.0.0.1",  # one machine under two names
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The recipe, and the run of it in one process."""
    folder = tmp_path_factory.mktemp("launched")
    recipe = tiny_world.build(folder / "world")
    alone(recipe, folder / "one", *WORDS[:2])
    return recipe, folder / "one"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[Any]]]:
    """Starts a program in ``tmp_path``, which logs to ``log`` there."""
    running: list[subprocess.Popen[Any]] = []

    def start(*command: str, **variables: str) -> subprocess.Popen[Any]:
        with (tmp_path / "log").open("ab") as log:
            running.append(
                subprocess.Popen(
                    command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env=ENVIRONMENT | {"TMPDIR": str(tmp_path)} | variables,
                )
            )  # fmt: skip
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


def until(
    done: Callable[[], Any], process: subprocess.Popen[Any], log: Path, seconds: float = 300
) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def trains(out: Path) -> bool:
    return (out / "events.jsonl").is_file() and bool(tiny_world.events(out, "update"))


def commands() -> dict[int, str]:
    """The command lines of all processes, as ps shows them."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def hosts_of(recipe: Path) -> list[int]:
    return [n for n, words in commands().items() if f"satune host {recipe}" in words]


def token_of(process: int) -> str:
    variables = Path(f"/proc/{process}/environ").read_text().split("\0")
    (token,) = (
        each.removeprefix(f"{LAUNCH_VARIABLE}=")
        for each in variables
        if each.startswith(LAUNCH_VARIABLE)
    )
    return token


def contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def assert_same(one: Path, out: Path) -> None:
    """A whole run, with a team that needs nobody."""
    assert tiny_world.events(one) == tiny_world.events(out)
    assert tiny_world.team_files(one) == tiny_world.team_files(out)
    manifest = "team/manifest.json"
    assert (one / manifest).read_text() == (out / manifest).read_text()


@pytest.mark.slow
def test_a_team_over_two_hosts_is_the_run_of_one_process(
    whole: tuple[Path, Path], started: Callable[..., subprocess.Popen[Any]], tmp_path: Path
) -> None:
    recipe, one = whole
    out, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "satune", "launch", str(recipe), *WORDS, "--out", "run"]
    run = started(*command)
    until(lambda: trains(out), run, log)
    hosts = hosts_of(recipe)
    assert len(hosts) == 2
    (token,) = {token_of(host) for host in hosts}
    assert not any(token in words for words in commands().values())

    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 60
    while hosts_of(recipe):
        assert time.monotonic() < deadline, "hosts live on without their run"
        time.sleep(0.05)

    again = started(*command)
    assert again.wait() == 0, log.read_text()
    assert not hosts_of(recipe)
    assert_same(one, out)
    assert token.encode() not in contents(tmp_path)

    said = [(out / "hosts" / f"host-{n}.log").read_bytes() for n in (1, 2)]
    assert started(*command).wait() == 0
    assert "the run is finished" in log.read_text()
    assert said == [(out / "hosts" / f"host-{n}.log").read_bytes() for n in (1, 2)]


@pytest.mark.slow
def test_a_job_is_interrupted_and_goes_on_when_it_is_put_into_the_queue_again(
    whole: tuple[Path, Path],
    started: Callable[..., subprocess.Popen[Any]],
    satune: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, one = whole
    monkeypatch.chdir(tmp_path)
    out, log = tmp_path / "run", tmp_path / "log"
    words = ["launch", str(recipe), *WORDS, "--out", "run", "--slurm", "job.sh"]
    assert satune(*words) == (0, "sbatch job.sh\n", "")
    (tmp_path / "bin").mkdir()
    for name, line in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/usr/bin/env bash\necho {name} $* >> asked\n{line}\n")
        program.chmod(0o755)
    inside = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-[1-2]"
    }  # fmt: skip

    job = started("bash", "job.sh", **inside)
    until(lambda: trains(out), job, log)
    job.send_signal(signal.SIGINT)  # as --signal=B:INT@120 does
    assert job.wait() == 130
    assert f"go on with: satune launch {recipe} {' '.join(WORDS[:2])}" in log.read_text()
    assert not hosts_of(recipe)

    assert started("bash", "job.sh", **inside).wait() == 0, log.read_text()
    assert_same(one, out)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == "scontrol show hostnames node-[1-2]"
    assert sorted(re.findall(r"--nodelist=(\S+)", "\n".join(asked[1:3]))) == [
        "127.0.0.1", "localhost",
    ]  # fmt: skip
    # Each is reached by the name of its machine, and listens to all of them.
    assert all("--address 0.0.0.0" in line for line in asked[1:3])
    told = log.read_text()
    assert re.search(r"^ann: http://localhost:\d+, log in run/hosts/host-1\.log$", told, re.M)
    assert re.search(r"^bob: http://127\.0\.0\.1:\d+, log in run/hosts/host-2\.log$", told, re.M)


def test_the_script_starts_the_same_command_inside_the_job(
    satune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["launch", "relay", "seed=3", "--hosts", "3", "--out", "it's here", "--minutes", "90"]
    assert satune(*words, "--slurm", "job.sh", "--sbatch", "--gres=gpu:1")[0] == 0
    lines = (tmp_path / "job.sh").read_text().splitlines()
    for wanted in (
        "--nodes=3", "--ntasks-per-node=1", "--time=90", "--requeue", "--signal=B:INT@120",
        "--gres=gpu:1",
    ):  # fmt: skip
        assert f"#SBATCH {wanted}" in lines
    assert shlex.split(lines[-1]) == [
        "exec", sys.executable, "-m", "satune", "launch", "relay", "seed=3", "--out", "it's here",
        "--hosts", "3", "--srun",
    ]  # fmt: skip


def test_what_cannot_be_is_told_before_a_host_begins(
    satune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").touch()
    words = ("launch", "relay", "--hosts", "2", "--out")
    assert "full: is not empty and holds no run" in refused(satune(*words, "full"))
    assert [path.name for path in full.iterdir()] == ["thesis.tex"]

    # A run of one process keeps its agents.
    whole = tmp_path / "whole"
    whole.mkdir()
    recipe = Path(__file__).parents[2] / "recipes" / "relay.yaml"
    (whole / "recipe.yaml").write_text(recipe.read_text())
    (whole / "events.jsonl").write_text('{"event": "run", "stages": 16}\n')
    said = refused(satune(*words, "whole"))
    assert said == "whole: the run was started with no `--hosts`, and goes on with that alone"
    assert not (whole / "hosts").exists()
