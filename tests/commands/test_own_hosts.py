"""Agents dealt over hosts of one's own: who gets which, and what becomes of the processes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from satune.commands import own_hosts
from satune.commands.own_hosts import (
    OwnHosts,
    Place,
    dealt,
    places_here,
    places_of_job,
    run_overrides,
    shares,
)
from satune.config.schema import Recipe
from satune.hosts.client import HostLost
from satune.loading import LAUNCH_VARIABLE
from satune.types import UserError

SAYS = """
import os, sys, time
print("agent " + sys.argv[1] + ": http://0.0.0.0:81, checkpoints in here", file=sys.stderr)
"""
"""A host that says where it listens, and ends."""
STAYS = SAYS + "time.sleep(60)"
UNTIL = SAYS + "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\nsys.exit(3)"
"""A host that is there until a file of its agent's name lies in the working directory."""
NOTES = f"""
print(os.getpid(), os.environ[{LAUNCH_VARIABLE!r}], file=open(sys.argv[1], "w"), flush=True)
"""
"""It leaves such a file."""


class Scripted(OwnHosts):
    """Hosts that are a few lines of Python each, what goes before their command."""

    def command(self, number: int) -> list[str]:
        return [sys.executable, "-c", *self.places[number].before, self.shares[number][0]]


def scripted(out: Path, *programs: str) -> OwnHosts:
    names = [["ann"], ["bob"]][: len(programs)]
    return Scripted("", [], [], names, [Place("far", before=[each]) for each in programs], out)


def recipe(**agents: dict[str, Any]) -> Recipe:
    given = {name: {"model": f"org/{name}", **more} for name, more in agents.items()}
    return Recipe.model_validate({"team": {"agents": given}, "task": "sums", "protocol": "chain"})


# -- who gets which ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (1, [[1, 2, 3, 4, 5]]),
        (2, [[1, 2], [3, 4, 5]]),
        (3, [[1], [2, 3], [4, 5]]),
        (5, [[1], [2], [3], [4], [5]]),
    ],
)
def test_parts_are_in_order_and_as_equal_as_can_be(count: int, parts: list[list[int]]) -> None:
    assert dealt([1, 2, 3, 4, 5], count) == parts


def test_trained_agents_without_another_owner_are_dealt_out() -> None:
    far = {"host": "https://far.example"}
    ours = {
        "host": "http://127.0.0.1:1234",
        "host_token_env": LAUNCH_VARIABLE,
    }  # of an earlier start
    team = recipe(a={}, b=far, c={"frozen": True}, d=ours, e={})
    assert shares(team, 2) == [["a"], ["d", "e"]]


def test_more_hosts_than_agents_are_one_line() -> None:
    with pytest.raises(UserError, match=r"--hosts is 3, and 2 agents .*\(a, b\); give 1 to 2$"):
        shares(recipe(a={}, b={}), 3)
    with pytest.raises(UserError, match=r"--hosts is 1, and 0 agents are .* dealt out; remove it$"):
        shares(recipe(a={"host": "https://far.example"}), 1)


def test_the_run_is_told_where_they_are_and_runs_no_code_of_theirs() -> None:
    team = recipe(a={}, b={"trust_remote_code": True})
    said = run_overrides(team, {"a": "http://x:1", "b": "http://x:2"})
    assert said == [
        "team.agents.a.host=http://x:1",
        f"team.agents.a.host_token_env={LAUNCH_VARIABLE}",
        "team.agents.b.host=http://x:2",
        f"team.agents.b.host_token_env={LAUNCH_VARIABLE}",
        "team.agents.b.trust_remote_code=false",
    ]


def test_a_hosts_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "python")
    places = [Place(), Place("n2", "0.0.0.0", ("srun", "--nodelist=n2"))]
    out = Path("run/hosts")
    made = OwnHosts("relay", ["seed=3"], ["--trust"], [["a"], ["b", "c"]], places, out)
    own = [
        word
        for name in "abc"
        for word in (
            f"team.agents.{name}.host=null",
            f"team.agents.{name}.host_token_env={LAUNCH_VARIABLE}",
        )
    ]
    listens = ["--port", "0", "--address"]
    assert made.command(0) == [
        "python", "-m", "satune", "host", "relay", "seed=3", *own, "--agent", "a",
        *listens, "127.0.0.1", "--out", "run/hosts/a", "--trust",
    ]  # fmt: skip
    # Of several agents each has the folder of its name in there: the same wherever they are.
    assert made.command(1) == [
        "srun", "--nodelist=n2", "python", "-m", "satune", "host", "relay", "seed=3", *own,
        "--agent", "b", "--agent", "c", *listens, "0.0.0.0", "--out", "run/hosts", "--trust",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "found", "device", "seen"),
    [
        (None, 4, "auto", ["0,1", "2,3"]),
        (None, 3, "cuda", ["0", "1,2"]),
        ("5,2", 2, "auto", ["5", "2"]),
        (None, 1, "auto", ["0", "0"]),
        (None, 0, "auto", [None, None]),
        (None, 4, "cpu", [None, None]),
        (None, 4, "cuda:3", [None, None]),
        (None, 4, "auto cuda:0", [None, None]),  # one agent's own, which is of all GPUs
    ],
)
def test_gpus_are_dealt_out(
    said: str | None, found: int, device: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if said is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    places = places_here(2, device.split())
    assert [place.variables.get("CUDA_VISIBLE_DEVICES") for place in places] == seen


def test_a_jobs_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"SLURM_JOB_NODELIST": "n[1-2]"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="scontrol does not say which machines"):
        places_of_job(2, job)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && echo n1 && echo n2\n')
    scontrol.chmod(0o755)
    places = places_of_job(2, job)
    assert [(place.machine, place.address) for place in places] == [
        ("n1", "0.0.0.0"),
        ("n2", "0.0.0.0"),
    ]
    assert [place.before[-1] for place in places] == ["--nodelist=n1", "--nodelist=n2"]
    with pytest.raises(UserError, match="--hosts is 3, the job has 2 machines"):
        places_of_job(3, job)


# -- their processes -----------------------------------------------------------------------------


def ended(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_they_live_as_long_as_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = STAYS.replace("print", f"{NOTES}print", 1)
    told: list[str] = []
    hosts = scripted(Path("hosts"), program, program)
    with pytest.raises(KeyboardInterrupt), hosts.running(told.append) as addresses:
        assert addresses == {"ann": "http://far:81", "bob": "http://far:81"}
        (ann, token), (bob, theirs) = (Path(n).read_text().split() for n in ("ann", "bob"))
        assert token == theirs == os.environ[LAUNCH_VARIABLE] and len(token) == 64
        assert not ended(int(ann)) and not ended(int(bob))
        raise KeyboardInterrupt
    assert ended(int(ann)) and ended(int(bob))
    assert LAUNCH_VARIABLE not in os.environ
    assert told == [
        "ann: http://far:81, log in hosts/host-1.log",
        "bob: http://far:81, log in hosts/host-2.log",
    ]


def test_they_are_interrupted_also_where_a_shell_has_this_process_ignore_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_hosts, "_PATIENCE", 5.0)
    program = f"""{SAYS}
try:
    time.sleep(60)
except KeyboardInterrupt:
    open(sys.argv[1], "w").close()
"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with scripted(Path("hosts"), program).running(print):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "ann").exists()


def test_each_start_has_its_token_and_reads_its_own_lines(tmp_path: Path) -> None:
    tokens = []
    for port in ("81", "82"):
        with scripted(tmp_path, STAYS.replace(":81", f":{port}")).running(print) as addresses:
            tokens.append(os.environ[LAUNCH_VARIABLE])
            assert addresses == {"ann": f"http://far:{port}"}
    assert tokens[0] != tokens[1]
    assert (tmp_path / "host-1.log").read_text().count("agent ann") == 2  # nothing is lost


@pytest.mark.parametrize("dies", ["import sys; sys.exit('error: no such model')", SAYS])
def test_one_that_ends_before_the_run_begins_is_named_with_its_log(
    tmp_path: Path, dies: str
) -> None:
    hosts = scripted(tmp_path, "import time; time.sleep(60)", dies)  # the first is not ready yet
    with pytest.raises(UserError) as refused, hosts.running(print):
        pytest.fail("the run begins")
    line = str(refused.value)
    assert line.startswith("launch: the host of bob has ended (exit code ")
    assert line.endswith(f"; its log: {tmp_path / 'host-2.log'}")
    assert ("no such model" in line) == ("model" in dies)


def test_one_that_ends_under_the_run_is_named_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hosts = scripted(tmp_path, STAYS, UNTIL)
    with (
        pytest.raises(
            UserError, match=r"host of bob has ended \(exit code 3\).*host-2\.log; the s"
        ),
        hosts.running(print),
    ):
        (tmp_path / "bob").touch()
        raise HostLost("agent bob: its host is lost")
    others = scripted(tmp_path, STAYS)
    with pytest.raises(UserError) as said, others.running(print):
        raise HostLost("agent cat: its host is lost; then go on with: satune launch")
    assert str(said.value) == (
        "launch: agent cat: its host is lost; then go on with: satune launch; the hosts' logs lie "
        f"in {tmp_path}"
    )
