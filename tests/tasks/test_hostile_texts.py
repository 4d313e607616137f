"""What any message may be: no text makes an extractor fail, or take longer than its length says."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable

import pytest

from every_task import HEADS, NAMES, PIECES, Case, case, hostile

LAW = 2.5
"""At most so many times as much processor time for twice the text."""
FELT = 0.02
"""Seconds of processor time below which nothing is compared: the clock and the machine decide."""
NUMBERS = ("1", "1,", "1.", "1/", "-1", "1+", "1 ", "1_")
TAILS = ("", "x", "1", "]", "}", '"', ")", "</think>")
"""What keeps a whole repetition from being what it seemed to be."""
SAME = {"aime24", "aime25", "math500", "arbench_gn"}  # extractors that others have as well
# A grade of these starts or asks a process.
PROCESSES = {"autologi", "maths", "aime24", "aime25", "math500"}


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Processor time, the least of several repeats."""
    least = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        work()
        least = min(least, time.process_time() - started)
    return least


def breach(
    read: Callable[[str], object], head: str, piece: str, tail: str, longest: int
) -> str | None:
    """Where the law does not hold for ``head``, repetitions of ``piece`` and ``tail``; None if it
    holds.

    Sizes double from a few hundred characters, so that a cubic extractor is found before it takes
    for ever. A ratio is measured again before it is believed.
    """

    def cost(size: int, repeats: int) -> float:
        text = (head + piece * (size // len(piece) + 1))[:size] + tail
        return seconds(lambda: read(text), repeats)

    size = longest
    while size > 800:
        size //= 2
    while size <= longest:
        if cost(size, 1) > FELT:
            ratios = []
            for attempt in range(4):
                # Where a piece is cut may spare the half a second look at the text: then the most
                # of all cuts counts, since the law is about growth.
                cuts = range(min(len(piece), 8)) if attempt else (0,)
                half, whole = max(cost(size // 2 - cut, 3) for cut in cuts), cost(size, 3)
                ratios.append(whole / half)
                if whole < FELT or ratios[-1] <= LAW:
                    break
                # No noise of the clock, and a repetition would take long.
                if attempt and whole > 20 * FELT:
                    return f"{head!r} and {piece!r}: {ratios[-1]:.1f} times as long at {size}"
            else:
                return f"{head!r} and {piece!r}: {min(ratios):.1f} times as long at {size}"
        size *= 2
    return None


def test_the_law_finds_what_is_not_linear():
    def quadratic(text: str) -> None:
        for _ in range(len(text) ** 2 // 50):
            pass

    def linear(text: str) -> None:
        for _ in range(len(text) * 50):
            pass

    assert breach(quadratic, "", "a", "", 25_000) is not None
    assert breach(linear, "", "a", "", 25_000) is None


@pytest.fixture(scope="module", params=NAMES)
def given_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(request.param, tmp_path_factory.mktemp("rows"))


def test_extractors_are_linear(given_case: Case) -> None:
    if given_case.task.name in SAME:
        pytest.skip("another task's test reads with the same extractor")
    texts = [*(("", piece, "") for piece in PIECES), *((head, " ", "") for head in HEADS)]
    texts += [("", piece, "x") for piece in NUMBERS]
    found = [breach(given_case.task.extract, *text, 12_500) for text in texts]
    assert not any(found), [line for line in found if line]


@pytest.mark.slow
def test_extractors_and_graders_are_linear_up_to_fifty_thousand_characters(
    given_case: Case,
) -> None:
    task, problem = given_case.task, given_case.problem
    if task.name in SAME:
        pytest.skip("another task's test reads with the same extractor")
    texts = [("", piece, "") for piece in PIECES]
    texts += random.Random(1).sample([*itertools.product(HEADS, PIECES, TAILS)], 300)
    found = [breach(task.extract, *text, 50_000) for text in texts]
    if task.name not in PROCESSES:
        read = lambda text: task.grade(problem, text)  # noqa: E731
        found += [breach(read, *text, 50_000) for text in texts[::4]]
    assert not any(found), [line for line in found if line]


def bear(given: Case, number: int, longest: int, seed: int) -> tuple[float, str]:
    """Reads and grades hostile messages; (most processor time a character, that message)."""
    task, problem = given.task, given.problem
    slowest = (0.0, "")
    for text in itertools.islice(hostile(random.Random(seed), given.right, longest), number):
        started = time.process_time()
        answer = task.extract(text)
        took = time.process_time() - started
        slowest = max(slowest, (took / max(len(text), 1000), text))
        assert answer is None or (isinstance(answer, str) and task.equal(answer, answer))
        if task.name not in PROCESSES:
            assert 0.0 <= task.grade(problem, text).score <= 1.0
    return slowest


def test_hostile_messages_are_borne(given_case: Case) -> None:
    bear(given_case, 60, 40_000, seed=0)


@pytest.mark.slow
def test_a_hundred_thousand_hostile_messages_are_borne(given_case: Case) -> None:
    """So many over all tasks, or as many as SATUNE_HOSTILE says for each. ``-s`` shows each task's
    slowest, in microseconds a character."""
    number = int(os.environ.get("SATUNE_HOSTILE", 100_000 // len(NAMES) + 1))
    cost, text = bear(given_case, number, 40_000, seed=1)
    print(
        f"\n{given_case.task.name}: {number:,} messages, at most {1e6 * cost:.1f} us a character, "
        f"{text[:60]!r}..."
    )
