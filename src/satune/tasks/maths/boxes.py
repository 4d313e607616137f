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
_TOKEN = re.compile(
    r"\\(?P<box>boxed|fbox)(?![A-Za-z])\s*(?P<brace>\{)?|\\(?!\\(?:boxed|fbox)).|[{}]", re.DOTALL
)
# What a box without braces may hold: up to the end of the formula (or line) that it stands in.
_FORMULA = re.compile(
    r"[^$\n{}\\]*(?:(?:\\(?![\])]|boxed|fbox).|[{}])[^$\n{}\\]*){0,200}", re.DOTALL
)
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_PLAIN_START = re.compile(r"[-+]?\$?[0-9][0-9.,/]*")
_LONGEST_FORMULA = 300
_WRAPPER = re.compile(
    r"\\(?:textbf|mathbf|textrm|mathrm|textit|text|mbox|bf|rm|boldsymbol)\s*\{([^{}]*)\}"
)
_NUMBER = re.compile(r"([+-]?)\s*([0-9]*)(?:\.([0-9]*))?")
_SPACE = r"\s|~|\\[,;:! ]"
_SPACES = re.compile(rf"(?:{_SPACE})+")
# A command that ends in a space keeps its backslash: behind it, the pattern runs backwards.
_BEFORE = re.compile(rf"(?:{_SPACE}|\$)*")
_BEHIND = re.compile(r"(?:\s|~|[,;:! ]\\(?!\\)|\$(?!\\)|[,;]|\.(?!\.))*")
_BOLD = re.compile(r"(\*\*?|__)([^*_].*[^*_]|[^*_])\1", re.DOTALL)
_SIGNS = str.maketrans({"−": "-", "–": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " "})


def last_box(text: str) -> str | None:
    r"""What the last ``\boxed{}`` (or ``\fbox{}``) with balanced braces holds, without outer space.

    ``\boxed 2`` without braces holds what follows in its formula. Boxes that hold nothing and boxes
    inside a thought (see ``thoughts``) do not count. Of nested boxes the innermost counts.
    """
    spoken = without_thoughts(text)
    best = (-1, "")
    # For every open brace: where its content begins, and whether it is a box's.
    opened: list[tuple[int, bool]] = []
    for token in _TOKEN.finditer(spoken):
        if token["brace"] or token[0] == "{":
            opened.append((token.end(), token["brace"] is not None))
        elif token[0] == "}" and opened:
            start, is_box = opened.pop()
            # Only a later start can win, so that no content is looked at twice.
            if is_box and start > best[0]:
                content = spoken[start : token.start()].strip()
                best = (start, content) if content else best
        elif token["box"]:
            content = _without_braces(spoken[token.end() : token.end() + _LONGEST_FORMULA])
            best = (token.end(), content) if content else best
    return best[1] or None


def _without_braces(following: str) -> str:
    """What a box without braces holds: the rest of its formula if that is no prose, else a plain
    number."""
    found = _FORMULA.match(following)
    formula = found[0] if found else ""
    ended = following[len(formula) :].startswith(("$", "\\)", "\\]"))
    if ended and formula.count("{") == formula.count("}") and not _PROSE.search(formula):
        return formula.strip().rstrip(".,;").strip()
    number = _PLAIN_START.match(following)
    return number[0].rstrip(".,/") if number else ""


def tidy(answer: str) -> str:
    r"""An answer without what surrounds it: outer spaces and spacing commands, ``$``, ``**``, a
    final full stop or comma, and a ``\textbf{}`` or ``\text{}`` around a number."""
    plain = answer.translate(_SIGNS)
    for _ in range(4):
        before = plain
        start, behind = _BEFORE.match(plain), _BEHIND.match(plain[::-1])
        assert start is not None and behind is not None  # they match the empty text
        plain = plain[start.end() : max(start.end(), len(plain) - behind.end())]
        bold = _BOLD.fullmatch(plain) if plain[:1] in "*_" else None
        if bold:
            plain = bold[2]
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
    aside), or two plain numbers, which are compared exactly. None: it needs some."""
    left, right = tidy(a), tidy(b)
    if _dense(left) == _dense(right):
        return bool(left)
    if not left or not right:
        return False
    first, second = as_decimal(left), as_decimal(right)
    return None if first is None or second is None else first == second


def _dense(text: str) -> str:
    """Without spaces, except between two letters or digits: 5 6 is not 56."""
    pieces = [piece for piece in _SPACES.split(text) if piece]
    return "".join(
        f" {piece}" if i and pieces[i - 1][-1].isalnum() and piece[0].isalnum() else piece
        for i, piece in enumerate(pieces)
    )
