"""Whether two runs of equal seeds say the same, say of two versions of satune.

    python benchmarks/equal_runs.py RUN OTHER_RUN

Compares events field by field, but for what may differ between equal runs (times, memory, places),
and the figures of a swap in summary.json. Fields that one of them alone has are counted by name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from satune.files.events import UNEQUAL


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def walk(name: str, one: Any, other: Any, found: dict[str, Counter[str]]) -> None:
    if not (isinstance(one, dict) and isinstance(other, dict)):
        found["equal" if one == other else "differing"][name] += 1
        return
    for key in sorted((one.keys() | other.keys()) - UNEQUAL):
        inner = f"{name}.{key}"
        if key in one and key in other:
            walk(inner, one[key], other[key], found)
        else:
            found["in one alone"][inner] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="two runs of equal seeds, field by field")
    parser.add_argument("runs", type=Path, nargs=2)
    one, other = parser.parse_args().runs
    found: dict[str, Counter[str]] = {n: Counter() for n in ("equal", "differing", "in one alone")}
    ours, theirs = events(one), events(other)
    for mine, its in zip(ours, theirs, strict=False):
        walk(mine["event"], mine, its, found)
    swaps = [json.loads((run / "summary.json").read_text()).get("swap", {}) for run in (one, other)]
    walk("swap", *({k: v for k, v in s.items() if k != "out"} for s in swaps), found)
    print(f"{len(ours)} and {len(theirs)} events; {found['equal'].total():,} fields equal")
    for kind in ("differing", "in one alone"):
        print(f"{kind}: {dict(found[kind]) or 'none'}")
    sys.exit(bool(found["differing"]) or len(ours) != len(theirs))


if __name__ == "__main__":
    main()
