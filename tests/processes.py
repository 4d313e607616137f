"""Work done by several processes that are forked from the test's, as torchrun would start them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from satune.agents.processes import Processes
from satune.agents.specs import ShardingSettings

SECONDS = 120.0


def free_port() -> int:
    """A free port below those that systems hand out to whoever connects, which might take it
    before it is listened on."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as listener:
            port = random.SystemRandom().randrange(15_000, 30_000)
            listener.bind(("127.0.0.1", port))
            return port


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells process ``rank``."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def in_processes(
    count: int,
    work: Callable[[Processes], Any],
    settings: ShardingSettings | None = None,
    *,
    check: bool = True,
) -> list[Any]:
    """What ``work`` returns in each of ``count`` processes, by rank. With ``check`` an error in one
    of them is an error here; without, its text is what it returned, None for one that died."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, children = [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(
            target=_child, args=(rank, count, port, work, settings or ShardingSettings(), theirs)
        )
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    found = []
    try:
        for pipe in pipes:
            assert pipe.poll(SECONDS), "a process is stuck"
            try:
                found.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                found.append((False, None))
    finally:
        for child in children:
            child.join(10)
            if child.is_alive():
                child.kill()
    for fine, result in found:
        assert fine or not check, result
    return [result for _, result in found]


def _child(
    rank: int,
    count: int,
    port: int,
    work: Callable[[Processes], Any],
    settings: ShardingSettings,
    pipe: Any,
) -> None:
    torch.set_num_threads(1)
    os.environ |= environment(rank, count, port)
    try:
        result = True, work(Processes(settings, "cpu"))
    except BaseException as error:
        result = False, f"process {rank}: {error}\n{traceback.format_exc()}"
    # Plainly pickled: torch would share the memory of tensors, which ends with this process.
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()
    # Without what the test's process wants done at its end.
    os._exit(0)
