"""Rewards for rows: two built in, and functions of TRL's signature.

A TRL reward is ``f(prompts, completions, **columns) -> list[float]``. Where the prompts are chats
(lists of messages), a completion is a list of one assistant message; else both are strings.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from satune.types import UserError

RewardFunction = Callable[..., Sequence[float]]

_NUMBER = r"[-+]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?"
_MARKED = re.compile(
    rf"(?:\\boxed\{{|####|answer(?: is)?\s*[:=]?)\s*\$?\s*({_NUMBER})", re.IGNORECASE
)
_ANY = re.compile(rf"(?<![\w.])({_NUMBER})(?!\w)")
_ANSWER = re.compile(r"(?:final )?answer(?: is)?\s*[:=]\s*(.*)", re.IGNORECASE)
_LONGEST = 300


def extract_exact(text: str) -> str | None:
    """What stands after the last "answer:" on its line, else the last line that is not blank."""
    marked = [found.strip() for found in _ANSWER.findall(text) if found.strip()]
    if marked:
        return marked[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def extract_numeric(text: str) -> str | None:
    r"""The last number marked as the answer (``\boxed{}``, ``####``, "answer is"), else the last
    number; commas between digits are dropped."""
    found = _MARKED.findall(text) or _ANY.findall(text)
    usable = [number for number in found if as_number(number) is not None]
    return usable[-1].replace(",", "") if usable else None


def as_number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal or fraction; None if it is no number."""
    plain = text.strip().strip("$").replace(",", "")
    if len(plain) > _LONGEST or not re.fullmatch(_NUMBER, plain) or re.search(r"/0+$", plain):
        return None
    upper, _, lower = plain.partition("/")
    return Fraction(upper) / int(lower or 1)


def same_number(a: str, b: str) -> bool:
    """Whether two numbers have the same value: 0.50 equals 1/2."""
    left, right = as_number(a), as_number(b)
    return left is not None and left == right


class FunctionReward:
    """A reward of TRL's signature, called for one completion at a time.

    ``lowest`` and ``highest`` are the range its values are rescaled from to [0, 1].
    ``needed`` names the columns it cannot do without.
    Raises UserError for an async function and for a parameter that is no column.
    """

    def __init__(
        self, name: str, function: RewardFunction, columns: Sequence[str], span: tuple[float, float]
    ) -> None:
        self.name = name
        self._function = function
        self._lowest, self._highest = span
        if inspect.iscoroutinefunction(function):
            raise UserError(f"reward {name}: it is async; give a plain function")
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

        Raises UserError if the function does not return one number, or one outside its range.
        """
        chat = isinstance(prompt, list)
        message = [{"role": "assistant", "content": completion}] if chat else completion
        given = {k: [v] for k, v in columns.items() if self._takes_any or k in self._named}
        result = self._function(prompts=[prompt], completions=[message], **given)
        if not isinstance(result, Sequence) or isinstance(result, str) or len(result) != 1:
            raise UserError(
                f"reward {self.name}: it returned {result!r} for one completion; "
                "return a list with one number for each"
            )
        value = result[0]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"reward {self.name}: its value is {value!r}; return a finite number")
        if not self._lowest <= value <= self._highest:
            raise UserError(
                f"reward {self.name}: its value {value} lies outside "
                f"[{self._lowest:g}, {self._highest:g}]; set reward_range: [lowest, highest]"
            )
        return (value - self._lowest) / (self._highest - self._lowest)
