"""YAML as recipes use it: the core schema of YAML 1.2, and no key twice.

PyYAML follows YAML 1.1, in which ``1e-5`` is a text, ``no`` is false and ``12:30`` is 750.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

LARGEST = 100_000
"""Values that a recipe may have, each counted as often as an alias repeats it."""
_DIGITS = 1000

_SCALARS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own way to hold them

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key '{key.value}' stands here a second time",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # YAML 1.1 reads 010 as octal.
        digits = self.construct_scalar(node)
        if len(digits) > _DIGITS:
            raise yaml.MarkedYAMLError(
                problem=f"an integer of more than {_DIGITS} digits", problem_mark=node.start_mark
            )
        return int(digits)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would read as something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), _first)


def parse(text: str) -> Any:
    """The data in ``text``. Raises ``yaml.YAMLError``, also for a text that nests too deeply, or
    whose aliases stand for more than ``LARGEST`` values."""
    loader = _Loader(text)  # a SafeLoader: builds plain data only
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > LARGEST:
            raise yaml.MarkedYAMLError(
                problem=f"its aliases stand for more than {LARGEST:,} values",
                problem_mark=node.start_mark,
            )
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values the node stands for once each alias is written out."""
    if id(node) not in known:
        known[id(node)] = LARGEST + 1  # met again inside itself, it would have no end
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_values(part, known) for part in inner)
    return known[id(node)]


def dump(data: Any) -> str:
    """``data`` as YAML that ``parse`` reads back equal, keys in their own order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
