"""Owners of agents in threads of this process, and the run that drives their agents."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import tiny_world
from satune.commands.host import assemble_owners
from satune.commands.hosted import train_with_hosts
from satune.commands.train import tolerance_of
from satune.config.load import load_recipe
from satune.hosts.agent import HostedAgent
from satune.hosts.owner import Owner
from satune.hosts.server import HostServer, Kept
from satune.training.run import Training
from satune.training.trainer import train

TOKEN = "the owners' word"


class Killable(HostServer):
    """A server whose end nobody is told of, as that of a process that is killed."""

    def __init__(self, *arguments: Any) -> None:
        self.sockets: list[Any] = []
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.sockets.append(request)
        super().process_request(request, client_address)

    def kill(self) -> None:
        self.shutdown()
        self.server_close()
        for each in self.sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@dataclass
class Owners:
    """Some agents of a recipe, behind a server each or behind one. ``out`` holds what they keep."""

    recipe: Path
    out: Path
    overrides: tuple[str, ...] = ()
    servers: dict[str, Killable] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def start(self, agent: str, port: int = 0, *more: str) -> None:
        self.start_together([agent], port, *more)

    def start_together(self, agents: Sequence[str], port: int = 0, *more: str) -> None:
        """These agents behind one server, as one process keeps them."""
        recipe = load_recipe(self.recipe, [*self.overrides, *more])
        there = assemble_owners(recipe, {agent: self.out / agent for agent in agents})
        kept = {agent: Kept(owner, TOKEN) for agent, owner in there.items()}
        server = Killable(("127.0.0.1", port), kept)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.servers |= dict.fromkeys(agents, server)

    def stop(self, agent: str) -> int:
        """As a process that is killed: its memory is gone. Gives its port."""
        server = self.servers.pop(agent)
        server.kill()
        return server.server_address[1]

    def owner(self, agent: str) -> Owner:
        return self.servers[agent].agents[agent].owner

    def url(self, agent: str) -> str:
        return f"http://127.0.0.1:{self.servers[agent].server_address[1]}"

    @property
    def hosts(self) -> list[str]:
        """What names them to the run."""
        return [f"team.agents.{agent}.host={self.url(agent)}" for agent in self.servers]

    def training(self, out: Path, *more: str, resume: bool = False) -> Training:
        return tiny_world.training(
            self.recipe, out, [*self.overrides, *self.hosts, *more], resume=resume
        )

    def train(
        self,
        out: Path,
        *more: str,
        checkpoint: str | None = None,
        watch: Callable[[Any], None] | None = None,
    ) -> Training:
        """A whole run, from the beginning or from a checkpoint."""
        run = self.training(out, *more, resume=checkpoint is not None)
        if watch is not None:
            run.watch = watch
        recipe = load_recipe(self.recipe, [*self.overrides, *self.hosts, *more])
        train_with_hosts(
            run,
            [each for each in run.learners.values() if isinstance(each, HostedAgent)],
            recipe.hosts.wait,
            tolerance=tolerance_of(recipe),
            checkpoint=checkpoint,
            command="satune train RECIPE --resume",
            tell=self.told.append,
        )
        return run


@contextmanager
def owners(
    recipe: Path,
    out: Path,
    agents: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    together: bool = False,
) -> Iterator[Owners]:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("SATUNE_HOST_TOKEN", TOKEN)
        found = Owners(recipe, out, tuple(overrides))
        stack.callback(lambda: [found.stop(agent) for agent in list(found.servers)])
        for those in [agents] if together else [[agent] for agent in agents]:
            found.start_together(those)
        yield found


def alone(recipe: Path, out: Path, *overrides: str) -> Training:
    """The same run in one process."""
    run = tiny_world.training(recipe, out, overrides)
    train(run, tolerance=tolerance_of(load_recipe(recipe, overrides)))
    return run
