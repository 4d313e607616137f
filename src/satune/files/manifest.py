"""manifest.json of a team directory: read, and held against its form and against what lies there.

{format, seats: {seat: agent}, agents: {agent: {dir, served or host, temperature, template, sharing,
delta, ...}}, protocol, task, max_new_tokens}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from satune.types import UserError

FORMAT = 1
MANIFEST = "manifest.json"
_LARGEST = 1 << 24
_KINDS: dict[str, tuple[type, ...]] = {
    "temperature": (int, float),
    "template": (dict,),
    "sharing": (str,),
    "delta": (int, float, type(None)),
}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a team directory. Raises UserError, one line, where there is none, and where
    it is damaged or of another format."""
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"{directory}: not a team directory (no manifest.json in it)")
    if path.stat().st_size > _LARGEST:
        raise UserError(f"{path}: has more than {_LARGEST:,} bytes, which no manifest needs")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: damaged JSON ({error.msg})") from error
    except (UnicodeDecodeError, RecursionError):
        raise UserError(f"{path}: damaged JSON (not a text of plain values)") from None
    fault = _fault(manifest)
    if fault is not None:
        raise UserError(f"{path}: {fault}")
    return manifest


def _fault(manifest: Any) -> str | None:
    if not isinstance(manifest, dict):
        return "damaged manifest (no object)"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')!r}, this satune reads {FORMAT}"
    for part in ("seats", "agents", "protocol", "task"):
        if not isinstance(manifest.get(part), dict):
            return f"damaged manifest (no {part})"
    agents = manifest["agents"]
    for name, entry in agents.items():
        places = (
            [entry[k] for k in ("dir", "served", "host") if k in entry] if _is_object(entry) else []
        )
        if len(places) != 1 or not isinstance(places[0], str):
            return f"damaged manifest (agents.{name}: has no dir)"
        for key, kinds in _KINDS.items():
            value = entry.get(key)
            if key not in entry or not isinstance(value, kinds) or isinstance(value, bool):
                return f"damaged manifest (agents.{name}: {key})"
    for seat, agent in manifest["seats"].items():
        if not isinstance(agent, str) or agent not in agents:
            return f"damaged manifest (seats.{seat}: no agent)"
    return None


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def missing_part(directory: Path) -> str | None:
    """What a team directory lacks of a whole team, as a path: its manifest, or the weights of an
    agent that is not served elsewhere. None where it lacks nothing."""
    try:
        manifest = read_manifest(directory)
    except UserError:
        return str(directory / MANIFEST)
    for entry in manifest["agents"].values():
        folder = directory / entry.get("dir", "")
        if "dir" in entry and not any(folder.glob("*.safetensors")):
            return f"{folder / '*.safetensors'}"
    return None
