"""How many answers a second the graders take.

    python benchmarks/grading.py [--grades 10000] [--checks 200] [--json]

Maths: answers nobody has asked about before, so that nothing comes from the cache of verdicts.
"integers" are compared in the process itself, "expressions" by math-verify in a worker process;
"mixed" has two integers in three answers, as MATH-500 does. Beside them stands math-verify itself,
called in this process with the settings it comes with on the same messages.

AutoLogi: what a check costs whose own code does nothing, which is to start the sandbox's processes,
hear of them, and see them end.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from satune.tasks import sandbox
from satune.tasks.maths.task import Maths
from satune.types import Problem


def integer(rng: random.Random) -> tuple[str, str]:
    """(reference, another way to write it, or a wrong one)."""
    value = rng.randrange(10**7)
    return str(value), rng.choice([f"{value}", f"0{value}", f"{value}.0", f"{value + 1}"])


def expression(rng: random.Random) -> tuple[str, str]:
    a, b, c = (rng.randrange(2, 10**4) for _ in range(3))
    return rng.choice(
        [
            (f"\\frac{{{a}}}{{{b}}}", f"\\dfrac{{{2 * a}}}{{{2 * b}}}"),
            (f"\\frac{{{a}}}{{{b}}}", f"{a + 1}/{b}"),
            (f"{a}\\sqrt{{{b}}}", f"{a} \\sqrt{{{b}}}"),
            (f"({a}, {b})", f"\\left({b}, {a}\\right)"),
            (f"{a}x + {b}", f"{b} + {a}x"),
            (f"x={c}", f"{c}"),
            (f"[{a}, \\infty)", f"[{a}, \\infty)"),
            (f"{a}^\\circ", f"{a}"),
        ]
    )


def mixed(rng: random.Random) -> tuple[str, str]:
    return integer(rng) if rng.random() < 2 / 3 else expression(rng)


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "integers": integer,
    "expressions": expression,
    "mixed": mixed,
}


def messages(kind: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    rng = random.Random(seed)
    for _ in range(count):
        reference, answer = KINDS[kind](rng)
        yield reference, f"Therefore the answer is $\\boxed{{{answer}}}$."


def maths_rows(grades: int) -> Iterator[dict[str, Any]]:
    """One row a kind of answer, as it is measured."""
    from math_verify import parse, verify

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(json.dumps({"problem": "?", "answer": "\\frac{1}{2}"}) + "\n")
        task = Maths(path)
        # The worker process starts with the first answer that needs it.
        task.grade(next(task.problems("all")), "\\boxed{\\frac{2}{4}}")
        for kind in KINDS:
            rows = list(messages(kind, grades, seed=1))
            problems = [Problem.of(str(i), "?", gold) for i, (gold, _) in enumerate(rows)]
            started = time.perf_counter()
            scores = [
                task.grade(p, text).score for p, (_, text) in zip(problems, rows, strict=True)
            ]
            between = time.perf_counter()
            theirs = [verify(parse(f"\\boxed{{{gold}}}"), parse(text)) for gold, text in rows]
            seconds, peer = between - started, time.perf_counter() - between
            yield {
                "task": "maths",
                "answers": kind,
                "grades": grades,
                "seconds": seconds,
                "grades_per_second": grades / seconds,
                "right": sum(scores) / grades,
                "peer": "math_verify.parse and verify",
                "peer_seconds": peer,
                "ratio": peer / seconds,
                "same_verdict": sum(s == float(t) for s, t in zip(scores, theirs, strict=True)),
            }


def sandbox_row(checks: int) -> dict[str, Any]:
    """Milliseconds of one check after the other: the median and the range of the middle 90%."""
    code = "def inputs_check(inputs):\n    return True\nconstraint_list = [lambda inputs: True]\n"
    taken = []
    for _ in range(checks):
        started = time.perf_counter()
        verdict = sandbox.check(code, "[1]")
        taken.append(1000 * (time.perf_counter() - started))
        assert verdict.holds, verdict
    low, *_, high = statistics.quantiles(taken, n=20)
    median = statistics.median(taken)
    return {"task": "autologi", "checks": checks, "milliseconds": median, "middle": [low, high]}


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['task']}, {row['answers']:<12} {row['grades']:,} grades in {row['seconds']:7.2f} s "
        f"({row['grades_per_second']:9,.0f}/s)   math-verify itself {row['peer_seconds']:7.2f} s   "
        f"ratio {row['ratio']:.1f}   same verdict {row['same_verdict']:,}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="grading: answers a second")
    parser.add_argument("--grades", type=int, default=10_000)
    parser.add_argument("--checks", type=int, default=200, help="2 or more")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for row in maths_rows(arguments.grades):
        rows.append(row)
        if not arguments.json:
            show(row)
    started = sandbox_row(arguments.checks)
    if arguments.json:
        print(json.dumps({"benchmark": "grading", "rows": rows, "sandbox": started}))
    else:
        low, high = started["middle"]
        print(
            f"autologi, an empty check: {started['milliseconds']:.1f} ms (median of "
            f"{arguments.checks}; nine in ten from {low:.1f} to {high:.1f})"
        )


if __name__ == "__main__":
    main()
