"""Ctrl-C while batches are drawn ahead and a server of vLLM is being started again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny_world
from command_line import ENVIRONMENT
from vllm_starts import environment_of, gone, notes

DRIVER = '''
"""satune, whose server dies in the thread that draws ahead: at DEATH, which STARTS.die is told, in
the batch of stage STAGE. It is drawn when the stage before it has begun."""
import os, sys, threading
from pathlib import Path
from satune.commands import train
from satune.commands.world import AheadWorld
from satune.training.self_check import Tolerance

train.tolerance_of = lambda recipe: Tolerance(1e9, 1e9)  # the stand-in has no model
draw_ahead, draw_by, begun = AheadWorld.draw_ahead, AheadWorld._draw_by, threading.Event()
stage = int(os.environ.get("STAGE", "0"))

def told(self, key, *rest):
    found = draw_ahead(self, key, *rest)
    if key.stage == stage:
        begun.set()
    return found

def drawn(self, key, *rest):
    if stage and key.stage == stage - 1:
        begun.wait()  # so that the team has changed when the next one is drawn
    if key.stage == stage:
        Path(os.environ["STARTS"] + ".ready").unlink()
        Path(os.environ["STARTS"] + ".die").write_text(os.environ["DEATH"])
    return draw_by(self, key, *rest)

AheadWorld.draw_ahead, AheadWorld._draw_by = told, drawn
from satune.cli.main import main
main()
'''
WORDS = [
    "schedule=reuse", "rollout.ahead=2", "stages=5", "engine={name: vllm, probe: 0}",
    "evaluate={problems: 3, samples: 2, every: 0}",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "death",
    [
        pytest.param("/v1/completions", id="while it draws"),
        pytest.param("/collective_rpc", id="while it is given weights"),
    ],
)
def test_a_server_that_is_being_started_again(tmp_path: Path, death: str) -> None:
    """One line, no process, no lock, and a resume goes on to the end."""
    recipe = tiny_world.build(tmp_path / "world")
    own = {**ENVIRONMENT, **environment_of(tmp_path), "TMPDIR": str(tmp_path), "SLOW": "1"}
    ready, out, starts = tmp_path / "starts.ready", tmp_path / "run", tmp_path / "starts"

    def train(*more: str, **variables: str) -> subprocess.Popen[str]:
        ready.touch()
        words = ["train", str(recipe), *WORDS, "--out", str(out), *more]
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**own, **variables},
        )

    process = train(DEATH=death, STAGE="5")
    try:
        while not (starts.exists() and _starts(starts) == 3):  # two, and one again
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, said
    (line,) = [each for each in said[1].splitlines() if "go on with" in each]
    assert "--resume" in line and "Traceback" not in said[1]
    assert all(gone(note["pid"]) for note in notes(starts))
    assert not list(out.glob("*.lock")) and not list(tmp_path.glob("satune-vllm-*"))
    process = train("--resume")
    said = process.communicate()
    assert process.returncode == 0, said
    assert [e["stage"] for e in tiny_world.events(out, "stage")] == [1, 2, 3, 4, 5]


def _starts(starts: Path) -> int:
    return sum("arguments" in note for note in notes(starts))
