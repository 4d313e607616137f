"""AutoLogi: open-ended logic puzzles whose answers are checked by the row's own code.

Graded as the benchmark's own evaluation does (8188zq/AutoLogi): the answer is the literal in the
last fenced block, else the last dictionary, else the last list; it counts if the row's
``inputs_check`` and every function of its ``constraint_list`` say yes within 20 seconds. What that
code prints, to either stream, is of no account here, while there it spoils the answer; and there
the words true and false become Python's inside strings too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from satune.tasks.literals import find_literal, read_literal
from satune.tasks.sandbox import MEMORY, SECONDS, check, demand, screen
from satune.tasks.sources import Row, field, identity, read_rows
from satune.tasks.splits import RowTask, places_of
from satune.thoughts import without_thoughts
from satune.types import Grade, Problem, UserError

_CODE = ("Inputs_Check_code", "Constraint_List_code")


class AutoLogi(RowTask):
    """The rows of ``data`` (``idx``, ``prompt``, ``code``, ``lang``; ``id`` if the file has one).

    ``lang`` keeps the rows of one language ("en", "cn"). ``seconds`` (wall time) and ``memory``
    (MiB) bound one check; see ``sandbox``.

    Raises UserError for a bad option or a bad row (file and line), and where checks would run half
    protected (see ``sandbox.check``).
    """

    name = "autologi"

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        eval_fraction: float = 0.1,
        lang: str | None = None,
        seconds: float = SECONDS,
        memory: int = MEMORY >> 20,
    ) -> None:
        if data is None:
            raise UserError("task autologi: it needs data: a JSONL file of 8188zq/AutoLogi")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise UserError(f"task autologi: seconds is {seconds!r}; give a number above 0")
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 64:
            raise UserError(f"task autologi: memory is {memory!r}; give MiB, an integer from 64 up")
        demand()
        self.seed = seed
        self.seconds = float(seconds)
        self.memory = memory
        rows = read_rows(data)
        named = [(place, _problem(place, row)) for place, row in rows]
        places_of(named)  # ids are the file's, whichever language is kept
        self._rows = {p.id: row for (_, row), (_, p) in zip(rows, named, strict=True)}
        languages = {problem.metadata["lang"] for _, problem in named}
        if lang is not None and lang not in languages:
            there = ", ".join(sorted(languages))
            raise UserError(f"task autologi: no rows of lang {lang!r}; there are: {there}")
        kept = [(place, p) for place, p in named if lang in (None, p.metadata["lang"])]
        self._keep(kept, eval_fraction)

    def extract(self, text: str) -> str | None:
        """The message's last literal outside a thought, written the way Python writes it; None if
        there is none."""
        found = find_literal(without_thoughts(text))
        if found is None:
            return None
        try:
            return repr(read_literal(found))
        except ValueError:
            return None

    def equal(self, a: str, b: str) -> bool:
        """Whether two extracted answers have one value, in whatever order their keys stand."""
        return a == b or _value(a) == _value(b)

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """1 if the format check and all constraints hold, else 0; ``detail`` names what failed."""
        inputs = None if answer is None else self.extract(answer)
        if inputs is None:
            return Grade(0.0, detail="no literal found in the answer")
        code = problem.metadata["code"]
        fault = screen(code)
        if fault is not None:
            return Grade(0.0, detail=f"the row's code was not run: {fault}")
        verdict = check(code, inputs, seconds=self.seconds, memory=self.memory << 20)
        return Grade(float(verdict.holds), detail=f"{verdict.detail} (read {_short(inputs)})")

    def validate(self) -> None:
        """Check that every row's code may be run, that its example is of a legal format, and, where
        the row says so (``accepted``, ``rejected_*``), that answers score 1 and 0.

        Raises UserError naming file and line of the row that fails.
        """
        for problem in self.problems("all"):
            place, row = self._places[problem.id], self._rows[problem.id]
            fault = screen(problem.metadata["code"])
            if fault is not None:
                raise UserError(f"{place}: its code may not be run ({fault}); mend or drop the row")
            if isinstance(row.get("example"), str):
                grade = self.grade(problem, row["example"])
                if not grade.detail.startswith(("format and", "constraint")):
                    raise UserError(f"{place}: its example is no legal input: {grade.detail}")
            for column, wanted in (
                ("accepted", 1.0), ("rejected_constraint", 0.0), ("rejected_format", 0.0),
            ):  # fmt: skip
                for answer in row.get(column, ()):
                    grade = self.grade(problem, answer)
                    if grade.score != wanted:
                        raise UserError(f"{place}: {column} {answer}: {grade.detail}")


def _problem(place: str, row: Row) -> Problem:
    prompt, code = field(place, row, "prompt"), field(place, row, "code")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{place}: field 'prompt' is no text; give the puzzle")
    if not isinstance(code, dict):
        raise UserError(f"{place}: field 'code' is no object; it holds {' and '.join(_CODE)}")
    parts = [field(f"{place}, code", code, name) for name in _CODE]
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"{place}: {' and '.join(_CODE)} must be text; write Python source")
    lang = str(row.get("lang", "en"))
    # The two official files count from 1 each, so an idx alone would not be a name.
    if row.get("id") is None:
        field(place, row, "idx")
    name = identity(row, f"{lang}-{row.get('idx')}")
    return Problem.of(name, prompt, row.get("example"), code="\n".join(parts), lang=lang)


def _value(text: str) -> Any:
    try:
        return read_literal(text)
    except ValueError:
        return text


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."
