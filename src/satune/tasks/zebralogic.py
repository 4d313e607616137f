"""ZebraLogic: grids of houses and attributes, graded as the benchmark does (WildEval/ZeroEval).

The answer is the last complete JSON object of the message. A cell counts if its text equals the
solution's, but for case and outer space; of a list the first item is read. The score is 1 if every
cell is right: puzzle accuracy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from satune.tasks.literals import last_balanced
from satune.tasks.sources import (
    Row,
    check_fraction,
    check_unique,
    choose_split,
    field,
    hold_out,
    read_rows,
)
from satune.types import Grade, Problem, UserError

LONGEST = 100_000
"""Characters of an object that are read."""

_SIZE = re.compile(r"([0-9]+)\s*[*x]\s*([0-9]+)")
_SCALES = ((1e3, "small"), (1e6, "medium"), (1e10, "large"), (math.inf, "x-large"))
_PROMPT = """\
{puzzle}

Work out who lives where. Finish with one JSON object that fills in every cell of this table, in \
the words of the puzzle, and write nothing behind it:

{form}"""


class ZebraLogic:
    """The rows of ``data`` (``puzzle``, ``solution`` with header and rows, ``id``, ``size``).

    A grade's components are ``cell_accuracy`` and ``parsed`` (an object with a solution was found).
    A problem's metadata hold ``size``, ``search_space`` = (houses!)^attributes and its ``scale``.
    ``eval_fraction`` of the rows, chosen by the hash of their ids, form the split "eval", the rest
    "train", everything "all".

    Raises UserError for a bad option or a bad row (file and line).
    """

    name = "zebralogic"
    fresh = False

    def __init__(
        self, data: str | Path | None = None, seed: int = 0, eval_fraction: float = 0.1
    ) -> None:
        self.seed = seed
        fraction = check_fraction(self.name, eval_fraction)
        if data is None:
            raise UserError(
                "task zebralogic: it needs data: rows of ZebraLogicBench's grid mode with their"
                " solutions, as a file or as org/name/grid_mode:test on the hub"
            )
        rows = read_rows(data)
        named = [(place, _problem(place, row)) for place, row in rows]
        check_unique([(place, problem.id) for place, problem in named])
        self._places = {problem.id: place for place, problem in named}
        problems = [problem for _, problem in named]
        self._kept, self._held = hold_out(problems, [p.id for p in problems], fraction)

    def problems(self, split: str) -> Iterator[Problem]:
        """The rows of "train", "eval" (also "certify": the held-out rows) or "all"."""
        return iter(choose_split(self.name, split, self._kept, self._held))

    def extract(self, text: str) -> str | None:
        """The table of the last complete JSON object, cells in lower case and keys in order, as
        JSON; None if there is no such object or it has no solution."""
        table = _table(text)
        return None if table is None else json.dumps(table, sort_keys=True)

    def equal(self, a: str, b: str) -> bool:
        return a == b

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """1 if every cell of the solution is right, else 0; what is beside it does not count."""
        table = None if answer is None else _table(answer)
        if table is None:
            return Grade(0.0, {"cell_accuracy": 0.0, "parsed": 0.0}, "no JSON with a solution")
        cells = {
            (house, attribute): str(value).lower().strip()
            for house, row in problem.answer.items()
            for attribute, value in row.items()
        }
        wrong = [
            f"{house} {attribute}"
            for (house, attribute), value in cells.items()
            if table.get(house, {}).get(attribute) != value
        ]
        share = 1.0 - len(wrong) / len(cells)
        detail = "every cell is right" if not wrong else f"{len(wrong)} wrong, first: {wrong[0]}"
        return Grade(float(not wrong), {"cell_accuracy": share, "parsed": 1.0}, detail)

    def validate(self) -> None:
        """Check that each row's solution scores 1 and that it scores 0 with one cell changed.

        Raises UserError naming file and line of the row that fails.
        """
        for problem in (*self._kept, *self._held):
            spoilt = json.loads(json.dumps(problem.answer))
            house = next(iter(spoilt))
            spoilt[house][next(iter(spoilt[house]))] += " not"
            scores = [
                self.grade(problem, json.dumps({"solution": t})).score
                for t in (problem.answer, spoilt)
            ]
            if scores != [1.0, 0.0]:
                raise UserError(f"{self._places[problem.id]}: grades its own solution wrongly")


def _table(text: str) -> dict[str, dict[str, str]] | None:
    """House to attribute to cell, in lower case. Cells that are no text are left out."""
    found = last_balanced(text, "}")
    if found is None or len(found) > LONGEST:
        return None
    try:
        value = json.loads(found, strict=False)
    except (ValueError, RecursionError):
        return None
    solution = value.get("solution") if isinstance(value, dict) else None
    if not isinstance(solution, Mapping):
        return None
    return {
        house: {
            attribute: cell
            for attribute, inner in row.items()
            if (cell := _cell(inner)) is not None
        }
        for house, row in solution.items()
        if isinstance(row, Mapping)
    }


def _cell(value: Any) -> str | None:
    if isinstance(value, list) and value:
        value = value[0]
    return value.lower().strip() if isinstance(value, str) else None


def _problem(place: str, row: Row) -> Problem:
    puzzle, solution = field(place, row, "puzzle"), field(place, row, "solution")
    if not isinstance(puzzle, str) or not puzzle.strip():
        raise UserError(f"{place}: field 'puzzle' is no text; give the puzzle")
    header = solution.get("header") if isinstance(solution, Mapping) else None
    rows = solution.get("rows") if isinstance(solution, Mapping) else None
    if not header or not rows or any(len(cells) != len(header) for cells in rows):
        raise UserError(f"{place}: field 'solution' is no header with rows of its length")
    if header[0] != "House":
        raise UserError(f"{place}: solution: the first column is {header[0]!r}; it must be 'House'")
    table = {
        f"House {cells[0]}": dict(zip(header[1:], map(str, cells[1:]), strict=True))
        for cells in rows
    }
    if any("___" in cell for cells in table.values() for cell in cells.values()):
        raise UserError(f"{place}: the solution is masked; use a copy that holds the solutions")
    houses, attributes = len(rows), len(header) - 1
    size = _SIZE.fullmatch(str(row.get("size", "")))
    if size is not None and (int(size[1]), int(size[2])) != (houses, attributes):
        raise UserError(
            f"{place}: size is {row['size']!r}, the solution has {houses}*{attributes} cells"
        )
    space = math.factorial(houses) ** attributes
    form = {house: dict.fromkeys(cells, "...") for house, cells in table.items()}
    return Problem.of(
        str(field(place, row, "id")),
        _PROMPT.format(puzzle=puzzle.strip(), form=json.dumps({"solution": form}, indent=1)),
        table,
        size=f"{houses}*{attributes}",
        search_space=space,
        scale=next(name for limit, name in _SCALES if space < limit),
    )
