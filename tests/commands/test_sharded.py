"""What the processes of a run compare before they train."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from satune.commands.sharded import _check_same
from satune.types import UserError


class Rank0:
    """Rank 0 among processes of which all others ``agree`` or not; ``free`` tells of each
    collective whether another thread could have spoken in between."""

    drives = True

    def __init__(self, agree: bool) -> None:
        self.agree = agree
        self.talking = threading.RLock()
        self.free: list[bool] = []

    def _look(self) -> None:
        def attempt() -> None:
            self.free.append(self.talking.acquire(blocking=False))

        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()

    def tell(self, message: Any) -> None:
        self._look()

    def everywhere(self, holds: bool) -> bool:
        self._look()
        return holds and self.agree

    def noticing(self) -> Any:
        return nullcontext()


@pytest.mark.parametrize("agree", [True, False])
def test_nobody_speaks_between_what_is_compared_and_the_answer(agree: bool) -> None:
    processes: Any = Rank0(agree)
    policies: Any = {"a": SimpleNamespace(model=torch.nn.Linear(1, 1))}
    if agree:
        _check_same(processes, policies)
    else:
        with pytest.raises(UserError, match="agent a: the processes read different weights"):
            _check_same(processes, policies)
    assert processes.free == [False, False]
    assert processes.talking.acquire(blocking=False)
