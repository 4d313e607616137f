"""The last literal that a message gives: a fenced block, a dictionary or a list.

Nothing here runs what it reads, and whatever the text is, reading it takes a bounded time.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
import warnings
from typing import Any

LONGEST = 20_000
"""Characters of a literal that are read; a longer one is none."""
DEEPEST = 50
"""Brackets inside brackets that are read."""

_FENCE = "```"
_INFO = re.compile(r"[ \t]*+\w*+[ \t\r]*+\n")
_LONGEST_INFO = 80
_BRACKETS = {"}": re.compile(r"[{}]"), "]": re.compile(r"[\[\]]")}
_COMMENT = re.compile(r"//[^\n]*")
_WORDS = {"true": "True", "false": "False", "null": "None"}
# A string is passed over whole, so that no word inside one is touched; one that is never closed
# ends with its line. Possessive repeats: no text is gone over twice.
_TEXT = r"'(?:[^'\\\n]|\\.)*+'?|\"(?:[^\"\\\n]|\\.)*+\"?"
_STRING = re.compile(_TEXT)
_JSON_WORD = re.compile(rf"{_TEXT}|\b(?:true|false|null)\b")
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def find_literal(text: str) -> str | None:
    """The text where the answer stands: the last closed fenced block, else the last balanced
    braces, else the last balanced brackets; None if there is none of them."""
    block = _last_block(text)
    if block is not None:
        return block
    braces = _last_balanced(text, "}")
    return braces if braces is not None else _last_balanced(text, "]")


def read_literal(text: str) -> Any:
    """The value of a Python or JSON literal; an assignment's right side counts, comments do not.

    Raises ValueError for anything else: what is no literal, is too long or too deep, holds a
    number that is not finite, or cannot be written down again.
    """
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    text = text.strip()
    for form in _forms(text):
        if _depth(form) > DEEPEST:
            raise ValueError(f"deeper than {DEEPEST} brackets")
        try:
            with warnings.catch_warnings():  # an escape that Python does not know is no concern
                warnings.simplefilter("ignore")
                value = ast.literal_eval(form)
            repr(value)  # an integer may be longer than can be written in decimal
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            continue
        if _finite(value):
            return value
    raise ValueError("no literal")


def _forms(text: str) -> list[str]:
    """The ways to read it, in order: as Python, with JSON's words, without comments, and the right
    side of an assignment."""
    forms = [text, _JSON_WORD.sub(lambda m: _WORDS.get(m[0], m[0]), text)]
    forms.append(_COMMENT.sub("", forms[1]))
    left, equals, right = forms[2].partition("=")
    if equals and left.strip().isidentifier():
        forms.append(right.strip())
    with contextlib.suppress(ValueError, RecursionError):  # not JSON: the other forms decide
        forms.append(repr(json.loads(text)))
    return forms


def _last_block(text: str) -> str | None:
    found, at = None, 0
    while (start := text.find(_FENCE, at)) >= 0:
        after = start + len(_FENCE)
        info = _INFO.match(text, after, after + _LONGEST_INFO)
        if info is None:
            at = after
            continue
        end = text.find(_FENCE, info.end())
        if end < 0:
            break
        found, at = text[info.end() : end], end + len(_FENCE)
    return found


def _last_balanced(text: str, closer: str) -> str | None:
    """The outermost balanced pair that closes last; an opener never closed hides nothing."""
    open_at: list[int] = []
    found = None
    for match in _BRACKETS[closer].finditer(text):
        if match[0] != closer:
            open_at.append(match.start())
        elif open_at:
            found = (open_at.pop(), match.end())
    return None if found is None else text[found[0] : found[1]]


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in _STRING.sub("", text):
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_finite(k) and _finite(v) for k, v in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_finite, value))
    if isinstance(value, complex):
        return math.isfinite(value.real) and math.isfinite(value.imag)
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, _PLAIN)
