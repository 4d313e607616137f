"""Whose code is run and which servers are asked: what a team, run or recipe of somebody else names
runs nothing and is sent nothing before the user has said so.

What the user names on the command line, or in a recipe given there, is the user's own. So is what
a training of the user's has used: it is then known by a digest of its content, kept in the user's
state directory and never in the run, so that a file that was changed is asked for again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from satune.config.load import load_recipe
from satune.config.schema import Recipe
from satune.loading import HOST_VARIABLE, KEY_VARIABLE, address_in, missing_file, reference_in
from satune.types import UserError

STATE = "SATUNE_STATE"
"""The environment variable that puts the state directory elsewhere."""
_LOG = logging.getLogger(__name__)
_CODE_OF_MODEL = ("*.py", "*config.json")


@dataclass(frozen=True, slots=True)
class Code:
    """Code that would be run: what ``reference`` names in the form of ``load_object``, or, where
    ``model`` is true, the code that comes with the model ``reference``. ``key`` is where the name
    stands, dotted."""

    key: str
    reference: str
    model: bool = False

    @property
    def digest(self) -> str | None:
        """SHA-256 of what would be run, found without running any of it; None where it is not
        found. A file may be moved; a module, and a model on the hub, keep their names."""
        if self.model:
            files: Sequence[Path] | None = _files_of_model(Path(self.reference))
            named = "" if files else self.reference
        else:
            place, name = reference_in(self.reference) or ("", "")
            file = place.endswith(".py")
            files = [Path(place).expanduser()] if file else _files_of_module(place)
            named = f"{'' if file else place}:{name}"
        if files is None or not all(file.is_file() for file in files):
            return None
        found = hashlib.sha256(f"code\0{self.model}\0{named}\0".encode())
        for file in files:
            found.update(hashlib.sha256(file.read_bytes()).digest())
        return found.hexdigest()

    def __str__(self) -> str:
        return f"the code that comes with {self.reference}" if self.model else self.reference


@dataclass(frozen=True, slots=True)
class Address:
    """A server that would be asked, and the environment variable whose value it would be sent."""

    key: str
    address: str
    variable: str = KEY_VARIABLE

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"server\0{self.address}\0{self.variable}".encode()).hexdigest()

    def __str__(self) -> str:
        return self.address if self.variable == KEY_VARIABLE else f"{self.address}={self.variable}"


Claim = Code | Address


def claims(document: Any) -> Iterator[Claim]:
    """Whatever in a recipe, a manifest or a part of one would be run or asked.

    Every text in it counts that has the form of a reference or an address, whatever its key: a key
    that is added to the recipe later is then no gap. A chat template is text, in a sandbox.
    """
    left: list[tuple[str, Any, Any]] = [("", document, None)]
    while left:
        key, value, asked = left.pop()
        if isinstance(value, Mapping):
            if value.get("trust_remote_code"):
                yield Code(f"{key}.trust_remote_code", str(value.get("model")), model=True)
            inner = [(f"{key}.{n}" if key else str(n), v, value) for n, v in value.items()]
            left += reversed(inner)
        elif isinstance(value, (list, tuple)):
            left += reversed([(f"{key}[{at}]", each, asked) for at, each in enumerate(value)])
        elif isinstance(value, str) and not key.endswith(".template.chat"):
            address = address_in(value)
            if address is not None:
                yield Address(key, address, _variable_of(key, asked))
            elif reference_in(value) and not (key == "task.host" and value[:6] == "model:"):
                yield Code(key, value)


def _variable_of(key: str, beside: Any) -> str:
    """The environment variable whose value is sent to the address at ``key``; ``beside`` is the
    section that the key is in."""
    section = beside if isinstance(beside, Mapping) else {}
    if key.endswith(".host") and ".agents." in f".{key}":
        return str(section.get("host_token_env") or HOST_VARIABLE)
    server = section.get("server")
    return str((server if isinstance(server, Mapping) else {}).get("api_key_env") or KEY_VARIABLE)


@dataclass(frozen=True, slots=True)
class Trust:
    """What the user has said of other people's files: whether their code may be run (``code``),
    what is the user's own by its name on the command line (``own``), and the servers that may be
    asked, each with the variable of its key (``addresses``)."""

    code: bool = False
    own: frozenset[str] = frozenset()
    addresses: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def of(cls, code: bool = False, allowed: Iterable[str] = (), said: Any = None) -> Trust:
        """``allowed`` are URL or URL=VARIABLE of ``--allow-address``; ``said`` is whatever else
        the command line names, in any structure of mappings and lists."""
        addresses: set[tuple[str, str]] = set()
        for text in allowed:
            url, _, variable = text.partition("=")
            address = address_in(url)
            if address is None:
                raise UserError(f"--allow-address {text}: is no address; give URL or URL=VARIABLE")
            addresses.add((address, variable or KEY_VARIABLE))
        named = list(claims(said))
        addresses |= {(c.address, c.variable) for c in named if isinstance(c, Address)}
        return cls(
            code, frozenset(c.reference for c in named if isinstance(c, Code)), frozenset(addresses)
        )

    def admit(self, document: Any, where: str | Path) -> None:
        """Raise UserError, one line, where ``document`` (of the file or directory ``where``) names
        code or servers that are neither the user's own nor allowed."""
        unknown = [claim for claim in claims(document) if not self._is_known(claim)]
        code = [claim for claim in unknown if isinstance(claim, Code)]
        for claim in code:
            place = (reference_in(claim.reference) or ("", ""))[0]
            if place.endswith(".py") and not claim.model and not Path(place).expanduser().is_file():
                raise missing_file(Path(place).expanduser())
        if code:
            named = ", ".join(dict.fromkeys(f"{claim} ({claim.key})" for claim in code))
            raise UserError(
                f"{where}: would run {named}, which you have not trained with as it is now; "
                "read it, then add --trust"
            )
        servers = [claim for claim in unknown if isinstance(claim, Address)]
        if servers:
            first = servers[0]
            options = " ".join(dict.fromkeys(f"--allow-address {claim}" for claim in servers))
            raise UserError(
                f"{where}: {first.key} would send its messages and the key in ${first.variable} "
                f"to {first.address}, which you have not trained with; to let it, add {options}"
            )

    def _is_known(self, claim: Claim) -> bool:
        if isinstance(claim, Address):
            if (claim.address, claim.variable) in self.addresses:
                return True
        elif self.code or (claim.reference in self.own and not claim.model):
            return True
        digest = claim.digest
        return digest is not None and (_known() / digest).is_file()


NOTHING = Trust()
"""What is trusted where nothing was said: one's own, known by its digest."""


def given_recipe(path: Path, overrides: Sequence[str], trust: Trust) -> Recipe:
    """The recipe in a file that the command names. It is the user's own, unless a run keeps it:
    that run may be anybody's. Raises UserError as ``load_recipe`` and ``Trust.admit``."""
    beside = ("events.jsonl", "summary.json", "episodes", "checkpoints", "team")
    kept = path.name == "recipe.yaml" and any((path.parent / name).exists() for name in beside)
    recipe = load_recipe(path, overrides, alone=kept)
    if kept:
        trust.admit(recipe.model_dump(mode="json"), path)
    return recipe


def remember(document: Any) -> None:
    """Take down that a training of the user's uses what ``document`` (a recipe) names. Where that
    cannot be written the log says so in one line: the training may go on, later commands ask."""
    folder = _known()
    for claim in claims(document):
        digest = claim.digest
        if digest is None or (folder / digest).is_file():
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / digest).write_text(f"{claim.key}: {claim}\n", encoding="utf-8")
        except OSError as error:
            _LOG.warning(
                f"{folder}: cannot be written ({error.strerror}); later commands will ask for "
                f"--trust; ${STATE} names another directory"
            )
            return


def state_directory() -> Path:
    """Where satune keeps what it knows of its user, by the XDG base directories."""
    said, base = os.environ.get(STATE), os.environ.get("XDG_STATE_HOME", "")
    if said:
        return Path(said).expanduser()
    # A relative path there is to be ignored, the specification says.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "satune"


def _known() -> Path:
    return state_directory() / "own"


def _files_of_module(name: str) -> Sequence[Path] | None:
    """The files that an import of a module runs first, its packages' included; None where there is
    no such module, none for one that is built in. Nothing is imported to find them."""
    files: list[Path] = []
    path: Sequence[str] | None = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        if depth > 1 and path is None:
            return None  # what is above it is no package
        spec = _spec(".".join(parts[:depth]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
        if spec.origin is not None and spec.has_location:
            files.append(Path(spec.origin))
    return files


def _spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    found = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)


def _files_of_model(place: Path) -> Sequence[Path]:
    """What says which code a model in a directory brings; none for a model on the hub."""
    return sorted(file for pattern in _CODE_OF_MODEL for file in place.glob(pattern))
