"""Hosts of one's own: the agents that a recipe trains are dealt over processes that keep them, here
or a machine each of a Slurm job, for as long as the run that drives them lasts.

They are ``satune host``, with a token that is made for the one start and handed over in the
environment. An agent keeps its checkpoints in ``OUT/hosts/NAME``, however many hosts there are.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from satune.config.schema import Recipe
from satune.files.writing import disk_errors
from satune.hosts.client import HostLost
from satune.loading import LAUNCH_VARIABLE
from satune.types import UserError

_LISTENS = re.compile(r"^agent \S+: http://\S+:(\d+), checkpoints in ", re.MULTILINE)
"""How a host says where it listens."""
_DEATH_SIGNAL = 1
"""prctl(2): PR_SET_PDEATHSIG."""
_PATIENCE = 20.0
"""Seconds that hosts have for their end."""
_Item = TypeVar("_Item")


def dealt(items: Sequence[_Item], count: int) -> list[list[_Item]]:
    """``items`` in their order in ``count`` parts, whose lengths differ by one at most."""
    size = len(items)
    return [list(items[size * i // count : size * (i + 1) // count]) for i in range(count)]


def shares(recipe: Recipe, count: int) -> list[list[str]]:
    """The agents that each of ``count`` hosts keeps: those that are trained, but for those that
    live with another owner.

    Raises UserError where they are fewer than hosts, and for agents that share all weights.
    """
    if recipe.team.sharing == "shared":
        raise UserError(
            "launch: --hosts deals agents out, and team.sharing: shared makes them one; remove one "
            "of the two"
        )
    agents = [
        name
        for name, agent in recipe.team.resolved().agents.items()
        # A run's own recipe names the addresses that its hosts had.
        if not agent.frozen and (agent.host is None or agent.host_token_env == LAUNCH_VARIABLE)
    ]
    if not 1 <= count <= len(agents):
        most = f"give 1 to {len(agents)}" if agents else "remove it"
        raise UserError(
            f"launch: --hosts is {count}, and {len(agents)} agents are there to be dealt out"
            f"{' ' if agents else ''}{_in_brackets(agents)}; {most}"
        )
    return dealt(agents, count)


def devices_of(recipe: Recipe, agents: Iterable[str]) -> set[str]:
    """Where the recipe puts these agents, in its own words."""
    return {recipe.team.agents[name].device or recipe.team.device for name in agents}


def _in_brackets(names: Sequence[str]) -> str:
    return f"({', '.join(names)})" if names else ""


def run_overrides(recipe: Recipe, addresses: Mapping[str, str]) -> list[str]:
    """What the run's recipe says of agents whose hosts are at ``addresses``."""
    said = []
    for name, url in addresses.items():
        said += [
            f"team.agents.{name}.host={url}",
            f"team.agents.{name}.host_token_env={LAUNCH_VARIABLE}",
        ]
        if recipe.team.agents[name].trust_remote_code:  # which is the host's to run
            said.append(f"team.agents.{name}.trust_remote_code=false")
    return said


@dataclass(frozen=True, slots=True)
class Place:
    """Where a host runs: at ``machine``, as the run reaches it; ``before`` goes before its command,
    and it listens at ``address``. ``variables`` are added to its environment."""

    machine: str = "127.0.0.1"
    address: str = "127.0.0.1"
    before: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def places_here(count: int, devices: Iterable[str]) -> list[Place]:
    """This machine, ``count`` times. Where none of the agents' ``devices`` is named by its number
    the GPUs that are seen here are dealt out as well; hosts that are more than GPUs share them."""
    named = any(device not in ("auto", "cuda") for device in devices)
    found = 0 if named else torch.cuda.device_count()
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (said.split(",") if said else [str(number) for number in range(found)])[:found]
    if not gpus:
        return [Place()] * count
    parts = dealt(gpus, count)
    seen = [part or [gpus[at * len(gpus) // count]] for at, part in enumerate(parts)]
    return [Place(variables={"CUDA_VISIBLE_DEVICES": ",".join(part)}) for part in seen]


def places_of_job(count: int, environment: Mapping[str, str]) -> list[Place]:
    """The first ``count`` machines of the Slurm job that this process is in. Raises UserError where
    it is in none, or has fewer."""
    nodes = environment.get("SLURM_JOB_NODELIST")
    if nodes is None:
        raise UserError(
            "launch: --srun is for inside a Slurm job, and SLURM_JOB_NODELIST is not set; "
            "write the job's script by --slurm FILE"
        )
    asked = ["scontrol", "show", "hostnames", nodes]
    try:
        said = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"launch: scontrol does not say which machines the job has: {error}"
        ) from None
    names = said.split()
    if len(names) < count:
        raise UserError(
            f"launch: --hosts is {count}, the job has {len(names)} machines; ask for more"
        )
    # Of all signals srun hands on an interrupt alone as it is, and that only without its status.
    once = ("srun", "--nodes=1", "--ntasks=1", "--export=ALL", "--disable-status")
    return [Place(name, "0.0.0.0", (*once, f"--nodelist={name}")) for name in names[:count]]


@dataclass(slots=True)
class _Started:
    """A host's process, and its log from ``begins`` on."""

    agents: Sequence[str]
    place: Place
    process: subprocess.Popen[Any]
    log: Path
    begins: int

    def address(self) -> str | None:
        """Where the run reaches it; None before it listens. Raises UserError where it has ended."""
        over = self.process.poll() is not None
        listens = _LISTENS.search(self._said())
        if over:
            raise UserError(f"launch: {self.end}")
        return f"http://{self.place.machine}:{listens[1]}" if listens else None

    @property
    def end(self) -> str:
        *_, last = self._said().splitlines() or ["it said nothing"]
        names, code = ", ".join(self.agents), self.process.returncode
        return f"the host of {names} has ended (exit code {code}): {last}; its log: {self.log}"

    def _said(self) -> str:
        return self.log.read_bytes()[self.begins :].decode("utf-8", "replace").strip()


@dataclass(frozen=True, slots=True)
class OwnHosts:
    """``satune host`` for each of ``shares`` at its place. ``recipe`` and ``overrides`` are the
    run's, ``options`` go with every command, and what hosts keep goes to ``out``."""

    recipe: str
    overrides: Sequence[str]
    options: Sequence[str]
    shares: Sequence[Sequence[str]]
    places: Sequence[Place]
    out: Path

    def command(self, number: int) -> list[str]:
        """How host ``number`` is started. It chooses its port, and says it."""
        agents, place = self.shares[number], self.places[number]
        own = [
            word
            for name in (name for share in self.shares for name in share)
            for word in (
                f"team.agents.{name}.host=null",
                f"team.agents.{name}.host_token_env={LAUNCH_VARIABLE}",
            )
        ]
        # One agent's folder is named, several have one each in the folder that is named.
        out = self.out / agents[0] if len(agents) == 1 else self.out
        return [
            *place.before, sys.executable, "-m", "satune", "host", self.recipe,
            *self.overrides, *own, *(word for name in agents for word in ("--agent", name)),
            "--port", "0", "--address", place.address, "--out", str(out), *self.options,
        ]  # fmt: skip

    @contextmanager
    def running(self, tell: Callable[[str], None]) -> Iterator[dict[str, str]]:
        """Start them and give the address of each agent's once all listen; ``tell`` is shown a line
        a host, and ``LAUNCH_VARIABLE`` is set for this process. They end with the block, and on
        Linux with this process however that ends.

        Raises UserError, with the log, for a host that ends before or while it is needed.
        """
        os.environ[LAUNCH_VARIABLE] = secrets.token_hex(32)
        started: list[_Started] = []
        with ExitStack() as stack:
            stack.callback(os.environ.pop, LAUNCH_VARIABLE)
            stack.callback(_end, started)
            for number in range(len(self.shares)):
                started.append(self._start(number, stack))
            while None in (urls := [host.address() for host in started]):
                time.sleep(0.1)
            addresses: dict[str, str] = {}
            for host, url in zip(started, urls, strict=True):
                addresses |= dict.fromkeys(host.agents, str(url))
                tell(f"{', '.join(host.agents)}: {url}, log in {host.log}")
            try:
                yield addresses
            except HostLost as lost:
                raise UserError(_why(lost, started, self.out)) from lost

    def _start(self, number: int, stack: ExitStack) -> _Started:
        log = self.out / f"host-{number + 1}.log"
        with disk_errors(log):
            self.out.mkdir(parents=True, exist_ok=True)
            file: IO[bytes] = stack.enter_context(log.open("ab"))
        place, begins = self.places[number], file.tell()
        process = subprocess.Popen(
            self.command(number),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **place.variables},
            start_new_session=True,  # ctrl-C is the run's to answer
            preexec_fn=_beginning(),
        )
        return _Started(self.shares[number], place, process, log, begins)


def _beginning() -> Callable[[], None]:
    """What a child does before its command: it is interrupted when this process is killed, where
    the system knows how, and does not ignore that, as what a shell has put in the background would.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if libc is not None:
            libc.prctl(_DEATH_SIGNAL, signal.SIGINT)

    return begin


def _why(lost: HostLost, started: Sequence[_Started], logs: Path) -> str:
    """What is said of a host that was lost: how its process ended, if it did, else where its log
    lies."""
    for _ in range(20):
        for host in started:
            if host.process.poll() is not None:
                return f"launch: {host.end}; the same command goes on"
        time.sleep(0.05)  # a connection is gone a little before its process
    return f"launch: {lost}; the hosts' logs lie in {logs}"


def _end(started: Sequence[_Started]) -> None:
    for host in started:
        host.process.send_signal(signal.SIGINT)  # nothing where it has ended
    until = time.monotonic() + _PATIENCE
    try:
        for host in started:
            with suppress(subprocess.TimeoutExpired):
                host.process.wait(max(0.0, until - time.monotonic()))
    finally:  # also where whoever waits is interrupted once more
        for host in started:
            host.process.kill()
            host.process.wait()
