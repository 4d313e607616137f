"""Engines for agents whose models are served elsewhere, beside the engine of local ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from satune.agents.loading import AgentSpec
from satune.engines.routed import RoutedEngine
from satune.loading import served
from satune.types import Engine, UserError

OpenSeats = Callable[[str, Mapping[str, str], Mapping[str, Any]], Engine]
"""(address, the model of each seat, options of ``team.agents.*.server``) to an engine."""


def open_seats(
    address: str,
    models: Mapping[str, str],
    options: Mapping[str, Any],
    answers: Path | None = None,
) -> Any:
    """An engine over an OpenAI-compatible server; ``answers`` is the file of what it answered.
    Raises UserError without the package that asks, and for options out of range."""
    try:
        from satune.engines.openai import OpenAIEngine, ServerSettings
    except ModuleNotFoundError as error:
        raise UserError(
            f"{address}: to ask a server needs {error.name}; pip install 'satune[openai]'"
        ) from None
    options = dict(options)
    variable = options.pop("api_key_env", "OPENAI_API_KEY")
    settings = ServerSettings(**options)
    return OpenAIEngine(address, models, settings, key_variable=variable, answers=answers)


def with_served(
    local: Engine,
    specs: Mapping[str, AgentSpec],
    seats: Mapping[str, str],
    open_seats: OpenSeats,
) -> Engine:
    """``local``, and the servers of the agents in ``specs`` for the seats they fill: one engine for
    those that are asked alike at one address."""
    asked: dict[Any, dict[str, str]] = {}
    for seat, agent in seats.items():
        at = served(specs[agent].model) if agent in specs else None
        if at is not None:
            alike = (at[0], tuple(sorted(specs[agent].server.items())))
            asked.setdefault(alike, {})[seat] = at[1]
    if not asked:
        return local
    there: dict[str, Engine] = {}
    for (address, options), models in asked.items():
        there |= dict.fromkeys(models, open_seats(address, models, dict(options)))
    return RoutedEngine(local, there, {seats[seat]: engine for seat, engine in there.items()})
