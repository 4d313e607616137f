"""How a process is told to end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from satune.files.interrupts import ended_by_term, uninterrupted


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever a test leaves is put back."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def told_to_end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)  # Python answers a signal between two of its instructions


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_term_is_answered_as_ctrl_c(ctrl_c: signal.Handlers) -> None:
    # A shell lets what it runs in the background ignore ctrl-C, but not SIGTERM.
    signal.signal(signal.SIGINT, ctrl_c)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ended_by_term():
        told_to_end()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_term_waits_for_what_must_not_be_left_half_done(ctrl_c: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, ctrl_c)
    done = []
    with pytest.raises(KeyboardInterrupt), ended_by_term(), uninterrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        done.append("all of it")
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) == ctrl_c
