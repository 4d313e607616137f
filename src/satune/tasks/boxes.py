r"""Answers in ``\boxed{}``: finding the last one, and comparing plain numbers exactly.

Everything here runs in time linear in the text and never raises, whatever the text.
"""

from __future__ import annotations

import re
from fractions import Fraction

from satune.thoughts import without_thoughts

LONGEST_ANSWER = 2000
"""Characters; a longer box holds no answer but prose."""

# A backslash takes the next character with it, so that \{ and \} do not count as braces; in
# "\\boxed" (escaped once too often) the second one begins a box all the same.
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*(\{)|\\(?!\\(?:boxed|fbox)).|[{}]", re.DOTALL)
_WRAPPER = re.compile(
    r"\\(?:textbf|mathbf|textrm|mathrm|textit|text|mbox|bf|rm|boldsymbol)\s*\{([^{}]*)\}"
)
_NUMBER = re.compile(r"([+-]?)\s*([0-9]*)(?:\.([0-9]*))?")
_BASED = re.compile(r"([0-9A-Za-z]+)_\{?\(?([0-9]+)\)?\}?")
_SPACES = re.compile(r"(?:\s|\\[,;:! ]|~)+")
_SIGNS = str.maketrans({"−": "-", "–": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " "})


def last_box(text: str) -> str | None:
    r"""What the last ``\boxed{}`` (or ``\fbox{}``) with balanced braces holds, without outer space.

    Boxes that hold nothing and boxes inside a thought (see ``thoughts``) do not count. Of nested
    boxes the innermost counts.
    """
    spoken = without_thoughts(text)
    best = (-1, "")
    # For every open brace: where its content begins, and whether it is a box's.
    opened: list[tuple[int, bool]] = []
    for token in _TOKEN.finditer(spoken):
        if token[1] or token[0] == "{":
            opened.append((token.end(), token[1] is not None))
        elif token[0] == "}" and opened:
            start, is_box = opened.pop()
            # Only a later start can win, so that no content is looked at twice.
            if is_box and start > best[0]:
                content = spoken[start : token.start()].strip()
                best = (start, content) if content else best
    return best[1] or None


def tidy(answer: str) -> str:
    r"""An answer without what surrounds it: outer spaces, ``$``, a final full stop or comma, and a
    ``\textbf{}`` or ``\text{}`` around a number."""
    plain = answer.translate(_SIGNS).strip()
    for _ in range(4):
        before = plain
        plain = plain.strip("$").rstrip(".,;").strip()
        wrapped = _WRAPPER.fullmatch(plain)
        if wrapped and as_decimal(wrapped[1]) is not None:
            plain = wrapped[1].strip()
        if plain == before:
            break
    return plain


def as_decimal(text: str) -> Fraction | None:
    """The exact value of a plain integer or decimal, perhaps in parentheses; else None."""
    plain = text.strip().rstrip(".").strip()
    if plain.startswith("(") and plain.endswith(")"):
        plain = plain[1:-1].strip()
    found = _NUMBER.fullmatch(plain)
    if len(plain) > LONGEST_ANSWER or found is None or not (found[2] or found[3]):
        return None
    decimals = found[3] or ""
    value = Fraction(int((found[2] or "") + decimals), 10 ** len(decimals))
    return -value if found[1] == "-" else value


def same_plainly(a: str, b: str) -> bool | None:
    """Whether two answers are equal, where that needs no mathematics: the same text (spaces
    aside), two plain numbers, which are compared exactly, or two numerals with their bases, where
    both must agree (math-verify would drop the bases). None: it needs some."""
    left, right = tidy(a), tidy(b)
    dense = _SPACES.sub("", left), _SPACES.sub("", right)
    if dense[0] == dense[1]:
        return bool(left)
    if not left or not right:
        return False
    based, other = _BASED.fullmatch(dense[0]), _BASED.fullmatch(dense[1])
    if based and other:
        return based.groups() == other.groups()
    first, second = as_decimal(left), as_decimal(right)
    return None if first is None or second is None else first == second
