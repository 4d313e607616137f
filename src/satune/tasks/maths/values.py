"""The value of a term at a point: exact where it is rational, else to as many digits as it needs.

Two terms are the same if they have the same value at every point that is tried: numbers chosen by
the symbols' places in the alphabet, so that the verdict depends neither on chance nor on the
letters. Nothing is rounded and nothing rewritten: two values that are not both rational are equal
if they agree to half of a precision that exceeds every cancellation met on the way. Costs are
bounded before they arise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import mpmath
from mpmath.libmp import NoConvergence

from satune.tasks.maths.terms import Term, Unreadable

Value = Any  # Fraction, or mpmath's mpf or mpc
_LEAST_BITS, MOST_BITS = 320, 40_000
FEWER_BITS = 5_000
"""What is enough where a value is only one of many, and would cost too much otherwise."""
_MOST_EXACT_BITS = 20_000
_LARGEST_MAGNITUDE = 1_000_000
_LARGEST_FACTORIAL = 3000
_mp = mpmath.mp.clone()
_FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    "sin": _mp.sin, "cos": _mp.cos, "tan": _mp.tan, "cot": _mp.cot, "sec": _mp.sec,
    "csc": _mp.csc, "arcsin": _mp.asin, "arccos": _mp.acos, "arctan": _mp.atan,
    "arccot": _mp.acot, "arcsec": _mp.asec, "arccsc": _mp.acsc, "sinh": _mp.sinh,
    "cosh": _mp.cosh, "tanh": _mp.tanh, "coth": _mp.coth, "arsinh": _mp.asinh,
    "arcosh": _mp.acosh, "artanh": _mp.atanh, "arcsinh": _mp.asinh, "arccosh": _mp.acosh,
    "arctanh": _mp.atanh, "ln": _mp.log, "exp": _mp.exp,
}  # fmt: skip

Point = Mapping[str, Fraction]
POSITIVE_POINTS = 4
"""How many of the points that come first have small positive values only."""
_PARTS = 97
# The least and the greatest value of a small and of a large symbol, in parts. The two make an odd
# sum, so that a value and its mirror image differ in what they make of (-1)^n.
_SMALL, _LARGE = (23, 412), (9_700, 96_997)
_MOST_ALONE = 6


class Values(NamedTuple):
    """Values of terms at a point, the precision in bits that they have in common, and whether
    roots, logarithms and the like of real numbers were real all the way."""

    found: list[Value]
    bits: int
    real: bool


def points(names: Iterable[str], fold: bool) -> list[Point]:
    """A value for every symbol at each of the points that are tried; one empty point if there is
    no symbol. Every symbol is small, large, positive and negative somewhere, any two stand in both
    orders and have other signs somewhere. ``fold`` gives a letter and its capital the same value.
    """
    key = {name: name.casefold() if fold else name for name in names}
    ranks = {found: rank for rank, found in enumerate(sorted(set(key.values())))}
    if not ranks:
        return [{}]
    small, other, large = (
        [_drawn(f"{i} {rank}", sizes) for rank in ranks.values()]
        for i, sizes in enumerate((_SMALL, _SMALL, _LARGE))
    )
    tried = [small, _mirrored(small, _SMALL), other, _mirrored(other, _SMALL)]
    tried += [large, _mirrored(large, _LARGE)]
    tried += [[-value for value in values] for values in (small, large)]
    for alone in range(min(len(ranks), _MOST_ALONE) if len(ranks) > 1 else 0):
        values = large if alone % 2 else other
        tried.append([-value if i == alone else value for i, value in enumerate(values)])
    return [{name: values[ranks[key[name]]] for name in key} for values in tried]


def _drawn(seed: str, sizes: tuple[int, int]) -> Fraction:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
    return Fraction(number % (sizes[1] - sizes[0] + 1) + sizes[0], _PARTS)


def _mirrored(values: list[Fraction], sizes: tuple[int, int]) -> list[Fraction]:
    """Values of the same size in the reverse order."""
    return [Fraction(sum(sizes), _PARTS) - value for value in values]


def symbols(*terms: Term) -> set[str]:
    found: set[str] = set()
    left = list(terms)
    while left:
        term = left.pop()
        if term.operation == "symbol":
            found.add(str(term.parts[0]))
        else:
            left += [part for part in term.parts if isinstance(part, Term)]
    return found


def values(terms: list[Term], at: Point, most_bits: int = MOST_BITS) -> Values:
    """The values of the terms at a point, to ``most_bits`` at most.

    Raises Unreadable where there is no value, or none within the bounds.
    """
    bits = _LEAST_BITS
    while True:
        calculator = _Calculator(bits, at)
        with _mp.workprec(bits):
            try:
                found = [calculator.of(term) for term in terms]
            except (ArithmeticError, ValueError, NoConvergence) as error:
                raise Unreadable(f"no value: {error}") from error
        needed = _LEAST_BITS + 4 * calculator.spread
        if needed <= bits or all(isinstance(value, Fraction) for value in found):
            return Values(found, bits, calculator.real)
        if needed > most_bits:
            raise Unreadable("the value needs too many digits")
        bits = needed


def close(a: Value, b: Value, bits: int) -> bool:
    """Whether two values of ``values`` are equal."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    with _mp.workprec(bits):
        left, right = _float(a), _float(b)
        if not (_mp.isfinite(left) and _mp.isfinite(right)):
            return bool(left == right)
        difference = left - right
        if difference == 0:
            return True
        size = max((_mp.mag(v) for v in (left, right) if v != 0), default=0)
        if left == 0 or right == 0:
            size = 0
        return bool(_mp.mag(difference) < size - bits // 2)


def is_real(value: Value) -> bool:
    return not isinstance(value, _mp.mpc)


def nearly(term: Term, decimal: Fraction, places: int) -> bool:
    """Whether a constant that is no finite decimal begins with these decimal places, the last of
    them rounded or cut off."""
    (found,), bits, _ = values([term], {})
    if not is_real(found):
        return False
    if isinstance(found, Fraction):
        rest = found.denominator
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return found == decimal
    return shown(found, decimal, places, bits)


def shown(value: Value, decimal: Fraction, places: int, bits: int) -> bool:
    """Whether a real value begins with these decimal places (-2: whole hundreds), the last of them
    rounded or cut off."""
    scale = Fraction(10) ** places
    with _mp.workprec(bits):
        if isinstance(value, Fraction):
            beyond = (abs(value) - abs(decimal)) * scale
        else:
            beyond = (abs(value) - abs(_float(decimal))) * _float(scale)
        same_sign = decimal == 0 or (value > 0) == (decimal > 0)
        return bool(same_sign and (0 <= beyond < 1 or abs(beyond) <= 0.5))


def agree(a: Term, places_a: int | None, b: Term, places_b: int | None) -> bool:
    """Whether two constants are the same to the decimal places that one of them shows (None: it is
    no decimal), or else to a hundredth of their size. A whole number's final zeros show nothing."""
    (left, right), bits, _ = values([a, b], {})
    if not (is_real(left) and is_real(right)):
        return close(left, right, bits)
    for value, decimal, places in ((left, right, places_b), (right, left, places_a)):
        if places is not None:
            digits = str(decimal.numerator) if decimal and places == 0 else ""
            if shown(value, decimal, places + len(digits.rstrip("0")) - len(digits), bits):
                return True
    with _mp.workprec(bits):
        difference = abs(_float(left) - _float(right))
        return places_a is places_b is None and bool(100 * difference <= abs(_float(left)))


def _float(value: Value) -> Value:
    if isinstance(value, Fraction):
        return _mp.mpf(value.numerator) / value.denominator
    return value


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


class _Calculator:
    """Values at one point to one precision; ``spread`` is how many bits lay between the largest
    and the smallest thing that met, ``real`` whether nothing led from real numbers to others."""

    def __init__(self, bits: int, at: Point) -> None:
        self._precision = bits
        self._at = at
        self.spread = 0
        self.real = True

    def of(self, term: Term) -> Value:
        operation, parts = term
        if operation == "number":
            return parts[0]
        if operation == "symbol":
            return self._at[str(parts[0])]
        if operation == "constant":
            return {"pi": +_mp.pi, "e": +_mp.e, "i": _mp.mpc(0, 1), "inf": _mp.inf}[str(parts[0])]
        inner = [self.of(part) for part in parts if isinstance(part, Term)]
        value = self._apply(operation, inner)
        if isinstance(value, Fraction):
            if _bits(value) > _MOST_EXACT_BITS:
                value = _float(value)
        elif _mp.isnan(value):
            raise Unreadable("no value")
        elif isinstance(value, _mp.mpc) and value.imag == 0:
            return value.real  # a complex number has no sign to ask for
        if not is_real(value) and all(is_real(part) for part in inner):
            self.real = False
        return value

    def _apply(self, operation: str, inner: list[Value]) -> Value:
        first = inner[0]
        if operation == "sum":
            return self._sum(inner)
        if operation in ("product", "fraction"):
            return self._product(inner)
        if operation == "negative":
            return -first
        if operation == "inverse":
            return 1 / first if isinstance(first, Fraction) else self._inverse(first)
        if operation == "power":
            return self._power(first, inner[1])
        if operation == "factorial":
            return self._factorial(first)
        if operation == "binomial":
            return self._binomial(first, inner[1])
        if operation == "abs":
            return abs(first)
        if operation in ("floor", "ceil"):
            return self._whole(first, math.floor if operation == "floor" else math.ceil)
        if operation == "degree":
            return _float(first) * _mp.pi / 180
        if operation == "log":
            return self._noted(_mp.log(_float(first)) / _mp.log(_float(inner[1])))
        argument = _float(first)
        if _mp.isfinite(argument) and argument != 0 and _mp.mag(argument) > self._precision // 4:
            raise Unreadable("an argument is too large")
        found = _FUNCTIONS[operation](argument)
        return found if operation == "exp" else self._noted(found)

    def _sum(self, inner: list[Value]) -> Value:
        total = inner[0]
        for part in inner[1:]:
            if isinstance(total, Fraction) and isinstance(part, Fraction):
                total += part
                self.spread = max(self.spread, _bits(total) if _bits(total) > 128 else 0)
                continue
            left, right = _float(total), _float(part)
            total = left + right
            sizes = [_mp.mag(v) for v in (left, right) if v != 0 and _mp.isfinite(v)]
            if len(sizes) < 2:
                continue
            self.spread = max(self.spread, abs(sizes[0] - sizes[1]))
            if total == 0 or max(sizes) - _mp.mag(total) > self._precision * 3 // 4:
                total = Fraction(0)
            else:
                self.spread = max(self.spread, max(sizes) - _mp.mag(total))
        return total

    def _product(self, inner: list[Value]) -> Value:
        total = inner[0]
        for part in inner[1:]:
            if isinstance(total, Fraction) and isinstance(part, Fraction):
                total *= part
            else:
                total = _float(total) * _float(part)
        return total

    def _inverse(self, value: Value) -> Value:
        if value == 0:
            raise Unreadable("division by zero")
        return 1 / value

    def _power(self, base: Value, exponent: Value) -> Value:
        if isinstance(exponent, Fraction) and isinstance(base, Fraction):
            whole = exponent.denominator == 1
            if base == 0:
                if exponent < 0:
                    raise Unreadable("division by zero")
                return Fraction(1 if exponent == 0 else 0)
            if whole and abs(exponent.numerator) * _bits(base) <= _MOST_EXACT_BITS:
                return base**exponent.numerator
        base, negative = _float(base), False
        if isinstance(exponent, Fraction) and exponent.denominator % 2 and is_real(base):
            # The odd root of a negative number is the real one.
            negative = bool(base < 0) and exponent.numerator % 2 == 1
            # Which root it is must not come from a symbol's value.
            self.real &= bool(base > 0) or exponent.denominator % _PARTS > 0
            base = abs(base)
        exponent = _float(exponent)
        if base == 0 or not (_mp.isfinite(base) and _mp.isfinite(exponent)):
            raise Unreadable("no value")
        if abs(exponent) * (abs(_mp.mag(base)) + 1) > _LARGEST_MAGNITUDE:
            raise Unreadable("the value is too large")
        found = _mp.power(base, exponent)
        return -found if negative else found

    def _factorial(self, value: Value) -> Value:
        if isinstance(value, Fraction) and value.denominator == 1:
            if not 0 <= value <= _LARGEST_FACTORIAL:
                raise Unreadable("a factorial out of bounds")
            return Fraction(math.factorial(value.numerator))
        return self._noted(_mp.gamma(_float(value) + 1))

    def _binomial(self, upper: Value, lower: Value) -> Value:
        ints = [
            v.numerator for v in (upper, lower) if isinstance(v, Fraction) and v.denominator == 1
        ]
        if len(ints) == 2 and ints[1] >= 0 and 0 <= ints[0] <= _LARGEST_FACTORIAL:
            return Fraction(math.comb(*ints))
        return self._noted(_mp.binomial(_float(upper), _float(lower)))

    def _whole(self, value: Value, rounding: Callable[[Any], int]) -> Value:
        if not is_real(value) or not (isinstance(value, Fraction) or _mp.isfinite(value)):
            raise Unreadable("no value")
        if isinstance(value, Fraction):
            return Fraction(rounding(value))
        real = _mp.re(value)
        if real != 0 and _mp.mag(real) > self._precision // 2:
            raise Unreadable("the value is too large")
        nearest = _mp.nint(real)
        if abs(real - nearest) < _mp.mpf(2) ** (-self._precision // 2):
            return Fraction(int(nearest))
        return Fraction(int(_mp.floor(real) if rounding is math.floor else _mp.ceil(real)))

    def _noted(self, value: Value) -> Value:
        """A function's value; one that is zero but for rounding is zero, one at a pole is none."""
        if not _mp.isfinite(value):
            raise Unreadable("no value")
        if value == 0:
            return value
        if _mp.mag(value) < -self._precision * 3 // 4:
            return Fraction(0)
        if _mp.mag(value) > self._precision * 3 // 4 and not isinstance(value, Fraction):
            raise Unreadable("too near to a pole")
        return value
