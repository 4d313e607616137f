"""How a setting is declared: the values it may have, and whether a resumed run may change it.

Both stand in the annotation of the setting, in the dataclass or the function that uses it:

    delta: Positive = 0.05
    device: Annotated[str, MayChange()] = "auto"

The recipe's schema is derived from these annotations (``config.derive``), and ``check`` holds a
dataclass that was made by hand against them. Standard library only, so that any room can use it.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number (greater than, at least, less than, at most), the least length of a text
    or list, and the pattern of a text; None: no such bound."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    min_length: int | None = None
    pattern: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        # pydantic asks annotations for this method by its name; nothing of it is needed here.
        bounds = {name: bound for name, bound in asdict(self).items() if bound is not None}
        return {**handler(source), **bounds}

    def refusal(self, value: Any) -> str | None:
        """What a number should be instead of ``value``; None where it lies inside."""
        for bound, holds, words in (
            (self.gt, lambda b: value > b, "above"),
            (self.ge, lambda b: value >= b, "of at least"),
            (self.lt, lambda b: value < b, "below"),
            (self.le, lambda b: value <= b, "of at most"),
        ):
            if bound is not None and not holds(bound):
                return f"give a number {words} {bound:g}"
        return None


def always(before: Any, after: Any) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class MayChange:
    """A run that is resumed may have another value of this setting, because it decides where and
    how the run computes and not what comes out (beyond the rounding of sums in another order).

    ``allows(before, after)`` tells whether it may change from the one value to the other.
    """

    allows: Callable[[Any, Any], bool] = always


Positive = Annotated[float, Range(gt=0)]
NotNegative = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]
Part = Annotated[float, Range(gt=0, le=1)]
Fraction = Annotated[float, Range(gt=0, lt=1)]
Count = Annotated[int, Range(ge=1)]
Whole = Annotated[int, Range(ge=0)]
Text = Annotated[str, Range(min_length=1)]


def check(settings: Any, where: str) -> None:
    """Hold the fields of a dataclass against the ranges and choices that their annotations declare.

    Raises: ValueError naming ``where`` and the first field at fault, with the mend.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        value = getattr(settings, field.name)
        refused = _refusal(hints[field.name], value)
        if refused is not None:
            raise ValueError(f"{where}.{field.name} {value!r}: {refused}")


def check_call(function: Callable[..., Any], options: Any, where: str) -> None:
    """The same for keyword arguments that ``function`` is to be called with. Arguments that its
    annotations do not declare are the caller's own matter."""
    hints = get_type_hints(function, include_extras=True)
    for name, value in options.items():
        refused = _refusal(hints[name], value) if name in hints else None
        if refused is not None:
            raise ValueError(f"{where}.{name} {value!r}: {refused}")


def _refusal(annotation: Any, value: Any) -> str | None:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *declared = arguments
        refused = _refusal(inner, value)
        if refused is not None or not isinstance(value, int | float):
            return refused
        ranges = (mark for mark in declared if isinstance(mark, Range))
        return next((r for mark in ranges if (r := mark.refusal(value)) is not None), None)
    if origin is Literal:
        choices = ", ".join(map(str, arguments))
        return None if value in arguments else f"choose one of {choices}"
    if origin in (Union, types.UnionType):
        refusals = [_refusal(each, value) for each in arguments]
        return None if None in refusals else refusals[0]
    if annotation in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and math.isfinite(value) else "give a finite number"
    if annotation is type(None):
        return None if value is None else "leave it out"
    return None
