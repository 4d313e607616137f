"""Where the tests look for real benchmark rows, and how they are damaged and mangled."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from yardstick import at_most

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "benchmarks"

_PIECES = (
    "{", "}", "[", "]", '"', "\\", "\n", ":", ",", "solution", "House 1", "[plan]", "[plan end]",
    "[STATEMENT]", "pick up", "put down", "stack", "unstack", "the red block", "the blue block",
    "(", ")", "(stack a b)", "load", "drive", "p0", "l0-0", "package_0", "```json", "</think>",
    "1.", "=", "AB", "A-", "/", "\x00", "é", "🙂", "\ud800", " " * 30, "{" * 50, "[" * 3000,
    '{"a":' * 300,
)  # fmt: skip


def rows_of(name: str) -> Path:
    """The file of that benchmark; skips the test where it is not there."""
    path = FOLDER / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no benchmark rows at {path}")
    return path


def mangled(text: str, rng: random.Random) -> str:
    """A message cut, repeated, shuffled or mixed with pieces of syntax; or one of these alone."""
    if rng.random() < 0.2:
        return "".join(rng.choice(_PIECES) for _ in range(rng.randrange(60)))
    for _ in range(rng.randrange(1, 5)):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:at] + text[to:]
        elif kind == 1:
            text = text[:at] + rng.choice(_PIECES) + text[at:]
        elif kind == 2:
            text = text[:to] + text[at:to] + text[to:]
        elif kind == 3:
            text = text.swapcase() if rng.random() < 0.3 else text[to:] + text[:to]
        else:
            lines = text.split("\n")
            rng.shuffle(lines)
            text = "\n".join(lines)
    return text


def fuzz(task, cases, number: int, seed: int) -> int:
    """Grades ``number`` mangled messages made from ``cases``, pairs of a problem and a good
    message. How many of them scored above 0."""
    rng = random.Random(seed)
    hits = 0
    for _ in range(number):
        problem, good = rng.choice(cases)
        text = mangled(good, rng)
        with at_most(60, text):
            answer = task.extract(text)
            grade = task.grade(problem, text)
        assert answer is None or task.equal(answer, answer)
        assert 0.0 <= grade.score <= 1.0
        assert all(
            v >= 0.0 and (v <= 1.0 or k == "plan_length") for k, v in grade.components.items()
        )
        hits += grade.score > 0.0
    return hits
