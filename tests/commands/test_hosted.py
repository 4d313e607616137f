"""A run that waits for a host: how long, and when it gives up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from satune.commands import hosted
from satune.hosts.client import HostLost, HostSilent

SILENT = "agent bob: its host is lost (no answer to improve in 9 s (hosts.timeout))"


class Host:
    """One that is met at once; ``within`` has what each meeting might have taken."""

    def __init__(self) -> None:
        self.within: list[float] = []

    def meet(self, within: float) -> None:
        self.within.append(within)


class Away:
    """A host that is not there."""

    def meet(self, within: float) -> None:
        raise HostLost("still away")


def run(
    monkeypatch: pytest.MonkeyPatch, losses: list[tuple[Exception, str]], host: Any = None
) -> tuple[Any, list[str | None]]:
    """A run that is lost so, each time with that newest checkpoint, and then ends; what it gave,
    and the checkpoints that it went on from."""
    left, went = list(losses), []

    def train(training: Any, *, tolerance: Any, checkpoint: str | None) -> str:
        went.append(checkpoint)
        if left:
            raise left[0][0]
        return "done"

    def latest() -> tuple[str, list[str]]:
        return left.pop(0)[1], []

    monkeypatch.setattr(hosted, "train", train)
    monkeypatch.setattr(hosted, "Checkpoints", lambda place, keep: SimpleNamespace(latest=latest))
    training = cast(Any, SimpleNamespace(directory=SimpleNamespace(checkpoints=Path())))
    hosts: list[Any] = [host or Host()]
    found = hosted.train_with_hosts(
        training,
        hosts,
        30.0,
        tolerance=cast(Any, None),
        checkpoint=None,
        command="satune go on",
        tell=lambda line: None,
    )
    return found, went


def test_no_answer_twice_from_one_checkpoint_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[tuple[Exception, str]] = [(HostSilent(SILENT), "stage-0001")] * 3
    with pytest.raises(
        HostLost, match=r"second time from stage-0001; give more.*, then go on with: satune go on$"
    ):
        run(monkeypatch, losses)


def test_a_run_that_comes_further_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = HostLost("agent bob: its host is lost (Connection refused)")
    losses: list[tuple[Exception, str]] = [
        (HostSilent(SILENT), "stage-0001"), (HostSilent(SILENT), "stage-0002"),
        (gone, "stage-0002"), (gone, "stage-0002"),
    ]  # fmt: skip
    found, went = run(monkeypatch, losses)
    assert found == "done" and went == [None, *(name for _, name in losses)]


def test_all_hosts_are_met_within_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    run(monkeypatch, [(HostLost("lost"), "stage-0001")], host)
    (within,) = host.within
    assert 10 < within <= 30


def test_a_host_that_stays_away_leaves_the_command_that_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosted, "_PAUSE", 40.0)  # longer than the wait
    with pytest.raises(HostLost, match=r"^still away; then go on with: satune go on$"):
        run(monkeypatch, [(HostLost("lost"), "stage-0001")], Away())
