"""ZebraLogic: puzzles about houses whose inhabitants differ in every attribute, answered by a grid.

The metric is that of the benchmark's own evaluation (WildEval/ZeroEval): a puzzle is solved if
every cell of the message's last JSON object is right after ``lower()`` and ``strip()``. Of a cell
that is a list the first value counts; houses and attributes that the puzzle does not have are
ignored; their names are case-sensitive. What makes that evaluation stop with an error (a cell that
is a number, a house that is no object) is a wrong cell here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from satune.tasks.json_answers import last_object
from satune.tasks.sources import Row, field, identity, read_rows
from satune.tasks.splits import RowTask
from satune.thoughts import without_thoughts
from satune.types import Grade, Problem, UserError

Table = dict[str, dict[str, str]]

_SCALES = {"small": 10**3, "medium": 10**6, "large": 10**10}
_PROMPT = """\
Solve this logic puzzle.

{puzzle}

End your answer with one JSON object of this form, every ___ replaced by one of the values that \
the puzzle lists for that attribute, spelt as it is there:

{form}"""


def scale(houses: int, attributes: int) -> str:
    """The class of a puzzle's search space, (houses!) ** attributes candidate grids: "small" below
    1e3, "medium" below 1e6, "large" below 1e10, else "x-large"."""
    size = math.factorial(houses) ** attributes
    return next((name for name, bound in _SCALES.items() if size < bound), "x-large")


def read_table(text: str) -> Table | None:
    """The grid of a message, values lowered and stripped; None if its last JSON object has no
    object under "solution". Thoughts are not read; cells that are no text are left out."""
    found = (last_object(without_thoughts(text), "solution") or {}).get("solution")
    if not isinstance(found, dict):
        return None
    table: Table = {}
    for house, cells in found.items():
        if isinstance(cells, dict):
            # Of a list the first value counts, as in the official evaluation.
            first = {a: c[0] if isinstance(c, list) and c else c for a, c in cells.items()}
            table[house] = {a: c.lower().strip() for a, c in first.items() if isinstance(c, str)}
    return table


class ZebraLogic(RowTask):
    """The puzzles of ``data``: rows with ``id``, ``size`` ("houses*attributes"), ``puzzle`` and
    ``solution`` {header, rows}, as allenai/ZebraLogicBench (grid_mode) has them; rows without an
    id are numbered. A hub id needs configuration and split: ``org/name:grid_mode:test``.

    A problem's metadata holds ``size``, ``scale``, ``houses`` and ``attributes`` to group by.
    Raises UserError naming file and line for a bad row.
    """

    name = "zebralogic"

    def __init__(
        self, data: str | Path | None = None, seed: int = 0, eval_fraction: float = 0.1
    ) -> None:
        if data is None:
            raise UserError("task zebralogic: it needs data: a JSONL or Parquet file, or a hub id")
        self.seed = seed
        rows = [(p, _problem(i, p, row)) for i, (p, row) in enumerate(read_rows(data), 1)]
        self._keep(rows, eval_fraction)

    def extract(self, text: str) -> str | None:
        """The message's grid as JSON with sorted keys; None without one."""
        table = read_table(text)
        if table is None:
            return None
        return json.dumps({"solution": table}, sort_keys=True, ensure_ascii=False)

    def equal(self, a: str, b: str) -> bool:
        return a == b

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """1 if every cell is right, else 0. Components: ``cell_accuracy`` (the share of right
        cells; 0 without a grid) and ``answered`` (there is a grid)."""
        table = None if answer is None else read_table(answer)
        right = total = 0
        wrong = ""
        for house, cells in problem.answer.items():
            for attribute, value in cells.items():
                given = (table or {}).get(house, {}).get(attribute)
                total += 1
                right += given == value.lower().strip()
                if given != value.lower().strip() and not wrong:
                    wrong = f"; first wrong: {house}, {attribute}: {given}, expected {value}"
        components = {"cell_accuracy": right / total, "answered": float(table is not None)}
        detail = "no grid found" if table is None else f"{right} of {total} cells right{wrong}"
        return Grade(float(right == total), components, detail)

    def validate(self) -> None:
        """Check that each solution as JSON scores 1, and that it scores 0 with two houses' values
        of an attribute exchanged, without its last house, and as no answer.

        Raises UserError naming file and line of the row that fails.
        """
        for problem in self.problems("all"):
            gold: Table = problem.answer
            first, second, *_ = gold
            attribute = next(iter(gold[first]))
            swapped = {house: dict(cells) for house, cells in gold.items()}
            swapped[first][attribute] = gold[second][attribute]
            swapped[second][attribute] = gold[first][attribute]
            cut = dict(list(gold.items())[:-1])
            good = self.grade(problem, json.dumps({"solution": gold}))
            spoilt = [json.dumps({"solution": table}) for table in (swapped, cut)]
            if (good.score, good.components["cell_accuracy"]) != (1.0, 1.0) or any(
                self.grade(problem, answer).score for answer in (*spoilt, "", None)
            ):
                raise UserError(
                    f"{self._places[problem.id]}: the solution of {problem.id!r} cannot be told "
                    "apart from a damaged one; mend the row"
                )


def _problem(number: int, place: str, row: Row) -> Problem:
    puzzle = field(place, row, "puzzle")
    if not isinstance(puzzle, str) or not puzzle.strip():
        raise UserError(f"{place}: field 'puzzle' is empty; give the puzzle's text")
    table = _table(place, field(place, row, "solution"))
    houses, attributes = len(table), len(next(iter(table.values())))
    size = row.get("size", f"{houses}*{attributes}")
    if size != f"{houses}*{attributes}":
        raise UserError(f"{place}: size is {size!r} but the solution is {houses}*{attributes}")
    form = {house: dict.fromkeys(cells, "___") for house, cells in table.items()}
    shown = json.dumps({"reasoning": "___", "solution": form}, indent=2)
    return Problem.of(
        identity(row, f"zebralogic-{number}"),
        _PROMPT.format(puzzle=puzzle.strip(), form=shown),
        table,
        size=size,
        scale=scale(houses, attributes),
        houses=houses,
        attributes=attributes,
    )


def _table(place: str, solution: Any) -> Table:
    """House to attribute to value. Raises UserError for another form and for masked solutions."""
    known = isinstance(solution, Mapping) and {"header", "rows"} <= set(solution)
    header, rows = (solution["header"], solution["rows"]) if known else ([], [])
    well_formed = (
        isinstance(header, list)
        and isinstance(rows, list)
        and len(header) > 1
        and len(set(map(str, header))) == len(header)
        and header[0] == "House"
        and len(rows) > 1
        and all(isinstance(row, list) and len(row) == len(header) for row in rows)
        and all(isinstance(cell, str) for row in [header, *rows] for cell in row)
    )
    if not well_formed:
        raise UserError(
            f'{place}: solution is not {{"header": ["House", ...], "rows": [["1", ...], ...]}} '
            "with two houses or more and as many texts in each row as in the header"
        )
    if any(not cell.strip() or set(cell) == {"_"} for row in rows for cell in row[1:]):
        raise UserError(f"{place}: the solution is masked; get the rows that hold the answers")
    return {
        f"House {number}": dict(zip(header[1:], row[1:], strict=True))
        for number, row in enumerate(rows, 1)
    }
