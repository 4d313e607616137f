"""What a run and the hosts of its agents have to agree on."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

from satune.config.derive import may_change
from satune.config.schema import Recipe
from satune.hosts.agent import Facts

RESUMABLE = dict(may_change(Recipe))
"""The keys that may be changed when a run is resumed, each with what allows it."""
_EACH_SIDES_OWN = (
    "team.agents.NAME.model",
    "team.agents.NAME.delta",
    "team.agents.NAME.trust_remote_code",
    "team.agents.NAME.attention",
    "critic.model",
    "task.data",
    "evaluate.data",
)
"""Beside those: where models and data lie, what only their owner runs, and δ."""


def facts_of(recipe: Recipe) -> Facts:
    """The package's version, and the digest of the recipe without what is each side's own: models,
    data, addresses, devices, δ, and whatever a resumed run may change."""
    plain = recipe.model_dump(mode="json")
    for pattern in (*RESUMABLE, *_EACH_SIDES_OWN):
        _leave_out(plain, pattern.split("."))
    text = json.dumps(plain, sort_keys=True)
    return Facts(version("satune"), hashlib.blake2b(text.encode(), digest_size=16).hexdigest())


def _leave_out(plain: Any, keys: list[str]) -> None:
    if not isinstance(plain, dict):
        return
    first, *rest = keys
    if not rest:
        plain.pop(first, None)
        return
    for inner in plain.values() if first == "NAME" else [plain.get(first)]:
        _leave_out(inner, rest)
