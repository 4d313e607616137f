"""Sections of the recipe, derived from the settings of the room that uses them.

A dataclass gives a section with its fields; a catalogue (name to class or function) gives one
section a name, with what that takes as its keys. Types, ranges and defaults are read from the
annotations, so that each stands in one place. What is validated becomes the dataclass itself:

    trust_region: Annotated[TrustRegionSettings, Derived()] = TrustRegionSettings()
    schedule: Annotated[Named, Choice(SCHEDULES, "hybrid")] = Field("hybrid", validate_default=True)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from satune.ranges import MayChange, Text

OWN = "path/to/file.py:name"
"""How the choices of an error line, and pydantic's locations, call what is the user's own."""


class Section(BaseModel):
    """A part of the recipe: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class OpenSection(Section):
    """A section whose further keys are options of what ``name`` names."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside the section's own, to be passed on as keyword arguments."""
        return dict(self.model_extra or {})


@dataclass(frozen=True, slots=True)
class Named:
    """An entry of a catalogue, or the user's own, and its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def listed(value: Any) -> Any:
    """YAML's lists as tuples, and a text alone as a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if type(value) is list else value


def keys_of(thing: Callable[..., Any], skip: int = 0) -> dict[str, tuple[Any, Any]]:
    """(type, default) of what a class or function takes beyond its first ``skip`` parameters; the
    default is ``...`` where there is none."""
    hints = get_type_hints(thing, include_extras=True)
    found = {}
    for parameter in list(inspect.signature(thing).parameters.values())[skip:]:
        hint = hints[parameter.name]
        if get_origin(_plain(hint)) is tuple:
            hint = Annotated[hint, BeforeValidator(listed)]
        empty = parameter.default is parameter.empty
        found[parameter.name] = (hint, ... if empty else parameter.default)
    return found


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


@cache
def section_of(settings: type) -> type[Section]:
    """The section with the fields of a dataclass as its keys."""
    keys: dict[str, Any] = keys_of(settings)
    return create_model(settings.__name__, __base__=Section, __doc__=settings.__doc__, **keys)


@dataclass(frozen=True)
class Derived:
    """Marks a field of the recipe that is a dataclass: its keys are the dataclass's fields."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        model = section_of(source)

        def made(value: Any, validate: Callable[[Any], Any]) -> Any:
            if isinstance(value, source):
                return value
            section = validate(value)
            return source(**{name: getattr(section, name) for name in model.model_fields})

        return core_schema.no_info_wrap_validator_function(
            made,
            handler.generate_schema(model),
            serialization=core_schema.plain_serializer_function_ser_schema(asdict),
        )


@dataclass(frozen=True, eq=False)
class Written:
    """Marks a field of the recipe that stands there as a text: ``read`` gives what it means (or
    raises UserError), and ``str`` of that is what is saved."""

    read: Callable[[str], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        def made(value: Any, validate: Callable[[Any], Any]) -> Any:
            already = isinstance(value, source) and not isinstance(value, str)
            return value if already else self.read(validate(value))

        return core_schema.no_info_wrap_validator_function(
            made,
            handler.generate_schema(Text),
            serialization=core_schema.plain_serializer_function_ser_schema(str),
        )


@dataclass(frozen=True, eq=False)
class Choice:
    """Marks a field of the recipe that names an entry of ``catalogue``, alone or with options.

    ``skip`` arguments of a function in it are not options. What comes out is ``make(name=...,
    options=..., **common)``; ``common`` are names of fields of ``make`` that every entry has beside
    its options. The options of a user's own are checked when it is loaded.
    """

    catalogue: Mapping[str, Callable[..., Any]]
    default: str
    skip: int = 0
    make: type = Named
    common: tuple[str, ...] = ()

    def sections(self) -> dict[str, type[Section]]:
        """The section of each name, and of the user's own."""
        made = keys_of(self.make)
        common: dict[str, Any] = {name: made[name] for name in self.common}
        sections: dict[str, type[Section]] = {}
        for name, thing in self.catalogue.items():
            tag: Any = Literal[name]  # type: ignore[valid-type]
            keys: dict[str, Any] = keys_of(thing, 0 if inspect.isclass(thing) else self.skip)
            sections[name] = create_model(
                name, __base__=Section, __doc__=thing.__doc__, name=(tag, name), **keys, **common
            )
        sections[OWN] = create_model("own", __base__=OpenSection, name=(Text, ...), **common)
        return sections

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        def tag(value: Any) -> str:
            name = value.get("name") if isinstance(value, dict) else self.default
            return OWN if isinstance(name, str) and ":" in name else str(name)

        def made(value: Any, validate: Callable[[Any], Any]) -> Any:
            if isinstance(value, self.make):
                return value
            if isinstance(value, str):
                value = {"name": value}
            elif isinstance(value, dict):
                # Without a name the keys are those of the default.
                value = {"name": self.default, **value}
            section = validate(value)
            given = {key: getattr(section, key) for key in type(section).model_fields}
            given |= section.model_extra or {}
            own = {key: given.pop(key) for key in ("name", *self.common)}
            return self.make(**own, options=given)

        def written(value: Any) -> dict[str, Any]:
            common = {name: getattr(value, name) for name in self.common}
            return {"name": value.name, **value.options, **common}

        return core_schema.no_info_wrap_validator_function(
            made,
            core_schema.tagged_union_schema(
                {name: handler.generate_schema(s) for name, s in self.sections().items()}, tag
            ),
            serialization=core_schema.plain_serializer_function_ser_schema(written),
        )


# Looking at a schema


def models_in(annotation: Any, metadata: tuple[Any, ...] = ()) -> list[tuple[str, type[BaseModel]]]:
    """The sections that a value of this type is read as, each with its tag in pydantic's locations
    ("" where there is but one). A mapping or a scalar is read as none."""
    for mark in metadata:
        if isinstance(mark, Choice):
            return list(mark.sections().items())
        if isinstance(mark, Derived):
            return [("", section_of(annotation))]
        if isinstance(mark, Written):
            return []
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [("", annotation)]
    if isinstance(annotation, type) and is_dataclass(annotation):
        return [("", section_of(annotation))]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return models_in(arguments[0], arguments[1:])
    if origin in (dict, tuple, Literal):
        return []
    return [found for argument in arguments for found in models_in(argument)]


def sections_of(info: FieldInfo) -> list[tuple[str, type[BaseModel]]]:
    """``models_in`` of a field."""
    return models_in(info.annotation, tuple(info.metadata))


def may_change(model: type[BaseModel], at: str = "") -> Iterator[tuple[str, MayChange]]:
    """The dotted keys that a resumed run may have changed, in the recipe's order; NAME stands for
    every key of a mapping. A section that may change is given once, for all of its keys."""
    for name, info in model.model_fields.items():
        key = f"{at}.{name}" if at else name
        mark = next((m for m in info.metadata if isinstance(m, MayChange)), None)
        if mark is not None:
            yield key, mark
        elif get_origin(info.annotation) is dict:
            for _, inner in models_in(get_args(info.annotation)[1]):
                yield from may_change(inner, f"{key}.NAME")
        else:
            found = dict.fromkeys(
                pair for _, inner in sections_of(info) for pair in may_change(inner, key)
            )
            yield from found
