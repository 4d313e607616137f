"""What is freed stays with the process that asked for it, in large pages where there are some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import SOURCES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told anything")

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()

# The module alone: its package loads the commands. Pages count once they are written to.
PROBE = """
import importlib.util, json, re, sys
spec = importlib.util.spec_from_file_location("allocator", sys.argv[1])
allocator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(allocator)
kept = allocator.keep_freed_memory()

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

before = resident()
piece = bytearray(b"x") * (64 << 20)
held = resident()
del piece
large = " hg" in "".join(re.findall(r"VmFlags:[^\\n]*", open("/proc/self/smaps").read()))
found = {"kept": kept, "held": held - before, "left": resident() - before, "large": large}
print(json.dumps(found))
"""


def probe(**environment: str) -> dict[str, float]:
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    run = subprocess.run(
        [sys.executable, "-c", PROBE, f"{SOURCES}/satune/cli/allocator.py"],
        capture_output=True, text=True, env=plain | environment, check=True,
    )  # fmt: skip
    return json.loads(run.stdout)


def test_freed_memory_is_kept_and_asked_for_in_large_pages() -> None:
    found = probe()
    if not found["kept"]:
        pytest.skip("this system's C library is not glibc")
    assert found["held"] > 60 and found["left"] > 60, found
    assert found["large"] or not LARGE_PAGES, found


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_who_chose_an_allocator_keeps_it(name: str) -> None:
    value = {"MALLOC_ARENA_MAX": "2", "GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}.get(name, "")
    found = probe(**{name: value})
    assert not found["kept"] and not found["large"], found
    assert found["held"] > 60 and found["left"] < 10, found


def test_a_process_of_little_address_space_goes_on() -> None:
    import resource

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    run = subprocess.run(
        [sys.executable, "-c", PROBE, f"{SOURCES}/satune/cli/allocator.py"],
        capture_output=True, text=True, preexec_fn=limited,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["left"] > 60 or not found["kept"], found
    # As many as there is room for.
    assert found["large"] or not (LARGE_PAGES and found["kept"]), found
