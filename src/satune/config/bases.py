"""Recipe files that build on another: ``base: sat.yaml`` in a file names the recipe it changes.

A file's own keys go over its base's, mapping by mapping, so that a row of a table is its models and
its figures and not a copy of everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from satune.loading import nearest
from satune.types import UserError

NAMED = ("task", "protocol", "schedule", "order", "objective", "credit", "engine")
"""Sections that may be given by their name alone."""

Layer = tuple[Path, dict[str, Any]]
"""A file and the keys that stand in it."""


def read_layers(path: Path, read: Callable[[Path], dict[str, Any]]) -> list[Layer]:
    """The file at ``path`` and the bases it builds on, itself first; ``base`` is taken out of each.

    A base is sought beside the file that names it, wherever satune is started. Raises UserError
    naming that file for a base that is no text, that is not there, or that leads back to itself.
    """
    layers: list[Layer] = []
    while True:
        keys = read(path)
        layers.append((path, keys))
        if "base" not in keys:
            return layers
        base = keys.pop("base")
        if not isinstance(base, str) or not base:
            raise UserError(f"{path}: base: expected one recipe's file, got {base!r}")
        below = path.parent / base
        if not below.is_file():
            there = [item.name for item in below.parent.glob("*.yaml")]
            near = nearest(below.name, sorted(there))
            mend = f"did you mean {Path(base).with_name(near)}?" if near else "mend the path"
            raise UserError(f"{path}: base: no such file: {below}; {mend}")
        if any(below.samefile(above) for above, _ in layers):
            raise UserError(f"{path}: base: {base} builds on this file itself; remove one base key")
        path = below


def merge(layers: list[Layer]) -> dict[str, Any]:
    """The keys of all layers, the first over the second and so on."""
    *above, (_, merged) = layers
    for _, keys in reversed(above):
        merged = _over(keys, merged, named=True)
    return merged


def _over(keys: dict[str, Any], base: dict[str, Any], *, named: bool = False) -> dict[str, Any]:
    merged = dict(base)
    for key, value in keys.items():
        below = base.get(key)
        if named and key in NAMED:
            value, below = _long(value), _long(below)
            # Options belong to what the name names.
            if isinstance(value, dict) and isinstance(below, dict) and _renames(value, below):
                below = None
        if value is None and key in base:
            del merged[key]
        elif isinstance(value, dict) and isinstance(below, dict):
            merged[key] = _over(value, below)
        else:
            merged[key] = value
    return merged


def _long(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _renames(value: dict[str, Any], below: dict[str, Any]) -> bool:
    return "name" in value and value["name"] != below.get("name")


def origin(layers: list[Layer], key: str) -> Path:
    """The file in which ``key`` (dotted) stands, or most of the way to it; the first if several."""

    def depth(keys: Any) -> int:
        steps = 0
        for name in key.replace("[", ".[").split("."):
            if not isinstance(keys, dict) or name not in keys:
                break
            keys, steps = keys[name], steps + 1
        return steps

    return max(layers, key=lambda layer: depth(layer[1]))[0]
