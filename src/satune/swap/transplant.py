"""A run or a team in which some agents are others: written beside, renamed, the old one let be.

What the untouched agents had is taken over file by file: weights, optimiser, reference, their place
at the last certificate. A newcomer begins with its own weights, no optimiser state and a fresh β.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor

from satune.files.events import SwapEvent
from satune.files.writing import (
    disk_errors,
    identity,
    link,
    tensor_errors,
    write_atomically,
)
from satune.training.run_directory import RunDirectory
from satune.training.state_file import read_state, write_state
from satune.types import UserError


@dataclass(frozen=True, slots=True)
class Newcomer:
    """An agent that the old team does not have: its parameters by name, as ``Learner.export``."""

    weights: Mapping[str, Tensor]


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: is there already and is not overwritten; give another --out")


def transplant(
    source: RunDirectory,
    checkpoint: str,
    target: RunDirectory,
    *,
    agents: Sequence[str],
    newcomers: Mapping[str, Newcomer],
    beta: float,
    reference: bool,
    certify_offset: int,
    event: Mapping[str, Any],
    recipe: Mapping[str, Any],
) -> None:
    """Write ``checkpoint`` of ``source``, its events and episodes into ``target``, where a resume
    finds them.

    Args:
        agents: all agents of the new team in their order; those not in ``newcomers`` are kept.
        beta: where a newcomer's penalty begins.
        reference: whether a newcomer's weights are to be its reference as well.
        certify_offset: problems of the stream for certificates that are used up by now.
        event: the fields of the ``swap`` event.
        recipe: what the new run goes on under, as plain values.

    A stage that the checkpoint stands in the middle of is closed where it stands: its experience
    is another team's. The event then names it under ``closed_stage``.
    """
    path = source.checkpoints / checkpoint
    held = read_state(path)
    state: dict[str, Any] = held["state"]
    kept = [name for name in agents if name not in newcomers]
    fields = dict(event)
    if state["step"] > 0:
        state["stage"] += 1
        fields["closed_stage"] = state["stage"]
    fields["stage"] = state["stage"]
    # A newcomer may bear the name of an agent whose numbers are given out.
    fresh = {name: state["issued"].get(name, -1) + 1 for name in newcomers}
    state |= {
        "step": 0,
        "order": list(agents),
        "accepted": {},
        "opening": {},
        "betas": {name: state["betas"][name] if name in kept else beta for name in agents},
        "versions": _of(state["versions"], kept, agents) | fresh,
        "issued": _of(state["issued"], kept, agents) | fresh,
    }
    state.pop("batch", None)
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
    target.append_event(cast(SwapEvent, {"event": "swap", **fields}))
    beside = target.checkpoints / f"stage-{state['stage']:04d}"
    with disk_errors(beside):
        beside.mkdir()
    files: dict[str, list[Any]] = {}
    for relative, recorded in held["files"].items():
        agent, _, kind = relative.removesuffix(".safetensors").rpartition(".")
        if agent in kept and (kind != "held" or agent in certify["held"]):
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


def copy_team(
    source: Path,
    target: Path,
    *,
    manifest: Mapping[str, Any],
    left_out: Sequence[str],
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
