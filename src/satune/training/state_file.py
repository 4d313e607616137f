"""state.json of a checkpoint: the run's state as text, with a digest of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from satune.agents.anchor import Snapshot
from satune.core.confidence import Spending
from satune.files.arrays import read_rows
from satune.files.writing import strict_json, write_atomically
from satune.training.ports import Saved, World
from satune.training.state import Batch, CertifyState, Early, Held, Past, State
from satune.types import UserError

FORMAT = 7
STATE = "state.json"
EXPERIENCE = "experience.jsonl"
PAST = "past-"
"""How the part of an agent begins that a past version is."""

_PLAIN = (
    "stage",
    "step",
    "order",
    "accepted",
    "betas",
    "versions",
    "issued",
    "opening",
    "totals",
    "evaluations",
)
"""The fields of the state that are JSON as they are."""


def write_state(directory: Path, fields: Mapping[str, Any]) -> None:
    """Write state.json of the checkpoint in ``directory``. Raises UserError where the disk
    refuses."""
    sealed = {**fields, "digest": _digest(fields)}
    write_atomically(directory / STATE, strict_json(sealed) + "\n")


def read_state(directory: Path) -> dict[str, Any]:
    """What ``write_state`` wrote. Raises UserError, one line, where it is not what was written, or
    where another satune wrote it."""
    path = directory / STATE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        recorded = fields.pop("digest", None) if isinstance(fields, dict) else None
        found = _digest(fields)
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: damaged checkpoint (unreadable)") from None
    if not isinstance(fields, dict) or "format" not in fields:
        raise UserError(f"{path}: damaged checkpoint (unreadable)")
    if fields["format"] != FORMAT:
        raise UserError(
            f"{directory}: checkpoint format {fields['format']!r}, this satune reads {FORMAT}"
        )
    if recorded != found:
        raise UserError(f"{path}: damaged checkpoint (content changed)")
    return fields


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.blake2b(strict_json(fields).encode(), digest_size=16).hexdigest()


def agent_file(agent: str, part: str) -> str:
    """The file of a checkpoint that holds a part of an agent: weights, optimizer, critic,
    reference, or what it was at the last certificate (held)."""
    return f"{agent}.{part}.safetensors"


def past_file(agent: str, version: int) -> str:
    """The file of a checkpoint that holds weights which draw a batch of a later stage."""
    return agent_file(agent, f"{PAST}{version}")


def pair(numbers: Sequence[int]) -> tuple[int, int]:
    first, second = numbers
    return first, second


def to_json(
    saved: Saved, steps: Mapping[str, int], hosts: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """All of state.json but the list of files. ``hosts`` has what the agents that live elsewhere
    call their part of the checkpoint."""
    state, certify = saved.state, saved.state.certify
    fields: dict[str, Any] = {name: getattr(state, name) for name in _PLAIN}
    fields["certify"] = {
        "spending": certify.spending.to_dict(),
        "offset": certify.offset,
        "steps": certify.steps,
        "held": {
            name: {
                "version": held.version,
                "since": list(held.since),
                "changes": held.changes,
                "steps": held.snapshot.steps,
            }
            for name, held in certify.held.items()
        },
    }
    if state.batch is not None:
        # repr of a float reads back to the same float, so JSON keeps log w bit for bit.
        fields["batch"] = {
            "log_weights": state.batch.log_weights,
            "drawn_before": state.batch.drawn_before,
            "reward": state.batch.reward,
            "spent": state.batch.spent,
        }
        if state.batch.log_ratios is not None:
            fields["batch"]["log_ratios"] = state.batch.log_ratios
    if state.early:
        fields["early"] = [
            {"stage": e.stage, "offset": e.offset, "versions": e.versions} for e in state.early
        ]
    return {
        "format": FORMAT,
        "recipe": saved.recipe,
        "state": fields,
        "offset": saved.offset,
        "learner_steps": dict(steps),
        "sizes": saved.sizes,
        **({"hosts": dict(hosts)} if hosts else {}),
    }


def from_json(fields: Mapping[str, Any], directory: Path, world: World) -> Saved:
    """What ``to_json`` was given; tensors and episodes are read from ``directory``."""
    plain = fields["state"]
    certify, batch = plain["certify"], plain.get("batch")
    held = {
        name: Held(
            _held(directory / agent_file(name, "held"), held["steps"]),
            held["version"],
            pair(held["since"]),
            held["changes"],
        )
        for name, held in certify["held"].items()
    }
    spending = Spending.from_dict(certify["spending"])
    early = [Early(**each) for each in plain.get("early", ())]
    state = State(
        certify=CertifyState(spending, certify["offset"], certify["steps"], held),
        early=early,
        past=_past(early, fields["files"], directory),
        **{name: plain[name] for name in _PLAIN},
    )
    if batch is not None:
        state.batch = Batch(
            [world.from_row(row) for row in read_rows(directory / EXPERIENCE)],
            [float(w) for w in batch["log_weights"]],
            batch["drawn_before"],
            float(batch["reward"]),
            batch["spent"],
            batch.get("log_ratios"),
        )
    return Saved(state, fields["offset"], fields["sizes"], fields["recipe"])


def _past(early: Sequence[Early], files: Mapping[str, Any], directory: Path) -> Past:
    """The weights that the checkpoint's files hold of what draws ahead: of agents that learn."""
    found: Past = {}
    named = {(a, number) for each in early for a, number in each.versions.items()}
    for agent, version in sorted(named):
        relative = past_file(agent, version)
        if relative in files:
            found.setdefault(agent, {})[version] = load_file(directory / relative)
    return found


def flat_snapshot(snapshot: Snapshot) -> dict[str, Tensor]:
    """The tensors of a snapshot as one file holds them."""
    parts = {
        "weights": snapshot.weights,
        "optimizer": snapshot.optimizer,
        "critic": snapshot.critic,
    }
    return {f"{part}|{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def snapshot_of(tensors: Mapping[str, Tensor], steps: int) -> Snapshot:
    """The snapshot, after so many steps, that ``flat_snapshot`` was given."""
    parts: dict[str, dict[str, Any]] = {"weights": {}, "optimizer": {}, "critic": {}}
    for name, tensor in tensors.items():
        part, inner = name.split("|", 1)
        parts[part][inner] = tensor
    return Snapshot(parts["weights"], parts["optimizer"], steps, parts["critic"])


def _held(path: Path, steps: int) -> Snapshot:
    """The snapshot in a file; where there is none its agent lives elsewhere, and so does it."""
    return snapshot_of(load_file(path) if path.is_file() else {}, steps)
