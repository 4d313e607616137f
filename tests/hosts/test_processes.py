"""Owners and the run as processes: killed on either side, and in network namespaces of their own
with a link that is cut."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import tiny_world
from command_line import ENVIRONMENT
from owners import TOKEN, alone

pytestmark = pytest.mark.slow

AGENTS = ("ann", "bob")
OVERRIDES = ("stages=2",)


class Processes:
    """``satune`` commands, each with its log; in the namespace ``ip`` where one is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[subprocess.Popen[Any]] = []

    def start(self, name: str, *words: str, namespace: str | None = None) -> subprocess.Popen[Any]:
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        log = (self.folder / f"{name}.log").open("w")
        process = subprocess.Popen(
            [*inside, sys.executable, "-m", "satune", *words],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            env=ENVIRONMENT | {"SATUNE_HOST_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.running.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def host(self, recipe: Path, agent: str, *more: str, namespace: str | None = None) -> str:
        """An owner's process, once it listens; its address."""
        words = ["host", str(recipe), *OVERRIDES, "--agent", agent]
        out = ["--out", str(self.folder / agent)]
        process = self.start(agent, *words, *out, *more, namespace=namespace)
        setattr(self, agent, process)
        until(lambda: "ctrl-C ends it" in self.log(agent), process, lambda: self.log(agent))
        found = re.search(r"http://\S+:\d+", self.log(agent))
        assert found is not None
        return found[0]

    def end(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
            process.wait()


def until(
    done: Callable[[], bool],
    process: subprocess.Popen[Any],
    said: Callable[[], str],
    seconds: float = 300,
) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, said()
        assert time.monotonic() < end, said()
        time.sleep(0.05)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The recipe, and the run of it in one process."""
    folder = tmp_path_factory.mktemp("processes")
    recipe = tiny_world.build(folder / "world")
    alone(recipe, folder / "one", *OVERRIDES)
    return recipe, folder / "one"


def told(out: Path, kind: str, count: int) -> bool:
    """Whether so many events of a kind have been written."""
    return (out / "events.jsonl").is_file() and len(tiny_world.events(out, kind)) >= count


def assert_same(one: Path, out: Path, folder: Path) -> None:
    assert tiny_world.events(one) == tiny_world.events(out)
    for agent in AGENTS:
        mine = load_file(one / "team" / agent / "model.safetensors")
        theirs = load_file(folder / agent / "agent" / agent / "model.safetensors")
        assert tiny_world.same(mine, theirs)
    assert not list((out / "team").rglob("*.safetensors"))  # a reference, no weights


def words_of(recipe: Path, out: Path, addresses: Sequence[str], *more: str) -> list[str]:
    hosts = [f"team.agents.{a}.host={url}" for a, url in zip(AGENTS, addresses, strict=True)]
    return ["train", str(recipe), *OVERRIDES, *hosts, "--out", str(out), *more]


def test_killed_on_either_side(
    whole: tuple[Path, Path], processes: Processes, tmp_path: Path
) -> None:
    recipe, one = whole
    out = tmp_path / "run"
    addresses = [processes.host(recipe, agent, "--port", "0") for agent in AGENTS]
    run = processes.start("run", *words_of(recipe, out, addresses))
    until(lambda: told(out, "update", 1), run, lambda: processes.log("run"))
    run.send_signal(signal.SIGKILL)
    run.wait()
    processes.bob.send_signal(signal.SIGKILL)  # type: ignore[attr-defined]
    processes.bob.wait()  # type: ignore[attr-defined]
    addresses[1] = processes.host(recipe, "bob", "--port", "0")
    again = processes.start("again", *words_of(recipe, out, addresses, "--resume"))
    assert again.wait() == 0, processes.log("again")
    assert_same(one, out, tmp_path)


def test_one_process_keeps_two_agents(
    whole: tuple[Path, Path], processes: Processes, tmp_path: Path
) -> None:
    recipe, one = whole
    words = ["host", str(recipe), *OVERRIDES, "--agent", "ann", "--agent", "bob", "--port", "0"]
    both = processes.start("both", *words, "--out", str(tmp_path / "both"))
    until(lambda: "ctrl-C ends it" in processes.log("both"), both, lambda: processes.log("both"))
    (url,) = {*re.findall(r"http://[^,\s]+:\d+", processes.log("both"))}
    run = processes.start("run", *words_of(recipe, tmp_path / "run", [url, url]))
    assert run.wait() == 0, processes.log("run")
    assert_same(one, tmp_path / "run", tmp_path / "both")
    assert all(f"{agent}: step" in processes.log("both") for agent in AGENTS)


# -- namespaces ----------------------------------------------------------------------------------


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Network:
    """A bridge and three namespaces on it: a run and two owners."""

    def __init__(self) -> None:
        self.tag = f"{os.getpid() % 100000:x}"
        self.bridge = f"sb{self.tag}"
        self.names = [f"sn{self.tag}-{i}" for i in range(3)]
        self.links = [f"sv{self.tag}-{i}" for i in range(3)]
        self.addresses = [f"10.77.91.{i + 1}" for i in range(3)]

    def up(self) -> str | None:
        """Why there is none; None where there is one."""
        if shutil.which("ip") is None or os.geteuid() != 0:
            return "network namespaces need root and iproute2"
        try:
            ip("link", "add", self.bridge, "type", "bridge")
            ip("link", "set", self.bridge, "up")
            for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
                ip("netns", "add", name)
                ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("link", "set", link, "master", self.bridge, "up")
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            return f"no network namespaces here: {error.stderr.decode().strip()}"
        return None

    def down(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

    def cut(self, number: int) -> None:
        ip("link", "set", self.links[number], "down")

    def mend(self, number: int) -> None:
        ip("link", "set", self.links[number], "up")


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network()
    why = made.up()
    if why is not None:
        made.down()
        pytest.skip(why)
    yield made
    made.down()


class Capture(threading.Thread):
    """All frames of an interface, in the order in which they came."""

    def __init__(self, link: str) -> None:
        super().__init__(daemon=True)
        self.frames: list[bytes] = []
        self.over = False
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        self.socket.bind((link, 0))
        self.socket.settimeout(0.2)

    def run(self) -> None:
        while not self.over:
            try:
                self.frames.append(self.socket.recv(1 << 17))
            except TimeoutError:
                continue
            except OSError:  # the link is down
                time.sleep(0.2)

    def stop(self) -> bytes:
        self.over = True
        self.join()
        self.socket.close()
        return b"".join(self.frames)


def test_two_owners_in_namespaces_and_a_cut_link(
    whole: tuple[Path, Path], processes: Processes, network: Network, tmp_path: Path
) -> None:
    recipe, one = whole
    out = tmp_path / "run"
    addresses = []
    for agent, name, address in zip(AGENTS, network.names[1:], network.addresses[1:], strict=True):
        place = ["--address", address, "--port", "8470"]
        addresses.append(processes.host(recipe, agent, *place, namespace=name))
    capture = Capture(network.links[0])
    capture.start()

    # Configured to wait: it goes on by itself once the link is mended.
    words = words_of(recipe, out, addresses, "hosts.timeout=20", "hosts.wait=240")
    run = processes.start("run", *words, namespace=network.names[0])
    until(lambda: told(out, "update", 1), run, lambda: processes.log("run"))
    network.cut(2)
    until(lambda: "waiting up to 240 s" in processes.log("run"), run, lambda: processes.log("run"))
    network.mend(2)
    assert run.wait() == 0, processes.log("run")
    assert "all hosts are there" in processes.log("run")
    assert_same(one, out, tmp_path)

    seen = capture.stop()
    assert b"/improve HTTP" in seen and b"log_ratio_E" in seen
    for agent in AGENTS:
        weights = load_file(tmp_path / agent / "agent" / agent / "model.safetensors")
        for tensor in weights.values():
            flat = tensor.reshape(-1)
            assert flat[:4].numpy().tobytes() not in seen
            texts = [repr(x).encode() for x in flat[:64].tolist() if not x.is_integer()]
            assert not any(text in seen for text in texts)

    # Configured not to wait: one line.
    network.cut(2)
    short = words_of(recipe, tmp_path / "other", addresses, "hosts.timeout=4")
    ended = processes.start("short", *short, namespace=network.names[0])
    assert ended.wait() == 2
    (line,) = [x for x in processes.log("short").splitlines() if x.startswith("error:")]
    assert "is lost" in line
