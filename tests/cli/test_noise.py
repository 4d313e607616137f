"""Standard error holds what a person can act on: no warning of a library reaches it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tiny_world
from command_line import Run

UNSHOWN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""What Python shows to nobody who has not asked for it."""


@contextmanager
def no_warning() -> Iterator[None]:
    """Fails for a warning that a process of its own would have written to standard error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    shown = [w for w in said if not issubclass(w.category, UNSHOWN)]
    assert [f"{w.category.__name__}: {w.message}" for w in shown] == []


def test_adapters_and_checkpointing_are_trained_without_a_warning(
    satune: Run, tmp_path: Path
) -> None:
    recipe = tiny_world.build(tmp_path / "world")
    model = tmp_path / "world" / "model-0"
    run = tmp_path / "run"
    settings = [
        "team.sharing=lora", f"team.agents.ann.model={model}", f"team.agents.bob.model={model}",
        "optimizer.gradient_checkpointing=true", "stages=1", "evaluate.greedy=false",
    ]  # fmt: skip
    for words in (["train", recipe, *settings, "--out", run], ["eval", run, "--limit", "2"]):
        with no_warning():
            code, _, said = satune(*words)
        assert code == 0 and "warn" not in said.lower(), said
