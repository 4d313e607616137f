"""Blocksworld to train on: instances without end, in PlanBench's words or in a short form that tiny
agents can play.

In short form a team builds a plan move by move. The prompt "AB/C:CBA" gives state and goal (see
``block_stacks``); a message is the plan so far, "=", and the state it leads to: "B-=A/B/C", then
"B-BC=A/CB". Only the plan counts.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from satune.tasks import block_stacks, blocks
from satune.tasks.plan_text import write_plan
from satune.tasks.planbench import BLOCKS, PlanBenchBlocksworld, grade_plan, grounder
from satune.tasks.splits import TENTHS, check_integer, generator, lies_in
from satune.tasks.strips import Fact, parse_problem
from satune.tasks.voices import last_said, prompt_of
from satune.types import Entry, Grade, Problem, UserError

MOST_BLOCKS = 8
"""Shortest plans for more are too slow to find."""


class Blocksworld:
    """Instances of ``blocks`` blocks named by some of the first ``letters`` letters.

    The initial state is random (see ``block_stacks.random_stacks``); the goal is what stands on
    what in another random state, or with even chance a part of that, and does not hold yet. Splits
    "train", "eval" and "certify" are disjoint whatever the seed; instances that differ in the names
    of their blocks only may lie in different ones.

    ``prompt`` "short" is for tiny agents, "planbench" is the same instance in PlanBench's words
    (``blocks.PROMPT``). ``data`` are PlanBench rows (see ``planbench``) of at most ``blocks``
    blocks, shown in the same form; ``subset`` and ``eval_fraction`` are for them.

    A plan is graded as PlanBench does: by any valid plan, by ``strips``.
    """

    name = "blocksworld"
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ-/:="
    """Every character that prompts and a player's messages hold in short form."""

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        blocks: int = 3,
        letters: int | None = None,
        prompt: str = "short",
        subset: str | None = None,
        eval_fraction: float = 0.1,
    ) -> None:
        check_integer("task blocksworld: blocks", blocks, 3, MOST_BLOCKS)
        letters = max(blocks, 6) if letters is None else letters
        check_integer("task blocksworld: letters", letters, blocks, 12)
        if prompt not in ("short", "planbench"):
            raise UserError(f"task blocksworld: prompt is {prompt!r}; give 'short' or 'planbench'")
        if subset is not None and data is None:
            raise UserError("task blocksworld: subset is for rows; give data or drop it")
        self.seed = seed
        self.blocks = blocks
        self.prompt = prompt
        self.fresh = data is None
        self._letters = block_stacks.LETTERS[:letters]
        self._rows: PlanBenchBlocksworld | None = None
        if data is not None:
            form = "short" if prompt == "short" else "own"
            self._rows = PlanBenchBlocksworld(data, seed, eval_fraction, form, subset, blocks)

    def problem_at(self, split: str, index: int) -> Problem:
        """Problem ``index`` (from 0) of a generated split's stream."""
        if not self.fresh:
            raise UserError("task blocksworld: its problems are rows; use problems(split)")
        rng = generator("blocksworld", self.seed, split, index)
        while True:
            state, goal = self._draw(rng)
            form = f"{state}:{goal}"
            digest = hashlib.blake2b(form.encode(), digest_size=8).digest()
            wanted = block_stacks.goal_of(goal)
            held = block_stacks.reached(block_stacks.read_stacks(state), wanted)
            if not held and lies_in(split, digest):
                return self._problem(f"blocksworld-{split}-{index:06d}", state, goal)

    def problems(self, split: str) -> Iterator[Problem]:
        """The rows of that split, or an endless stream of generated instances."""
        if self._rows is not None:
            return self._rows.problems(split)
        return (self.problem_at(split, index) for index in itertools.count())

    def extract(self, text: str) -> str | None:
        """In short form the moves that a message ends with; else the plan in it, in PDDL."""
        if self.prompt == "short":
            return "".join(block_stacks.read_moves(text) or ()) or None
        return write_plan(blocks.read_blocks_plan(text)) or None

    def equal(self, a: str, b: str) -> bool:
        return a == b

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """1 if the plan can be executed and reaches the goal; see ``planbench.grade_plan``."""
        if self._rows is not None:
            return self._rows.grade(problem, answer)
        ground = grounder(BLOCKS, problem.metadata["problem_pddl"])
        plan = None if self.extract(answer or "") is None else self._read(problem, answer or "")
        return grade_plan(problem, ground, plan, problem.metadata["plan_length"])

    def validate(self) -> None:
        """Check, on the first problems of each split (or every row), that the shortest plan scores
        1, in one piece and as a faultless player builds it, and 0 without its last move.

        Raises ValueError naming the problem that fails.
        """
        if self._rows is not None:
            self._rows.validate()
            return
        for split in TENTHS:
            for problem in itertools.islice(self.problems(split), 50):
                entries = [Entry("problem", parts=problem.prompt)]
                for _ in range(problem.metadata["plan_length"] // 2):
                    said = self.expert(entries, random.Random(0), 0.0)
                    entries.append(Entry("foreign", said, "player"))
                said = entries[-1].text
                cut = self._write(self._below(problem.text), self._moves(said, problem.text)[:-1])
                good = [self.grade(problem, text).score for text in (said, problem.answer)]
                if good != [1.0, 1.0] or any(self.grade(problem, t).score for t in (cut, "", None)):
                    raise ValueError(f"task blocksworld: {problem.id} grades its own plan wrongly")

    def expert(self, entries: Sequence[Entry], rng: random.Random, error: float) -> str:
        """What a player who errs with probability ``error`` writes after seeing ``entries``.

        It adds to the last plan it sees the first move of a shortest way to the goal from where
        that plan leads. Where several seats have just written plans of one length (a round of a
        debate), it takes the one most of them wrote, the earliest of these on a tie. An error makes
        another legal move. A plan that has reached the goal is repeated.
        """
        prompt = prompt_of(entries)
        moves = last_said(entries, lambda text: self._moves(text, prompt) or None, len) or []
        start, goal = self._below(prompt), self._goal(prompt)
        now = block_stacks.after_moves(start, moves)
        ahead = block_stacks.shortest_moves(block_stacks.write_stacks(now), goal)
        if ahead:
            others = [m for m in block_stacks.legal_moves(now) if m != ahead[0]]
            wrong = rng.random() < error and others
            moves = [*moves, rng.choice(others) if wrong else ahead[0]]
        return self._write(start, moves)

    def _below(self, prompt: str) -> block_stacks.Below:
        return block_stacks.read_stacks(self._forms(prompt)[0])

    def _goal(self, prompt: str) -> str:
        return self._forms(prompt)[1]

    def _forms(self, prompt: str) -> tuple[str, str]:
        """(state, goal) in short form from a prompt of either form."""
        if self.prompt == "short":
            state, _, goal = prompt.partition(":")
            return state, goal
        return block_stacks.short_form(parse_problem(blocks.read_statement(prompt)))

    def _moves(self, text: str, prompt: str) -> list[str]:
        if self.prompt == "short":
            return block_stacks.read_moves(text) or []
        objects = [block.lower() for block in self._below(prompt)]
        plan = blocks.to_objects(blocks.read_blocks_plan(text), dict.fromkeys(objects, "object"))
        return block_stacks.to_moves(plan)

    def _write(self, start: block_stacks.Below, moves: Sequence[str]) -> str:
        if self.prompt == "short":
            after = block_stacks.write_stacks(block_stacks.after_moves(start, moves))
            return f"{''.join(moves)}={after}"
        plan = blocks.write_steps(block_stacks.to_actions(start, moves))
        return f"[PLAN]\n{plan}\n[PLAN END]"

    def _read(self, problem: Problem, answer: str) -> list[Fact]:
        if self.prompt == "short":
            moves = block_stacks.read_moves(answer) or []
            return block_stacks.to_actions(self._below(problem.text), moves)
        instance = parse_problem(problem.metadata["problem_pddl"])
        return blocks.to_objects(blocks.read_blocks_plan(answer), instance.objects)

    def _draw(self, rng: random.Random) -> tuple[str, str]:
        chosen = rng.sample(self._letters, self.blocks)
        state = block_stacks.random_stacks(chosen, rng)
        goal: block_stacks.Below = {}
        while not goal:
            goal = block_stacks.goal_of(block_stacks.random_stacks(chosen, rng))
        if len(goal) > 1 and rng.random() < 0.5:
            kept = rng.sample(sorted(goal), rng.randrange(1, len(goal)))
            goal = {block: goal[block] for block in kept}
        return state, block_stacks.write_stacks(goal)

    def _problem(self, identity: str, state: str, goal: str) -> Problem:
        below = block_stacks.read_stacks(state)
        moves = block_stacks.shortest_moves(state, goal)
        pddl = blocks.blocks_problem(
            identity,
            sorted(block.lower() for block in below),
            block_stacks.facts(state),
            block_stacks.goal_facts(goal),
        )
        text = f"{state}:{goal}"
        if self.prompt == "planbench":
            text = blocks.write_prompt(parse_problem(pddl))
        return Problem.of(
            identity,
            text,
            self._write(below, moves),
            fresh=True,
            short=f"{state}:{goal}",
            plan_length=2 * len(moves),
            problem_pddl=pddl,
        )
