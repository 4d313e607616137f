"""Fixtures that tests of several rooms use."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import hypothesis
import numpy
import pytest
import torch

# The same examples at every run, however slow the machine is;
# `pytest --hypothesis-profile=search` looks for new ones.
for name, always_the_same in (("repeat", True), ("search", False)):
    hypothesis.settings.register_profile(
        name,
        deadline=None,
        derandomize=always_the_same,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("repeat")

# A state directory for the tests, and for the commands that they start: they neither know nor fill
# that of whoever runs them. It is removed at the end.
_STATE = tempfile.TemporaryDirectory(prefix="satune-state-")
os.environ["SATUNE_STATE"] = _STATE.name

# A shell's background job ignores ctrl-C, and so would every command that a test starts and
# interrupts: whoever runs the tests, and however, ctrl-C reaches them.
signal.signal(signal.SIGINT, signal.default_int_handler)

from command_line import Run  # noqa: E402 - keeps the environment as it is when it is imported
from satune.cli.main import main  # noqa: E402


def _seed() -> None:
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a library draws by itself (an adapter's first weights) is the same at every run."""
    _seed()


@pytest.fixture(scope="module", autouse=True)
def _seeded_for_a_module() -> None:
    """``_seeded`` for what a module's tests share, which is made before it."""
    _seed()


@pytest.fixture
def satune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; gives exit code, standard output, standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["satune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run
