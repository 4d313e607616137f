r"""Mathematics with a final answer in ``\boxed{}``: AIME 2024 and 2025, MATH-500, training rows.

The last box of a message is the answer. Plain numbers are compared at once; anything else is read
and compared in a process of its own with a time limit (``worker``). All of it is exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from satune.tasks.maths import worker
from satune.tasks.maths.boxes import LONGEST_ANSWER, as_decimal, last_box, same_plainly, tidy
from satune.tasks.pool import Failure, Workers, processes
from satune.tasks.sources import Row, read_rows
from satune.tasks.splits import RowTask, check_fraction
from satune.types import EpisodeFailure, Grade, Problem, UserError

_INSTRUCTION = (
    "Think the problem through step by step. Finish with the answer alone, in simplest form, "
    "inside \\boxed{}."
)
_INTEGER_INSTRUCTION = (
    "Think the problem through step by step. The answer is an integer from 0 to 999; finish with "
    "it inside \\boxed{}."
)
# In order of preference; names are compared without regard to case.
_PROBLEM_FIELDS = ("problem", "question", "prompt", "input")
_ANSWER_FIELDS = ("answer", "final_answer", "expected_answer", "ground_truth", "gt_answer")
_SOLUTION_FIELDS = ("solution", "output")
_ID_FIELDS = ("id", "unique_id", "problem_id", "problem_idx", "idx")
_MOST_VERDICTS = 100_000


class Maths(RowTask):
    """Rows with a problem and its final answer; by default DeepScaleR's training set.

    ``data``: see ``sources.read_rows``. Field names of the upstream sets are known, whatever their
    case: problem, question or prompt (text, or a chat, of which the user's messages count); answer,
    final_answer or reward_model.ground_truth, else the last box of solution; id or unique_id, else
    rows are numbered from 0. ``instruction`` follows each problem ("" leaves the problem bare).

    Raises UserError naming file and line for a bad row, and if mpmath is not installed.
    """

    name = "maths"
    published: ClassVar[str] = "agentica-org/DeepScaleR-Preview-Dataset:train"
    """What is read where no data are given."""
    default_instruction: ClassVar[str] = _INSTRUCTION

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        eval_fraction: float = 0.1,
        instruction: str | None = None,
    ) -> None:
        worker.check_installed(self.name)
        check_fraction(self.name, eval_fraction)  # before rows are downloaded
        self.seed = seed
        self._instruction = self.default_instruction if instruction is None else instruction
        rows = read_rows(self.published if data is None else data)
        named = [(place, self._problem(i, place, row)) for i, (place, row) in enumerate(rows)]
        self._keep(named, eval_fraction)
        self._workers = Workers(worker.build, processes(), worker.CALL_SECONDS)
        self._verdicts: dict[tuple[str, str, bool], bool] = {}

    def extract(self, text: str) -> str | None:
        r"""What the last balanced ``\boxed{}`` outside a thought holds; None if there is none."""
        return last_box(text)

    def equal(self, a: str, b: str) -> bool:
        """Whether two extracted answers are the same in value, whichever comes first. Answers that
        cannot be compared (too long, out of time) are equal only as texts."""
        try:
            return a == b or self._same(a, b, symmetric=True)[0]
        except EpisodeFailure as failure:
            if not failure.policy:
                raise
            return False

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        r"""1 if the message's last box equals the reference, else 0.

        Raises EpisodeFailure, the policy's, where comparing it raises or takes too long.
        """
        if answer is None:
            return Grade(0.0, detail="no answer")
        found = self.extract(answer)
        if found is None:
            return Grade(0.0, detail=f"no \\boxed{{}} outside a thought; expected {problem.answer}")
        right, trouble = self._same(str(problem.answer), found, symmetric=False)
        shown = found if len(found) <= 200 else f"{found[:200]}..."
        detail = f"read {shown}, expected {problem.answer}"
        return Grade(float(right), detail=f"{detail} ({trouble})" if trouble else detail)

    def validate(self) -> None:
        """Check that each row's reference in a box scores 1 and a damaged one 0.

        Raises UserError naming file and line of the row that fails.
        """
        for problem in self.problems("all"):
            gold = str(problem.answer)
            try:
                scores = [
                    self.grade(problem, f"\\boxed{{{text}}}").score
                    for text in (gold, damaged(gold))
                ]
            except EpisodeFailure as failure:
                raise UserError(f"{self._places[problem.id]}: {failure.reason}") from failure
            if scores != [1.0, 0.0] or self.grade(problem, gold.replace("boxed", "")).score:
                raise UserError(
                    f"{self._places[problem.id]}: the answer {gold!r} cannot be told apart from "
                    f"{damaged(gold)!r}; mend or drop the row"
                )

    def _same(self, reference: str, answer: str, *, symmetric: bool) -> tuple[bool, str]:
        """(equal, what kept them from being compared, if anything did). Raises EpisodeFailure: the
        policy's where comparing raises or takes too long, the world's where its process died."""
        if max(len(reference), len(answer)) > LONGEST_ANSWER:
            return reference == answer, f"longer than {LONGEST_ANSWER} characters"
        plainly = same_plainly(reference, answer)
        if plainly is not None:
            return plainly, ""
        key = (tidy(reference), tidy(answer), symmetric)
        if symmetric and key[0] > key[1]:
            key = (key[1], key[0], True)
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._workers.call(*key)
            if isinstance(verdict, Failure):
                died = verdict.kind == "died"
                what = "worker" if died else "grader"
                raise EpisodeFailure(f"{what}: {verdict.text}", policy=not died)
            # Several threads grade: another one may empty it at any moment.
            if len(self._verdicts) >= _MOST_VERDICTS:
                self._verdicts.clear()
            self._verdicts[key] = verdict
        return verdict, ""

    def _problem(self, number: int, place: str, row: Row) -> Problem:
        fields = {name.lower(): value for name, value in row.items()}
        text = _statement(place, row, fields)
        answer = _answer(place, row, fields)
        self._check_answer(place, answer)
        identity = next((fields[f] for f in _ID_FIELDS if fields.get(f) is not None), None)
        if identity is None:
            identity = f"{self.name}-{number}"
        prompt = f"{text}\n\n{self._instruction}" if self._instruction else text
        return Problem.of(str(identity), prompt, answer, statement=text)

    def _check_answer(self, place: str, answer: str) -> None:
        if len(answer) > LONGEST_ANSWER:
            raise UserError(
                f"{place}: the answer has {len(answer)} characters; give a final answer"
            )


class _Benchmark(Maths):
    """Rows that are all held out unless ``eval_fraction`` is lowered."""

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        eval_fraction: float = 1.0,
        instruction: str | None = None,
    ) -> None:
        super().__init__(data, seed, eval_fraction, instruction)


class _Aime(_Benchmark):
    """AIME: fifteen problems an exam, two exams a year, integers from 0 to 999."""

    default_instruction = _INTEGER_INSTRUCTION

    def _check_answer(self, place: str, answer: str) -> None:
        value = as_decimal(tidy(answer))
        if value is None or value.denominator != 1 or not 0 <= value <= 999:
            raise UserError(
                f"{place}: the answer is {answer!r}; AIME has integers from 0 to 999"
                " (for other problems: task maths)"
            )


class Aime24(_Aime):
    """AIME I and II of 2024; all rows are held out unless ``eval_fraction`` is lowered."""

    name = "aime24"
    published = "HuggingFaceH4/aime_2024:train"


class Aime25(_Aime):
    """AIME I and II of 2025; all rows are held out unless ``eval_fraction`` is lowered."""

    name = "aime25"
    published = "math-ai/aime25:test"


class Math500(_Benchmark):
    """MATH-500; all rows are held out unless ``eval_fraction`` is lowered."""

    name = "math500"
    published = "HuggingFaceH4/MATH-500:test"


def damaged(answer: str) -> str:
    """Another answer than this one: its last digit raised by one (that of a base or a unit's power
    only if there is no other), or, if it has none, another text or a sum with one."""
    value = re.match(r"[^_]*?[0-9][^_]*?(?=\\(?:mbox|text)\{|_|$)", answer)
    found = re.search(r"[0-9](?=[^0-9]*$)", value[0] if value else answer)
    if found:
        digit = str((int(found[0]) + 1) % 10)
        return answer[: found.start()] + digit + answer[found.end() :]
    return r"\text{none of these}" if r"\text" in answer else f"{answer}+1"


def _statement(place: str, row: Row, fields: Mapping[str, Any]) -> str:
    value = next((fields[f] for f in _PROBLEM_FIELDS if fields.get(f) is not None), None)
    if isinstance(value, list):
        said = [m for m in value if isinstance(m, Mapping) and m.get("role") == "user"]
        value = "\n\n".join(str(m.get("content", "")) for m in said)
    if value is None:
        raise UserError(f"{place}: no problem; name it 'problem'; the fields are: {_names(row)}")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: the problem is {value!r}; give a text")
    return value.strip()


def _answer(place: str, row: Row, fields: Mapping[str, Any]) -> str:
    model = fields.get("reward_model")
    candidates = [fields.get(f) for f in _ANSWER_FIELDS]
    candidates.append(model.get("ground_truth") if isinstance(model, Mapping) else None)
    for value in candidates:
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            text = str(value).strip()
            boxed = last_box(text)
            if boxed or text:
                return boxed or text
    solutions = [last_box(s) for f in _SOLUTION_FIELDS if isinstance(s := fields.get(f), str)]
    boxed = next((s for s in solutions if s), None)
    if boxed is None:
        raise UserError(
            f"{place}: no answer (a text or number in 'answer', or a solution with \\boxed{{}}); "
            f"the fields are: {_names(row)}"
        )
    return boxed


def _names(row: Row) -> str:
    return ", ".join(row) or "none"
