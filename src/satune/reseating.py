"""A trained team as a run or a team directory holds it, the same team with newcomers in some seats,
and the new directory that is made of both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from satune.agents.loading import AgentSpec, Precision, load_policies
from satune.agents.mixture import MixturePolicy, tokenizer_difference
from satune.agents.policy import Policy
from satune.agents.rendering import TemplateSettings
from satune.assembly import Cast, Progress, assemble, local_engine, lora_spec, model_path
from satune.config.load import load_recipe, save_recipe
from satune.config.schema import AgentSection, Recipe, TeamSection
from satune.loading import nearest
from satune.swap.transplant import Newcomer, copy_team, transplant, written_beside
from satune.team import FORMAT, Team, add_mixtures, read_manifest
from satune.training.checkpoint import Checkpoints
from satune.training.run_directory import RunDirectory, strict_json, write_atomically
from satune.types import UserError

NEWCOMERS = "newcomers"


@dataclass(slots=True)
class Found:
    """A trained team and where it was found. ``run`` and ``checkpoint`` are None for a team
    directory, whose recipe is made of its manifest, and of a file if ``given``; ``state`` is the
    checkpoint's."""

    path: Path
    recipe: Recipe
    run: RunDirectory | None = None
    checkpoint: str | None = None
    state: dict[str, Any] = field(default_factory=dict)
    passed: Sequence[str] = ()
    given: bool = False

    @property
    def seats(self) -> Mapping[str, str]:
        return self.recipe.team.resolved().seats

    @property
    def stage(self) -> int:
        """Stages finished, or begun and not to be gone on with."""
        held = self.state.get("state", {"stage": 0, "step": 0})
        return held["stage"] + (held["step"] > 0)

    @property
    def certify_offset(self) -> int:
        """Problems for certificates that training has used up."""
        return self.state["state"]["certify"]["offset"] if self.state else 0

    @property
    def train_offset(self) -> int:
        return self.state["offset"] if self.state else 0


def find_team(path: Path, recipe: Path | None) -> Found:
    """The team in a run's newest undamaged checkpoint, or in a team directory; loads no model.

    ``recipe`` gives a team directory what its manifest does not hold. Raises UserError where there
    is no team, or nothing complete of one.
    """
    if (path / "manifest.json").is_file():
        return Found(path, _recipe_of_team(path, recipe), given=recipe is not None)
    run = RunDirectory(path)
    if not run.recipe.is_file():
        what = "holds neither a run nor a team" if path.is_dir() else "no such directory"
        raise UserError(f"{path}: {what}; give a run's directory, or the team/ in it")
    if recipe is not None:
        raise UserError(f"{path}: a run has its own recipe; drop --recipe {recipe}")
    loaded = load_recipe(run.recipe)
    found = Checkpoints(run.checkpoints, loaded.checkpoint.keep).latest()
    if found is None:
        raise UserError(f"{path}: the run has no complete checkpoint yet; let it train on")
    name, passed = found
    state = json.loads((run.checkpoints / name / "state.json").read_text())
    return Found(path, loaded, run, name, state, passed)


def _recipe_of_team(path: Path, recipe: Path | None) -> Recipe:
    manifest = read_manifest(path)
    agents: dict[str, AgentSection] = {}
    sharing = "separate"
    for name, entry in manifest["agents"].items():
        sharing = entry["sharing"]
        lora = entry.get("lora")
        if lora is not None:
            lora = {**lora, "targets": lora["targets"] or ["all-linear"]}
        agents[name] = AgentSection.model_validate(
            {
                "model": str(path / entry["dir"]),
                "temperature": entry["temperature"],
                "template": entry["template"],
                "delta": entry["delta"],
                "lora": lora,
            }
        )
    seats: dict[str, str] = manifest["seats"]
    if recipe is not None:
        given = load_recipe(recipe)
        team = given.team.model_copy(update={"sharing": sharing, "agents": agents, "seats": seats})
        return given.model_copy(update={"team": team})
    for part in ("task", "protocol"):
        if "name" not in manifest[part]:
            raise UserError(f"{path}: its manifest names no {part}; give the recipe by --recipe")
    section = TeamSection(sharing=sharing, agents=agents, seats=seats)  # type: ignore[arg-type]
    return Recipe.model_validate(
        {"team": section, "task": manifest["task"], "protocol": manifest["protocol"]}
    )


def check_seat(found: Found, seat: str) -> None:
    if seat not in found.seats:
        raise UserError(f"--seat {seat}: the team has no such seat{nearest(seat, found.seats)}")


def load_found(found: Found, progress: Progress) -> Cast:
    """The team as it is in the checkpoint, ready to play."""
    cast = assemble(found.recipe, progress)
    if found.run is None:
        manifest, section = read_manifest(found.path), found.recipe.team
        add_mixtures(cast.team, found.path, manifest, dtype=section.dtype, device=section.device)
        return with_team(cast, _fitting(found, cast.team), cast.team)
    assert found.checkpoint is not None
    path = found.run.checkpoints / found.checkpoint
    for name, policy in cast.team.policies.items():
        weights_of_file = path / f"{name}.weights.safetensors"
        if not weights_of_file.is_file():
            raise UserError(f"{path}: holds no weights of agent {name}; is it of another recipe?")
        put_weights(policy, load_file(weights_of_file))
        cast.engine.publish(name, found.state["state"]["versions"][name])
    return cast


def _fitting(found: Found, team: Team) -> Recipe:
    """The recipe, with messages that leave room in every context where nobody has said how long
    they may be."""
    room = min(policy.context_limit for policy in team.policies.values()) // 4
    rollout = found.recipe.rollout
    if found.given or rollout.max_new_tokens <= room:
        return found.recipe
    shorter = rollout.model_copy(update={"max_new_tokens": max(1, room)})
    return found.recipe.model_copy(update={"rollout": shorter})


@torch.no_grad()
def put_weights(policy: Policy, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in policy.trainable().items():
        parameter.copy_(weights[name])


def weights_of(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable().items()}


# -- the team with a newcomer ---------------------------------------------------------------------


def reseated(team: TeamSection, seat: str, newcomer: AgentSection) -> tuple[TeamSection, str]:
    """The team with a newcomer in ``seat``, and the newcomer's name: that of the agent which filled
    this seat alone, else one of its own, behind the agent that keeps its other seats."""
    resolved = team.resolved()
    shared = team.sharing == "shared"
    old, seats = dict(resolved.agents if shared else team.agents), dict(resolved.seats)
    incumbent = seats[seat]
    name = incumbent
    if list(seats.values()).count(incumbent) > 1:
        name = next(n for n in _names(seat) if n not in old)
    agents: dict[str, AgentSection] = {}
    for each, section in old.items():
        if each != name:
            agents[each] = section
        if each == incumbent:
            agents[name] = newcomer
    seats[seat] = name
    changed: dict[str, Any] = {"agents": agents, "seats": seats}
    return team.model_copy(update=changed | ({"sharing": "separate"} if shared else {})), name


def _names(seat: str):
    yield seat
    number = 2
    while True:
        yield f"{seat}-{number}"
        number += 1


@dataclass(slots=True)
class Candidate:
    """A team in which newcomers fill some seats. ``newcomers``: agent to the model it was made
    from; every other agent is the old team's own."""

    cast: Cast
    newcomers: dict[str, str] = field(default_factory=dict)

    def agent_of(self, seat: str) -> str:
        return self.cast.team.seats[seat]


def with_newcomer(
    base: Candidate,
    seat: str,
    model: str,
    *,
    loaded: Policy | None = None,
    tiny: Mapping[str, Any] | None = None,
) -> Candidate:
    """``base`` with ``model`` in ``seat``. A tiny model is taught first, as in training but for the
    settings in ``tiny``; ``loaded`` is the policy where there is one already. Raises UserError
    where the model does not load."""
    cast = base.cast
    recipe, team = cast.recipe, cast.team
    incumbent = team.seats[seat]
    # A text that was written for the incumbent's template says nothing to another tokenizer.
    had = recipe.team.resolved().agents[incumbent]
    section = had.model_copy(update={"model": model, "trust_remote_code": False})
    if loaded is None:
        taught = recipe.model_copy(update={"tiny": recipe.tiny.model_copy(update=tiny or {})})
        model = model_path(section, taught, cast.protocol, team.seats, cast.progress)
    section = section.model_copy(update={"model": model})
    sections, name = reseated(recipe.team, seat, section)
    section = sections.resolved().agents[name]
    policy = loaded or _load(recipe, sections, name, section)
    if section.template.chat is not None and tokenizer_difference(
        team.policies[incumbent].tokenizer, policy.tokenizer
    ):
        plain = section.template.model_copy(update={"chat": None})
        section = section.model_copy(update={"template": plain})
        sections = sections.model_copy(update={"agents": {**sections.agents, name: section}})
    resolved = sections.resolved()
    policies = {n: policy if n == name else team.policies[n] for n in resolved.agents}
    specs = {n: _spec(name, section) if n == name else team.specs[n] for n in resolved.agents}
    new_team = Team(
        policies, specs, dict(resolved.seats), sections.sharing, team.protocol, team.task
    )
    new_recipe = recipe.model_copy(update={"team": sections})
    kept = {n: m for n, m in base.newcomers.items() if n in policies}
    return Candidate(with_team(cast, new_recipe, new_team), kept | {name: model})


def with_policy(candidate: Candidate, name: str, policy: Policy) -> Candidate:
    """The candidate with the agent ``name`` played by another policy."""
    team = candidate.cast.team
    changed = replace(team, policies={**team.policies, name: policy})
    cast = with_team(candidate.cast, candidate.cast.recipe, changed)
    return Candidate(cast, dict(candidate.newcomers))


def with_team(cast: Cast, recipe: Recipe, team: Team) -> Cast:
    """The cast with another team, and an engine that serves it."""
    engine = local_engine(team.policies, team.seats, recipe)
    return Cast(recipe, cast.task, cast.held_out, cast.protocol, team, engine, cast.progress)


def _spec(name: str, section: AgentSection) -> AgentSpec:
    return AgentSpec(
        name=name,
        model=section.model,
        temperature=section.temperature,
        template=TemplateSettings(**section.template.model_dump()),
        lora=lora_spec(section),
        delta=section.delta,
        trust_remote_code=section.trust_remote_code,
    )


def _load(recipe: Recipe, team: TeamSection, name: str, section: AgentSection) -> Policy:
    return load_policies(
        [_spec(name, section)],
        shared_base=team.sharing == "lora",
        precision=Precision.of(team.dtype, recipe.optimizer.autocast),
        device=team.device,
        seed=recipe.seed,
    )[name]


# -- the new directory ----------------------------------------------------------------------------


def write_result(
    found: Found,
    candidate: Candidate,
    out: Path,
    event: Mapping[str, Any],
    *,
    certify_offset: int,
    evidence: Sequence[Mapping[str, Any]],
) -> None:
    """Write the candidate as ``found`` was: a run that training goes on with, or a team. Complete
    or absent; ``found`` is only read."""
    mixed = any(isinstance(p, MixturePolicy) for p in candidate.cast.team.policies.values())
    with written_beside(out) as beside:
        if found.run is None:
            _write_team(found, candidate, beside, out)
        elif mixed:
            # Nothing of a mixture is trained, so that no run goes on from it.
            candidate.cast.team.save(beside, final=out)
        if found.run is None or mixed:
            write_atomically(beside / "swap.json", strict_json(event) + "\n")
        else:
            _write_run(found, candidate, beside, out, event, certify_offset)
        if evidence:
            lines = "".join(f"{strict_json(row)}\n" for row in evidence)
            write_atomically(beside / "swap-evidence.jsonl", lines)


def _write_run(
    found: Found,
    candidate: Candidate,
    beside: Path,
    out: Path,
    event: Mapping[str, Any],
    certify_offset: int,
) -> None:
    assert found.run is not None and found.checkpoint is not None
    team, target = candidate.cast.team, RunDirectory(beside)
    recipe = candidate.cast.recipe
    sections = dict(recipe.team.agents)
    for name, model in candidate.newcomers.items():
        where = _save_newcomer(team, name, model, beside / NEWCOMERS, out / NEWCOMERS)
        sections[name] = sections[name].model_copy(update={"model": where})
    transplant(
        found.run,
        found.checkpoint,
        target,
        agents=list(team.policies),
        newcomers={n: Newcomer(weights_of(team.policies[n])) for n in candidate.newcomers},
        beta=recipe.trust_region.beta,
        reference=recipe.objective.reference_kl > 0,
        certify_offset=certify_offset,
        event=event,
    )
    section = recipe.team.model_copy(update={"agents": sections})
    save_recipe(recipe.model_copy(update={"team": section}), target.recipe)
    team.save(target.team, final=out / "team")


def _save_newcomer(team: Team, name: str, model: str, beside: Path, final: Path) -> str:
    """Keep a newcomer's model beside the run, as the team has it; what the recipe is to call it.

    Under an adapter it is the base as it came: the adapter's weights lie in the checkpoint.
    """
    beside.mkdir(exist_ok=True)
    source, policy = Path(model), team.policies[name]
    if policy.adapter is None:
        team.save_agent(name, beside, final, {})
        if (source / "tiny.json").is_file():
            shutil.copy2(source / "tiny.json", beside / name / "tiny.json")
    elif not source.is_dir():
        return model
    else:
        shutil.copytree(source, beside / name)
        base = Path(str(policy.causal_lm.config._name_or_path))
        if (source / "adapter_config.json").is_file() and base.is_dir():
            shutil.copytree(base, beside / base.name, dirs_exist_ok=True)
    return str(final.resolve() / name)


def _write_team(found: Found, candidate: Candidate, beside: Path, out: Path) -> None:
    team, manifest = candidate.cast.team, read_manifest(found.path)
    old = manifest["agents"]
    kept = {n: old[n] for n in team.policies if n not in candidate.newcomers}
    dirs = [folder for entry in kept.values() for folder in _folders(entry)]
    left_out = [f for entry in old.values() for f in _folders(entry) if f not in dirs]
    entries: dict[str, Any] = {}
    for name in team.policies:
        entry = kept[name] if name in kept else team.entry(name)
        entries[name] = entry | {"sharing": team.sharing}
    for folder in (f for n in candidate.newcomers for f in _folders(entries[n])):
        if (found.path / folder).exists() and folder not in left_out:
            raise UserError(f"{found.path}: holds a {folder!r} that is no agent; move it away")
    copy_team(
        found.path,
        beside,
        manifest=manifest | {"format": FORMAT, "seats": team.seats, "agents": entries},
        left_out=[*left_out, "swap.json", "swap-evidence.jsonl"],
    )
    for name in candidate.newcomers:
        team.save_agent(name, beside, out, {})


def _folders(entry: Mapping[str, Any]) -> list[str]:
    """The directories of an agent in its team's."""
    return [entry["dir"], *([entry["mixture"]["dir"]] if "mixture" in entry else [])]
