"""The processes of a run that torchrun started. The first one, rank 0, drives; the others hear what
it says and take part.

Between calls rank 0 plays conversations for hours. So that a silent process can be told from a lost
one, it then says "still here" every quarter of the time-out.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from satune.agents.specs import ShardingSettings
from satune.files.interrupts import Lost
from satune.types import UserError

_STILL_HERE = "still here"
_WORDS = ("gloo", "nccl", "connection", "socket", "timed out", "broken pipe")
"""What the errors of a lost process have in common, whatever its transport."""


def started_by_torchrun() -> bool:
    """Whether the environment names a rank and how many processes there are."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


class Processes:
    """All processes of the run, over ``kind`` "cpu" or "cuda" of devices; a process alone is one of
    one. Raises UserError where they cannot be cut into ``settings.replicas`` equal parts."""

    def __init__(self, settings: ShardingSettings, kind: str) -> None:
        self.settings = settings
        self.kind = kind
        limit = timedelta(seconds=settings.timeout)
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        with self.noticing():
            if started_by_torchrun():
                dist.init_process_group(backend, timeout=limit)
            else:
                store = dist.HashStore()  # type: ignore[attr-defined]
                dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.on_this_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self.count % settings.replicas:
            raise UserError(
                f"sharding.replicas: {self.count} processes are not {settings.replicas} equal "
                "parts; give a divisor of the number of processes"
            )
        # Apart from the group of the weights, so that a thread may speak here.
        self._line: Any = dist.new_group(backend="gloo", timeout=limit)
        self.mesh = self._make_mesh()
        self.talking = threading.RLock()
        self._over = threading.Event()
        if self.drives and self.count > 1:
            threading.Thread(target=self._keep_alive, daemon=True).start()

    def _make_mesh(self) -> DeviceMesh:
        replicas = self.settings.replicas
        if replicas == 1:
            return init_device_mesh(self.kind, (self.count,), mesh_dim_names=("shards",))
        shape = (replicas, self.count // replicas)
        return init_device_mesh(self.kind, shape, mesh_dim_names=("replicas", "shards"))

    @property
    def drives(self) -> bool:
        return self.rank == 0

    # -- what rank 0 says ------------------------------------------------------------------------

    def tell(self, message: Any) -> None:
        """Have every other process hear ``message``. Raises Lost."""
        with self.talking, self.noticing():
            dist.broadcast_object_list([message], src=0, group=self._line)

    def hear(self) -> Any:
        """What rank 0 says next. Raises Lost."""
        while True:
            heard: list[Any] = [None]
            with self.noticing():
                dist.broadcast_object_list(heard, src=0, group=self._line)
            if heard[0] != _STILL_HERE:
                return heard[0]

    def _keep_alive(self) -> None:
        while not self._over.wait(self.settings.timeout / 4):
            # Whoever talks is heard anyway.
            if self.talking.acquire(blocking=False):
                try:
                    self.tell(_STILL_HERE)
                except Lost:
                    # The main thread is somewhere in a rollout; its handler tells it.
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                finally:
                    self.talking.release()

    # -- what all do together --------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the CPU."""
        total = tensor.clone()
        dist.all_reduce(total, group=self._line)
        return total

    def decided(self, value: float) -> float:
        """The number that rank 0 has."""
        told = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(told, src=0, group=self._line)
        return float(told)

    def everywhere(self, holds: bool) -> bool:
        """Whether something holds in every process."""
        return float(self.sum(torch.tensor([float(holds)]))) == self.count

    # -- how it ends -----------------------------------------------------------------------------

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Inside the block what a lost process makes of a collective is Lost."""
        try:
            yield
        except RuntimeError as error:
            if not any(word in str(error).lower() for word in _WORDS):
                raise
            # Without the line of its source, and in the words of a sentence.
            said = re.sub(r"^\[[^]]*\] *|(?<=rror): ", " ", str(error).splitlines()[0]).strip()
            where = f"process {self.rank} of {self.count}" if hasattr(self, "rank") else "a process"
            raise Lost(f"{where} lost another one ({said[:160]})") from error

    @contextmanager
    def ended_by_signal(self) -> Iterator[None]:
        """Inside the block SIGTERM, which torchrun sends when another process has failed, is Lost
        in the main thread."""

        def ended(*_: Any) -> None:
            raise Lost(f"process {self.rank} of {self.count} was told to end: another one failed")

        before = signal.signal(signal.SIGTERM, ended)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def dismiss(self) -> None:
        """Rank 0: tell the others that it is over."""
        self._over.set()
        if self.drives:
            self.tell(None)

    def close(self) -> None:
        """End without a failure: all processes come here."""
        with self.talking:
            dist.destroy_process_group()
