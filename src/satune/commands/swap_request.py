"""What a swap is asked for, and what can be refused of it before a model is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from satune.commands.reseat import Found, check_seat, find_team
from satune.commands.trust import NOTHING, Trust
from satune.config.derive import section_of
from satune.engines.settings import ServerSettings
from satune.files.lock import LOCK, locked
from satune.files.writing import disk_errors
from satune.loading import HostAddress, host_in, model_in, nearest_hint
from satune.swap.directory import Model, refuse_existing
from satune.swap.settings import DistillSettings, HandOverSettings
from satune.types import ServedModel, UserError

Given = Literal["project", "handover"]
"""How a seat is given to a newcomer."""
Method = Literal["auto", "project", "handover"]
METHODS = ("auto", "project", "handover")
Pair = tuple[str, Model]
"""A seat, and the model that it is to be given to."""


@dataclass(frozen=True, slots=True)
class SwapRequest:
    """What ``satune swap`` is asked for. ``delta`` None: the paper's. ``otherwise``: what becomes
    of a projection outside it; None: a hand-over, or a refusal where projection was asked for by
    name. ``rounds``: the most that a distillation takes. ``tiny``: keys of the recipe's section by
    that name which a tiny newcomer is taught by instead. ``server``: how a served newcomer is
    asked, as ``team.agents.*.server`` of a recipe. ``hosts``: addresses of agents that live with
    their owners and have moved. ``out`` None: beside the source."""

    source: Path
    seats: Sequence[str]
    models: Sequence[str]
    method: Method = "auto"
    delta: float | None = None
    together: bool = False
    dry_run: bool = False
    otherwise: Literal["mixture", "refuse", "handover"] | None = None
    rounds: int = DistillSettings().rounds
    tiny: Mapping[str, Any] = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)
    hosts: Mapping[str, str] = field(default_factory=dict)
    recipe: Path | None = None
    trust: Trust = NOTHING
    out: Path | None = None
    break_lock: bool = False
    hand_over: HandOverSettings = field(default_factory=HandOverSettings)

    @property
    def fallback(self) -> Literal["mixture", "refuse", "handover"]:
        return self.otherwise or ("handover" if self.method == "auto" else "refuse")

    def pairs(self) -> list[Pair]:
        """Each seat with its model. Raises UserError where they do not match, and for a served
        model whose address or name is missing."""
        if not self.seats:
            raise UserError("--seat: name a seat, and its model by --with")
        for seat in self.seats:
            if list(self.seats).count(seat) > 1:
                raise UserError(f"--seat {seat}: is named twice; a seat has one newcomer")
        if len(self.models) not in (1, len(self.seats)):
            raise UserError(
                f"--with: {len(self.models)} models for {len(self.seats)} seats; give one a seat, "
                "in the same order, or one for all"
            )
        try:
            models = [host_in(model) or model_in(model) for model in self.models]
        except UserError as error:
            raise UserError(f"--with: {error}") from None
        models = models if len(models) > 1 else models * len(self.seats)
        return list(zip(self.seats, models, strict=True))


def check_request(request: SwapRequest, pairs: Sequence[Pair]) -> tuple[Found, Path]:
    """The team, and where the new one goes; whatever can be refused before models are loaded."""
    if request.method not in METHODS:
        hint = nearest_hint(request.method, METHODS)
        raise UserError(f"--method {request.method}: no such method{hint}")
    if request.rounds < 0:
        raise UserError(f"--rounds {request.rounds}: give 0 (no distillation) or more")
    if request.rounds == 0 and request.fallback != "mixture":
        raise UserError("--rounds 0: leaves only the mixture; add --otherwise mixture")
    if request.delta is not None and not request.delta > 0:
        raise UserError(f"--delta {request.delta:g}: give a positive number of nats, such as 0.01")
    source = request.source
    out = request.out or source.with_name(source.resolve().name + "-swapped")
    if not request.dry_run:
        refuse_existing(out)
    found = find_team(source, request.recipe, request.trust, request.hosts)
    for seat, model in pairs:
        check_seat(found, seat)
        if isinstance(model, ServedModel) and request.method == "project":
            raise UserError(
                f"--with {model}: a server shows no distributions to project; use --method handover"
            )
        if isinstance(model, HostAddress):
            _check_host(model, found, request)
    _check_server(request, pairs)
    return found, out


def _check_host(model: HostAddress, found: Found, request: SwapRequest) -> None:
    if request.method == "project":
        raise UserError(
            f"--with {model}: its owner gives no weights, and a projection needs them; use "
            "--method handover"
        )
    if found.run is not None:
        raise UserError(
            f"--with {model}: an owner trains in the run that began with it, so no training can go "
            f"on from such a swap; give {found.path / 'team'}, of which a team comes"
        )


@contextmanager
def swap_lock(request: SwapRequest, out: Path) -> Iterator[None]:
    """Keep every other swap from writing ``out``, which comes to be at the end alone: the lock lies
    beside it. Nothing for a dry run, which writes nothing. Raises UserError where another one is at
    work there."""
    if request.dry_run:
        yield
        return
    beside = out.absolute()
    with disk_errors(beside):
        beside.parent.mkdir(parents=True, exist_ok=True)
    lock = beside.with_name(f".{beside.name}{LOCK}")
    with locked(lock, str(out), break_lock=request.break_lock):
        yield


@contextmanager
def kept_answers(
    request: SwapRequest, pairs: Sequence[Pair], found: Found, out: Path
) -> Iterator[Path | None]:
    """Where servers' answers lie until the swap is decided, so that the same command, begun again
    after a failure, asks only for what is missing. None for a dry run, which writes nothing."""
    if request.dry_run:
        yield None
        return
    named = [(seat, str(model)) for seat, model in pairs]
    same = [str(found.path.resolve()), found.checkpoint, named, dict(request.server)]
    digest = hashlib.blake2b(json.dumps(same).encode(), digest_size=4).hexdigest()
    path = out.absolute().with_name(f"{out.absolute().name}.answers-{digest}.jsonl")
    try:
        yield path
    except BaseException:
        if path.is_file() and path.stat().st_size == 0:
            path.unlink()
        raise
    path.unlink(missing_ok=True)


def _check_server(request: SwapRequest, pairs: Sequence[Pair]) -> None:
    section = section_of(ServerSettings)
    try:
        section(**request.server)
    except ValidationError as error:
        first = error.errors()[0]
        where, said = ".".join(map(str, first["loc"])), first["msg"].lower()
        hint = nearest_hint(where, section.model_fields) if "extra" in first["type"] else ""
        raise UserError(f"--server-option {where}: {said}{hint}") from None
    if request.server and not any(isinstance(model, ServedModel) for _, model in pairs):
        raise UserError("--server-option: is for a newcomer at http://ADDRESS/v1#MODEL; drop it")
    variable = request.server.get("api_key_env")
    if variable is not None and not os.environ.get(variable):
        raise UserError(f"--server-option api_key_env: ${variable} is not set; export it")
