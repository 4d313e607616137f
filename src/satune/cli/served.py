"""What ``satune serve`` and ``satune chat`` share: which team, how it plays, and how it is had."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from satune.cli.common import (
    agent_hosts,
    find_recipe,
    open_console,
    quiet_libraries,
    said_of_hosts,
    trust_of,
)

if TYPE_CHECKING:  # its libraries take seconds to load
    from satune.serve.served import ServedTeam

SAMPLING = "Sampling"
TeamGiven = Annotated[
    str, typer.Argument(metavar="RUN_OR_TEAM", help="a run or team directory, a recipe, a model")
]
Protocol = Annotated[
    str | None,
    typer.Option(
        help="a name, or file.py:function",
        show_default="the team's own, else solo for one seat and vote for several",
    ),
]
ProtocolOption = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="an option of it", show_default="the protocol's own"),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="in place of each agent's own", show_default="each agent's", rich_help_panel=SAMPLING
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="the most of a message",
        show_default="the recipe's, else half the context",
        rich_help_panel=SAMPLING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0, help="of what gives none", show_default="another each time", rich_help_panel=SAMPLING
    ),
]


def load_served(
    team: str,
    overrides: list[str] | None,
    wanted: dict[str, Any],
    limits: dict[str, int],
    trust: bool,
    allow_address: list[str] | None,
    agent_host: list[str] | None = None,
) -> ServedTeam:
    """The team, loaded and ready to be asked. ``wanted`` are fields of ``evaluate.Wanted``, the
    protocol's options as they were given; ``limits`` are ``ServeSettings``. Raises UserError for
    what cannot be had."""
    from satune.cli.progress import Display
    from satune.commands.contestant import local_contestant
    from satune.commands.evaluate import Wanted
    from satune.commands.serve import serve_team
    from satune.config.load import override
    from satune.engines.servers import Servers

    options: dict[str, Any] = {}
    for text in wanted.pop("protocol_options") or []:
        override(options, text)
    hosts = agent_hosts(agent_host)
    said = [wanted["protocol"], options, said_of_hosts(hosts)]
    spoken = trust_of(trust, overrides, allow_address, said)
    quiet_libraries()
    with Display(open_console(stderr=True)) as display:
        contestant = local_contestant(
            team,
            find_recipe(team),
            1,
            overrides or [],
            display.progress,
            Servers(),
            spoken,
            "throughput",
            hosts,
        )
        return serve_team(contestant, Wanted(**wanted, protocol_options=options), limits)
