"""PlanBench, plan generation (karthikv792/LLMs-Planning): Blocksworld and Logistics.

The metric is the benchmark's own: the share of plans that can be executed from the initial state
and reach the goal, shortest or not. The plan is read out of the message as the official extraction
does it, with the additions that ``blocks`` and ``logistics`` name, and executed here (``strips``)
instead of by VAL.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from satune.tasks import block_stacks, blocks, logistics
from satune.tasks.plan_text import write_plan
from satune.tasks.sources import Row, field, identity, read_bytes, read_json, read_rows
from satune.tasks.splits import RowTask
from satune.tasks.strips import (
    Domain,
    Fact,
    Grounder,
    Instance,
    PddlError,
    parse_domain,
    parse_plan,
    parse_problem,
)
from satune.thoughts import without_thoughts
from satune.types import Grade, Problem, UserError


@dataclass(frozen=True, eq=False)
class Words:
    """A planning domain and its language."""

    domain: Domain
    read_plan: Callable[[str], list[Fact]]
    to_objects: Callable[[Sequence[Fact], Mapping[str, str]], list[Fact]]
    write_prompt: Callable[[Instance], str]
    read_statement: Callable[[str], str]
    prefix: str
    """Rows of the upstream files and hub rows name their ``domain``, which starts with this."""


BLOCKS = Words(
    blocks.DOMAIN, blocks.read_blocks_plan, blocks.to_objects, blocks.write_prompt,
    blocks.read_statement, "blocksworld",
)  # fmt: skip
LOGISTICS = Words(
    logistics.DOMAIN, logistics.read_logistics_plan, logistics.to_objects, logistics.write_prompt,
    logistics.read_statement, "logistics",
)  # fmt: skip


@functools.lru_cache(maxsize=2048)
def grounder(words: Words, problem_pddl: str, domain_pddl: str | None = None) -> Grounder:
    """Raises PddlError for PDDL that cannot be read."""
    domain = words.domain if domain_pddl is None else parse_domain(domain_pddl)
    return Grounder(domain, parse_problem(problem_pddl))


def grade_plan(
    problem: Problem, ground: Grounder, plan: Sequence[Fact] | None, length: int | None
) -> Grade:
    """1 if the plan can be executed and reaches the goal, else 0.

    ``plan`` None is no answer; without actions it is right where the goal holds from the start.
    Components: ``executable`` (the share of the actions before the first that cannot be executed; 1
    for a plan without actions), ``goal_share`` (the share of the goal's facts that hold where
    execution ended), ``plan_length`` (actions read) and, where ``length``, that of the reference
    plan, is known, ``optimal``: the plan is valid and no longer than the reference.
    """
    if plan is None:
        return Grade(0.0, {"executable": 0.0, "goal_share": 0.0}, "no answer")
    done = ground.execute(plan)
    components = {
        "executable": done.executed / done.length if done.length else 1.0,
        "goal_share": done.goal_share,
        "plan_length": float(done.length),
    }
    if length is not None:
        components["optimal"] = float(done.valid and done.length <= length)
    return Grade(float(done.valid), components, f"{done.length} actions; {done.detail}")


class PlanBench(RowTask):
    """The problems of ``data``: rows with ``problem_pddl`` (and, if they differ from the
    benchmark's, ``domain_pddl``), or the upstream form, rows or a file with ``instances``, whose
    problems are read from the last [STATEMENT] of ``query``.

    ``prompt``: "official" is the row's own ``query``, one example and the statement (rows without
    one get the next); "own" is this project's, without an example; "short" (Blocksworld only) is
    that of the task ``blocksworld``. ``subset`` keeps the rows of one ``subset``, ``max_blocks``
    those of so many objects at most.

    Raises UserError naming file and line for a bad row.
    """

    prompts: ClassVar[tuple[str, ...]] = ("official", "own")
    _words: ClassVar[Words]
    _largest = math.inf
    """Objects of a problem that is kept."""

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        eval_fraction: float = 0.1,
        prompt: str = "official",
        subset: str | None = None,
    ) -> None:
        start = f"task {self.name}"
        if data is None:
            raise UserError(f"{start}: it needs data: a JSONL or Parquet file, or a hub id")
        if prompt not in self.prompts:
            known = ", ".join(self.prompts)
            raise UserError(f"{start}: prompt is {prompt!r}; there are {known}")
        self.seed = seed
        self.prompt = prompt
        rows = [
            (place, self._problem(place, row))
            for place, row in plan_rows(data, self._words)
            if subset is None or row.get("subset") == subset
        ]
        rows = [(p, r) for p, r in rows if r.metadata["objects"] <= self._largest]
        if not rows:
            raise UserError(f"{data}: no row is left of subset {subset!r} and the sizes asked for")
        self._keep(rows, eval_fraction)

    def extract(self, text: str) -> str | None:
        """The plan in a message, in PDDL with the names that the message uses; in short form its
        moves. None if there are no actions."""
        if self.prompt == "short":
            return "".join(block_stacks.read_moves(text) or ()) or None
        return write_plan(self._words.read_plan(text)) or None

    def equal(self, a: str, b: str) -> bool:
        return a == b

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """1 if the plan can be executed and reaches the goal: see ``grade_plan``."""
        pddl: str = problem.metadata["problem_pddl"]
        ground = grounder(self._words, pddl, problem.metadata.get("domain_pddl"))
        plan = None
        if answer is not None and without_thoughts(answer).strip():
            plan = self._plan(ground.instance, answer)
        return grade_plan(problem, ground, plan, problem.metadata.get("plan_length"))

    def validate(self) -> None:
        """Check that each reference plan scores 1, and that it scores 0 without its last action and
        as no answer.

        Raises UserError naming file and line of the row that fails.
        """
        for problem in self.problems("all"):
            if problem.answer is None:
                continue
            gold = parse_plan(problem.answer)
            # Of a plan in short form the last move goes, two actions.
            cut = gold[:-2] if self.prompt == "short" else gold[:-1]
            texts = [self._text(plan) for plan in (gold, cut)]
            scores = [self.grade(problem, text).score for text in texts]
            if scores != [1.0, 0.0] or self.grade(problem, None).score:
                raise UserError(
                    f"{self._places[problem.id]}: the reference plan of {problem.id!r} fails, or "
                    "its last action is not needed; mend the row"
                )

    def _plan(self, instance: Instance, answer: str) -> list[Fact]:
        if self.prompt == "short":
            state = block_stacks.read_stacks(block_stacks.short_form(instance)[0])
            return block_stacks.to_actions(state, block_stacks.read_moves(answer) or ())
        return self._words.to_objects(self._words.read_plan(answer), instance.objects)

    def _text(self, plan: Sequence[Fact]) -> str:
        if self.prompt == "short":
            return "".join(block_stacks.to_moves(plan))
        return write_plan(plan)

    def _problem(self, place: str, row: Row) -> Problem:
        query, domain = row.get("query"), row.get("domain_pddl")
        for name, value in (("query", query), ("domain_pddl", domain)):
            if value is not None and not isinstance(value, str):
                wanted = "the prompt" if name == "query" else "PDDL"
                raise UserError(f"{place}: {name} is no text; give {wanted} or leave it out")
        try:
            if row.get("problem_pddl") is not None:
                pddl = str(row["problem_pddl"])
            else:
                pddl = self._words.read_statement(str(field(place, row, "query")))
            same = domain is None or parse_domain(domain).actions.keys() == (
                self._words.domain.actions.keys()
            )
            if not same:
                raise PddlError("domain_pddl has other actions than this benchmark")
            # Of equal meaning the built-in one is used, so that episodes need not carry the row's.
            domain = None if domain is None or _alike(domain, self._words.domain) else domain
            ground = grounder(self._words, pddl, domain)
            answer = self._answer(row, ground)
            text = self._prompt(ground.instance, query)
        except PddlError as error:
            raise UserError(f"{place}: {error}; mend or delete the row") from error
        length = row.get("plan_length")
        if length is None and answer is not None:
            length = len(parse_plan(answer))
        if row.get("id") is None:
            field(place, row, "instance_id")
        number = f"{row.get('domain', self._words.prefix)}-{row.get('instance_id')}"
        details = {
            "subset": row.get("subset"),
            "objects": len(ground.instance.objects),
            "plan_length": length,
            "problem_pddl": pddl,
            "domain_pddl": domain,
        }
        return Problem.of(identity(row, number), text, answer, **_known(details))

    def _prompt(self, instance: Instance, query: str | None) -> str:
        if self.prompt == "short":
            return ":".join(block_stacks.short_form(instance))
        if self.prompt == "official" and query is not None:
            return query
        return self._words.write_prompt(instance)

    def _answer(self, row: Row, ground: Grounder) -> str | None:
        """The reference plan in PDDL with the problem's names."""
        given = row.get("ground_truth_plan_pddl", row.get("ground_truth_plan"))
        if given is None:
            return None
        plan = self._words.to_objects(self._words.read_plan(str(given)), ground.instance.objects)
        return write_plan(plan)


class PlanBenchBlocksworld(PlanBench):
    """``planbench_bw``: see PlanBench."""

    name = "planbench_bw"
    prompts = ("official", "own", "short")
    _words = BLOCKS

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        eval_fraction: float = 0.1,
        prompt: str = "official",
        subset: str | None = None,
        max_blocks: int | None = None,
    ) -> None:
        if max_blocks is not None:
            self._largest = max_blocks
        super().__init__(data, seed, eval_fraction, prompt, subset)


class PlanBenchLogistics(PlanBench):
    """``planbench_logistics``: see PlanBench."""

    name = "planbench_logistics"
    _words = LOGISTICS


def plan_rows(data: str | Path, words: Words) -> list[tuple[str, Row]]:
    """Rows as ``read_rows`` has them; of an upstream file (one JSON object) its ``instances``. Rows
    that name another domain are left out.

    Raises UserError as ``read_rows``.
    """
    path = Path(data).expanduser()
    content = read_bytes(path) if path.suffix == ".json" and path.is_file() else b""
    # JSON Lines under another name begin like an object, too: read_rows says what is wrong there.
    if content.lstrip()[:1] == b"{" and b'"instances"' in content:
        whole = read_json(str(path), content, "not a whole JSON object")
        if isinstance(whole, dict) and isinstance(whole.get("instances"), list):
            rows = [(f"{path}, instance {i}", item) for i, item in enumerate(whole["instances"], 1)]
            for place, row in rows:
                if not isinstance(row, dict):
                    raise UserError(f"{place}: it is no JSON object; mend or delete it")
            return rows
    return [
        (place, row)
        for place, row in read_rows(data)
        if str(row.get("domain", words.prefix)).startswith(words.prefix)
    ]


@functools.lru_cache(maxsize=64)
def _alike(text: str, domain: Domain) -> bool:
    """Whether a domain's actions are those of another but for the names of their parameters."""
    given = parse_domain(text).actions
    return all(given[name].meaning() == action.meaning() for name, action in domain.actions.items())


def _known(details: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in details.items() if value is not None}
