"""The new directory that a swap makes of the team that was found and the newcomers in it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from satune.agents.mixture import MixturePolicy
from satune.config.load import save_recipe
from satune.files.manifest import FORMAT
from satune.files.writing import strict_json, write_atomically, written_beside
from satune.swap.seat import Candidate, Found, weights_of
from satune.swap.transplant import Newcomer, copy_team, refuse_existing, transplant
from satune.team import Team, manifest_of
from satune.training.run_directory import RunDirectory
from satune.types import UserError

NEWCOMERS = "newcomers"


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
    team = candidate.cast.team
    sections = candidate.cast.recipe.team.resolved().agents
    mixed = any(isinstance(policy, MixturePolicy) for policy in team.policies.values())
    # Nothing of a mixture is trained, so that no run goes on from it.
    goes_on = not mixed and any(not sections[name].frozen for name in team.policies)
    refuse_existing(out)
    with written_beside(out) as beside:
        if found.run is None:
            _write_team(found, candidate, beside, out)
        elif not goes_on:
            team.save(beside, final=out)
        if found.run is None or not goes_on:
            write_atomically(beside / "swap.json", strict_json(event) + "\n")
        else:
            _write_run(found, candidate, beside, out, event, certify_offset)
        if evidence:
            lines = "".join(f"{strict_json(row)}\n" for row in evidence)
            write_atomically(beside / "swap-evidence.jsonl", lines)
        refuse_existing(out)


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
    newcomers = {n: m for n, m in candidate.newcomers.items() if n in team.policies}
    for name, model in newcomers.items():
        where = _save_newcomer(team, name, model, beside / NEWCOMERS, out / NEWCOMERS)
        sections[name] = sections[name].model_copy(update={"model": where})
    section = recipe.team.model_copy(update={"agents": sections})
    new = recipe.model_copy(update={"team": section})
    transplant(
        found.run,
        found.checkpoint,
        target,
        agents=list(team.policies),
        newcomers={n: Newcomer(weights_of(team.policies[n])) for n in newcomers},
        beta=recipe.trust_region.beta,
        reference=recipe.objective.reference_kl > 0,
        certify_offset=certify_offset,
        event=event,
        recipe=new.model_dump(mode="json"),
    )
    save_recipe(new, target.recipe)
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
    elif not source.exists():
        return model
    else:
        if source.is_dir():
            shutil.copytree(source, beside / name)
        else:
            (beside / name).mkdir()
            shutil.copy2(source, beside / name)
        base = Path(str(policy.causal_lm.config._name_or_path))
        if (source / "adapter_config.json").is_file() and base.is_dir():
            shutil.copytree(base, beside / base.name, dirs_exist_ok=True)
    return str(final.resolve() / name)


def _write_team(found: Found, candidate: Candidate, beside: Path, out: Path) -> None:
    team, manifest = candidate.cast.team, manifest_of(found.path)
    old = manifest["agents"]
    kept = {n: old[n] for n in team.specs if n not in candidate.newcomers}
    dirs = [folder for entry in kept.values() for folder in _folders(entry)]
    left_out = [f for entry in old.values() for f in _folders(entry) if f not in dirs]
    entries: dict[str, Any] = {}
    for name in team.specs:
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
        if name in team.policies:
            team.save_agent(name, beside, out, {})


def _folders(entry: Mapping[str, Any]) -> list[str]:
    """The directories of an agent in its team's."""
    return [each["dir"] for each in (entry, entry.get("mixture", {})) if "dir" in each]
