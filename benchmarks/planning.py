"""Plans checked per second, and satune's STRIPS check against unified-planning's validator: the
same plans, valid and damaged, with the same verdicts, in turn within one run.

    python benchmarks/planning.py [--data PLANBENCH_ROWS.jsonl] [--repeats 5] [--json]

Without --data the plans are of generated Blocksworld instances of four blocks. The peer needs
``pip install unified-planning``; without it only the rate is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from satune.tasks.blocks import write_steps
from satune.tasks.blocksworld import Blocksworld
from satune.tasks.planbench import BLOCKS, PlanBenchBlocksworld
from satune.tasks.strips import Fact, Grounder, parse_problem
from satune.types import Problem, Task

ROUNDS = 20
"""How often satune checks all plans in one repetition: once is too short to be timed."""

Case = tuple[Problem, list[Fact]]


def cases(data: str | None, count: int) -> tuple[Task, list[Case]]:
    """The task, and problems with their reference plan, and with it damaged: the last action
    dropped, the first two exchanged."""
    if data is None:
        task: Task = Blocksworld(blocks=4, prompt="planbench")
        problems = list(itertools.islice(task.problems("train"), count))
    else:
        task = PlanBenchBlocksworld(data)
        problems = [p for p in task.problems("all") if p.answer is not None][:count]
    found: list[Case] = []
    for problem in problems:
        objects = parse_problem(problem.metadata["problem_pddl"]).objects
        gold = BLOCKS.to_objects(BLOCKS.read_plan(problem.answer), objects)
        swapped = [gold[1], gold[0], *gold[2:]]
        found += [(problem, gold), (problem, gold[:-1]), (problem, swapped)]
    return task, found


def rate(task: Task, chosen: Sequence[Case], number: int, repeats: int) -> dict[str, float]:
    """Validations a second, from the text of a message to its grade."""
    work = [
        (problem, f"My plan:\n[PLAN]\n{write_steps(plan)}\n[PLAN END]\nIt reaches the goal.")
        for problem, plan in itertools.islice(itertools.cycle(chosen), number)
    ]
    seconds: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        right = sum(task.grade(problem, text).score for problem, text in work)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {
        "validations": number,
        "valid": right,
        "seconds": median,
        "per_second": number / median,
    }


def against_peer(chosen: Sequence[Case], repeats: int) -> dict[str, float]:
    """Seconds to check all plans, problems and plans read beforehand by either side; the ground
    actions of satune are made anew in each of its rounds. Also to read the problems.

    Raises RuntimeError if a verdict differs.
    """
    from unified_planning.engines import SequentialPlanValidator
    from unified_planning.engines.results import ValidationResultStatus
    from unified_planning.io import PDDLReader

    domain = _domain_text()
    texts = {p.id: p.metadata["problem_pddl"] for p, _ in chosen}
    started = time.perf_counter()
    read = {key: PDDLReader().parse_problem_string(domain, text) for key, text in texts.items()}
    peer_reading = time.perf_counter() - started
    parse_problem.cache_clear()
    started = time.perf_counter()
    ours_read = {key: parse_problem(text) for key, text in texts.items()}
    reading = time.perf_counter() - started

    plans = [
        PDDLReader().parse_plan_string(
            read[problem.id], "\n".join(f"({' '.join(step)})" for step in plan)
        )
        for problem, plan in chosen
    ]
    seconds: dict[str, list[float]] = {"satune": [], "peer": []}
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(ROUNDS):
            grounders = {key: Grounder(BLOCKS.domain, one) for key, one in ours_read.items()}
            verdicts = [grounders[problem.id].execute(plan).valid for problem, plan in chosen]
        between = time.perf_counter()
        with SequentialPlanValidator() as validator:
            results = [
                validator.validate(read[problem.id], plan)
                for (problem, _), plan in zip(chosen, plans, strict=True)
            ]
        ended = time.perf_counter()
        seconds["satune"].append((between - started) / ROUNDS)
        seconds["peer"].append(ended - between)
        theirs = [r.status is ValidationResultStatus.VALID for r in results]
        if verdicts != theirs:
            raise RuntimeError("satune and unified-planning disagree about a plan")
    pairs = sorted(b / a for a, b in zip(seconds["satune"], seconds["peer"], strict=True))
    return {
        "plans": len(chosen),
        "valid": sum(verdicts),
        "satune_seconds": statistics.median(seconds["satune"]),
        "peer_seconds": statistics.median(seconds["peer"]),
        "ratio": statistics.median(seconds["peer"]) / statistics.median(seconds["satune"]),
        "ratio_low": pairs[0],
        "ratio_high": pairs[-1],
        "satune_reading_seconds": reading,
        "peer_reading_seconds": peer_reading,
    }


def _domain_text() -> str:
    """The domain in PDDL for the peer, written out of the one that satune uses."""

    def literals(positive: Sequence[Fact], negative: Sequence[Fact]) -> str:
        written = [f"({' '.join(f)})" for f in positive]
        written += [f"(not ({' '.join(f)}))" for f in negative]
        return f"(and {' '.join(written)})"

    actions = [
        f"(:action {a.name} :parameters ({' '.join(name for name, _ in a.parameters)}) "
        f":precondition {literals(a.needs, a.forbids)} :effect {literals(a.adds, a.deletes)})"
        for a in BLOCKS.domain.actions.values()
    ]
    predicates = "(:predicates (clear ?x) (ontable ?x) (handempty) (holding ?x) (on ?x ?y))"
    head = f"(define (domain {BLOCKS.domain.name}) (:requirements :strips) {predicates}"
    return f"{head} {' '.join(actions)})"


def main() -> None:
    parser = argparse.ArgumentParser(description="plan validation: rate, and against a peer")
    parser.add_argument("--data", help="PlanBench Blocksworld rows; generated ones if left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--validations", type=int, default=10_000)
    parser.add_argument("--problems", type=int, default=20, help="for the comparison; 0: none")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    task, many = cases(arguments.data, 500)
    result: dict[str, Any] = {
        "benchmark": "planning",
        "rate": rate(task, many, arguments.validations, arguments.repeats),
    }
    if arguments.problems and importlib.util.find_spec("unified_planning") is not None:
        chosen = cases(arguments.data, arguments.problems)[1]
        result |= {"peer": "unified_planning.SequentialPlanValidator"}
        result |= {"check": against_peer(chosen, arguments.repeats)}
    if arguments.json:
        print(json.dumps(result))
        return
    figures = result["rate"]
    print(
        f"{figures['validations']:,} plans from text: {figures['seconds']:.3f} s "
        f"({figures['per_second']:,.0f} a second)"
    )
    if "check" not in result:
        print("not compared: --problems 0, or unified-planning is not installed")
        return
    check = result["check"]
    print(
        f"{check['plans']} plans checked: satune {1e3 * check['satune_seconds']:.2f} ms, "
        f"unified-planning {1e3 * check['peer_seconds']:.1f} ms, ratio {check['ratio']:.0f} "
        f"({check['ratio_low']:.0f} to {check['ratio_high']:.0f}); reading the problems: "
        f"{1e3 * check['satune_reading_seconds']:.1f} and "
        f"{1e3 * check['peer_reading_seconds']:.0f} ms"
    )


if __name__ == "__main__":
    main()
