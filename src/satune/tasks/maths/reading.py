r"""What an answer says: an amount, a name, a numeral in a base, several of them, or a relation.

Structure is read here and expressions by ``terms``. What can be read in no way is kept as a
``Literal``, which equals the same text only: a part of an answer is never taken for the whole.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from satune.tasks.maths.brackets import (
    Tokens,
    depths,
    is_sign,
    split,
    trimmed,
    whole_group,
    without_currency,
    without_ordinal,
    without_sign_unit,
)
from satune.tasks.maths.notation import Token, dense, tokens_of
from satune.tasks.maths.terms import Term, Unreadable, number, parse
from satune.tasks.maths.units import is_unit, multiplier, unit_of, words
from satune.tasks.maths.values import agree, symbols


class Quantity(NamedTuple):
    """An expression and its unit ("" for none); ``places`` counts the decimal places of a number
    that is written as a plain decimal, and is None for all else."""

    term: Term
    unit: str = ""
    places: int | None = None


class Name(NamedTuple):
    """A word, a phrase or a letter. ``term`` is what letters mean as a product of variables; words
    mean none."""

    text: str
    term: Term | None


class Numeral(NamedTuple):
    """Digits in a base."""

    digits: str
    base: int


class Many(NamedTuple):
    """Several readings. Kinds: list (side by side), set, the brackets of a tuple or interval (such
    as "(]"), union, difference, ratio, time (of day), row, and the names of LaTeX's matrices."""

    kind: str
    items: tuple[Reading, ...]


class Relation(NamedTuple):
    """Sides and the signs between them (= < > le ge ne in ...)."""

    sides: tuple[Reading, ...]
    signs: tuple[str, ...]
    named: bool
    """Whether the first side only names what follows: x, f(x), AB, (x,y), "Area"."""


class Literal(NamedTuple):
    """A text that is compared as it stands."""

    text: str


Reading = Quantity | Name | Numeral | Many | Relation | Literal

_RELATIONS = words("= < > le ge ne approx in notin equiv sim subset subseteq cong")
_ALIGNED = words("aligned align alignedat gathered gather equation split center displaymath")
_MATRICES = words("matrix pmatrix bmatrix Bmatrix vmatrix Vmatrix smallmatrix array")
_BASES = {
    word: base
    for base, word in enumerate(
        ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"), start=2
    )
} | {"twelve": 12, "sixteen": 16}
_BASED = re.compile(
    r"(?P<sign>[+-]?)\(?(?P<inner>-?)(?P<digits>[0-9A-Za-z.]*[0-9][0-9A-Za-z.]*)\)?"
    r"(?:_\{?\(?(?:base)?(?P<base>[0-9]{1,3}|[a-z]+)\)?\}?|\(?base(?P<said>[0-9]{1,3}|[a-z]+)\)?)"
)
_NAMED = re.compile(
    r"(?:[A-Za-z]|\\[a-z]+|[A-Z]{2,4}|\\(?:bar|overline|vec|hat)\{?\w+\}?)'*"
    r"(?:_(?:\w|\{\w+\}))?(?:\(\w(?:,\w)*\))?|\(\w(?:,\w)+\)"
)
_LETTERS = ("letter", "initial")


def read(text: str) -> Reading:
    """The reading of an answer; a Literal where there is no other."""
    tokens = trimmed(tokens_of(text))
    try:
        return _several(tokens)
    except Unreadable:
        return Literal(dense(tokens))


def _separates(token: Token) -> bool:
    if token.kind == "word":
        return token.text.casefold() in ("and", "or")
    return token.kind == "sign" and token.text in (",", ";")


def _relates(token: Token) -> bool:
    return token.kind in ("sign", "command") and token.text in _RELATIONS


def _several(tokens: Tokens, kind: str = "list") -> Reading:
    """One reading, or those that commas, "and", "or" separate."""
    tokens = trimmed(tokens)
    pieces = [piece for piece in split(tokens, _separates)[0] if piece]
    if not pieces:
        raise Unreadable("nothing is there")
    if len(pieces) == 1 and kind == "list":
        return _one(pieces[0])
    return Many(kind, _items(pieces))


def _items(pieces: Sequence[Tokens]) -> tuple[Reading, ...]:
    items: list[Reading] = []
    for piece in pieces:
        item = _one_or_literal(piece)
        # Both values of a plus-minus, and amounts side by side, stand beside their neighbours.
        items += item.items if isinstance(item, Many) and item.kind == "list" else [item]
    return tuple(items)


def _one_or_literal(tokens: Tokens) -> Reading:
    try:
        return _one(tokens)
    except Unreadable:
        return Literal(dense(tokens))


def _one(tokens: Tokens) -> Reading:
    tokens = trimmed(tokens)
    if not tokens:
        raise Unreadable("nothing is there")
    sides, signs = split(tokens, _relates)
    if signs:
        return _relation(sides, signs)
    for command, kind in (("cup", "union"), ("setminus", "difference")):
        parts, between = split(tokens, lambda token, c=command: is_sign(token, c))
        if between:
            return Many(kind, tuple(_one(part) for part in parts))
    if whole_group(tokens):
        grouped = _group(tokens)
        if grouped is not None:
            return grouped
    if any(token.kind == "begin" for token in tokens):
        return _scaled_matrix(tokens)
    if len(tokens) == 1 and is_sign(tokens[0], "emptyset"):
        return Many("set", ())
    if dense(tokens) == "\\mathbb{R}":
        infinity = Term("constant", ("inf",))
        return Many("()", (Quantity(Term("negative", (infinity,))), Quantity(infinity)))
    parts, between = split(tokens, lambda token: is_sign(token, ":"))
    if between:
        return Many(_ratio_or_time(parts), tuple(_amount(part) for part in parts))
    return _numeral(tokens) or _name(tokens) or _amounts(tokens)


def _relation(sides: list[Tokens], signs: list[str]) -> Reading:
    if "approx" in signs:
        # An exact value stands before the sign, or only a name does.
        cut = signs.index("approx")
        if cut or not _names(sides[0]):
            exact, *others = (_one_or_literal(side) for side in sides[cut:])
            if not all(_may_be_near(exact, other) for other in others):
                raise Unreadable("two numbers that are not nearly the same")
            sides, signs = sides[: cut + 1], signs[:cut]
        else:
            signs = ["=" if sign == "approx" else sign for sign in signs]
        if not signs:
            return _one(sides[0])
    read = tuple(_several(side) for side in sides)
    return Relation(read, tuple(signs), _names(sides[0]))


def _may_be_near(exact: Reading, other: Reading) -> bool:
    """False for two numbers, of one unit as far as they have any, that are not nearly the same."""
    if not (isinstance(exact, Quantity) and isinstance(other, Quantity)):
        return True
    units = {exact.unit, other.unit}
    one_unit = len(units) == 1 or ("" in units and "percent" not in units)
    if symbols(exact.term, other.term) or not one_unit:
        return True
    return agree(exact.term, exact.places, other.term, other.places)


def _ratio_or_time(parts: Sequence[Tokens]) -> str:
    """Minutes have two digits; a ratio would not begin with a zero, and be in lowest terms."""
    texts = [dense(part[:1]) for part in parts]
    if not all(text.isdigit() for text in texts) or len(texts[1]) != 2 or int(texts[1]) > 59:
        return "ratio"
    return "time" if texts[1][0] == "0" or math.gcd(*map(int, texts)) > 1 else "ratio"


def _names(side: Tokens) -> bool:
    if _NAMED.fullmatch(dense(side).replace(" ", "")):
        return True
    return bool(side) and all(token.kind in ("word", "bare") for token in side)


def _group(tokens: Tokens) -> Reading | None:
    """What stands in brackets that hold all; None for a matrix."""
    inner, opening = tokens[1:-1], tokens[0].text
    if tokens[0].kind == "begin":
        if opening not in _ALIGNED:
            return None
        rows = [_without_tabs(row) for row in _rows(inner)]
        return _several(rows[0]) if len(rows) == 1 else Many("list", _items(rows))
    if opening == "\\{":
        return _set(inner)
    pieces = [piece for piece in split(inner, _separates)[0] if piece]
    if len(pieces) > 1 and opening in ("(", "[", "langle"):
        if any(token.kind == "word" for piece in pieces for token in piece[:1]):
            return _several(inner)
        brackets = "()" if opening == "langle" else opening + tokens[-1].text
        return Many(brackets, tuple(_one_or_literal(piece) for piece in pieces))
    if opening in ("(", "[", "{"):
        return _one(inner)
    return None


def _set(inner: Tokens) -> Reading:
    if not inner:
        return Many("set", ())
    pieces, _ = split(inner, lambda token: is_sign(token, "|", ":", "mid"))
    if len(pieces) == 2 and len(pieces[0]) == 1 and pieces[0][0].kind == "letter":
        return _one(pieces[1])  # a set by its condition
    return _several(inner, "set")


def _rows(tokens: Tokens) -> list[Tokens]:
    rows, _ = split(tokens, lambda token: token.kind == "command" and token.text == "\\")
    return [row for row in rows if row]


def _without_tabs(tokens: Tokens) -> Tokens:
    pieces, _ = split(tokens, lambda token: is_sign(token, "&"))
    return [token for piece in pieces for token in piece]


def _scaled_matrix(tokens: Tokens) -> Reading:
    """A matrix, perhaps with a factor before it."""
    start = next(i for i, token in enumerate(tokens) if token.kind == "begin")
    matrix, kind = tokens[start:], tokens[start].text
    if kind not in _MATRICES or not whole_group(matrix):
        raise Unreadable("no matrix alone")
    factor = None
    if start:
        last = start - 1 if is_sign(tokens[start - 1], "*") else start
        factor = number(-1) if dense(tokens[:last]) == "-" else parse(tokens[:last])
    rows: list[Reading] = []
    for row in _rows(matrix[1:-1]):
        cells, _ = split(row, lambda token: is_sign(token, "&"))
        read = [_one_or_literal(cell) for cell in cells]
        rows.append(Many("row", tuple(_scaled(cell, factor) for cell in read)))
    return Many(kind if kind in ("vmatrix", "Vmatrix") else "matrix", tuple(rows))


def _scaled(cell: Reading, factor: Term | None) -> Reading:
    term = term_of(cell)
    if factor is None or term is None:
        return cell
    return Quantity(Term("product", (factor, term)))


def term_of(reading: Reading) -> Term | None:
    """The expression that a reading without unit is; None if it is none."""
    if isinstance(reading, Quantity):
        return reading.term if not reading.unit else None
    return reading.term if isinstance(reading, Name) else None


def _numeral(tokens: Tokens) -> Numeral | None:
    found = _BASED.fullmatch(dense(tokens).replace(" ", ""))
    if found is None:
        return None
    said = found["base"] or found["said"]
    base = int(said) if said.isdigit() else _BASES.get(said.removeprefix("base"), 0)
    digits = found["digits"].upper()
    if base < 2 or (base <= 10 and re.search("[A-Z]", digits)):
        return None
    negative = (found["sign"] == "-") != (found["inner"] == "-")
    return Numeral(("-" if negative else "") + (digits.lstrip("0") or "0"), base)


def _name(tokens: Tokens) -> Name | None:
    kinds = {token.kind for token in tokens if not is_sign(token, ".", "-", "'", "(", ")")}
    if kinds and kinds <= {*_LETTERS} and all(token.kind in _LETTERS for token in tokens):
        return Name("".join(token.text for token in tokens), parse(tokens))
    negated = next((is_sign(token, "-") for token in tokens if not is_sign(token, "(")), False)
    if not negated and kinds & {"word", "bare"} and kinds <= {*_LETTERS, "word", "bare"}:
        said = [token.text.casefold() for token in tokens if token.kind != "sign"]
        if len(said) > 1 and said[0] in ("a", "an", "the"):
            said = said[1:]
        return Name(" ".join(said), None)
    return None


def _amounts(tokens: Tokens) -> Reading:
    """An amount, or several side by side, each with its unit: 5 ft 6 in."""
    tail = _tail(tokens)
    for i in range(tail + 1, len(tokens)):
        if tokens[i].kind == "number" and not is_sign(tokens[i - 1], "^", "{", "-", "_"):
            first, rest = _amount(tokens[:i]), _amounts(tokens[i:])
            more = rest.items if isinstance(rest, Many) else (rest,)
            amounts = (first, *more)
            if not all(isinstance(a, Quantity) and a.unit for a in amounts):
                raise Unreadable("numbers side by side")
            return Many("list", amounts)
    return _amount(tokens)


def _tail(tokens: Tokens) -> int:
    """Where the words behind an amount begin; the length of the tokens if there are none."""
    for i, token, depth in depths(tokens):
        if i == 0 or depth:
            continue
        before = tokens[i - 1]
        if token.kind == "word":
            return i
        if token.kind == "bare" and (token.blank or before.kind == "number"):
            return i
        counts = before.kind == "number" or is_sign(before, "}") or before.text == "pi"
        if token.kind == "initial" and token.text in "mgshl" and counts:
            return i
        if is_sign(token, "(") and i + 1 < len(tokens) and tokens[i + 1].kind == "word":
            return i
    return len(tokens)


def _amount(tokens: Tokens) -> Reading:
    tokens = without_ordinal(trimmed(tokens))
    tail = _tail(tokens)
    head, behind = tokens[:tail], tokens[tail:]
    head, unit = without_currency(head)
    factor, said = multiplier([token.text for token in behind])
    behind = behind[said:]
    if behind and is_sign(behind[0], "(") and is_sign(behind[-1], ")"):
        behind = behind[1:-1]
    if behind:
        says_more = any(
            token.kind == "letter" and not (token.text in "mgshl" and is_sign(before, "/"))
            for before, token in itertools.pairwise(behind)
        )
        named = None if says_more else unit_of(dense(behind))
        if named is None or (unit and named not in ("", unit)):
            raise Unreadable("words behind an amount")
        # A bare word behind letters is a product's: 2 xab, not an amount of something.
        bare = all(token.kind == "bare" for token in behind)
        if bare and any(t.kind == "letter" for t in head) and not is_unit(dense(behind).casefold()):
            raise Unreadable("letters and words")
        unit = unit or named
    if not unit:
        head, unit = without_sign_unit(head)
    if any(is_sign(token, "pm", "mp") for token in head):
        both = (parse(head, plus=True), parse(head, plus=False))
        return Many("list", tuple(Quantity(_times(factor, term), unit) for term in both))
    text = dense(head)
    plain = re.fullmatch(r"[+-]?[0-9]+(?:\.([0-9]+))?", text)
    places = len(plain[1] or "") if plain and factor == 1 else None
    return Quantity(_times(factor, parse(head)), unit, places)


def _times(factor: Fraction, term: Term) -> Term:
    return term if factor == 1 else Term("product", (number(factor), term))
