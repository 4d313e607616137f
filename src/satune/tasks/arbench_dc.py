"""Detective cases (ARBench DC): question five suspects, then name the murderer.

The game follows the benchmark's own evaluation (tmlr-group/AR-Bench): the team has ``max_turns``
questions, each put to one suspect, who answers in a sentence, playing the role that the row gives;
then the team is asked for its final choice, a letter from A to E, and only that counts. There a
suspect is chosen in one message and questioned in the next; here one message does both. A name that
is no suspect's costs the turn, as there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from satune.tasks.arbench import (
    HostedGame,
    ModelRole,
    Questions,
    Role,
    ScriptedSuspect,
    plain,
)
from satune.tasks.sources import Row, field
from satune.thoughts import without_thoughts
from satune.types import Generate, Grade, Problem, UserError

LETTERS = "ABCDE"
LONGEST_CHOICE = 100
"""Characters of a message without "Answer:" that may be a choice and nothing else."""

_ANSWER = re.compile(r"answer\W{0,8}:", re.IGNORECASE)
_LETTER = re.compile(r"(?<![^\W_])[A-E](?![^\W_]|['’])")
_OPTION = re.compile(r"\W{0,8}([A-E])(?:\W{0,8}$|\s?[.):])")
_ADDRESSED = re.compile(r"question\s{1,4}(?:for|to)\s", re.IGNORECASE)
_MARKUP = "*_`#>\"'[](){} \t\r\n"

_PROMPT = """\
You are the detective in a murder case. One of five suspects is the murderer. You have {turns} \
turns; in each you put one single question to one suspect, who answers in a sentence and may lie. \
After the last turn you are asked who the murderer is.

{case}

Write each question in the form "Question for NAME: your question", with the whole name."""
_FINAL = """\
That was the last question. Who is most likely the murderer? {choices}
Reason step by step, then end with a line that gives the letter alone:
Answer: A, B, C, D or E"""
_SUSPECT = """\
You play {name}, a suspect whom a detective questions about a murder. Stay in this role and answer \
each question in one sentence.

What you are to do: {task}

What you know and did:
{story}"""


class DetectiveCases(HostedGame):
    """The rows of ``data`` (``initial_information``, ``suspects``, ``label``) as a game; ``host``
    plays the suspects (see ``HostedGame``).

    The final choice is read from the line after the first "Answer:": a suspect's whole name, or the
    letter that stands first and apart ("B." or "B) ..."), or the last single capital from A to E.
    The benchmark takes the last capital from A to E there, those inside names included, and nothing
    else; here a message that is a letter or a name and nothing more counts too.
    """

    name = "arbench_dc"
    needs = "the cases as JSONL, or upstream's JSON"

    def extract(self, text: str) -> str | None:
        """The choice in a message, as a letter or as what stands where one was asked for; without
        one, its question in the form asked for; None if there is neither."""
        text = without_thoughts(text)
        choice = _choice(text)
        if choice is not None:
            return choice
        question = _question(text)
        return None if question is None else f"Question for {question[0]}: {question[1]}"

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """The official metric: 1 if the final choice is the murderer, else 0."""
        chosen = None if answer is None else self._letter(problem, without_thoughts(answer))
        score = float(chosen == problem.answer)
        return Grade(score, {"final": score}, f"read {chosen}, expected {problem.answer}")

    def environment(
        self, problem: Problem, rng: random.Random, generate: Generate
    ) -> Interrogation:
        roles: dict[str, Role] = {}
        for suspect in self._secrets[problem.metadata["case"]]:
            roles[suspect["name"]] = (
                ScriptedSuspect(suspect["story"])
                if self.host == "scripted"
                else ModelRole(_SUSPECT.format_map(suspect), generate, self.sampling, True)
            )
        return Interrogation(self, problem, roles)

    def validate(self) -> None:
        """Check that each row's letter scores 1, written with "Answer:" and alone, that the
        murderer's name does, and that the other letters and names, and no answer, score 0.

        Raises ValueError naming the problem that fails.
        """
        for problem in self.problems("all"):
            for letter, suspect in zip(LETTERS, problem.metadata["suspects"], strict=True):
                wanted = float(letter == problem.answer)
                forms = (
                    letter,
                    f"Reason: he ran.\nAnswer: {letter}",
                    f"Answer: {suspect}",
                    suspect,
                )
                if [self.grade(problem, form).score for form in forms] != [wanted] * 4:
                    raise ValueError(f"task arbench_dc: {problem.id} grades {letter} wrongly")
            if any(self.grade(problem, spoilt).score for spoilt in ("", None, "Answer: F")):
                raise ValueError(f"task arbench_dc: {problem.id} grades no answer as one")

    def _letter(self, problem: Problem, text: str) -> str | None:
        names = {
            plain(n): letter
            for letter, n in zip(LETTERS, problem.metadata["suspects"], strict=True)
        }
        named = names.get(plain(_answered(text) or ""))
        choice = _choice(text)
        return named or (choice if choice is not None and choice in tuple(LETTERS) else None)

    def _problem(self, number: int, place: str, row: Row) -> Problem:
        known = _object(place, field(place, row, "initial_information"), "initial_information")
        where = f"{place}, initial_information"
        victim = _object(where, field(where, known, "victim"), "victim")
        shown = field(where, known, "suspect")
        if not isinstance(shown, list) or len(shown) != len(LETTERS):
            raise UserError(f"{where}: suspect is no list of {len(LETTERS)}; give five suspects")
        names = [_text(f"{where}, suspect", _object(where, s, "suspect"), "name") for s in shown]
        suspects = field(place, row, "suspects")
        if not isinstance(suspects, list):
            raise UserError(f"{place}: suspects is no list; give the five roles")
        roles = [
            {k: _text(f"{place}, suspects", _object(place, s, "suspects"), k) for k in _ROLE}
            for s in suspects
        ]
        if sorted(role["name"] for role in roles) != sorted(names) or len(set(names)) < len(names):
            raise UserError(f"{place}: suspects and initial_information name different people")
        label = field(place, row, "label")
        if isinstance(label, bool) or label not in range(len(LETTERS)):
            raise UserError(f"{place}: label is {label!r}; give an index from 0 to 4")
        guilty = {s["name"] for s in suspects if s.get("is_murderer") is True}
        if guilty and guilty != {names[label]}:
            raise UserError(f"{place}: label points to {names[label]}, who is not the murderer")
        identity = self._named(number, row)
        self._secrets[identity] = roles
        lines = [f"{key}: {_text(where, known, key)}" for key in ("time", "location")]
        lines.append(f"victim: {_text(f'{where}, victim', victim, 'name')}")
        lines += [
            f"- {title}: {_text(f'{where}, victim', victim, key)}"
            for title, key in (
                ("about", "introduction"), ("cause of death", "cause_of_death"),
                ("weapon", "murder_weapon"),
            )
        ]  # fmt: skip
        lines.append("suspects:")
        lines += [f"- {s['name']}: {_text(where, s, 'introduction')}" for s in shown]
        prompt = _PROMPT.format(turns=self.max_turns, case="\n".join(lines))
        return Problem.of(
            identity, prompt, LETTERS[label], suspects=names, case=identity,
            max_turns=self.max_turns,
        )  # fmt: skip


class Interrogation(Questions):
    """One case. A name that no suspect has costs the turn."""

    def __init__(self, task: DetectiveCases, problem: Problem, roles: Mapping[str, Role]) -> None:
        super().__init__(task, problem)
        self._roles = {plain(name): (name, role) for name, role in roles.items()}

    def _final(self) -> str:
        names = self._problem.metadata["suspects"]
        choices = ", ".join(f"{a}. {b}" for a, b in zip(LETTERS, names, strict=True))
        return _FINAL.format(choices=choices)

    async def _reply(self, action: str) -> str:
        question = _question(action, self._roles)
        if question is None:
            self._malformed += 1
            return 'No question found: the turn is lost. Write "Question for NAME: your question".'
        if plain(question[0]) not in self._roles:
            self._malformed += 1
            names = ", ".join(name for name, _ in self._roles.values())
            return f"No suspect has that name: the turn is lost. The suspects are: {names}."
        name, role = self._roles[plain(question[0])]
        return f"{name}: {await role.answer(question[1])}"


_ROLE = ("name", "task", "story")


def _answered(text: str) -> str | None:
    """The line after the first "Answer:" (else one spelt otherwise); the whole of a short message;
    None if there is neither."""
    found = re.search("Answer:", text) or _ANSWER.search(text)
    if found is None:
        return text.strip() if len(text) <= LONGEST_CHOICE else None
    lines = text[found.end() :].strip(_MARKUP).splitlines()
    return lines[0].rstrip(_MARKUP) if lines else None


def _choice(text: str) -> str | None:
    """The letter in the answer's line, its text if there is no letter; without an "Answer:" only a
    message that is one letter has one."""
    line = _answered(text)
    if line is None:
        return None
    option = _OPTION.match(line)
    if option is not None and (option.end() == len(line) or _ANSWER.search(text)):
        return option[1]
    if not _ANSWER.search(text):
        return None
    letters = _LETTER.findall(line)
    return letters[-1] if letters else line.strip(_MARKUP + ".") or None


def _question(text: str, names: Sequence[str] | Mapping[str, Any] = ()) -> tuple[str, str] | None:
    """(name, question) of the last line "Question for NAME: ...", else of a line "NAME: ..." with
    one of ``names`` (in plain form). What stands on the lines after it belongs to the question."""
    lines = text.splitlines()
    for index in range(len(lines) - 1, -1, -1):
        found = _ADDRESSED.search(lines[index])
        whole = lines[index][found.end() :] if found else lines[index]
        name, colon, first = whole.partition(":")
        if not colon or not (found or plain(name) in names):
            continue
        question = " ".join([first, *lines[index + 1 :]]).strip(_MARKUP)
        name = name.strip(_MARKUP)
        return (name, question) if name and question else None
    return None


def _object(place: str, value: Any, name: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{place}: {name} is a {type(value).__name__}; it must be an object")
    return value


def _text(place: str, row: Row, name: str) -> str:
    value = field(place, row, name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: field {name!r} is {str(value)[:40]!r}; it must be text")
    return value
