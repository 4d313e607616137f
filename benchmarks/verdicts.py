"""Which verdicts two versions of the graders give differently, and on which answers.

    python benchmarks/verdicts.py mutate ROWS ANSWERS [--count 18000] [--seed 0]
    python benchmarks/verdicts.py collect ANSWERS RUN_OR_EVALUATION... [--writer NAME]
    PYTHONPATH=VERSION/src python benchmarks/verdicts.py grade ANSWERS VERDICTS
    python benchmarks/verdicts.py compare ANSWERS VERDICTS_BEFORE VERDICTS_AFTER

``mutate`` writes right answers to the benchmark rows in the directory ROWS and other versions of
them: with notation put in, wrapped, cut, exchanged with another problem's. ``collect`` appends what
models said: the last message of each conversation of runs and evaluations, each text once a
problem.
``grade`` uses nothing but what every version of satune has, so that an old checkout's source can be
named in PYTHONPATH. ``compare`` prints every answer whose score differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from satune.tasks.catalog import load_task
from satune.types import Problem

Row = dict[str, Any]

# task, rows, share of the answers, the right answer to a problem as a message
SOURCES: tuple[tuple[str, str | None, int, Callable[[Problem], str]], ...] = (
    ("math500", "math500", 5, lambda p: f"So it is $\\boxed{{{p.answer}}}$."),
    ("maths", "deepscaler_train_2k", 5, lambda p: f"\\boxed{{{p.answer}}}"),
    ("aime24", "aime24", 1, lambda p: f"Therefore \\boxed{{{p.answer}}}"),
    ("zebralogic", "zebralogic", 2, lambda p: json.dumps({"solution": p.answer})),
    ("planbench_bw", "planbench_bw_nl", 2, lambda p: str(p.answer)),
    ("planbench_logistics", "planbench_logistics", 2, lambda p: str(p.answer)),
    ("arbench_dc", "arbench_dc", 1, lambda p: f"He lied about the time.\nAnswer: {p.answer}"),
    ("arbench_gn", "arbench_gn", 1, lambda p: f"Guess: {p.answer}"),
    ("arbench_sp", "arbench_sp", 1, lambda p: str(p.answer)),
    ("rows", "aime_1983_2023_train", 2, lambda p: f"The answer is {p.answer}."),
    ("relay", None, 1, lambda p: str(p.answer)),
)
OPTIONS: dict[str, Row] = {"rows": {"prompt": "problem", "reward": "numeric"}}

NOTATION = (
    " ", "\n", "\t", "\u00a0", "\\,", "\\;", "\\ ", "\\!", "$", "\\$", "\\%", "%", "**", "*", "_",
    "`", ",", ".", ":", ";", "=", "+", "-", "\u2212", "\u2013", "/", "\u2044", "^\\circ",
    "\u00b0", "\u221a", "\u00b2", "\u00bd", "\u00d7", "\u00f7", "\u03c0", "\u221e", "\\pi",
    "\\infty", "\\sqrt", "\\frac", "\\dfrac", "\\left(", "\\right)", "\\text{ cm}", "\\text{",
    "\\mbox{ units}", "\\mathrm{m}", "{", "}", "[", "]", "(", ")", "\\{", "\\}", "|", "<", ">",
    "\\le", "\\neq", "\\pm", "\\cdot", "\\times", "x", "x=", "a = ", "!", "'", "\"", "0", "1",
    "7", "00", ".0", ".5", "e3", "1e-16", "_2", "^2", "\\overline{3}", "\\approx", "\\color{red}",
    " cm", " dollars", " and ", " or ", " to ", "\\\\", "&", "#", "#### ", "\uff15", "\u200b",
    "\ufeff", "null", "<think>", "</think>", "<think>hm</think>", "[PLAN]", "[PLAN END]",
    "[/PLAN]", "(stack a b)", "pick up the red block\n", "```", "```json\n", "1. ", "- ",
    "Answer: ", "\\boxed{", "{}", "{\"solution\":",
)  # fmt: skip
WRAPS = (
    "**{}**", "`{}`", "<think>{}</think>", "<think>first</think>{}", "<think>{}", "no </think>{}",
    "{}\n\nI hope that helps.", "Let me see.\n{}", "${}$", "\\({}\\)", "```\n{}\n```", "> {}",
    "_{}_", "{0}\n{0}", "Answer: {}", "The final answer is {}",
)  # fmt: skip


def mutated(text: str, other: str, rng: random.Random) -> str:
    """Another version of a right message; ``other`` is right for another problem."""
    kind = rng.random()
    if kind < 0.05:
        return text
    if kind < 0.15:
        return other
    if kind < 0.3:
        return rng.choice(WRAPS).format(text)
    if kind < 0.4:
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        return text[:at] + text[to:] if rng.random() < 0.5 else text[:to] + text[at:]
    if kind < 0.5:
        digits = [i for i, character in enumerate(text) if character.isdigit()] or [0]
        at = rng.choice(digits)
        return text[:at] + str(rng.randrange(10)) + text[at + 1 :]
    # Where an answer stands in a box or a value, most of what matters is near it.
    for _ in range(rng.choice((1, 1, 2, 3))):
        start = max(text.find("{") + 1, 0) if rng.random() < 0.7 else 0
        at = rng.randrange(start, len(text) + 1)
        text = text[:at] + rng.choice(NOTATION) + text[at:]
    return text


def mutate(rows: Path, count: int, seed: int) -> Iterator[Row]:
    rng = random.Random(seed)
    shares = sum(share for _, _, share, _ in SOURCES)
    for task, name, share, right in SOURCES:
        data = None if name is None else str((rows / f"{name}.jsonl").resolve())
        made = load_task(task, data, 0, None, **OPTIONS.get(task, {}))
        given = made.problems("all" if data else "eval")
        problems = [p for p, _ in zip(given, range(3000), strict=False) if p.answer is not None]
        for _ in range(round(count * share / shares)):
            problem, other = rng.choice(problems), rng.choice(problems)
            yield {
                "writer": "mutator",
                "task": task,
                "data": data,
                "problem": problem.id,
                "reference": problem.answer if data is None else None,
                "text": mutated(right(problem), right(other), rng),
            }


def collect(places: list[Path], writer: str, rows: dict[str, str]) -> Iterator[Row]:
    """The last messages of the conversations below ``places``; ``rows`` maps a task to its data."""
    seen = set()
    for place in places:
        task = read_task(place)
        files = [*place.glob("episodes/*.jsonl"), *place.glob("conversations.jsonl")]
        for file in sorted(files):
            for line in file.read_text(encoding="utf-8").splitlines():
                episode = json.loads(line)
                if not episode.get("turns"):
                    continue
                problem, text = episode["problem"], episode["turns"][-1]["text"]
                if (task, problem["id"], text) in seen:
                    continue
                seen.add((task, problem["id"], text))
                data = rows.get(task)
                yield {
                    "writer": writer,
                    "task": task,
                    "data": data,
                    "problem": problem["id"],
                    "reference": problem["answer"] if data is None else None,
                    "text": text,
                }


def read_task(place: Path) -> str:
    """The name of the task that a run or an evaluation played."""
    import yaml

    for name in ("recipe.yaml", "settings.json"):
        if (place / name).is_file():
            read = yaml.safe_load((place / name).read_text(encoding="utf-8"))
            task = read.get("task", read.get("benchmark"))
            return str(task["name"] if isinstance(task, dict) else task)
    raise SystemExit(f"{place}: no recipe.yaml or settings.json; name runs and evaluations")


def grade(answers: Path) -> Iterator[Row]:
    """A row for each answer: its score, what was read, and what went wrong if anything did."""
    tasks: dict[tuple[str, str | None], Any] = {}
    problems: dict[tuple[str, str | None], dict[str, Problem]] = {}
    for line in answers.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        key = (row["task"], row["data"])
        if key not in tasks:
            tasks[key] = load_task(key[0], key[1], 0, None, **OPTIONS.get(key[0], {}))
            listed = tasks[key].problems("all") if key[1] else ()
            problems[key] = {problem.id: problem for problem in listed}
        problem = problems[key].get(row["problem"])
        if problem is None:
            problem = Problem.of(row["problem"], "?", row["reference"])
        try:
            found = tasks[key].grade(problem, row["text"])
            yield {"score": found.score, "detail": found.detail[:300]}
        except Exception as error:  # whatever an old version raises is a verdict of its own
            yield {"score": None, "detail": f"{type(error).__name__}: {str(error)[:200]}"}


def compare(answers: list[Row], before: list[Row], after: list[Row]) -> None:
    assert len(answers) == len(before) == len(after)
    graded = Counter((row["writer"], row["task"]) for row in answers)
    differing = defaultdict(list)
    for row, old, new in zip(answers, before, after, strict=True):
        if old["score"] != new["score"]:
            differing[row["writer"], row["task"]].append((row, old, new))
    for key, rows in differing.items():
        for row, old, new in rows:
            print(f"\n{key[0]}, {key[1]} {row['problem']}: {old['score']} -> {new['score']}")
            print(f"  said   {row['text']!r}")
            print(f"  before {old['detail']!r}\n  after  {new['detail']!r}")
    print("\nwriter, task: answers, verdicts that differ")
    for key, count in sorted(graded.items()):
        print(f"{key[0]}, {key[1]}: {count:,}, {len(differing[key])}")
    print(f"all: {len(answers):,}, {sum(map(len, differing.values()))}")


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Iterator[Row], mode: str = "w") -> None:
    with path.open(mode, encoding="utf-8") as file:
        for number, row in enumerate(rows, 1):
            file.write(json.dumps(row) + "\n")
            if number % 1000 == 0:
                print(f"{path}: {number:,}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="verdicts of two versions of the graders")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("mutate")
    command.add_argument("rows", type=Path)
    command.add_argument("answers", type=Path)
    command.add_argument("--count", type=int, default=18_000)
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("collect")
    command.add_argument("answers", type=Path)
    command.add_argument("places", type=Path, nargs="+")
    command.add_argument("--writer", default="team")
    command.add_argument("--data", action="append", default=[], metavar="TASK=FILE")
    command = commands.add_parser("grade")
    command.add_argument("answers", type=Path)
    command.add_argument("verdicts", type=Path)
    command = commands.add_parser("compare")
    for name in ("answers", "before", "after"):
        command.add_argument(name, type=Path)
    asked = parser.parse_args()
    if asked.command == "mutate":
        write(asked.answers, mutate(asked.rows, asked.count, asked.seed))
    elif asked.command == "collect":
        rows = dict(pair.split("=", 1) for pair in asked.data)
        write(asked.answers, collect(asked.places, asked.writer, rows), "a")
    elif asked.command == "grade":
        write(asked.verdicts, grade(asked.answers))
    else:
        compare(read(asked.answers), read(asked.before), read(asked.after))


if __name__ == "__main__":
    main()
