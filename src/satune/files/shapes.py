"""Whether plain values, from a file that anybody may have written, have a typed dict's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def misfit(value: Any, shape: Any) -> str | None:
    """The first key, dotted, at which ``value`` is not what ``shape`` says; "" is the value itself,
    None that it fits.

    ``shape`` is a typed dict, or what the fields of one are made of: plain types, None, unions,
    literals, lists, tuples, sequences and mappings of them. Keys that it does not name are let
    through. A float may be an int, and one of the texts "inf", "-inf" and "nan".
    """
    if shape is Any:
        return None
    if is_typeddict(shape):
        return _misfit_of_fields(value, shape)
    origin, arguments = get_origin(shape) or shape, get_args(shape)
    if origin is NotRequired:
        return misfit(value, arguments[0])
    if origin in (Union, UnionType):
        places = [misfit(value, each) for each in arguments]
        return None if None in places else max(map(str, places), key=len)
    if origin is Literal:
        return None if value in arguments else ""
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            return ""
        of_values = arguments[1] if arguments else Any
        return _first((str(key), misfit(inner, of_values)) for key, inner in value.items())
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list):
            return ""
        if origin is tuple and Ellipsis not in arguments:
            if len(value) != len(arguments):
                return ""
            pairs = zip(value, arguments, strict=True)
        else:
            pairs = ((inner, arguments[0] if arguments else Any) for inner in value)
        return _first((str(at), misfit(*pair)) for at, pair in enumerate(pairs))
    return None if _is_plain(value, origin) else ""


def _misfit_of_fields(value: Any, shape: Any) -> str | None:
    if not isinstance(value, dict):
        return ""
    hints = _hints(shape)
    for key, hint in hints.items():
        if key not in value and get_origin(hint) is not NotRequired:
            return key
    return _first((key, misfit(value[key], hints[key])) for key in hints if key in value)


@cache
def _hints(shape: Any) -> dict[str, Any]:
    return get_type_hints(shape, include_extras=True)


def _first(places: Any) -> str | None:
    return next((f"{k}.{place}".rstrip(".") for k, place in places if place is not None), None)


def _is_plain(value: Any, kind: Any) -> bool:
    if kind in (None, NoneType):
        return value is None
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) or value in ("inf", "-inf", "nan")
    return isinstance(value, kind)
