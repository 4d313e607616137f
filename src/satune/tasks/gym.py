"""reasoning-gym's procedural data sets as tasks: problems without end, and their own scorers.

https://github.com/open-thought/reasoning-gym; installed with ``pip install 'satune[gym]'``. What
scorers get to read is written by a model, and some of them hand it to Python's or sympy's ``eval``:
scores are computed in worker processes with limits, and what could be more than the value that is
asked for is not handed to those at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from satune.loading import nearest_hint
from satune.tasks.pool import Failure, Workers, processes
from satune.thoughts import without_thoughts
from satune.types import EpisodeFailure, Grade, Key, Problem, UserError

INSTRUCTION = "Write the final answer between <answer> and </answer>."
CALL_SECONDS = 10.0
"""How long a scorer may take for one answer."""

_MEMORY = 4 << 30
# A data set is built for so many problems at a time: some generate all of theirs at once.
_CHUNK = 64
# Some data sets draw from generators that the whole process shares, and what they print is sent
# elsewhere for the whole process: one thread at a time.
_GENERATING = threading.Lock()
# Where the seeds of a split's problems begin: below 2 ** 31, which every data set takes.
_SPLITS = {"train": 0, "eval": 1 << 29, "certify": 1 << 30}
_LONGEST = 20_000
"""An answer of more characters is none; the longest right ones are grids of some thousand."""

_OURS = {"seed", "size"}

REFUSED = {
    "codeio": "its answers are what programs give that draw without a seed",
    "composite": "it is made of others; name one of them",
    "game_of_life_halting": "its scorer takes any text for one of its two answers",
    **dict.fromkeys(
        ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note"),
        "its problems differ from process to process, so that no run could be repeated",
    ),
    "list_functions": "some of its problems are drawn without a seed",
    "word_ladder": "its reference answers differ from process to process",
}
"""Data sets that cannot be trained on, with the reason (seen with reasoning-gym 0.1.25)."""

EVALUATED = frozenset(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"))
"""Data sets whose scorer hands the answer to ``eval``: lists of plain values."""

PARSED = frozenset(("countdown", "intermediate_integration", "puzzle24", "simple_integration"))
"""Data sets whose scorer hands the answer to sympy's parser, which evaluates it."""

_FUNCTIONS = frozenset((
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp",
    "log", "ln", "sqrt", "Abs", "pi", "E", "C",
))  # fmt: skip


def is_plain(dataset: str, answer: str) -> bool:
    """Whether the data set's scorer may be handed this answer: what it would evaluate holds values
    and arithmetic and nothing that could call, name or reach anything else."""
    if len(answer) > _LONGEST:
        return False
    if dataset in EVALUATED:
        return not re.search(r"[({]", answer)
    if dataset in PARSED:
        names = re.findall(r"[^\W\d]\w*", answer)
        known = all(len(name) == 1 or name in _FUNCTIONS for name in names)
        return known and not re.search(r"""["'\[\]{}:;=\\@_]|\.\s*[^\W\d]""", answer)
    return True


def last_answer(text: str) -> str | None:
    """What stands in the last ``<answer>``…``</answer>`` of a text; None if nothing does."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if end < 0 or start < 0:
        return None
    return text[start + len("<answer>") : end].strip() or None


class ReasoningGym:
    """The problems of ``dataset``, one of reasoning-gym's, made with its own ``options``.

    Splits are held out by seed: each has seeds of its own, so that no problem is drawn twice; where
    a data set knows few questions, the same text may come up on both sides. ``instruction`` is put
    behind every question (None: ``INSTRUCTION``; "": nothing). The answer is read between tags
    (``answer="tag"``) or is the whole message ("message"), thoughts aside. The score is the
    scorer's own, some of which give a part for what is nearly right, and .01 to .05 for any text at
    all.

    Raises UserError for an unknown data set or option, one that is ``REFUSED``, and where
    reasoning-gym is not installed.
    """

    name = "reasoning_gym"
    fresh = True
    """Problems can be generated without end, see ``problem_at``."""

    def __init__(
        self,
        dataset: str,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        instruction: str | None = None,
        answer: Literal["tag", "message"] = "tag",
    ) -> None:
        self.dataset, self.options = dataset, dict(options or {})
        self.seed = seed
        self._answer = answer
        self._instruction = INSTRUCTION if instruction is None else instruction
        if dataset in REFUSED:
            raise UserError(f"task reasoning_gym: dataset {dataset!r}: {REFUSED[dataset]}")
        if answer not in ("tag", "message"):
            raise UserError(f"task reasoning_gym: answer is {answer!r}; choose tag or message")
        given = self.options.keys() & _OURS
        if given:
            raise UserError(
                f"task reasoning_gym: options: {min(given)} is satune's own; problems come without "
                "end, and the task has a seed"
            )
        _known(dataset)
        self._chunk = functools.lru_cache(maxsize=8)(self._chunk_anew)
        with _GENERATING:
            self._chunk("train", 0)
        build = functools.partial(_scorer, dataset, self.options)
        self._workers = Workers(build, processes(), CALL_SECONDS)

    def problem_at(self, split: str, index: int) -> Problem:
        """Problem ``index`` (from 0) of a split's stream."""
        entry = self._entry(split, index)
        question = str(entry["question"])
        return Problem.of(
            f"{self.dataset}-{split}-{index:06d}",
            f"{question}\n\n{self._instruction}" if self._instruction else question,
            entry["answer"],
            split=split,
            fresh=True,
            index=index,
        )

    def problems(self, split: str) -> Iterator[Problem]:
        """The endless stream of a split."""
        return (self.problem_at(split, index) for index in itertools.count())

    def extract(self, text: str) -> str | None:
        """The answer that a message gives, thoughts aside; None if it gives none."""
        said = without_thoughts(text)
        return last_answer(said) if self._answer == "tag" else said.strip() or None

    def equal(self, a: str, b: str) -> bool:
        """Whether two answers are the same text."""
        return a.split() == b.split()

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        """What the data set's own scorer gives the message's answer, between 0 and 1.

        Raises EpisodeFailure, the policy's, where the scorer takes too long, and the world's where
        its process died.
        """
        found = None if answer is None else self.extract(answer)
        if found is None:
            return Grade(0.0, detail="no answer")
        if not is_plain(self.dataset, found):
            return Grade(0.0, detail="the answer is more than a value")
        entry = self._entry(problem.metadata["split"], problem.metadata["index"])
        score = self._workers.call(found, entry)
        if isinstance(score, Failure) and score.kind != "exception":
            raise EpisodeFailure(f"scorer: {score.text}", policy=score.kind == "timeout")
        if isinstance(score, Failure):
            return Grade(0.0, detail=f"the scorer cannot read it ({score.text})")
        detail = f"read {found[:200]}"
        expected = "" if problem.answer is None else f", expected {str(problem.answer)[:200]}"
        return Grade(min(max(float(score), 0.0), 1.0), detail=detail + expected)

    def validate(self) -> None:
        """Check, on the first problems of each split, that the gold answer scores 1 where there is
        one, and that no answer scores 0.

        Raises ValueError naming the problem that fails.
        """
        for split in _SPLITS:
            for problem in itertools.islice(self.problems(split), 8):
                gold = problem.answer
                said = f"<answer>{gold}</answer>" if self._answer == "tag" else gold
                if gold is not None and self.grade(problem, said).score != 1.0:
                    raise ValueError(f"task reasoning_gym: {problem.id} grades its answer wrongly")
                if self.grade(problem, None).score:
                    raise ValueError(f"task reasoning_gym: {problem.id} grades no answer as one")

    def _entry(self, split: str, index: int) -> Mapping[str, Any]:
        """reasoning-gym's own record of a problem: question, answer, metadata."""
        if split not in _SPLITS:
            raise UserError(f"task {self.name}: no split {split!r}; there are {', '.join(_SPLITS)}")
        chunk, at = divmod(index, _CHUNK)
        with _GENERATING, contextlib.redirect_stdout(sys.stderr):
            return self._chunk(split, chunk)[at]

    def _chunk_anew(self, split: str, chunk: int) -> Any:
        # Entry i of a data set is drawn with its seed + i: no two problems of a run share one.
        first = Key(self.seed, self.name).rng().getrandbits(28) + _SPLITS[split]
        return _made(self.dataset, self.options, first + chunk * _CHUNK, _CHUNK)


def _known(dataset: str) -> None:
    """Raises UserError unless reasoning-gym is there and has the data set."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(
            "task reasoning_gym: it needs reasoning-gym; install it with pip install 'satune[gym]'"
        )
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        hint = nearest_hint(dataset, DATASETS)
        raise UserError(f"task reasoning_gym: no dataset {dataset!r}{hint}")


def _made(dataset: str, options: Mapping[str, Any], seed: int, size: int) -> Any:
    from reasoning_gym.factory import DATASETS, create_dataset

    known = [field.name for field in dataclasses.fields(DATASETS[dataset][1])]
    for name in options:
        if name not in known:
            hint = nearest_hint(name, [k for k in known if k not in _OURS])
            raise UserError(f"task reasoning_gym: {dataset} has no option {name!r}{hint}")
    try:
        # Some print while they generate, where the answer to --json may be meant to go.
        with contextlib.redirect_stdout(sys.stderr):
            return create_dataset(dataset, **options, seed=seed, size=size)
    except (TypeError, ValueError, AssertionError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"task reasoning_gym: options of {dataset}: {said}") from error


def _scorer(dataset: str, options: Mapping[str, Any]) -> Callable[[str, Any], float]:
    """``score(answer, entry)``, in a worker process."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > _MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, hard))
    made = _made(dataset, options, 0, 1)
    return lambda answer, entry: float(made.score_answer(answer, entry))
