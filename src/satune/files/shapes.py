"""Whether plain values, from a file that anybody may have written, have a typed dict's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

Check = Callable[[Any], str | None]
"""The place at which a value does not fit, None that it fits."""


_LARGEST = 1 << 53


def misfit(value: Any, shape: Any) -> str | None:
    """The first key, dotted, at which ``value`` is not what ``shape`` says; "" is the value itself,
    None that it fits.

    ``shape`` is a typed dict, or what the fields of one are made of: plain types, None, unions,
    literals, lists, tuples, sequences and mappings of them. Keys that it does not name are let
    through. A float may be an int, and one of the texts "inf", "-inf" and "nan"; an int is one that
    a float holds exactly.
    """
    return _check(shape)(value)


@cache
def _check(shape: Any) -> Check:
    if shape is Any:
        return lambda value: None
    if is_typeddict(shape):
        return _fields(shape)
    origin, arguments = get_origin(shape) or shape, get_args(shape)
    if origin is NotRequired:
        return _check(arguments[0])
    if origin in (Union, UnionType):
        return _one_of([_check(each) for each in arguments])
    if origin is Literal:
        return lambda value: None if value in arguments else ""
    if origin in (dict, Mapping):
        return _mapping(_check(arguments[1] if arguments else Any))
    if origin is tuple and Ellipsis not in arguments:
        return _tuple([_check(each) for each in arguments])
    if origin in (list, tuple, Sequence):
        return _list(_check(arguments[0] if arguments else Any))
    return _plain(origin)


def _fields(shape: Any) -> Check:
    hints = get_type_hints(shape, include_extras=True)
    checks = [(key, _check(hint), get_origin(hint) is NotRequired) for key, hint in hints.items()]

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return ""
        for key, inner, optional in checks:
            if key in value:
                place = inner(value[key])
                if place is not None:
                    return f"{key}.{place}".rstrip(".")
            elif not optional:
                return key
        return None

    return check


def _one_of(checks: Sequence[Check]) -> Check:
    def check(value: Any) -> str | None:
        deepest = ""
        for inner in checks:
            place = inner(value)
            if place is None:
                return None
            deepest = max(deepest, place, key=len)
        return deepest

    return check


def _mapping(inner: Check) -> Check:
    return lambda value: _first(value.items(), inner) if isinstance(value, dict) else ""


def _list(inner: Check) -> Check:
    return lambda value: _first(enumerate(value), inner) if isinstance(value, list) else ""


def _tuple(checks: Sequence[Check]) -> Check:
    def check(value: Any) -> str | None:
        if not isinstance(value, list) or len(value) != len(checks):
            return ""
        for at, (inner, one) in enumerate(zip(value, checks, strict=True)):
            place = one(inner)
            if place is not None:
                return f"{at}.{place}".rstrip(".")
        return None

    return check


def _first(items: Iterable[tuple[Any, Any]], check: Check) -> str | None:
    for key, inner in items:
        place = check(inner)
        if place is not None:
            return f"{key}.{place}".rstrip(".")
    return None


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= _LARGEST


def _plain(kind: Any) -> Check:
    if kind in (None, NoneType):
        return lambda value: None if value is None else ""
    if kind is int:
        return lambda value: None if _is_whole(value) else ""
    if kind is float:
        return lambda value: (
            None
            if type(value) is float or value in ("inf", "-inf", "nan") or _is_whole(value)
            else ""
        )
    return lambda value: None if type(value) is kind else ""
