"""An owner's checkpoints: the agent's weights, moments, critic and reference, and the ids of what
it wrote, under the names of the run's checkpoints. Complete or absent, damage noticed.

The run names the digest of each in its own checkpoint. The newest two always stay; of the others
those that the run says it has.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from satune.files.arrays import append_rows, read_rows
from satune.files.names import is_plain
from satune.files.writing import (
    WRITING,
    identity,
    link,
    remove_tree,
    strict_json,
    write_atomically,
    written_beside,
)
from satune.types import UserError

_STATE = "state.json"
_RUN = "run.json"
_WRITTEN = "written.jsonl"
_HELD = "held"
_NEWEST = 2
_LOG = logging.getLogger(__name__)

Find = Callable[[], Mapping[str, Tensor] | None]
"""Gives the tensors of a part of the agent, or None where it has none."""


class Refused(UserError):
    """What a run may be told as it stands: no place on the owner's disk is in it."""


@contextmanager
def unplaced() -> Iterator[None]:
    """Inside the block, or the function, no error names a place on the disk: what does is logged
    for the owner, and Refused is raised in its stead."""
    try:
        yield
    except Refused:
        raise
    except UserError as error:
        _LOG.warning("%s", error)
        raise Refused("cannot read or write its files; its log says why") from error


@dataclass(frozen=True, slots=True)
class Stored:
    """What a checkpoint holds: tensors by part and name, those of the agent at the last
    certificate, rows of what was written, and plain values."""

    parts: dict[str, dict[str, Tensor]]
    held: dict[str, Tensor]
    rows: list[dict[str, Any]]
    plain: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Found:
    """A complete checkpoint; ``number`` counts those that were ever written."""

    path: Path
    number: int
    plain: Mapping[str, Any]


class Vault:
    """The checkpoints in ``directory``, of one run at a time. Every UserError is Refused."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._last: _Found | None = None

    # -- whose they are --------------------------------------------------------------------------

    @unplaced()
    def begin(self, run: str) -> None:
        """Be that of a run that begins. Raises UserError where another run may yet go on from what
        lies here, and where that is no host's."""
        owner = self._run()
        if owner.get("committed") and owner.get("run") != run:
            raise Refused(
                "holds checkpoints that another run may go on from; start the host with another "
                "--out, or remove them"
            )
        if not owner and self._directories():
            raise Refused(
                "holds checkpoints that no host has written; start the host with another --out"
            )
        for path in self._directories():
            remove_tree(path)
        self._last = None
        self._note(run, committed=False)

    @unplaced()
    def commit(self, run: str, names: Sequence[str]) -> None:
        """The run has these checkpoints."""
        self._note(run, committed=True)
        newest = sorted(self._found(), key=lambda found: found.number)[-_NEWEST:]
        stay = [*(found.path for found in newest), *(self.directory / name for name in names)]
        for path in self._directories():
            if path not in stay:
                remove_tree(path)

    def _run(self) -> dict[str, Any]:
        path = self.directory / _RUN
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{path}: damaged; remove it and what lies beside it")
        return found

    def _note(self, run: str, *, committed: bool) -> None:
        said = {"run": run, "committed": committed}
        if self._run() != said:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self.directory / _RUN, strict_json(said) + "\n")

    def _directories(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if path.is_dir())

    def _found(self) -> list[_Found]:
        """The complete ones. One whose text is damaged is as good as none."""
        found = []
        for path in self._directories():
            if path.name.endswith(WRITING) or not (path / _STATE).is_file():
                continue
            try:
                state = json.loads((path / _STATE).read_text(encoding="utf-8"))
                found.append(_Found(path, int(state["number"]), state["plain"]))
            except (ValueError, KeyError, TypeError):
                continue
        return found

    # -- what is in one --------------------------------------------------------------------------

    @unplaced()
    def write(
        self,
        name: str,
        parts: Mapping[str, Find],
        held: Mapping[str, Tensor],
        rows: Iterable[Mapping[str, Any]],
        plain: Mapping[str, Any],
    ) -> str:
        """Write a checkpoint; its digest. Where ``plain`` is what it was at the last one, nothing
        of ``parts`` has changed since: those files are linked and nobody is asked for them. Raises
        UserError where the disk refuses."""
        if not is_plain(name):
            raise Refused(f"{name!r} is no name of a checkpoint")
        source = self._last if self._last is not None and self._last.plain == plain else None
        if source is not None and (source.path.name == name or not source.path.is_dir()):
            source = None
        path = self.directory / name
        number = 1 + max((found.number for found in self._found()), default=0)
        with written_beside(path) as beside:
            for part, find in parts.items():
                file = beside / f"{part}.safetensors"
                if source is None:
                    _save(file, find())
                elif (source.path / file.name).is_file():
                    link(source.path / file.name, file)
            _save(beside / f"{_HELD}.safetensors", held)
            append_rows(beside / _WRITTEN, rows)
            files = {each.name: identity(each) for each in sorted(beside.iterdir())}
            text = strict_json({"number": number, "plain": dict(plain), "files": files})
            write_atomically(beside / _STATE, text + "\n")
        self._last = _Found(path, number, dict(plain))
        return _digest(text)

    @unplaced()
    def read(self, name: str, digest: str) -> Stored:
        """What a checkpoint holds. Raises UserError where there is none of that digest, or where it
        is damaged."""
        path = self.directory / name
        if not is_plain(name) or not (path / _STATE).is_file():
            raise Refused(f"has no checkpoint {name}")
        text = (path / _STATE).read_text(encoding="utf-8").rstrip("\n")
        if _digest(text) != digest:
            raise Refused(f"{name} is not the one that the run has named, but of another run")
        state = json.loads(text)
        for file, recorded in state["files"].items():
            if not (path / file).is_file():
                raise Refused(f"{name}/{file}: damaged checkpoint (missing file)")
            if identity(path / file) != recorded:
                raise Refused(f"{name}/{file}: damaged checkpoint (content changed)")
        parts = {
            Path(file).stem: load_file(path / file)
            for file in state["files"]
            if file.endswith(".safetensors")
        }
        held = parts.pop(_HELD, {})
        self._last = _Found(path, state["number"], state["plain"])
        return Stored(parts, held, read_rows(path / _WRITTEN), state["plain"])

    @unplaced()
    def adopt(self, run: str) -> None:
        """Be that of a run that goes on from the checkpoint read last. What was written after it
        stays until the run says what it has: another host may refuse, and then it goes on from a
        later one after all."""
        self._note(run, committed=True)


def _save(file: Path, tensors: Mapping[str, Tensor] | None) -> None:
    if tensors:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
