"""Who is evaluated: a team or run directory, a recipe, a model, or models at a server."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from satune.agents.messages import MessageRenderer, TemplateSettings
from satune.agents.pretrained import AgentSpec, Precision
from satune.agents.sources import misspelt_path
from satune.commands.identity import digest_of, fingerprint
from satune.commands.trust import NOTHING, Trust, given_recipe
from satune.config.derive import Named, section_of
from satune.config.load import load_recipe, override, recipe_text
from satune.config.schema import EngineChoice, Recipe
from satune.engines.base import ENGINES, EngineSettings, engine_settings
from satune.engines.roles import OpenServer
from satune.engines.servers import Servers
from satune.hosts.settings import HostSettings
from satune.loading import nearest_hint
from satune.training.settings import RolloutSettings
from satune.types import FAILURES, GRADING_SECONDS, Engine, Sampling, Seat, UserError

if TYPE_CHECKING:  # httpx is an extra
    from satune.engines.openai import OpenAIEngine

_T = TypeVar("_T")

PAPER_TOKENS = 32768
PAPER_TEMPERATURE = 0.8


@dataclass(slots=True)
class Contestant:
    """What an evaluation needs to know of a team.

    ``protocol``, ``task`` (name, data and options), ``held_out`` (other data for evaluations) and
    ``seed`` are its own, as it was or would be trained. ``identity`` names its models by content
    where they lie here: equal identities answer alike.
    """

    seats: list[Seat]
    engine: Engine
    identity: dict[str, Any]
    protocol: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    """Keys of a protocol that were given for this evaluation."""
    task: dict[str, Any] = field(default_factory=dict)
    asked_task: dict[str, Any] = field(default_factory=dict)
    """Options of the task that were given for this evaluation, whatever task it is."""
    held_out: str | None = None
    seed: int = 0
    conversations: int | None = None
    """How many conversations may be open at a time; None: all."""
    failures: float = FAILURES
    grading_seconds: float = GRADING_SECONDS
    host: str | None = None
    """Who plays an environment's roles where the task has a choice and nobody made it."""
    open_server: OpenServer = field(default_factory=lambda: Servers().model)
    precision: Precision = field(default_factory=Precision)
    device: str = "auto"
    """Of whoever plays an environment's roles in this process."""
    admit: Callable[[Mapping[str, Any]], None] = lambda played: None
    """Is given the task and the protocol before they are loaded, and raises UserError where they
    would run what the user has not said."""

    def sampled(self, temperature: float | None, max_new_tokens: int | None) -> list[Seat]:
        """The seats, with another temperature or limit where one is given."""
        changes: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        changes = {name: value for name, value in changes.items() if value is not None}
        return [replace(seat, sampling=replace(seat.sampling, **changes)) for seat in self.seats]

    def only(self, name: str) -> None:
        """Leave this seat alone in the team. Raises UserError if there is none of the name."""
        kept = [seat for seat in self.seats if seat.name == name]
        if not kept:
            raise UserError(
                f"--seat: no {name!r}{nearest_hint(name, [s.name for s in self.seats])}"
            )
        self.seats, self.protocol = kept, {"name": "solo"}


def served_contestant(
    names: str, copies: int, overrides: Sequence[str], engine: OpenAIEngine
) -> Contestant:
    """Models at a server, a seat each (``names`` are separated by commas), or ``copies`` of one.
    ``engine`` is told the seats' models here. Overrides are protocol.*, task.* and rollout.*."""
    keys = _keys(overrides, ("protocol", "task", "rollout"))
    models = [name.strip() for name in names.split(",")]
    if not all(models):
        raise UserError(f"TEAM: {names!r} leaves a name empty; give model or model,model,...")
    seats = _seat_names(models, copies)
    engine.models = {**engine.models, **seats}
    renderer = MessageRenderer(TemplateSettings())
    sampling = Sampling(PAPER_TOKENS, temperature=PAPER_TEMPERATURE)
    return Contestant(
        [Seat(name, model, renderer, sampling) for name, model in seats.items()],
        engine,
        {"models": seats},
        asked=keys["protocol"],
        task=keys["task"],
        asked_task=keys["task"],
        conversations=engine.settings.concurrency,
        **_borne(keys),
    )


def local_contestant(
    given: str,
    path: Path | None,
    copies: int,
    overrides: Sequence[str],
    progress: Any,
    servers: Servers,
    trust: Trust = NOTHING,
    order: str | None = None,
    hosts: Mapping[str, str] | None = None,
) -> Contestant:
    """The team that ``given`` names; ``path`` is where a recipe of that name lies, if one does.
    ``hosts`` has the addresses of agents that live with their owners and have moved.

    Overrides are those of the recipe; other teams take protocol.*, task.*, engine.*,
    team.device, team.dtype, rollout.failures, rollout.grading_seconds and hosts.timeout. ``order``
    is the local engine's where nobody has said one. Raises UserError for whatever cannot be had,
    and for what ``trust`` does not admit.
    """
    place, hosts = Path(given), hosts or {}
    if path is not None and not place.is_dir():
        _one_of_each(copies, "a recipe")
        moved = [f"team.agents.{name}.host={url}" for name, url in hosts.items()]
        recipe = given_recipe(path, [*overrides, *moved], trust)
        hosted = any(agent.host for agent in recipe.team.agents.values())
        engine = _in_order(recipe.engine, None if hosted else order)
        recipe = recipe.model_copy(update={"engine": engine})
        contestant = _of_recipe(recipe, progress, servers)
        given_here: dict[str, Any] = {}
        for text in overrides:
            if text.startswith("task."):
                override(given_here, text)
        contestant.asked_task = given_here.get("task", {})
        return contestant
    keys = _keys(overrides)
    if (place / "manifest.json").is_file() or (place / "team" / "manifest.json").is_file():
        _one_of_each(copies, "a team")
        return _of_directory(place, keys, servers, trust, order, hosts)
    if hosts:
        raise UserError("--agent-host: is for a team with agents that live with their owners")
    if place.is_dir() and not any(
        any(place.glob(name)) for name in ("config.json", "adapter_config.json", "*.gguf")
    ):
        unfinished = (place / "recipe.yaml").is_file()
        raise UserError(
            f"{given}: the run has no trained team yet; finish it, or evaluate its recipe.yaml"
            if unfinished
            else f"{given}: holds neither a team (manifest.json) nor a model (config.json, *.gguf)"
        )
    misspelt = misspelt_path(given)
    if misspelt:
        raise UserError(f"{given}: no such team, recipe or model ({misspelt})")
    if given.startswith(("http://", "https://")):
        raise UserError("TEAM: is an address; give the model's name, and the address by --base-url")
    if not place.exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given):
        raise UserError(f"{given}: no such team, recipe or model; give a directory or a hub id")
    return _of_model(given, copies, keys, order)


def _of_recipe(recipe: Recipe, progress: Any, servers: Servers) -> Contestant:
    from satune.commands.assemble import assemble, engine_of

    # Its roles are those of whatever task is played: the examination attaches them.
    cast = assemble(recipe, progress, servers, roles=False, visiting={})
    named = (a.model for a in recipe.team.agents.values())
    hosted = {name: host.digest for name, host in cast.visited.items()}
    models = {model for model in named if isinstance(model, str) and Path(model).exists()}
    return Contestant(
        cast.team.seats_for(recipe.rollout.max_new_tokens),
        cast.engine,
        {
            "recipe": digest_of(recipe_text(recipe).encode()),
            "models": {model: fingerprint(Path(model)) for model in sorted(models)},
            **({"hosts": hosted} if hosted else {}),
        },
        protocol=recipe.protocol.model_dump(),
        task=recipe.task.model_dump(),
        held_out=recipe.evaluate.data,
        seed=recipe.seed,
        conversations=engine_of(recipe).conversations,
        failures=recipe.rollout.failures,
        grading_seconds=recipe.rollout.grading_seconds,
        precision=Precision.of(recipe.team.dtype, recipe.optimizer.autocast),
        device=recipe.team.device,
    )


def _of_directory(
    place: Path,
    keys: dict[str, Any],
    servers: Servers,
    trust: Trust,
    order: str | None,
    hosts: Mapping[str, str],
) -> Contestant:
    from satune.commands.assemble import visit_hosts
    from satune.team import digests_of, load_team, manifest_of, moved_hosts

    directory = place if (place / "manifest.json").is_file() else place / "team"
    admit = partial(trust.admit, where=directory / "manifest.json")
    manifest = moved_hosts(manifest_of(directory), hosts)
    admit({"agents": manifest["agents"]})
    team = load_team(directory, **keys["team"], hosts=hosts)
    # A run's team plays as it was trained: the recipe beside it says how long a message may be.
    written = directory.parent / "recipe.yaml"
    beside = directory.name == "team" and written.is_file()
    recipe = load_recipe(written, alone=True) if beside else None
    digests = digests_of(manifest)
    order = None if digests else order
    section = _engine_settings(keys, recipe, order, partial(trust.admit, where=written))
    visited = visit_hosts(team, digests, _host_timeout(keys, recipe))
    limit = recipe.rollout.max_new_tokens if recipe else team.max_new_tokens or _room(team)
    return Contestant(
        team.seats_for(limit),
        _engine(team, section, servers, visited),
        {"team": fingerprint(directory)},
        protocol=dict(team.protocol),
        asked=keys["protocol"],
        task={**team.task, **keys["task"]},
        asked_task=keys["task"],
        held_out=recipe.evaluate.data if recipe else None,
        seed=recipe.seed if recipe else 0,
        admit=admit,
        conversations=section.conversations,
        **_borne(keys, recipe),
        **_placed(keys),
    )


def _of_model(given: str, copies: int, keys: dict[str, Any], order: str | None) -> Contestant:
    from satune.team import build_team
    from satune.tiny.zoo import is_tiny

    if is_tiny(given):
        raise UserError(f"{given}: a tiny model is built for a recipe; give the recipe")
    seats = _seat_names([given], copies)
    agent = re.sub(r"-1$", "", next(iter(seats))) if copies > 1 else next(iter(seats))
    spec = AgentSpec(agent, given, PAPER_TEMPERATURE)
    team = build_team([spec], dict.fromkeys(seats, agent), sharing="separate", **keys["team"])
    section = _engine_settings(keys, None, order)
    local = Path(given).exists()
    return Contestant(
        team.seats_for(_room(team)),
        _engine(team, section, Servers()),
        {"model": fingerprint(Path(given)) if local else given, "seats": copies},
        asked=keys["protocol"],
        task=keys["task"],
        asked_task=keys["task"],
        conversations=section.conversations,
        **_borne(keys),
        **_placed(keys),
    )


def _placed(keys: dict[str, Any]) -> dict[str, Any]:
    """Where the team of those keys lies, and roles with it."""
    dtype = keys["team"].get("dtype", "float32")
    return {"precision": Precision.of(dtype), "device": keys["team"].get("device", "auto")}


def _room(team: Any) -> int:
    """Tokens a message may have where nothing says it: the paper's, or half the context."""
    return min([PAPER_TOKENS, *(p.context_limit // 2 for p in team.policies.values())])


def _engine(
    team: Any, settings: EngineSettings, servers: Servers, visited: Mapping[str, Any] | None = None
) -> Engine:
    import torch

    from satune.commands.assemble import team_engine

    size = sum(p.numel() for policy in team.policies.values() for p in policy.model.parameters())
    if size < 10_000_000:
        # Matrices too small to share: two threads were slower than one.
        torch.set_num_threads(1)
    return team_engine(team, settings, servers, visited)


def _engine_settings(
    keys: dict[str, Any],
    recipe: Recipe | None,
    order: str | None,
    admit: Callable[[Mapping[str, Any]], None] = lambda engine: None,
) -> EngineSettings:
    written = {"name": recipe.engine.name, **recipe.engine.options} if recipe else {}
    given = _checked(TypeAdapter(EngineChoice).validate_python, "engine", written, keys)
    engine = _in_order(given, order)
    admit({"engine": {"name": engine.name, **engine.options}})
    return engine_settings(engine.name, engine.options)


def _in_order(engine: Named, order: str | None) -> Named:
    """The engine; a local one in ``order``, where nobody has said another."""
    if order is None or engine.name != "local" or engine.options["order"] is not None:
        return engine
    return replace(engine, options={**engine.options, "order": order})


def _borne(keys: dict[str, Any], recipe: Recipe | None = None) -> dict[str, Any]:
    """How many failures an evaluation bears, and for how long it lets a message be graded."""
    written = asdict(recipe.rollout) if recipe else {}
    section = section_of(RolloutSettings)
    found = _checked(lambda given: section(**given), "rollout", written, keys)
    return {name: getattr(found, name) for name in _HEEDED["rollout"]}


def _host_timeout(keys: dict[str, Any], recipe: Recipe | None) -> float:
    """Seconds that an answer of a host may take."""
    written = asdict(recipe.hosts) if recipe else {}
    section = section_of(HostSettings)
    return _checked(lambda given: section(**given), "hosts", written, keys).model_dump()["timeout"]


def _checked(
    check: Callable[[dict[str, Any]], _T],
    name: str,
    written: Mapping[str, Any],
    keys: dict[str, Any],
) -> _T:
    """A recipe's section with what was given for this evaluation."""
    try:
        return check({**written, **keys[name]})
    except ValidationError as error:
        first = error.errors()[0]
        # A section with a choice of names has the one that was chosen in its places.
        place = [part for part in first["loc"] if part not in ENGINES]
        where = ".".join(map(str, (name, *place)))
        raise UserError(f"command line: {where}: {first['msg'].lower()}") from None


_DTYPES = ("float32", "bfloat16", "float16", "float64")
_HEEDED = {
    "team": ("device", "dtype"),
    "rollout": ("failures", "grading_seconds"),
    "hosts": ("timeout",),
}
"""The keys of these sections that an evaluation of what is no recipe takes."""


def _keys(
    overrides: Sequence[str],
    known: Sequence[str] = ("protocol", "task", "engine", "team", "rollout", "hosts"),
) -> dict[str, Any]:
    """The overrides of a team that is no recipe, by section."""
    data: dict[str, Any] = {}
    for text in overrides:
        override(data, text)
    for section in data:
        if section not in known:
            raise UserError(f"command line: {section}: unknown here{nearest_hint(section, known)}")
    found = {section: data.get(section) or {} for section in known}
    for section, value in found.items():
        if isinstance(value, str):
            found[section] = {"name": value}
    for section, heeded in _HEEDED.items():
        for key in found.get(section, {}):
            if key not in heeded:
                only = " and ".join(f"{section}.{name}" for name in heeded)
                raise UserError(f"command line: {section}.{key}: only {only} are heeded")
    if found.get("team", {}).get("dtype", "float32") not in _DTYPES:
        raise UserError(f"command line: team.dtype: give {', '.join(_DTYPES[:-1])} or float64")
    return found


def _one_of_each(copies: int, what: str) -> None:
    if copies != 1:
        raise UserError(f"--seats: {what} has its own seats; leave it out")


def _seat_names(models: Sequence[str], copies: int) -> dict[str, str]:
    """A name for each model's seat: the last part of the model's, numbered where it comes twice."""
    if copies > 1 and len(models) > 1:
        raise UserError("--seats: copies are made of one model; name each model once for each seat")
    models = [model for model in models for _ in range(copies)]
    short = [
        re.sub(r"[^A-Za-z0-9_-]+", "-", Path(model).name).strip("-") or "model" for model in models
    ]
    names = [
        f"{name}-{short[: at + 1].count(name)}" if short.count(name) > 1 else name
        for at, name in enumerate(short)
    ]
    return dict(zip(names, models, strict=True))
