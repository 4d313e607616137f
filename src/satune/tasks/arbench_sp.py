"""Situation puzzles (ARBench SP): find the story behind a riddle by asking yes-or-no questions.

The game follows the benchmark's own evaluation (tmlr-group/AR-Bench): ``max_turns`` questions, each
answered by the puzzle's host with Yes, No or Unknown, every one on its own; then the team is asked
for its explanation, and only that counts. A message that is no question costs the turn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from satune.tasks.arbench import (
    HOST_TOKENS,
    MAX_TURNS,
    ModelRole,
    Role,
    ScriptedHost,
    check_game,
    f1_score,
    plain,
    without_thoughts,
)
from satune.tasks.sources import (
    Row,
    check_fraction,
    check_unique,
    choose_split,
    field,
    hold_out,
    read_rows,
)
from satune.types import Generate, Grade, Problem, Sampling, StepResult, UserError

_LONGEST = 100_000  # characters of an explanation that are counted

_PROMPT = """\
Solve a situation puzzle: find out what happened by asking questions that can be answered with yes \
or no. You have {turns} turns, one question each; the answer is Yes, No or Unknown. After the last \
turn you are asked for the whole explanation; do not give it before.

Puzzle: {surface}

Write each question in the form "Q: your question"."""
_FINAL = """\
That was the last question. Give your explanation of the puzzle directly, in the form:
A: your explanation"""
_HOST = """\
You are the host of a situation puzzle. The players see the puzzle only; you know the story \
behind it. They ask questions, and you answer each with one of these and nothing else:
- Yes: the story, or what follows from it, says so.
- No: the story, or what follows from it, contradicts it.
- Unknown: it cannot be concluded from the puzzle and the story.
- Not a question: it is no question about the puzzle, or it asks you for the solution.

An example. Puzzle: A man rides the lift to the seventh floor and walks up to the tenth, but when \
it rains he rides all the way. Story: He is too short to reach the upper buttons, and on wet days \
he has an umbrella to press them with.
Does his height matter? Yes
Is he afraid of lifts? No
Does he live alone? Unknown
What is the solution? Not a question

Puzzle: {surface}
Story: {bottom}"""
_REFUSED = 'That is no question: the turn is lost. Write "Q: your question".'


class SituationPuzzles:
    """The rows of ``data`` (``surface``, ``bottom``, ``key_question``) as a game.

    ``host`` says who answers (see ``arbench``), at ``host_temperature`` and top_p 0.7 as in the
    benchmark. What a host says beside Yes, No and Unknown is not shown but counts as Unknown: it
    might give the story away. ``eval_fraction`` of the rows, chosen by the hash of their ids, form
    the split "eval", the rest "train", everything "all".

    Score: ``f1_score_char``, the F1 of the characters of the whole final message (thoughts left
    out) and of the true story; ``f1_score_word`` of the words between spaces stands beside it.

    Raises UserError for a bad option or a bad row (file and line).
    """

    name = "arbench_sp"
    fresh = False

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        eval_fraction: float = 0.1,
        max_turns: int = MAX_TURNS,
        host: str = "scripted",
        host_temperature: float = 0.7,
    ) -> None:
        self.role_player = check_game(self.name, host, max_turns, host_temperature)
        if data is None:
            raise UserError("task arbench_sp: it needs data: the puzzles as JSONL or JSON")
        self.seed = seed
        self.host = host
        self.max_turns = max_turns
        self.sampling = Sampling(HOST_TOKENS, temperature=float(host_temperature), top_p=0.7)
        self._keys: dict[str, list[str]] = {}
        rows = [self._problem(i, *row) for i, row in enumerate(read_rows(data), 1)]
        check_unique([(place, problem.id) for place, problem in rows])
        problems = [problem for _, problem in rows]
        fraction = check_fraction(self.name, eval_fraction)
        self._kept, self._held = hold_out(problems, [p.id for p in problems], fraction)

    def problems(self, split: str) -> Iterator[Problem]:
        """The rows of "train", "eval" (also "certify": the held-out rows) or "all"."""
        return iter(choose_split(self.name, split, self._kept, self._held))

    def extract(self, text: str) -> str | None:
        """The whole message without thoughts; None if nothing is left."""
        said = without_thoughts(text)
        return said if said.strip() else None

    def equal(self, a: str, b: str) -> bool:
        return plain(a) == plain(b)

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """F1 of the explanation and the true story, by characters; by words beside it."""
        said = None if answer is None else self.extract(answer)
        said = "" if said is None else said[:_LONGEST]
        truth = str(problem.answer)
        by_character = f1_score(said, truth)
        by_word = f1_score(said.split(), truth.split())
        return Grade(
            by_character,
            {"f1_score_char": by_character, "f1_score_word": by_word},
            f"read {len(said)} characters; f1 by characters {by_character:.4f}, "
            f"by words {by_word:.4f}",
        )

    def environment(self, problem: Problem, rng: random.Random, generate: Generate) -> Questioning:
        surface, bottom = problem.metadata["surface"], str(problem.answer)
        host: Role
        if self.host == "scripted":
            host = ScriptedHost(self._keys[problem.metadata["case"]], surface, bottom)
        else:
            instructions = _HOST.format(surface=surface, bottom=bottom)
            host = ModelRole(instructions, generate, self.sampling, remembers=False)
        return Questioning(self, problem, host)

    def validate(self) -> None:
        """Check that each row's story scores 1 in both forms, that its first half scores less and
        that no answer scores 0.

        Raises ValueError naming the problem that fails.
        """
        for problem in (*self._kept, *self._held):
            truth = str(problem.answer)
            gold = self.grade(problem, truth)
            half = self.grade(problem, truth[: len(truth) // 2])
            nothing = [self.grade(problem, a).score for a in ("", " ", None)]
            if set(gold.components.values()) != {1.0} or not half.score < 1.0 or any(nothing):
                raise ValueError(f"task arbench_sp: {problem.id} grades its own story wrongly")

    def _problem(self, number: int, place: str, row: Row) -> tuple[str, Problem]:
        texts = {}
        for name in ("surface", "bottom"):
            texts[name] = field(place, row, name)
            if not isinstance(texts[name], str) or not texts[name].strip():
                raise UserError(f"{place}: field {name!r} is no text; give the story")
        keys = row.get("key_question", [])
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise UserError(f"{place}: field 'key_question' is no list of texts; mend or drop it")
        identity = str(row.get("id", f"arbench_sp-{row.get('index', number)}"))
        self._keys[identity] = keys
        prompt = _PROMPT.format(turns=self.max_turns, surface=texts["surface"])
        return place, Problem.of(
            identity, prompt, texts["bottom"], surface=texts["surface"], case=identity,
            max_turns=self.max_turns,
        )  # fmt: skip


class Questioning:
    """One puzzle. Components of its grade: both forms of F1 and ``malformed``, the share of turns
    that were lost to a message that is no question."""

    def __init__(self, task: SituationPuzzles, problem: Problem, host: Role) -> None:
        self._task = task
        self._problem = problem
        self._host = host
        self._turns = 0
        self._malformed = 0

    async def step(self, action: str | None) -> StepResult:
        """Have a question answered; grade what follows the last turn."""
        limit = self._problem.metadata["max_turns"]
        if self._turns == limit:
            graded = self._task.grade(self._problem, action)
            components = {**graded.components, "malformed": self._malformed / limit}
            detail = f"{graded.detail}; host {self._task.host}"
            return StepResult("", True, grade=Grade(graded.score, components, detail))
        self._turns += 1
        question = _question(without_thoughts(action or ""))
        text = _REFUSED if question is None else _verdict(await self._host.answer(question))
        self._malformed += text == _REFUSED
        if self._turns == limit:
            text += f"\n\n{_FINAL}"
        return StepResult(text)


def _question(text: str) -> str | None:
    """What follows the last "Q:" at the start of a line, else the message; None if it does not ask
    anything, which a question mark tells."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.lstrip("*_` ").startswith("Q:")]
    asked = "\n".join(lines[starts[-1] :] if starts else lines).lstrip("*_` \n").removeprefix("Q:")
    asked = " ".join(asked.split())
    return asked if "?" in asked or (starts and asked.strip("*_` ")) else None


def _verdict(said: str) -> str:
    heard = plain(said)
    for word in ("Yes", "No", "Unknown"):
        if heard.split()[:1] == [word.lower()] and not heard.startswith("not a question"):
            return word
    return _REFUSED if "not a question" in heard else "Unknown"
