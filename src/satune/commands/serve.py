"""A team as it is served: by the path on which an evaluation plays it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

from satune.commands.contestant import Contestant
from satune.commands.evaluate import Wanted, chosen_protocol, chosen_task
from satune.play.match import Match
from satune.protocols.named import UNREAD, load_protocol
from satune.serve.served import Reading, ServedTeam
from satune.serve.settings import ServeSettings


def serve_team(contestant: Contestant, wanted: Wanted, limits: Mapping[str, int]) -> ServedTeam:
    """The contestant, as it is ``wanted``, ready to be asked. ``limits`` are ``ServeSettings``; as
    many conversations are open at a time as keep its engine busy, where they do not say it.

    Its task is loaded only where the protocol reads answers: a team that was trained elsewhere
    mostly comes without its data. Raises UserError for what cannot be had.
    """
    seats = contestant.sampled(wanted.temperature, wanted.max_new_tokens)
    protocol = chosen_protocol(contestant, wanted, seats)
    contestant.admit({"protocol": protocol})
    options = {key: value for key, value in protocol.items() if key != "name"}
    function = load_protocol(protocol["name"], [seat.name for seat in seats], None, **options)
    task = None
    if protocol["name"] not in UNREAD and "name" in contestant.task:
        task, _, _ = chosen_task(contestant, wanted, contestant.seed)
    match = Match(seats, function, contestant.engine, Reading(task))
    played = {
        "team": contestant.identity,
        "protocol": protocol,
        "sampling": [asdict(seat.sampling) for seat in seats],
        "precision": asdict(contestant.precision),
    }
    digest = hashlib.sha256(json.dumps(played, sort_keys=True, default=str).encode()).hexdigest()
    if "concurrency" not in limits and contestant.conversations is not None:
        limits = {**limits, "concurrency": contestant.conversations}
    return ServedTeam(match, ServeSettings(**limits), f"fp_{digest[:16]}")
