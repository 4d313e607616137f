"""Which problems a task trains on and which it holds out, whether they are rows or generated."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from satune.types import Key, Problem, UserError

# Tenths of all problems a task can generate, by the hash of their text: splits are disjoint for
# every seed and every number of problems drawn.
TENTHS = {"train": range(8), "eval": range(8, 9), "certify": range(9, 10)}


class RowTask:
    """What the tasks that read a file share: which of its rows are held out.

    ``eval_fraction`` of the rows, as ``hold_out`` chooses them, form the splits "eval" and
    "certify", the rest "train", everything "all".
    """

    name: str
    fresh = False

    def _keep(self, rows: Sequence[tuple[str, Problem]], eval_fraction: float) -> None:
        """Take (place, problem) of all rows. ``_places`` has the place of each problem's id.

        Raises UserError for two rows with one id, and as ``check_fraction``.
        """
        self._places = places_of(rows)
        fraction = check_fraction(self.name, eval_fraction)
        self._kept, self._held = hold_out([problem for _, problem in rows], fraction)

    def problems(self, split: str) -> Iterator[Problem]:
        """The rows of "train", "eval" (also "certify": the held-out rows) or "all".

        Raises UserError for another split and for one that is empty.
        """
        parts = {
            "train": self._kept,
            "eval": self._held,
            "certify": self._held,
            "all": [*self._kept, *self._held],
        }
        if split not in parts:
            raise UserError(f"task {self.name}: no split {split!r}; there are {', '.join(parts)}")
        if not parts[split]:
            raise UserError(f"task {self.name}: no rows for {split!r}; change eval_fraction")
        return iter(parts[split])


def places_of(rows: Sequence[tuple[str, Problem]]) -> dict[str, str]:
    """The place of each problem's id. Raises UserError naming two places that share one."""
    places: dict[str, str] = {}
    for place, problem in rows:
        if problem.id in places:
            raise UserError(f"{place}: id {problem.id!r} stands already in {places[problem.id]}")
        places[problem.id] = place
    return places


def hold_out(problems: Sequence[Problem], fraction: float) -> tuple[list[Problem], list[Problem]]:
    """(kept, held out): ``fraction`` of the problems, rounded, chosen by the hash of their ids and
    so the same whatever the seed and the order. Both keep the order of ``problems``. Those with the
    same prompt and answer lie on the same side, so that fewer may be held out.

    A fraction strictly between 0 and 1 leaves at least one problem on either side if there are two
    that differ.
    """
    digests = [hashlib.blake2b(problem.id.encode()).digest() for problem in problems]
    alike: dict[str, list[int]] = defaultdict(list)
    for place in sorted(range(len(problems)), key=digests.__getitem__):
        alike[repr((problems[place].prompt, problems[place].answer))].append(place)
    count = round(fraction * len(problems))
    both = 0.0 < fraction < 1.0 and len(alike) > 1
    if both:
        count = min(max(count, 1), len(problems) - 1)
    held: set[int] = set()
    for places in alike.values():
        if len(held) + len(places) <= count:
            held.update(places)
    if both and not held:
        held.update(min(alike.values(), key=len))
    kept = [problem for i, problem in enumerate(problems) if i not in held]
    return kept, [problems[i] for i in sorted(held)]


def check_fraction(task: str, fraction: float) -> float:
    """Raises UserError unless ``fraction`` is a number in [0, 1]."""
    if not isinstance(fraction, (int, float)) or not 0.0 <= fraction <= 1.0:
        raise UserError(f"task {task}: eval_fraction is {fraction!r}; give a number from 0 to 1")
    return float(fraction)


def generator(task: str, seed: int, split: str, index: int) -> random.Random:
    """What draws problem ``index`` of a generated split. Raises UserError for an unknown split."""
    if split not in TENTHS:
        raise UserError(f"task {task}: no split {split!r}; there are {', '.join(TENTHS)}")
    return Key(seed, task, problem=split, sample=index).rng()


def lies_in(split: str, digest: bytes) -> bool:
    """Whether a generated problem belongs to that split, by the hash of its text."""
    return digest[0] * 10 // 256 in TENTHS[split]


def check_integer(what: str, value: object, lowest: int, highest: int | None = None) -> None:
    """Raises UserError naming ``what`` unless ``value`` is an integer in that range."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < lowest
        or (highest is not None and value > highest)
    ):
        span = f"{lowest} up" if highest is None else f"{lowest} to {highest}"
        raise UserError(f"{what} is {value!r}; give an integer from {span}")
