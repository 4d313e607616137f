"""What a user names in a recipe: objects as ``path/to/file.py:name`` or ``package.module:name``,
models at a server as ``http://ADDRESS/v1#MODEL``, agents at their owner as ``host:URL``.

Standard library only.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import SplitResult, urlsplit

from satune.types import ServedModel, UserError

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable that holds a server's key where no other is named."""
HOST_VARIABLE = "SATUNE_HOST_TOKEN"
"""The environment variable that holds the token of an agent's host where no other is named."""
LAUNCH_VARIABLE = "SATUNE_LAUNCH_TOKEN"
"""The environment variable that holds the token of hosts that ``satune launch`` starts, and of no
others."""


def model_in(text: str) -> str | ServedModel:
    """The model that ``text`` names: one at a server by its address and its name there, any other
    (a directory, a file, a hub id) as it is written.

    Raises UserError where a part is missing, and for an address that holds more.
    """
    parts = _server(text)
    if parts is None:
        return text
    address, _, name = text.partition("#")
    # None of it is shown: what should not be in an address may be a key.
    if _holds_more(parts):
        raise UserError(
            f"a model at {parts.hostname}: its address holds a key or a query; give the key in an "
            "environment variable (server.api_key_env)"
        )
    if not parts.hostname or not name:
        raise UserError(
            f"a model at {parts.hostname or 'no address'}: give http://ADDRESS/v1#MODEL"
        )
    return ServedModel(address, name)


@dataclass(frozen=True, slots=True)
class HostAddress:
    """Where an owner keeps an agent, and the environment variable with the token for it."""

    address: str
    variable: str = HOST_VARIABLE

    def __str__(self) -> str:
        return f"host:{self.address}"


def host_in(text: str) -> HostAddress | None:
    """The host that ``text`` names, ``host:URL`` or ``host:URL=VARIABLE``; None for any other text.
    Raises UserError for what is no plain address."""
    kind, _, rest = text.partition(":")
    if kind != "host":
        return None
    url, _, variable = rest.partition("=")
    if address_in(url) is None or holds_key(url) or "#" in url:
        raise UserError("a host is named by host:URL or host:URL=VARIABLE, without user or query")
    return HostAddress(url, variable or HOST_VARIABLE)


def holds_key(address: str) -> bool:
    """Whether an address, as ``address_in`` finds one, holds a user, a password or a query, each of
    which may be a key."""
    parts = _server(address)
    return parts is not None and _holds_more(parts)


def _holds_more(parts: SplitResult) -> bool:
    return bool(parts.username or parts.password or parts.query)


def address_in(text: str) -> str | None:
    """The address of a server that ``text`` names, with or without a model behind ``#``, in one
    form whatever its case and last slash; None for a text that names none. Raises nothing."""
    parts = _server(text)
    if parts is None:
        return None
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def _server(text: str) -> SplitResult | None:
    try:
        parts = urlsplit(text.partition("#")[0])
    except ValueError:  # brackets that hold no IPv6 address: a name like any other
        return None
    return parts if parts.scheme in ("http", "https") else None


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name most like ``word``, None if none is like it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return close[0] if close else None


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """The text `` (nearest: x; there are: x, y)`` for an error line about an unknown name."""
    names = sorted(set(known))
    if not names:
        return " (there are none)"
    close = nearest(name, names)
    hint = f"nearest: {close}; " if close else ""
    return f" ({hint}there are: {', '.join(names)})"


def missing_file(path: Path) -> UserError:
    """The error for a file that is not there, naming the nearest name in its directory."""
    if not path.parent.is_dir():
        return UserError(f"{path}: no such file, and no directory {path.parent}; check the path")
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return UserError(f"{path}: no such file" + (f"; did you mean {close[0]}?" if close else ""))


def reference_in(text: str) -> tuple[str, str] | None:
    """(file or module, name) where ``text`` has the form of an object's reference; None for any
    other text, which ``load_object`` refuses before it runs anything."""
    place, _, name = text.rpartition(":")
    is_module = all(part.isidentifier() for part in place.split("."))
    return (place, name) if name.isidentifier() and (place.endswith(".py") or is_module) else None


def load_object(reference: str, base: Path | None = None) -> Callable[..., Any]:
    """The callable that ``reference`` names. Relative files are sought in ``base`` (default: the
    working directory).

    Raises UserError for a reference of another form, a missing file or module, a missing name, a
    file that is not Python or raises while it is read (its line and error are named), and an
    object that cannot be called. Errors of a module of a package pass through.
    """
    named = reference_in(reference)
    if named is None:
        raise UserError(
            f"{reference!r}: write path/to/file.py:name or package.module:name, "
            "where name is a function or class"
        )
    place, name = named
    module = _from_file(place, base) if place.endswith(".py") else _from_package(place)
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"{place}: no {name!r} in it{nearest_hint(name, public)}")
    found = getattr(module, name)
    if not callable(found):
        raise UserError(f"{reference}: {name} is a {type(found).__name__}, not a function or class")
    return found


def pick(what: str, name: str, known: Mapping[str, Any], base: Path | None = None) -> Any:
    """The entry of a catalogue by its name, or the user's own by ``file.py:name`` or
    ``package.module:name``; ``what`` is the catalogue's word for its entries.

    Raises UserError for an unknown name, and whatever ``load_object`` refuses.
    """
    if ":" in name:
        return load_object(name, base)
    if name in known:
        return known[name]
    hint = nearest_hint(name, known)
    raise UserError(f"unknown {what} {name!r}{hint}; or give path/to/file.py:name")


def load_named(
    what: str,
    name: str,
    known: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    skip: int,
    base: Path | None = None,
) -> Any:
    """What ``pick`` finds, with its options filled in: a class is made with them, a function gets
    them beyond its first ``skip`` arguments.

    Raises UserError as ``pick`` does, and for options that the class or function does not take.
    """
    found = pick(what, name, known, base)
    made_now = inspect.isclass(found)
    check_options(f"{what} {name}", found, options, skip=0 if made_now else skip)
    return found(**options) if made_now else functools.partial(found, **options)


def check_options(
    what: str, function: Callable[..., Any], options: Mapping[str, Any], skip: int = 0
) -> None:
    """Check that ``options`` are parameters of ``function`` beyond its first ``skip``, and that no
    parameter without a default is left out.

    Raises UserError naming the unknown option and the nearest known one, or the missing one.
    """
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [p.name for p in named]
    for option in options:
        if option not in known and not takes_any:
            raise UserError(f"{what}: unknown option {option!r}{nearest_hint(option, known)}")
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise UserError(f"{what}: option {parameter.name!r} is needed and has no default")


def _from_file(place: str, base: Path | None) -> ModuleType:
    path = (base or Path()) / Path(place).expanduser()
    if not path.is_file():
        raise missing_file(path)
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()
    module_name = f"satune_user_{path.stem}_{digest}"
    loader = importlib.machinery.SourceFileLoader(module_name, str(path))
    spec = importlib.util.spec_from_loader(module_name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look their module up here while the file is still being read.
    sys.modules[module_name] = module
    try:
        loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[module_name]
        raise UserError(f"{path}, line {error.lineno}: not valid Python ({error.msg})") from error
    except Exception as error:
        del sys.modules[module_name]
        raise UserError(f"{path}{_line_of(error, path)}: {_said(error)}; mend the file") from error
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _line_of(error: Exception, path: Path) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _from_package(place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        # A missing import inside the user's module is the module's error, not a wrong reference.
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{place}: no module {error.name}; install it or give a .py file") from None
