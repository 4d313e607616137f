"""What fits a typed dict, and where something does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from satune.files.shapes import misfit


class Inner(TypedDict):
    size: float
    note: NotRequired[str]


class Outer(TypedDict):
    kind: Literal["a", "b"]
    count: int
    on: bool
    inner: Inner
    many: list[Inner]
    by_name: dict[str, int]
    pair: tuple[float, float | None]
    span: Sequence[float] | None
    anything: NotRequired[Any]


WHOLE: dict[str, Any] = {
    "kind": "a", "count": 1, "on": True, "inner": {"size": 1}, "many": [{"size": 0.5, "note": "x"}],
    "by_name": {"x": 1}, "pair": [1.0, None], "span": [0.0, "inf"], "unknown": object(),
}  # fmt: skip


def test_what_fits() -> None:
    assert misfit(WHOLE, Outer) is None
    assert misfit(WHOLE | {"span": None, "anything": [{}]}, Outer) is None


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"kind": "c"}, "kind"),
        ({"count": 1.0}, "count"),
        ({"count": True}, "count"),
        ({"count": 10**400}, "count"),
        ({"inner": {"size": -(10**400)}}, "inner.size"),
        ({"on": 1}, "on"),
        ({"inner": {}}, "inner.size"),
        ({"inner": {"size": "1"}}, "inner.size"),
        ({"inner": {"size": True}}, "inner.size"),
        ({"inner": {"size": 1, "note": None}}, "inner.note"),
        ({"inner": [1]}, "inner"),
        ({"many": {}}, "many"),
        ({"many": [{"size": 1}, {"size": None}]}, "many.1.size"),
        ({"by_name": {"x": 1, "y": None}}, "by_name.y"),
        ({"by_name": []}, "by_name"),
        ({"pair": [1.0]}, "pair"),
        ({"pair": [None, None]}, "pair.0"),
        ({"span": [1.0, "many"]}, "span.1"),
        ({"span": "inf"}, "span"),
    ],
)
def test_where_something_does_not(change: dict[str, Any], place: str) -> None:
    assert misfit(WHOLE | change, Outer) == place


@pytest.mark.parametrize("missing", [key for key in WHOLE if key != "unknown"])
def test_what_is_missing(missing: str) -> None:
    assert misfit({k: v for k, v in WHOLE.items() if k != missing}, Outer) == missing


@pytest.mark.parametrize("value", [None, [], "x", 1])
def test_no_object_at_all(value: Any) -> None:
    assert misfit(value, Outer) == ""
