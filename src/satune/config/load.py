"""Reading and writing recipes. Whatever is wrong with one is said in one line.

    recipe = load_recipe("recipes/relay.yaml", ["seed=3", "rollout.problems=32"])

Paths inside a recipe are relative to the working directory, like those on the command line; only
``base`` is relative to the file that names it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from satune.config import yaml12
from satune.config.bases import NAMED, merge, origin, read_layers
from satune.config.checks import STILL_OR_FREE, Fault, faults, no_such
from satune.config.derive import models_in, sections_of
from satune.config.schema import Recipe
from satune.files.writing import write_atomically
from satune.loading import nearest
from satune.types import UserError


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, alone: bool = False) -> Recipe:
    """The recipe in the file ``path``, over its base if it names one, with ``overrides``
    ("dotted.key=value", YAML) applied.

    A template given as a file is read, so that the recipe stands by itself; one that is ``alone``,
    as a run keeps it, names neither that nor a base. Raises ``UserError``,
    one line, for a file that is missing or damaged, a key that is not known or has the wrong
    type, and keys that do not go together. Several faults: the first, and how many more.
    """
    layers = read_layers(Path(path), _read_alone if alone else _read)
    data = merge(layers)
    overridden = [override(data, text) for text in overrides]

    def refuse(found: list[Fault]) -> UserError:
        key, message = found[0]
        ours = any(f"{key}.".startswith(f"{o}.") or o.startswith(f"{key}.") for o in overridden)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        where = "command line" if ours else str(origin(layers, key))
        return UserError(_one_line(f"{where}: {key}: {message}{more}"))

    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        # A misspelt key is often the reason why another one is missing.
        errors = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        raise refuse(_joined([_fault(item) for item in errors])) from None
    recipe = _with_templates(recipe, overridden if alone else None)
    found = faults(recipe)
    if found:
        raise refuse(found)
    return recipe


def recipe_text(recipe: Recipe) -> str:
    """The effective recipe as YAML, every default written out."""
    return yaml12.dump(recipe.model_dump(mode="json"))


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the effective recipe so that ``load_recipe`` gives an equal one.

    Raises ``UserError`` if the disk is full or the place cannot be written.
    """
    write_atomically(path, recipe_text(recipe))


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ, in the recipe's order."""
    return _differences(ours.model_dump(mode="json"), theirs.model_dump(mode="json"), "")


def _differences(ours: Any, theirs: Any, at: str) -> list[str]:
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [at]
    return [
        path
        for key in [*ours, *(key for key in theirs if key not in ours)]
        for path in _differences(ours.get(key), theirs.get(key), f"{at}.{key}" if at else str(key))
    ]


# Reading


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give the YAML file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file{_nearest_file(path)}")
    try:
        data = yaml12.parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(_one_line(f"{path}{_damage(error)}; mend the YAML there")) from None
    if data is None:
        raise UserError(f"{path}: is empty; a recipe needs at least team, task and protocol")
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys such as team, task and protocol, got {_show(data)}")
    return data


def _read_alone(path: Path) -> dict[str, Any]:
    data = _read(path)
    if "base" in data:
        raise UserError(f"{path}: base: a run's recipe stands by itself; remove the key")
    return data


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist either"
    near = nearest(path.name, sorted(item.name for item in folder.iterdir() if item.is_file()))
    return f"; did you mean {folder / near}?" if near else f"; nothing in {folder} is named like it"


def _damage(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f", line {mark.line + 1}: {problem}" if mark else f": {problem}"


def override(data: dict[str, Any], text: str) -> str:
    """Apply one override to ``data`` in place and give its dotted key."""
    dotted, equals, written = text.partition("=")
    dotted = dotted.strip()
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise UserError(
            _one_line(f"command line: '{text}' is not an override; write it as dotted.key=value")
        )
    try:
        value = yaml12.parse(written)
    except yaml.YAMLError as error:
        raise UserError(
            _one_line(f"command line: {dotted}: '{written}' is not YAML{_damage(error)}; quote it")
        ) from None
    if dotted == "base":
        raise UserError("command line: base: only a file builds on another; override its keys")
    place: Any = data
    for depth, key in enumerate(keys[:-1]):
        inner = place.get(key)
        if inner is None:
            if keys[:depth] == ["team", "agents"] and place and key not in place:
                # Most likely a slip; and an agent of one key would lack all others.
                agent = ".".join(keys[: depth + 1])
                raise UserError(
                    _one_line(
                        f"command line: {dotted}: {no_such('agent', key, place)} (a new agent is "
                        f"given whole: {agent}={{model: ...}})"
                    )
                )
            inner = {}
        elif isinstance(inner, str) and depth == 0 and key in NAMED:
            inner = {"name": inner}
        elif not isinstance(inner, dict):
            at = ".".join(keys[: depth + 1])
            raise UserError(
                _one_line(f"command line: {dotted}: {at} is {_show(inner)} and has no keys")
            )
        # A copy: what has the same by an alias (second: *first) keeps it as it is.
        place[key] = place = dict(inner)
    place[keys[-1]] = value
    return dotted


def _with_templates(recipe: Recipe, own: Sequence[str] | None) -> Recipe:
    """The recipe with the templates that it names as files; of those only the keys ``own``, if that
    is given."""
    agents = {}
    for name, agent in recipe.team.agents.items():
        chat = agent.template.chat
        if chat is not None and "{" not in chat:
            file = Path(chat)
            where = f"team.agents.{name}.template.chat"
            if (own is not None and where not in own) or not file.is_file():
                raise UserError(
                    _one_line(f"{where}: '{chat}' is neither a Jinja template nor a file")
                )
            chat = file.read_text(encoding="utf-8")
            if "{" not in chat:
                raise UserError(f"{where}: the file {file} holds no Jinja template")
            template = replace(agent.template, chat=chat)
            agent = agent.model_copy(update={"template": template})
        agents[name] = agent
    team = recipe.team.model_copy(update={"agents": agents})
    return recipe.model_copy(update={"team": team})


# Wording of pydantic's errors


def _joined(found: list[Fault]) -> list[Fault]:
    """One fault a key: of a value that may be one thing or another, pydantic tells of each."""
    by_key: dict[str, str] = {}
    for key, message in found:
        said = by_key.get(key)
        other = re.match(r"expected (.*), got ", message)
        if said is None:
            by_key[key] = message
        elif other and said.startswith("expected "):
            by_key[key] = said.replace(", got ", f" or {other[1]}, got ", 1)
    return list(by_key.items())


def _fault(error: Any) -> Fault:
    keys, known = _place(error["loc"])
    path = ".".join(keys).replace(".[", "[")
    kind, given, context = error["type"], error.get("input"), error.get("ctx", {})
    if kind == "extra_forbidden" and path in _RENAMED:
        return path, f"is {_RENAMED[path]} now"
    if kind == "extra_forbidden":
        near = nearest(keys[-1], known)
        inside = ".".join(keys[:-1])
        mend = (
            f"did you mean {f'{inside}.' if inside else ''}{near}?"
            if near
            else f"the keys here are {', '.join(known)}"
        )
        return path, f"unknown key; {mend}"
    if kind == "missing":
        return path, "is needed and not given"
    if kind == "literal_error":
        return path, _choice(given, context["expected"].replace(" or ", ", "))
    if kind == "union_tag_invalid":
        return f"{path}.name", _choice(context["tag"], context["expected_tags"])
    if kind == "value_error":
        return path, str(context["error"])
    expected = _EXPECTED.get(kind)
    if expected is None:
        return path, f"{error['msg'].lower()}, got {_show(given)}"
    mend = _MENDS.get(path, "") if kind == "greater_than" else ""
    return path, f"expected {expected.format(**context)}, got {_show(given)}{mend}"


_RENAMED = {"log.tensorboard": "log.report_to: [tensorboard]"}
"""Keys of earlier versions, which recipes of runs may still have."""
_MENDS = {"trust_region.delta": f"; {STILL_OR_FREE}"}
_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_pattern_mismatch": "a name of letters, digits, '-' and '_'",
    "string_too_short": "a text that is not empty",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "tuple_type": "a list",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
}


def _choice(given: Any, expected: str) -> str:
    names = [name.strip(" '") for name in expected.split(",")]
    near = nearest(given, names) if isinstance(given, str) else None
    mend = f"; did you mean '{near}'?" if near else ""
    choices = names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    return f"expected {choices}, got {_show(given)}{mend}"


def _show(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"keys ({', '.join(map(str, value))})" if value else "nothing"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _place(location: Sequence[int | str]) -> tuple[list[str], list[str]]:
    """The dotted key of a pydantic location, and the keys known where it ends.

    Pydantic puts the tag of a union, the member that was tried and the marker of a dictionary's key
    into the location; a person's recipe has none of them.
    """
    models: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    values: Any = None  # of a mapping, the type of its values
    keys: list[str] = []
    known: list[str] = []
    info: FieldInfo | None = None
    for element in location:
        if element == "[key]":
            continue
        if info is not None and any(get_origin(a) is Literal for a in get_args(info.annotation)):
            continue  # of a setting that is a name or a number, what it was read as
        tagged = dict(models)
        if element in tagged and "" not in tagged:
            models = [("", tagged[element])]  # type: ignore[index]
            continue
        info = None
        if len(models) == 1 and isinstance(element, str):
            fields = models[0][1].model_fields
            known, info = list(fields), fields.get(element)
        inner, values = values, None
        if info is not None:
            models = sections_of(info)
            if get_origin(info.annotation) is dict:
                values = get_args(info.annotation)[1]
        else:
            models = models_in(inner)
        keys.append(f"[{element}]" if isinstance(element, int) and keys else str(element))
    return keys, known
