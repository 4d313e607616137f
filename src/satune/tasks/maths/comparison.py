"""Whether two readings say the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction

from satune.tasks.maths.reading import (
    Literal,
    Many,
    Name,
    Numeral,
    Quantity,
    Reading,
    Relation,
    term_of,
)
from satune.tasks.maths.terms import Term, Unreadable, number
from satune.tasks.maths.values import (
    FEWER_BITS,
    MOST_BITS,
    POSITIVE_POINTS,
    Value,
    close,
    is_real,
    nearly,
    points,
    symbols,
    values,
)

_FEWEST_POINTS = 2
_MOST_UNORDERED = 40
_ROUNDED_PLACES = 6
_STRICT = {"<": True, ">": True, "le": False, "ge": False}


def same(reference: Reading, answer: Reading) -> bool:
    """Whether the answer says what the reference says. What only the answer may do: name what it
    gives (x = 5 for 5), or be a set where the reference is an inequality."""
    if isinstance(reference, Relation) and isinstance(answer, Relation):
        return _same_relations(_in_order(reference), _in_order(answer))
    if isinstance(answer, Relation):
        if not set(answer.signs) <= {"=", "in"} or not _holds(answer):
            return False
        return same(reference, _in_order(answer).sides[-1])
    if isinstance(reference, Relation):
        if set(reference.signs) <= {"=", "in"}:
            return reference.named and same(reference.sides[-1], answer)
        interval = _interval(reference)
        return interval is not None and same(interval, answer)
    if isinstance(reference, Many) or isinstance(answer, Many):
        return _same_many(reference, answer)
    if isinstance(reference, Numeral) or isinstance(answer, Numeral):
        return _same_numerals(reference, answer)
    if isinstance(reference, Literal) or isinstance(answer, Literal):
        return reference == answer
    if isinstance(reference, Name) and isinstance(answer, Name):
        return _same_names(reference, answer)
    return _same_amounts(reference, answer)


def _same_names(a: Name, b: Name) -> bool:
    """The same word, or the same letters as a product of variables; capitals (TTF, AB) are none."""
    if a.text.casefold() == b.text.casefold():
        return True
    if a.term is None or b.term is None or a.text.isupper() or len(a.text) == 1:
        return False
    return same_terms(a.term, b.term)


def same_terms(a: Term, b: Term) -> bool:
    """Whether two expressions have the same value wherever both are real, and are defined at all
    at some points that are tried."""
    names = symbols(a, b)
    fold = len({name.casefold() for name in names}) == len(names)
    # A letter and its capital in one expression are two variables, in two they are one.
    fold = fold or all(
        len({name.casefold() for name in symbols(term)}) == len(symbols(term)) for term in (a, b)
    )
    tried = 0
    for (left, right), bits in _deciding([a, b], names, fold):
        if not close(left, right, bits):
            return False
        tried += 1
    return tried >= (_FEWEST_POINTS if names else 1)


def _deciding(terms: list[Term], names: set[str], fold: bool) -> Iterator[tuple[list[Value], int]]:
    """The values of the terms, and their bits, at the points that decide: where all of them are
    defined in real numbers. An i in a term is welcome at the first points. Where too few decide,
    the first points do in complex numbers."""
    decided = 0
    undefined: list[tuple[list[Value], int]] = []
    for i, point in enumerate(points(names, fold)):
        first = i < POSITIVE_POINTS
        try:
            found, bits, real = values(terms, point, MOST_BITS if first else FEWER_BITS)
        except Unreadable:
            continue
        if real and (first or all(is_real(value) for value in found)):
            decided += 1
            yield found, bits
        elif first:
            undefined.append((found, bits))
    if decided < _FEWEST_POINTS:
        yield from undefined


def _same_amounts(reference: Reading, answer: Reading, *, both_units: bool = False) -> bool:
    left, right = _amount(reference), _amount(answer)
    if left is None or right is None:
        return False
    if {left.unit, right.unit} == {"percent", ""}:
        share, plain = (left, right) if left.unit else (right, left)
        part = Term("product", (share.term, number(Fraction(1, 100))))
        return same_terms(plain.term, share.term) or same_terms(plain.term, part)
    if left.unit != right.unit and (both_units or (left.unit and right.unit)):
        return False
    if same_terms(left.term, right.term):
        return True
    return _rounded(left, right) or _rounded(right, left)


def _amount(reading: Reading) -> Quantity | None:
    if isinstance(reading, Quantity):
        return reading
    term = term_of(reading)
    return None if term is None else Quantity(term)


def _rounded(exact: Quantity, decimal: Quantity) -> bool:
    """Whether a decimal of six places or more, and as many digits, is that of a value that has no
    finite one. Where the last six are all 0 or all 9 it may stand for too many."""
    if exact.places is not None or not decimal.places or decimal.places < _ROUNDED_PLACES:
        return False
    if symbols(exact.term, decimal.term):
        return False
    try:
        (value,), *_ = values([decimal.term], {})
        assert isinstance(value, Fraction)  # a number, perhaps with a sign
        digits = str(abs(value * 10**decimal.places).numerator)
        if len(digits) < _ROUNDED_PLACES or digits[-_ROUNDED_PLACES:] in ("000000", "999999"):
            return False
        return nearly(exact.term, value, decimal.places)
    except Unreadable:
        return False


def _same_numerals(reference: Reading, answer: Reading) -> bool:
    """Digits and bases agree; one of the two may leave the base out if it is the answer."""
    if isinstance(reference, Numeral) and isinstance(answer, Numeral):
        return reference == answer
    if not isinstance(reference, Numeral) or not isinstance(answer, Quantity):
        return False
    if answer.unit or answer.places is None or not reference.digits.lstrip("-").isdigit():
        return False
    return same_terms(number(int(reference.digits)), answer.term)


def _same_many(reference: Reading, answer: Reading) -> bool:
    if not (isinstance(reference, Many) and isinstance(answer, Many)):
        return _same_as_single(reference, answer)
    a, b = reference.items, answer.items
    kinds = {reference.kind, answer.kind}
    if kinds <= {"list", "set"}:
        if reference.kind == "set":
            a = _distinct(a)
        if answer.kind == "set":
            b = _distinct(b)
        return _same_unordered(a, b)
    if len(a) != len(b):
        return False
    if kinds == {"union"}:
        return _same_unordered(a, b)
    if kinds <= {"ratio", "time"} and reference.kind == "ratio":
        return _same_ratio(a, b)
    # 1,2 for (1,2), and [1,2,3] for (1,2,3): the order counts.
    loose = kinds in ({"list", "()"}, {"time", "ratio"}) or (kinds == {"()", "[]"} and len(a) > 2)
    if len(kinds) == 1 or loose:
        return all(same(x, y) for x, y in zip(_by_name(a), _by_name(b), strict=True))
    return False


def _same_as_single(reference: Reading, answer: Reading) -> bool:
    many, other = (reference, answer) if isinstance(reference, Many) else (answer, reference)
    assert isinstance(many, Many)
    if many.kind == "set" and len(many.items) == 1:
        item = many.items[0]
        return same(item, other) if many is reference else same(other, item)
    is_ratio = many.kind == "ratio" or (many.kind == "time" and many is answer)
    if is_ratio and len(many.items) == 2:
        upper, lower = (term_of(item) for item in many.items)
        if upper is not None and lower is not None:
            quotient = Quantity(Term("product", (upper, Term("inverse", (lower,)))))
            return _same_amounts(quotient, other)
    return False


def _in_order(relation: Relation) -> Relation:
    """A pair that is called (y, x), and what is so called, as one that is called (x, y)."""
    names, given = relation.sides[0], relation.sides[-1]
    if not (isinstance(names, Many) and isinstance(given, Many) and given.kind in ("()", "list")):
        return relation
    if len(names.items) != len(given.items):
        return relation
    sides = (
        names._replace(items=_alphabetical(names.items, names.items)),
        *relation.sides[1:-1],
        given._replace(items=_alphabetical(names.items, given.items)),
    )
    return relation._replace(sides=sides)


def _by_name(items: Sequence[Reading]) -> Sequence[Reading]:
    """y = 1, x = 2 as x = 2, y = 1."""
    named = [item.sides[0] for item in items if isinstance(item, Relation) and item.named]
    return _alphabetical(named, items) if len(named) == len(items) else items


def _alphabetical(names: Sequence[Reading], items: Sequence[Reading]) -> tuple[Reading, ...]:
    """Items in the order of their names, where these are letters that follow each other in the
    alphabet. Others have no order that everybody keeps to: (m, b) is one."""
    letters = [name.text for name in names if isinstance(name, Name) and len(name.text) == 1]
    order = sorted(range(len(letters)), key=letters.__getitem__)
    steps = {ord(letters[j]) - ord(letters[i]) for i, j in itertools.pairwise(order)}
    if len(letters) < len(names) or steps != {1}:
        return tuple(items)
    return tuple(items[i] for i in order)


def _distinct(items: Sequence[Reading]) -> tuple[Reading, ...]:
    kept: list[Reading] = []
    for item in items[:_MOST_UNORDERED]:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return (*kept, *items[_MOST_UNORDERED:])


def _same_unordered(a: Sequence[Reading], b: Sequence[Reading]) -> bool:
    if len(a) != len(b):
        return False
    # Amounts of several kinds are told apart by their units, which none may leave out then.
    mixed = any(len(_units(items)) > 1 for items in (a, b))
    if mixed and _units(a) != _units(b):
        return False
    if len(a) > _MOST_UNORDERED:
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    left = list(b)
    for x in a:
        found = next(
            (i for i, y in enumerate(left) if same(x, y) and not (mixed and _unit(x) != _unit(y))),
            None,
        )
        if found is None:
            return False
        del left[found]
    return True


def _unit(reading: Reading) -> str:
    return reading.unit if isinstance(reading, Quantity) else ""


def _units(items: Sequence[Reading]) -> set[str]:
    return {_unit(item) for item in items}


def _same_ratio(a: Sequence[Reading], b: Sequence[Reading]) -> bool:
    terms = [(term_of(x), term_of(y)) for x, y in zip(a, b, strict=True)]
    pairs = [(x, y) for x, y in terms if x is not None and y is not None]
    if len(pairs) < len(terms):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    if any(same_terms(x, number(0)) or same_terms(y, number(0)) for x, y in pairs):
        return all(same_terms(x, y) for x, y in pairs)  # a time of day
    first, other = pairs[0]
    return all(
        same_terms(Term("product", (x, other)), Term("product", (y, first))) for x, y in pairs
    )


def _holds(relation: Relation) -> bool:
    """Whether what an answer claims may be so: the numbers among its sides are one number."""
    terms = [term for side in relation.sides if (term := term_of(side)) and not symbols(term)]
    return all(same_terms(term, terms[0]) for term in terms[1:])


def _same_relations(a: Relation, b: Relation) -> bool:
    if set(a.signs) == set(b.signs) == {"="} or set(a.signs) == set(b.signs) == {"ne"}:
        if len(a.sides) == len(b.sides) == 2:
            left, right = _difference(a.sides), _difference(b.sides)
            if left is not None and right is not None:
                return _proportional(left, right, positive=False)
    elif set(a.signs) | set(b.signs) <= _STRICT.keys():
        return _same_inequalities(a, b)
    if a.signs == b.signs:
        return all(same(x, y) for x, y in zip(a.sides, b.sides, strict=True))
    return False


def _difference(sides: Sequence[Reading]) -> Term | None:
    left, right = term_of(sides[0]), term_of(sides[1])
    if left is None or right is None:
        return None
    return Term("sum", (left, Term("negative", (right,))))


def _proportional(a: Term, b: Term, *, positive: bool) -> bool:
    """Whether a is b times a constant, which is not 0 (or greater than 0)."""
    if symbols(a) != symbols(b):
        return False
    quotient = Term("product", (a, Term("inverse", (b,))))
    first: Fraction | None = None
    tried = 0
    for (found,), bits in _deciding([quotient], symbols(a), fold=False):
        if found == 0 or (positive and not (is_real(found) and found > 0)):
            return False
        if first is not None and not close(found, first, bits):
            return False
        first = found
        tried += 1
    return tried >= _FEWEST_POINTS or (tried > 0 and not symbols(a))


def _ordered_pairs(relation: Relation) -> Iterator[tuple[Reading, Reading, bool]]:
    """(smaller, larger, whether strictly) of every sign of a chain of inequalities."""
    for i, sign in enumerate(relation.signs):
        left, right = relation.sides[i], relation.sides[i + 1]
        smaller, larger = (left, right) if sign in ("<", "le") else (right, left)
        yield smaller, larger, _STRICT[sign]


def _same_inequalities(a: Relation, b: Relation) -> bool:
    if len(a.signs) != len(b.signs):
        return False
    left = list(_ordered_pairs(b))
    for smaller, larger, strict in _ordered_pairs(a):
        mine = _difference((larger, smaller))
        for i, (other_smaller, other_larger, other_strict) in enumerate(left):
            theirs = _difference((other_larger, other_smaller))
            if mine is None or theirs is None or strict != other_strict:
                continue
            if _proportional(mine, theirs, positive=True):
                del left[i]
                break
        else:
            return False
    return True


def _interval(relation: Relation) -> Many | None:
    """The interval of one variable that inequalities describe; None if they describe another
    set."""
    if not set(relation.signs) <= _STRICT.keys() or len(relation.signs) > 2:
        return None
    infinity = Term("constant", ("inf",))
    low: tuple[Reading, bool] = (Quantity(Term("negative", (infinity,))), True)
    high: tuple[Reading, bool] = (Quantity(infinity), True)
    bounded = 0
    for smaller, larger, strict in _ordered_pairs(relation):
        if isinstance(smaller, Name) and not isinstance(larger, Name):
            high = (larger, strict)
        elif isinstance(larger, Name) and not isinstance(smaller, Name):
            low = (smaller, strict)
        else:
            return None
        bounded += 1
    if bounded != len(relation.signs):
        return None
    return Many(("(" if low[1] else "[") + (")" if high[1] else "]"), (low[0], high[0]))
