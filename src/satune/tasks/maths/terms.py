r"""From tokens to a term: the expression grammar of LaTeX as answers use it.

A term is a tree of operations; nothing is computed here. What the grammar does not know (words,
integrals, two numbers side by side) is ``Unreadable`` and never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from satune.tasks.maths.notation import FUNCTIONS, GREEK, Token
from satune.tasks.maths.units import words

_DEEPEST = 60
_MOST_SUFFIXES = 4
_ACCENTS = words("overline bar vec hat tilde dot ddot widebar")
_CONSTANTS = {"pi": "pi", "infty": "inf"}
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_CLOSING = {"lfloor": ("rfloor", "floor"), "lceil": ("rceil", "ceil")}


class Unreadable(Exception):
    """The text is no expression of this grammar, or its value is out of reach."""


class Term(NamedTuple):
    """``number`` (a Fraction), ``symbol`` and ``constant`` (a name), or an operation on terms:
    sum, product, negative, inverse, power, factorial, abs, floor, ceil, binomial, log (with its
    base), degree, or the name of a function."""

    operation: str
    parts: tuple[Term | Fraction | str, ...]


def number(value: Fraction | int) -> Term:
    return Term("number", (Fraction(value),))


def fraction_of(text: str) -> Fraction:
    """The value of a number token: 12.5 is 25/2, 0.1(6) is 1/6."""
    whole, _, part = text.partition(".")
    fixed, _, period = part.rstrip(")").partition("(")
    value = Fraction(int(whole + fixed), 10 ** len(fixed))
    if period:
        value += Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
    return value


def parse(tokens: Sequence[Token], plus: bool = True) -> Term:
    r"""The term that all the tokens form; ``plus`` says which sign of ``\pm`` is meant.

    Raises Unreadable if they form none.
    """
    parser = _Parser(tokens, plus)
    term = parser.sum()
    if parser.token is not None:
        raise Unreadable(f"{parser.token.text} is not expected there")
    return term


class _Parser:
    def __init__(self, tokens: Sequence[Token], plus: bool) -> None:
        self._tokens = list(tokens)
        self._at = 0
        self._plus = plus
        self._depth = 0
        self._bars = 0

    @property
    def token(self) -> Token | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _next_is(self, *texts: str, kinds: tuple[str, ...] = ("sign", "command")) -> bool:
        token = self.token
        return token is not None and token.kind in kinds and token.text in texts

    def _take(self, *texts: str) -> bool:
        if self._next_is(*texts):
            self._at += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise Unreadable(f"{text} is missing")

    def _sign(self) -> bool | None:
        """Whether the sign that stands here is a plus; None if there is none."""
        if self._take("+"):
            return True
        if self._take("-"):
            return False
        if self._take("pm"):
            return self._plus
        return not self._plus if self._take("mp") else None

    def sum(self) -> Term:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise Unreadable("too deep")
        parts: list[Term] = []
        while True:
            positive, sign = True, self._sign()
            if sign is None and parts:
                break
            while sign is not None:
                positive = positive == sign
                sign = self._sign()
            part = self._product()
            parts.append(part if positive else Term("negative", (part,)))
        self._depth -= 1
        return parts[0] if len(parts) == 1 else Term("sum", tuple(parts))

    def _product(self) -> Term:
        parts = [self._first_factor()]
        while self.token is not None:
            if self._take("*"):
                parts.append(self._signed_factor())
            elif self._take("/", ":"):
                parts.append(Term("inverse", (self._signed_factor(),)))
            elif self._starts_factor():
                parts.append(self._factor())
            else:
                break
        return parts[0] if len(parts) == 1 else Term("product", tuple(parts))

    def _first_factor(self) -> Term:
        r"""A factor, or a mixed number: 2\frac{1}{2} and 2 1/2."""
        token = self.token
        if token is None or token.kind != "number" or not token.text.isdigit():
            return self._factor()
        following = [(t.kind, t.text) for t in self._tokens[self._at + 1 : self._at + 4]]
        if following[:1] == [("command", "frac")]:
            self._at += 1
            part = self._factor()
            if part.operation == "fraction":
                return Term("sum", (number(int(token.text)), part))
            return Term("product", (number(int(token.text)), part))
        if [kind for kind, _ in following] == ["number", "sign", "number"] and (
            following[1][1] == "/"
        ):
            self._at += 1
            upper = self._factor()
            self._expect("/")
            part = Term("product", (upper, Term("inverse", (self._factor(),))))
            return Term("sum", (number(int(token.text)), part))
        return self._factor()

    def _signed_factor(self) -> Term:
        sign = self._sign()
        factor = self._factor()
        return Term("negative", (factor,)) if sign is False else factor

    def _starts_factor(self) -> bool:
        token = self.token
        if token is None:
            return False
        if token.kind == "number":
            # 5 6 and x2 are not products; (2)3 is.
            before = self._tokens[self._at - 1]
            return before.kind == "sign" and before.text in (")", "]", "}")
        if token.kind == "sign":
            return token.text in ("(", "[", "{") or (token.text == "|" and self._bars == 0)
        return token.kind in ("letter", "initial", "bare") or (
            token.kind == "command" and (token.text in _STARTING)
        )

    def _factor(self) -> Term:
        term = self._base()
        for _ in range(_MOST_SUFFIXES):
            if self._take("^") or self._double_star():
                if self._take("circ") or self._circle_in_braces():
                    term = Term("degree", (term,))
                else:
                    term = Term("power", (term, self._exponent()))
            elif self._take("!"):
                term = Term("factorial", (term,))
            elif self._take("%"):
                term = Term("product", (term, number(Fraction(1, 100))))
            else:
                return term
        raise Unreadable("too many suffixes")

    def _double_star(self) -> bool:
        following = self._tokens[self._at : self._at + 2]
        if [(token.kind, token.text) for token in following] == [("sign", "*")] * 2:
            self._at += 2
            return True
        return False

    def _circle_in_braces(self) -> bool:
        texts = [t.text for t in self._tokens[self._at : self._at + 3]]
        if texts == ["{", "circ", "}"]:
            self._at += 3
            return True
        return False

    def _exponent(self) -> Term:
        sign = self._sign()
        exponent = self._group() if self._next_is("{", "(") else self._base()
        return Term("negative", (exponent,)) if sign is False else exponent

    def _group(self) -> Term:
        token = self.token
        if token is None or token.kind != "sign" or token.text not in _PAIRS:
            raise Unreadable("a group is missing")
        self._at += 1
        bars, self._bars = self._bars, 0
        term = self.sum()
        self._bars = bars
        self._expect(_PAIRS[token.text])
        return term

    def _argument(self) -> Term:
        """One argument of TeX: a group, or a single digit, letter or command."""
        token = self.token
        if token is not None and token.kind == "number" and len(token.text) > 1:
            if not token.text.isdigit() or len(token.text) > 2:
                raise Unreadable("digits without braces")
            self._tokens[self._at] = token._replace(text=token.text[1:])
            return number(int(token.text[0]))
        if self._next_is("{", "("):
            return self._group()
        return self._base()

    def _base(self) -> Term:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise Unreadable("too deep")
        term = self._bare_base()
        self._depth -= 1
        return term

    def _bare_base(self) -> Term:
        token = self.token
        if token is None:
            raise Unreadable("the end is not expected there")
        if token.kind == "sign" and token.text in _PAIRS:
            return self._group()
        self._at += 1
        if token.kind == "number":
            return Term("number", (fraction_of(token.text),))
        if token.kind in ("letter", "initial"):
            return self._symbol(token.text)
        if token.kind == "bare":
            return Term("product", tuple(self._symbol(letter) for letter in token.text))
        if token.kind == "sign" and token.text == "|":
            self._bars += 1
            term = self.sum()
            self._bars -= 1
            self._expect("|")
            return Term("abs", (term,))
        if token.kind == "command":
            return self._after(token.text)
        raise Unreadable(f"{token.text} is not expected there")

    def _after(self, command: str) -> Term:
        """The base that a command begins."""
        if command in _CONSTANTS:
            return Term("constant", (_CONSTANTS[command],))
        if command in GREEK:
            return self._symbol(command)
        if command in _ACCENTS or command == "mathbb":
            name = "".join(token.text for token in self._raw_group())
            return self._symbol(f"{command} {name}")
        if command == "frac":
            upper, lower = self._argument(), self._argument()
            term = Term("product", (upper, Term("inverse", (lower,))))
            plain = upper.operation == lower.operation == "number"
            return term._replace(operation="fraction") if plain else term
        if command == "binom":
            return Term("binomial", (self._argument(), self._argument()))
        if command in ("sqrt", "surd"):
            return self._root(command)
        if command in _CLOSING:
            closing, operation = _CLOSING[command]
            term = self.sum()
            self._expect(closing)
            return Term(operation, (term,))
        if command in FUNCTIONS:
            return self._function(command)
        raise Unreadable(f"\\{command} is not known")

    def _root(self, command: str) -> Term:
        degree = number(2)
        if command == "sqrt" and self._take("["):
            degree = self.sum()
            self._expect("]")
        token = self.token
        if command == "surd" and token is not None and token.kind == "number":
            radicand = self._base()
        else:
            radicand = self._argument()
        return Term("power", (radicand, Term("inverse", (degree,))))

    def _function(self, name: str) -> Term:
        base: Term = number(10)
        if name in ("log", "lg") and self._take("_"):
            base = self._argument()
        power = self._exponent() if self._take("^") else None
        if power == Term("negative", (number(1),)) and name in _INVERSES:
            name, power = _INVERSES[name], None
        argument = self._group() if self._next_is("(", "{", "[") else self._bare_argument()
        with_base = name in ("log", "lg")
        term = Term("log", (argument, base)) if with_base else Term(name, (argument,))
        return term if power is None else Term("power", (term, power))

    def _bare_argument(self) -> Term:
        r"""What a function without brackets applies to: \sin 2x y, up to another function."""
        sign = self._sign()
        parts = [self._factor()]
        while self._starts_factor() and not self._next_is(*FUNCTIONS, "(", "["):
            parts.append(self._factor())
        term = parts[0] if len(parts) == 1 else Term("product", tuple(parts))
        return Term("negative", (term,)) if sign is False else term

    def _symbol(self, name: str) -> Term:
        if self._take("_"):
            name += "_" + "".join(token.text for token in self._raw_group())
        while self._take("'", "prime"):
            name += "'"
        if name in ("e", "i"):
            return Term("constant", (name,))
        return Term("symbol", (name,))

    def _raw_group(self) -> list[Token]:
        """The tokens of one argument, for names and subscripts."""
        start = self._at
        if not self._take("{"):
            if self.token is None:
                raise Unreadable("the end is not expected there")
            self._at += 1
            return self._tokens[start : self._at]
        while self.token is not None and not self._next_is("{", "}"):
            self._at += 1
        self._expect("}")
        return self._tokens[start + 1 : self._at - 1]


_STARTING = FUNCTIONS | GREEK | _ACCENTS | _CONSTANTS.keys() | _CLOSING.keys() | {
    "frac", "binom", "sqrt", "surd", "mathbb"
}  # fmt: skip
_INVERSES = {name: "arc" + name for name in ("sin", "cos", "tan", "cot", "sec", "csc")}
