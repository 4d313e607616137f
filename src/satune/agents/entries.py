"""What a team's manifest says of one agent, held against its form and against what lies there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from satune.agents.messages import TemplateSettings
from satune.agents.sources import saved_adapter
from satune.files.names import is_plain
from satune.loading import HOST_VARIABLE, address_in, holds_key, model_in
from satune.types import ServedModel, UserError

PRIVATE = "private"
"""What the model of an agent that lives with its owner is called here, where nobody loads it."""
_TEMPLATE = {each.name for each in fields(TemplateSettings)}


def is_name(name: str) -> bool:
    """Whether an agent or a seat may be called so: it is no path and no part of a file's name."""
    return is_plain(name) and "." not in name


def fault_of_agent(name: str, entry: Any, directory: Path) -> str | None:
    """What is wrong with an agent's entry in a manifest; None for nothing."""
    if not is_name(name):
        return "its name has other characters than letters, digits, '-' and '_'"
    template = entry["template"]
    if not isinstance(template, dict) or not set(template) <= _TEMPLATE:
        return f"its template has other keys than {', '.join(sorted(_TEMPLATE))}"
    chat = template.get("chat")
    if chat is not None and not (isinstance(chat, str) and "{" in chat):
        return "its template.chat is no Jinja text"
    if entry.get("attention") not in (None, "sdpa", "eager"):
        return "its attention is neither sdpa nor eager"  # transformers would fetch others' code
    if "host" in entry:
        return fault_of_host(entry)
    if "served" in entry:
        try:
            model = model_of(entry, directory)
        except UserError as error:
            return str(error)
        return None if isinstance(model, ServedModel) else "served is not http://ADDRESS/v1#MODEL"
    if not isinstance(entry.get("base"), str | None):
        return "its base is no text"
    for holder in (entry, entry.get("mixture") or {"dir": name}):
        folder = holder.get("dir") if isinstance(holder, dict) else None
        if not is_plain(folder):
            return f"its directory is {folder!r}, which is no name of one beside the manifest"
        place = directory / str(folder)
        if not _is_inside(place, directory):
            return f"its directory {folder} leads out of the team's"
        saved = saved_adapter(str(place))
        base = Path(saved.base) if saved else place
        if (base.is_absolute() or ".." in base.parts) and not _is_inside(base, directory):
            return f"the base of its adapter is {base}, which lies outside of the team's directory"
    return None


def fault_of_host(entry: Mapping[str, Any]) -> str | None:
    """What is wrong with the entry of an agent that lives with its owner; None for nothing."""
    variable = entry.get("host_token_env", HOST_VARIABLE)
    if address_in(entry["host"]) is None or holds_key(entry["host"]):
        return "its host is no plain http or https address"
    if not (isinstance(variable, str) and variable.isascii() and variable.isidentifier()):
        return "its host_token_env is no name of an environment variable"
    if not (isinstance(entry.get("digest"), str) and entry["digest"]):
        return "it has no digest of the weights that its owner has"
    return None


def _is_inside(path: Path, directory: Path) -> bool:
    return path.resolve().is_relative_to(directory.resolve())


def model_of(entry: Mapping[str, Any], directory: Path) -> str | ServedModel:
    """The model of an agent's entry in the manifest of ``directory``, PRIVATE where its owner has
    it. Raises UserError for a served one whose address or name is missing."""
    if "host" in entry:
        return PRIVATE
    return model_in(entry["served"]) if "served" in entry else str(directory / entry["dir"])
