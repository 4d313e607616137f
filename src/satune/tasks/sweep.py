"""A simple way to play guess-number: find one position after the other by counting up.

Only the count of right places is used. Changing one digit of a guess moves that count by +1 if the
new digit is right, by -1 if the old one was, and by 0 if neither is; so each comparison with the
best known guess settles something, and a wasted guess does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence


def sweep(history: Sequence[tuple[str, int]]) -> tuple[str, str]:
    """(best known guess, next guess) after ``history``, pairs of a guess of four digits and the
    number of its digits that are in the right place. The first guess is 0000."""
    if not history:
        return "0000", "0000"
    best, right = history[0]
    settled: set[int] = set()
    wrong: list[set[str]] = [set() for _ in range(4)]
    following = best
    for guess, count in history[1:]:
        changed = [i for i in range(4) if guess[i] != best[i]]
        if count == 4:
            best, right, settled = guess, 4, {0, 1, 2, 3}
        elif len(changed) == 1:
            (place,) = changed
            if count > right:
                wrong[place].add(best[place])
                best, right = guess, count
                settled.add(place)
            elif count < right:
                settled.add(place)
            else:
                wrong[place] |= {best[place], guess[place]}
                # A planned guess becomes the point to go on from; a stray one is taken back.
                best = guess if guess == following else best
        following = _next(best, right, settled, wrong)
    return best, _next(best, right, settled, wrong)


def neighbours(guess: str) -> list[str]:
    """The guesses that differ from ``guess`` by one step (9 and 0 adjoin) in one digit."""
    steps = [(i, shift) for i in range(4) for shift in (-1, 1)]
    return [guess[:i] + str((int(guess[i]) + d) % 10) + guess[i + 1 :] for i, d in steps]


def _next(best: str, right: int, settled: set[int], wrong: Sequence[set[str]]) -> str:
    if right == 4:
        return best
    for place in range(4):
        if place in settled:
            continue
        for shift in range(1, 10):
            digit = str((int(best[place]) + shift) % 10)
            if digit not in wrong[place]:
                return best[:place] + digit + best[place + 1 :]
    return best
