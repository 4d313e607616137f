"""A run some of whose agents live with their owners, when one of their hosts is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from satune.hosts.agent import HostedAgent
from satune.hosts.client import HostLost, HostSilent
from satune.training.checkpoint import Checkpoints
from satune.training.run import Training
from satune.training.self_check import Tolerance
from satune.training.trainer import train

_PAUSE = 1.0
"""Seconds between two questions whether a host is there again."""


def train_with_hosts(
    training: Training,
    hosts: Iterable[HostedAgent],
    wait: float,
    *,
    tolerance: Tolerance,
    checkpoint: str | None,
    command: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """``training.trainer.train``; a host that is lost is waited for, up to ``wait`` seconds, and
    the run goes on from its newest checkpoint: the step that was lost is as if it had never been
    proposed. Raises HostLost where it stays away, where there is no checkpoint yet, and where no
    answer came in time for a second time from one checkpoint: the same would be asked again. It
    names the ``command`` that goes on."""
    hosts = list(hosts)
    silent_from: str | None = None
    while True:
        try:
            return train(training, tolerance=tolerance, checkpoint=checkpoint)
        except HostLost as lost:
            store = Checkpoints(training.directory.checkpoints, keep=1)  # only to look
            found = store.latest() if wait else None
            if found is None:
                raise HostLost(f"{lost}; then go on with: {command}") from lost
            checkpoint = found[0]
            if isinstance(lost, HostSilent):
                if checkpoint == silent_from:
                    raise HostLost(
                        f"{lost}, for the second time from {checkpoint}; give more seconds in "
                        f"hosts.timeout, then go on with: {command}"
                    ) from lost
                silent_from = checkpoint
            tell(f"{lost}; waiting up to {wait:g} s to go on from {checkpoint}")
            try:
                _await(hosts, wait)
            except HostLost as away:
                raise HostLost(f"{away}; then go on with: {command}") from away
            tell(f"all hosts are there; going on from {checkpoint}")


def _await(hosts: Iterable[HostedAgent], wait: float) -> None:
    """Return once every host has said who it is. Raises HostLost when the time is up."""
    end = time.monotonic() + wait
    for host in hosts:
        while True:
            try:
                host.meet(within=max(_PAUSE, end - time.monotonic()))
                break
            except HostLost:
                if time.monotonic() + _PAUSE > end:
                    raise
            time.sleep(_PAUSE)
