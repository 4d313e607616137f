"""The planning benchmark runs, agrees with its peer, and is as fast as is claimed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*options):
    command = [sys.executable, str(ROOT / "benchmarks" / "planning.py"), "--json", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(ended.stdout)


def test_a_third_of_the_plans_is_valid():
    # Each problem comes with its plan and two damaged ones.
    result = run("--validations", "300", "--repeats", "1", "--problems", "0")
    assert result["rate"]["valid"] == 100 and result["rate"]["per_second"] > 0


@pytest.mark.slow
def test_the_check_is_a_hundred_times_as_fast_as_the_peers():
    pytest.importorskip("unified_planning")
    check = run("--validations", "300", "--repeats", "3")["check"]
    assert (check["plans"], check["valid"]) == (60, 20)
    assert check["ratio"] >= 100
