"""Situation puzzles (ARBench SP): find the story behind a riddle by asking yes-or-no questions.

The game follows the benchmark's own evaluation (tmlr-group/AR-Bench): ``max_turns`` questions, each
answered by the puzzle's host with Yes, No or Unknown, every one on its own; then the team is asked
for its explanation, and only that counts. A message that is no question costs the turn.
"""

from __future__ import annotations

import random

from satune.tasks.arbench import (
    HostedGame,
    ModelRole,
    Questions,
    Role,
    ScriptedHost,
    f1_score,
    plain,
)
from satune.tasks.sources import Row, field
from satune.thoughts import without_thoughts
from satune.types import Generate, Grade, Problem, UserError

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


class SituationPuzzles(HostedGame):
    """The rows of ``data`` (``surface``, ``bottom``, ``key_question``) as a game; ``host`` answers
    (see ``HostedGame``). What it says beside Yes, No and Unknown is not shown but counts as
    Unknown: it might give the story away.

    Score: ``f1_score_char``, the F1 of the characters of the whole final message (thoughts left
    out) and of the true story; ``f1_score_word`` of the words between spaces stands beside it.
    """

    name = "arbench_sp"
    needs = "the puzzles as JSONL or JSON"

    def extract(self, text: str) -> str | None:
        """The whole message without thoughts; None if nothing is left."""
        said = without_thoughts(text)
        return said if said.strip() else None

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
            host = ScriptedHost(self._secrets[problem.metadata["case"]], surface, bottom)
        else:
            instructions = _HOST.format(surface=surface, bottom=bottom)
            host = ModelRole(instructions, generate, self.sampling, remembers=False)
        return Questioning(self, problem, host)

    def validate(self) -> None:
        """Check that each row's story scores 1 in both forms, that its first half scores less and
        that no answer scores 0.

        Raises ValueError naming the problem that fails.
        """
        for problem in self.problems("all"):
            truth = str(problem.answer)
            gold = self.grade(problem, truth)
            half = self.grade(problem, truth[: len(truth) // 2])
            nothing = [self.grade(problem, a).score for a in ("", " ", None)]
            if set(gold.components.values()) != {1.0} or not half.score < 1.0 or any(nothing):
                raise ValueError(f"task arbench_sp: {problem.id} grades its own story wrongly")

    def _problem(self, number: int, place: str, row: Row) -> Problem:
        texts = {}
        for name in ("surface", "bottom"):
            texts[name] = field(place, row, name)
            if not isinstance(texts[name], str) or not texts[name].strip():
                raise UserError(f"{place}: field {name!r} is no text; give the story")
        keys = row.get("key_question", [])
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise UserError(f"{place}: field 'key_question' is no list of texts; mend or drop it")
        identity = self._named(number, row)
        self._secrets[identity] = keys
        prompt = _PROMPT.format(turns=self.max_turns, surface=texts["surface"])
        return Problem.of(
            identity, prompt, texts["bottom"], surface=texts["surface"], case=identity,
            max_turns=self.max_turns,
        )  # fmt: skip


class Questioning(Questions):
    """One puzzle."""

    def __init__(self, task: SituationPuzzles, problem: Problem, host: Role) -> None:
        super().__init__(task, problem)
        self._host = host

    def _final(self) -> str:
        return _FINAL

    async def _reply(self, action: str) -> str:
        question = _question(action)
        text = _REFUSED if question is None else _verdict(await self._host.answer(question))
        self._malformed += text == _REFUSED
        return text


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
