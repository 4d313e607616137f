"""Rewards for rows: two built in, and functions of TRL's signature.

A TRL reward is ``f(prompts, completions, **columns) -> list[float]``, or a coroutine function that
returns such a list. Where the prompts are chats (lists of messages), a completion is a list of one
assistant message; else both are strings.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import re
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from numbers import Rational, Real
from typing import Any

from satune.types import UserError

RewardFunction = Callable[..., Any]

# Every repeat is possessive and no two neighbours share a character, so that no character of a text
# is gone over more than a few times.
_NUMBER = r"[-+]?(?:[0-9]++(?:,[0-9]++)*+(?:\.[0-9]++)?|\.[0-9]++)(?:/[0-9]++)?"
_MARKED = re.compile(
    rf"(?:\\boxed\s*+\{{?+|####|answer(?: is)?\s*+[:=]?)(?:[\s$*_`]|\\[$(\[])*+({_NUMBER})",
    re.IGNORECASE,
)
# A number that a letter follows ("3x") is none; it is taken whole, so that its rest is none either.
_ANY = re.compile(rf"(?<![\w.])({_NUMBER})(\w?)")
_ANSWER = re.compile(r"(?:final )?answer(?: is)?\s*+[:=]\s*+(.*)", re.IGNORECASE)
_PLAIN_NUMBER = re.compile(_NUMBER)
_FINAL = "####"
_LONGEST = 300
# Signs for minus, and the full width forms of what numbers are made of.
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"),
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        "\uff0b": "+", "\uff0c": ",", "\uff0e": ".", "\uff0f": "/", "\u2044": "/",
    }
)  # fmt: skip


def extract_exact(text: str) -> str | None:
    """What stands after the last "answer:" on its line, else the last line that is not blank,
    "#### " before it left out."""
    marked = [found.strip() for found in _ANSWER.findall(text) if found.strip()]
    if marked:
        return marked[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1].removeprefix(_FINAL).strip() or lines[-1]) if lines else None


def extract_numeric(text: str) -> str | None:
    r"""The last number marked as the answer (``\boxed{}``, ``####``, "answer is"), else the last
    number; commas between digits are dropped, signs written in ASCII."""
    plain = text.translate(_SIGNS)
    found = _MARKED.findall(plain) or [n for n, glued in _ANY.findall(plain) if not glued]
    usable = (number for number in reversed(found) if as_number(number) is not None)
    number = next(usable, None)
    return None if number is None else number.replace(",", "")


def reference(answer: str) -> str:
    """The final answer in a reference that is a worked solution and ends with ``#### ANSWER``, as
    those of GSM8K do; any other reference as it is."""
    solution, _, rest = answer.rpartition(_FINAL)
    final = rest.strip()
    return final if solution.strip() and final and "\n" not in final else answer


def as_number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal or fraction; None if it is no number."""
    plain = text.strip().strip("$").replace(",", "").translate(_SIGNS)
    if len(plain) > _LONGEST or not _PLAIN_NUMBER.fullmatch(plain):
        return None
    upper, _, lower = plain.partition("/")
    return Fraction(upper) / int(lower or 1) if lower.strip("0") or not lower else None


def same_number(a: str, b: str) -> bool:
    """Whether two numbers have the same value: 0.50 equals 1/2."""
    left, right = as_number(a), as_number(b)
    return left is not None and left == right


class FunctionReward:
    """A reward of TRL's signature, called for one completion at a time.

    ``lowest`` and ``highest`` are the range its values are rescaled from to [0, 1].
    ``needed`` names the columns it cannot do without.
    Raises UserError for a parameter that is no column.
    """

    def __init__(
        self, name: str, function: RewardFunction, columns: Sequence[str], span: tuple[float, float]
    ) -> None:
        self.name = name
        self._function = function
        self._lowest, self._highest = span
        parameters = inspect.signature(function).parameters.values()
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._named = {p.name for p in parameters}
        self.needed = tuple(
            p.name
            for p in parameters
            if p.default is p.empty
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and p.name not in ("prompts", "completions")
        )
        for column in self.needed:
            if column not in columns:
                raise UserError(
                    f"reward {name}: it asks for {column!r}; the rows have {', '.join(columns)}"
                )

    def __call__(self, prompt: Any, completion: str, columns: Mapping[str, Any]) -> float:
        """The reward in [0, 1]. ``prompt`` is a string or a list of messages.

        The function may return a list, tuple, array or tensor of one number, which may be Python's
        (Fraction and Decimal included), numpy's or a tensor. What it returns is awaited if it can
        be, in an event loop that all rewards of the process share.
        Raises UserError if it does not return one number, or one outside its range.
        """
        chat = isinstance(prompt, list)
        message = [{"role": "assistant", "content": completion}] if chat else completion
        given = {k: [v] for k, v in columns.items() if self._takes_any or k in self._named}
        returned = self._function(prompts=[prompt], completions=[message], **given)
        if inspect.isawaitable(returned):
            returned = _awaited(returned)
        # Arrays and tensors give what they hold as Python's own lists and numbers.
        result = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(result, (list, tuple)) or len(result) != 1:
            raise UserError(
                f"reward {self.name}: it returned {_short(returned)} for one completion; "
                "return a list with one number for each"
            )
        value = result[0].tolist() if hasattr(result[0], "tolist") else result[0]
        number = _number(value)
        if number is None:
            raise UserError(
                f"reward {self.name}: its value is {_short(value)}; return a finite number"
            )
        if not self._lowest <= number <= self._highest:
            raise UserError(
                f"reward {self.name}: its value {_short(value)} lies outside "
                f"[{self._lowest:g}, {self._highest:g}]; set reward_range: [lowest, highest]"
            )
        return (float(number) - self._lowest) / (self._highest - self._lowest)


def _number(value: object) -> float | Fraction | Decimal | None:
    """A finite number, exact where it is (a Fraction may be beyond what a float holds); else
    None."""
    if isinstance(value, Decimal):
        return value if value.is_finite() else None
    if isinstance(value, Rational):
        return Fraction(value)
    if isinstance(value, Real) and math.isfinite(number := float(value)):
        return number
    return None


def _short(value: object) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """A loop of its own thread, started when first needed: grading may itself stand in a loop, and
    what a reward keeps open between calls (a connection) belongs to one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="satune-rewards", daemon=True).start()
    return loop


def _awaited(awaitable: Awaitable[Any]) -> Any:
    async def whole() -> Any:
        return await awaitable

    return asyncio.run_coroutine_threadsafe(whole(), _loop()).result()
