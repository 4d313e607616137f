"""certify.jsonl: every test that a run has spent confidence on, whatever became of the run since.

A run that goes back to an earlier checkpoint has looked at bounds that the checkpoint knows nothing
of, and a look cannot be taken back. The file is therefore never cut back. A test that comes again,
under the same key and with the same weights on both sides, is the same test: it has the same data
and is paid for. Every other one is the next in the run's spending, on problems beyond all that any
test has drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from satune.core.confidence import Spending
from satune.files.lines import append_lines, cut_torn_line, read_lines
from satune.types import Key, UserError

_MEND = (
    "what the run has spent of its confidence is not known without it: put the line back from a "
    "copy to go on; the team as it is can be evaluated and swapped"
)


@dataclass(frozen=True, slots=True)
class Test:
    """One look at a bound. ``number`` counts from 1, ``alpha`` is the test's share of the
    confidence, ``offset`` that of the first of its ``problems``; ``old`` and ``new`` have the
    digest of every changed agent's weights on the two sides (``agents.weights.weights_digest``)."""

    number: int
    alpha: float
    offset: int
    problems: int
    seed: int
    stage: int
    step: int
    draw: int
    old: Mapping[str, str]
    new: Mapping[str, str]

    @property
    def end(self) -> int:
        return self.offset + self.problems

    def is_of(self, key: Key, old: Mapping[str, str], new: Mapping[str, str]) -> bool:
        ours = (self.seed, self.stage, self.step, self.draw)
        same_key = ours == (key.seed, key.stage, key.step, key.draw)
        return same_key and (self.old, self.new) == (old, new)


_COUNTS = ("number", "offset", "problems", "seed", "stage", "step", "draw")


class Ledger:
    """The tests in ``path``, read when this is made; a line is on the disk before its test.

    Raises UserError naming file and line for what is no test.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = read_lines(path, _MEND)
        self.tests = [_test(path, number, row) for number, row in enumerate(rows, 1)]

    @property
    def used(self) -> int:
        """How many tests the run has spent confidence on, on any of its ways."""
        return max((test.number for test in self.tests), default=0)

    @property
    def end(self) -> int:
        """The first offset that no test has drawn from."""
        return max((test.end for test in self.tests), default=0)

    def enter(
        self,
        key: Key,
        old: Mapping[str, str],
        new: Mapping[str, str],
        *,
        spending: Spending,
        offset: int,
        problems: int,
    ) -> Test | None:
        """The test that compares ``new`` with ``old`` under ``key``: the recorded one, else a new
        one, recorded before this returns. None where the declared number of tests is used up.

        ``spending`` and ``offset`` are those of the run's state, which may know of tests that were
        made elsewhere. Raises UserError where the disk refuses.
        """
        for test in self.tests:
            if test.is_of(key, old, new):
                return test
        number = max(spending.used, self.used) + 1
        if spending.decisions is not None and number > spending.decisions:
            return None
        test = Test(
            number,
            spending.share(number),
            max(offset, self.end),
            problems,
            key.seed,
            key.stage,
            key.step,
            key.draw,
            dict(old),
            dict(new),
        )
        cut_torn_line(self.path)  # of a test that was never made
        append_lines(self.path, [asdict(test)], sync=True)
        self.tests.append(test)
        return test


def _test(path: Path, number: int, row: Mapping[str, object]) -> Test:
    kinds = {**dict.fromkeys(_COUNTS, int), "alpha": float, "old": dict, "new": dict}
    if {name: type(value) for name, value in row.items()} == kinds:
        test = Test(**row)  # type: ignore[arg-type]
        counts = [getattr(test, name) for name in _COUNTS]
        if min(counts) >= 0 and test.number and test.problems and 0 < test.alpha < 1:
            return test
    raise UserError(f"{path}, line {number}: no test of a certificate; {_MEND}")
