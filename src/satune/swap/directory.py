"""The new directory that a swap makes of a run or a team and the newcomers in it: written beside,
then renamed; the old one is only read.

What the untouched agents had is taken over file by file: weights, optimiser, reference, their place
at the last certificate. A newcomer begins with its own weights, no optimiser state and a fresh β.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from satune.agents.mixture import MixturePolicy
from satune.files.events import SwapEvent
from satune.files.manifest import FORMAT
from satune.files.writing import (
    disk_errors,
    identity,
    link,
    strict_json,
    tensor_errors,
    write_atomically,
    written_beside,
)
from satune.loading import HostAddress
from satune.team import Team, manifest_of
from satune.training.run_directory import RunDirectory
from satune.training.state_file import PAST, read_state, write_state
from satune.types import ServedModel, UserError

Model = str | ServedModel | HostAddress
"""What a newcomer is made from: a model here, one at a server, or an agent at its owner."""
NEWCOMERS = "newcomers"
"""The folder of a run in which the models of newcomers lie."""


@dataclass(frozen=True, slots=True)
class Newcomer:
    """An agent that the old team does not have: its parameters by name, as ``Learner.export`` has
    them, and their version number."""

    weights: Mapping[str, Tensor]
    version: int


@dataclass(frozen=True, slots=True)
class Source:
    """What a swap started from: a team directory, or a run's checkpoint by its name."""

    path: Path
    run: RunDirectory | None
    checkpoint: str | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The team that a swap makes, and how training is to go on with it.

    ``newcomers`` has the model that each was made from, ``digests`` those of the weights of agents
    that live with their owners, ``versions`` the numbers of their weights
    and ``issued`` the highest number that any weights of each agent have had. ``trainable`` tells
    whether any agent is still trained. A newcomer's penalty begins at ``beta``; ``reference``:
    whether its weights are to be its reference as well. ``certify_offset`` problems of the stream
    for certificates are used up by now. ``write_recipe`` writes the recipe of a run that goes on,
    given the file and where the model of each newcomer lies, and returns it as plain values.
    ``evidence`` has a row for each episode of a hand-over.
    """

    team: Team
    newcomers: Mapping[str, Model]
    digests: Mapping[str, str]
    versions: Mapping[str, int]
    issued: Mapping[str, int]
    trainable: bool
    beta: float
    reference: bool
    certify_offset: int
    write_recipe: Callable[[Path, Mapping[str, str]], Mapping[str, Any]]
    evidence: Sequence[Mapping[str, Any]]


def write_result(source: Source, outcome: Outcome, out: Path, event: SwapEvent) -> None:
    """Write the new team as the old one was: a run that training goes on with, or a team. Complete
    or absent. Raises UserError where ``out`` is there already or cannot be written."""
    team = outcome.team
    mixed = any(isinstance(policy, MixturePolicy) for policy in team.policies.values())
    # Nothing of a mixture is trained, so that no run goes on from it.
    goes_on = outcome.trainable and not mixed
    refuse_existing(out)
    with written_beside(out) as beside:
        if source.run is None:
            _write_team(source.path, outcome, beside, out)
        elif not goes_on:
            team.save(beside, final=out)
        if source.run is None or not goes_on:
            write_atomically(beside / "swap.json", strict_json(event) + "\n")
        else:
            _write_run(source, outcome, beside, out, event)
        if outcome.evidence:
            lines = "".join(f"{strict_json(row)}\n" for row in outcome.evidence)
            write_atomically(beside / "swap-evidence.jsonl", lines)
        refuse_existing(out)


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: is there already and is not overwritten; give another --out")


def _write_run(source: Source, outcome: Outcome, beside: Path, out: Path, event: SwapEvent) -> None:
    assert source.run is not None and source.checkpoint is not None
    team, target = outcome.team, RunDirectory(beside)
    newcomers = {n: model for n, model in outcome.newcomers.items() if isinstance(model, str)}
    models = {
        name: _save_newcomer(team, name, model, beside / NEWCOMERS, out / NEWCOMERS)
        for name, model in newcomers.items()
    }
    recipe = outcome.write_recipe(target.recipe, models)
    transplant(
        source.run,
        source.checkpoint,
        target,
        agents=list(team.policies),
        newcomers={n: Newcomer(team.policies[n].export(), outcome.versions[n]) for n in newcomers},
        issued=outcome.issued,
        beta=outcome.beta,
        reference=outcome.reference,
        certify_offset=outcome.certify_offset,
        event=event,
        recipe=recipe,
    )
    team.save(target.team, final=out / "team")


def transplant(
    source: RunDirectory,
    checkpoint: str,
    target: RunDirectory,
    *,
    agents: Sequence[str],
    newcomers: Mapping[str, Newcomer],
    issued: Mapping[str, int],
    beta: float,
    reference: bool,
    certify_offset: int,
    event: SwapEvent,
    recipe: Mapping[str, Any],
) -> None:
    """Write ``checkpoint`` of ``source``, its events and episodes into ``target``, where a resume
    finds them.

    Args:
        agents: all agents of the new team in their order; those not in ``newcomers`` are kept.
        issued: the highest number of each agent's weights, by now.
        beta, reference, certify_offset: as in ``Outcome``.
        event: the swap; ``stage`` is set here.
        recipe: what the new run goes on under, as plain values.

    A stage that the checkpoint stands in the middle of is closed where it stands: its experience
    is another team's, and so is what was drawn ahead. The event then names it under
    ``closed_stage``.
    """
    path = source.checkpoints / checkpoint
    held = read_state(path)
    state: dict[str, Any] = held["state"]
    kept = [name for name in agents if name not in newcomers]
    told: SwapEvent = {**event}
    if state["step"] > 0:
        state["stage"] += 1
        told["closed_stage"] = state["stage"]
    told["stage"] = state["stage"]
    numbers = {name: newcomer.version for name, newcomer in newcomers.items()}
    state |= {
        "step": 0,
        "order": list(agents),
        "accepted": {},
        "opening": {},
        "betas": {name: state["betas"][name] if name in kept else beta for name in agents},
        "versions": _of(state["versions"], kept, agents) | numbers,
        "issued": {name: issued[name] for name in agents},
    }
    state.pop("batch", None)
    state.pop("early", None)
    certify = state["certify"]
    certify["held"] = {name: at for name, at in certify["held"].items() if name in kept}
    certify["offset"] = max(certify["offset"], certify_offset)

    with disk_errors(target.path):
        target.episodes.mkdir()
        target.checkpoints.mkdir()
    _copy_records(source, target, held["sizes"])
    if source.certify.exists():
        # All of it: what was spent on any way that the run went stays spent.
        with disk_errors(target.certify):
            shutil.copy2(source.certify, target.certify)
    target.append_event(told)
    beside = target.checkpoints / f"stage-{state['stage']:04d}"
    with disk_errors(beside):
        beside.mkdir()
    files: dict[str, list[Any]] = {}
    for relative, recorded in held["files"].items():
        agent, _, kind = relative.removesuffix(".safetensors").rpartition(".")
        wanted = not kind.startswith(PAST) and (kind != "held" or agent in certify["held"])
        if agent in kept and wanted:
            link(path / relative, beside / relative)
            files[relative] = recorded
    for name, newcomer in newcomers.items():
        tensors = {key: t.detach().cpu().contiguous() for key, t in newcomer.weights.items()}
        for part in ("weights", "reference")[: 1 + reference]:
            relative = f"{name}.{part}.safetensors"
            with tensor_errors(beside / relative):
                save_file(tensors, beside / relative)
            files[relative] = identity(beside / relative)
    held |= {
        "learner_steps": _of(held["learner_steps"], kept, agents),
        "sizes": target.sizes(),
        "files": files,
        "recipe": recipe,
    }
    write_state(beside, held)


def _of(counts: Mapping[str, int], kept: Sequence[str], agents: Sequence[str]) -> dict[str, int]:
    return {name: counts[name] if name in kept else 0 for name in agents}


def _copy_records(source: RunDirectory, target: RunDirectory, sizes: Mapping[str, Any]) -> None:
    """Events and episodes up to the lengths that the checkpoint recorded."""
    wanted = {source.events: (target.events, int(sizes["events"]))}
    for name, size in sizes["episodes"].items():
        wanted[source.episodes / name] = (target.episodes / name, int(size))
    for old, (new, size) in wanted.items():
        if size == 0:
            continue
        there = old.stat().st_size if old.exists() else 0
        if there < size:
            raise UserError(
                f"{old}: holds {there} bytes where the checkpoint recorded {size}; the run is "
                "damaged, swap from another one"
            )
        with disk_errors(new), open(old, "rb") as reading, open(new, "wb") as writing:
            left = size
            while left:
                piece = reading.read(min(left, 1 << 20))
                writing.write(piece)
                left -= len(piece)


def _copy_team(
    source: Path, target: Path, *, manifest: Mapping[str, Any], left_out: Sequence[str]
) -> None:
    """The files of a team directory without those of the agents ``left_out``, under a new manifest;
    the directories of newcomers are the caller's to add."""
    with disk_errors(target):
        for item in sorted(source.iterdir()):
            if item.name == "manifest.json" or item.name in left_out:
                continue
            if item.is_dir():
                shutil.copytree(item, target / item.name)
            else:
                shutil.copy2(item, target / item.name)
    write_atomically(target / "manifest.json", json.dumps(manifest, indent=2) + "\n")


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


def _write_team(source: Path, outcome: Outcome, beside: Path, out: Path) -> None:
    team, newcomers = outcome.team, outcome.newcomers
    manifest = manifest_of(source)
    old = manifest["agents"]
    kept = {n: old[n] for n in team.specs if n not in newcomers}
    dirs = [folder for entry in kept.values() for folder in _folders(entry)]
    left_out = [f for entry in old.values() for f in _folders(entry) if f not in dirs]
    entries: dict[str, Any] = {}
    for name in team.specs:
        entry = kept[name] if name in kept else team.entry(name)
        entries[name] = entry | {"sharing": team.sharing}
        if name in outcome.digests:
            entries[name] |= {"host": team.specs[name].host, "digest": outcome.digests[name]}
    for folder in (f for n in newcomers for f in _folders(entries[n])):
        if (source / folder).exists() and folder not in left_out:
            raise UserError(f"{source}: holds a {folder!r} that is no agent; move it away")
    _copy_team(
        source,
        beside,
        manifest=manifest | {"format": FORMAT, "seats": team.seats, "agents": entries},
        left_out=[*left_out, "swap.json", "swap-evidence.jsonl"],
    )
    for name in newcomers:
        if name in team.policies:
            team.save_agent(name, beside, out, {})


def _folders(entry: Mapping[str, Any]) -> list[str]:
    """The directories of an agent in its team's."""
    return [each["dir"] for each in (entry, entry.get("mixture", {})) if "dir" in each]
