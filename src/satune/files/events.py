"""What a run tells as it goes on: one typed record a kind, written and read here alone.

Records lie in ``events.jsonl``, one a line. What may differ between two equal runs stands under
``time``, ``seconds``, ``memory``, ``rate``, ``host`` or ``pid``; everything else is equal bit for
bit. Numbers that JSON lacks are the texts "inf", "-inf" and "nan", which ``float`` turns back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from satune.files.lines import append_lines, read_lines
from satune.files.writing import strict_json, write_atomically
from satune.types import Episode

UNEQUAL = frozenset({"time", "seconds", "memory", "rate", "host", "pid"})
"""The keys, at any depth, under which equal runs may differ."""

Interval = Sequence[float]
"""[low, high] around a mean."""

Failures = dict[str, dict[str, int]]
"""How many episodes failed: {"policy": {kind: count}, "world": {kind: count}}."""


def count_failures(episodes: Iterable[Episode]) -> Failures:
    """The failures among ``episodes``, by whose they were and by their kind."""
    counts: Failures = {"policy": {}, "world": {}}
    for failure in filter(None, (episode.failure for episode in episodes)):
        of = counts["policy" if failure.policy else "world"]
        of[failure.kind] = of.get(failure.kind, 0) + 1
    return counts


class RunEvent(TypedDict):
    """``agents``: each agent's seats; ``self_check``: what engine and learner differ by."""

    event: Literal["run"]
    time: NotRequired[str]
    seed: int
    stages: int
    agents: dict[str, list[str]]
    self_check: dict[str, dict[str, float]]
    host: dict[str, Any]


class RolloutEvent(TypedDict):
    """Episodes were played to learn from. ``reward`` is their mean, ``tokens`` counts prompt,
    sampled and environment tokens. Of a batch drawn before its stage ``ahead`` has what
    ``training.ahead.correction`` found; its ``step`` is 0 where no step learns from it."""

    event: Literal["rollout"]
    time: NotRequired[str]
    stage: int
    step: int
    episodes: int
    reward: float
    failures: Failures
    tokens: dict[str, int]
    seconds: dict[str, float]
    ahead: NotRequired[dict[str, Any]]


class Divergence(TypedDict):
    """KL(proposal‖anchor) over an agent's states, nats; ``trajectory`` and ``reverse_quantile``
    hold KL(anchor‖proposal) as well. ``violation_share`` is of states, the rate of problems."""

    mean: float
    quantile: float
    max: float
    trajectory: dict[str, float]
    violation_share: NotRequired[float]
    violation_rate: float
    violation_ucb: float
    reverse_quantile: NotRequired[float]
    level_shifted_quantile: float
    states: int
    problems: int


class Gate(TypedDict):
    """How the gate decided on the change ``since`` a step: ``candidates`` are the scales tried,
    each with its lower bound."""

    accept: Literal["trust_region", "certified"]
    verdict: Literal["kept", "shrunk", "reverted", "not tested"]
    agents: list[str]
    since: dict[str, int]
    candidates: list[list[float]]
    tolerance: NotRequired[float]
    reason: NotRequired[str]


class Certificate(TypedDict):
    """What a step can claim: rows of theory, and a lower bound on the gain by statistics."""

    statistical: dict[str, Any]
    theory: NotRequired[list[dict[str, Any]]]


class UpdateEvent(TypedDict):
    """One agent's step. What only a measured proposal has is absent where none was made.

    ``version`` numbers the agent's weights after it, ``scale`` is how much of the proposal was
    taken. ``rounding`` is what training.gauge found, ``masked`` counts episodes that the world
    ended, ``at_least`` has scales whose statistic is a lower bound, ``critic`` what its values
    explained, ``publish`` how the engine took the weights, ``host`` whose owners vouch for it."""

    event: Literal["update"]
    time: NotRequired[str]
    stage: int
    step: int
    agent: str
    seats: list[str]
    schedule: str
    version: int
    failures: Failures
    episodes: int
    ess: float
    delta: float
    beta: float
    scale: float
    accepted: bool
    reason: str
    tokens: dict[str, int]
    seconds: dict[str, float]
    kl: NotRequired[Divergence]
    unit: NotRequired[str]
    candidates: NotRequired[list[list[float]]]
    at_least: NotRequired[list[float]]
    objective: NotRequired[float]
    clip_fraction: NotRequired[float]
    grad_norm: NotRequired[float]
    optimizer_steps: NotRequired[int]
    mismatch: NotRequired[dict[str, float]]
    rounding: NotRequired[dict[str, Any]]
    publish: NotRequired[dict[str, Any]]
    capped_mass: NotRequired[float]
    masked: NotRequired[int]
    critic: NotRequired[dict[str, float | None]]
    certificate: NotRequired[Certificate]
    gate: NotRequired[Gate]
    host: NotRequired[dict[str, list[str]]]


class StageEvent(TypedDict):
    """A sweep is over. ``reward`` is that of the rollout it began with, ``uncertified`` names the
    agents whose changes no certificate covers yet, ``ahead_dropped`` the stages whose batch was
    drawn by what the gate refused; ``memory`` has the ``peak`` in bytes."""

    event: Literal["stage"]
    time: NotRequired[str]
    stage: int
    reward: float
    order: list[str]
    seconds: float
    memory: dict[str, int]
    order_scores: NotRequired[dict[str, float]]
    certificate: NotRequired[dict[str, Any]]
    uncertified: NotRequired[list[str]]
    ahead_dropped: NotRequired[list[int]]


class EvalEvent(TypedDict):
    """Held-out problems after ``stage`` stages. ``figures`` has what ``play.evaluation`` computes
    beside ``reward`` and ``interval``; ``failures`` counts conversations that failed and so score
    0. ``difference`` [mean, low, high] is to the first evaluation of its kind, paired by problem.
    ``groups`` says reward, interval, problems and difference of each group that problems name."""

    event: Literal["eval"]
    time: NotRequired[str]
    stage: int
    greedy: bool
    reward: float
    interval: Interval | None
    problems: int
    samples: int
    per_problem: list[float]
    tokens: int
    failures: Failures
    figures: dict[str, Any]
    seconds: float
    difference: NotRequired[list[float]]
    groups: NotRequired[dict[str, dict[str, Any]]]


Difference = tuple[float, float | None, float | None]
"""Mean, low and high of a paired difference; no interval where too few problems were played."""


class Spread(TypedDict):
    """Mean of a figure over token states, and its quantiles at 5, 50 and 99 %; none of a NaN."""

    mean: float
    low: NotRequired[float]
    median: NotRequired[float]
    high: NotRequired[float]


class Alignment(TypedDict):
    """To first order what the projected newcomer changes the reward by (THEORY §7)."""

    score: float
    standard_error: float | None
    problems: int


Projection = TypedDict(
    "Projection",
    {
        "states": int, "inside": float, "infeasible": float, "lambda": Spread, "kl": Spread,
        "newcomer_kl": Spread, "trajectory": dict[str, float], "alignment": NotRequired[Alignment],
    },
)  # fmt: skip
"""What the projection of a newcomer would be: the shares of states that lie ``inside`` delta
already and that cannot be brought there (``infeasible``), λ, KL to the incumbent of the projection
and of the newcomer as it is, nats, and the ``reverse`` KL of trajectories."""


class Round(TypedDict):
    """A round of distillation: KL(student‖incumbent) before it, ``mean`` and ``quantile``; mean KL
    of the student to the mixture and to the newcomer; nothing was learnt without a ``grad_norm``.
    """

    round: int
    episodes: int
    states: int
    reward: float
    kl: dict[str, float]
    to_mixture: float
    to_newcomer: float
    grad_norm: NotRequired[float]


class Distillation(TypedDict):
    """What came of a distillation. ``kl`` and ``reward`` are of the states that the team visits
    with the ``newcomer`` and with the ``incumbent``; the ``decision`` stands alone where the two
    were mixed at once."""

    decision: Literal["distilled", "mixture", "refused", "outside"]
    reason: NotRequired[str]
    delta: NotRequired[float]
    aim: NotRequired[float]
    quantile: NotRequired[float]
    unit: NotRequired[str]
    rounds: NotRequired[list[Round]]
    kl: NotRequired[dict[str, Divergence]]
    trajectory: NotRequired[dict[str, float]]
    reward: NotRequired[dict[str, float]]
    version: NotRequired[int]
    seconds: NotRequired[float]


class Look(TypedDict):
    """One look of a hand-over at the evidence so far. ``epsilon`` is the newcomer's share while it
    was gathered, ``allowed`` the share it allows; ``lower`` and ``upper`` bound J(new) - J(old),
    each wrong with probability ``alpha``; ``episodes`` of either side since the last look, ``old``
    and ``new`` the mean rewards of those that the world did not end (None where it ended all).
    ``tv`` and ``kl`` hold exactly for the mixture at ``allowed``: the most that trajectories' TV
    and KL(old‖mix) can be."""

    epsilon: float
    problems: int
    episodes: int
    old: float | None
    new: float | None
    mean: float
    lower: float
    upper: float
    alpha: float
    allowed: float
    tv: float
    kl: float


class SwapRecord(TypedDict):
    """What became of one group of seats, with its agents and models by seat.

    ``before``, ``naive`` and ``after`` are held-out rewards of the old team, of the one with the
    newcomers as they are, and of the new one; differences are paired, to ``before``.
    ``projection`` has by seat what was measured before a projection was tried, ``distillation``
    what came of it, and ``projection_reason`` why it was not taken where a hand-over followed.
    ``looks`` are those of a hand-over; ``epsilon`` is the share that the last of them allows,
    ``tv`` and ``mixture_kl`` what holds exactly of the mixture at that share, ``lower`` the last
    bound and ``claim`` what it says. ``tokens`` counts what was sampled."""

    seats: list[str]
    agents: dict[str, str]
    models: dict[str, str]
    method: Literal["project", "handover"]
    verdict: Literal["measured", "accepted", "mixture", "refused", "stopped"]
    tokens: int
    seconds: float
    before: float
    naive: float
    naive_difference: Difference
    problems: int
    reason: str
    after: NotRequired[float]
    difference: NotRequired[Difference]
    projection: NotRequired[dict[str, Projection]]
    distillation: NotRequired[dict[str, Distillation]]
    kl: NotRequired[Mapping[str, Divergence | Spread] | None]
    projection_reason: NotRequired[str]
    looks: NotRequired[list[Look]]
    epsilon: NotRequired[float]
    tv: NotRequired[float]
    mixture_kl: NotRequired[float]
    lower: NotRequired[float]
    claim: NotRequired[str]


class SwapEvent(TypedDict):
    """Seats were given to other models; ``swaps`` has a record for each group of seats."""

    event: Literal["swap"]
    time: NotRequired[str]
    stage: int
    seats: list[str]
    swaps: list[SwapRecord]
    source: str
    checkpoint: str | None
    verdict: str
    reason: str
    tolerance: float
    confidence: float
    delta: float
    tokens: int
    seconds: float
    closed_stage: NotRequired[int]


Event = RunEvent | RolloutEvent | UpdateEvent | StageEvent | EvalEvent | SwapEvent
"""What events.jsonl holds; ``event`` tells the kind."""


class LookNotice(TypedDict):
    """A hand-over was looked at; ``allowed`` is the newcomer's share of the seat from now on."""

    event: Literal["look"]
    seats: list[str]
    problems: int
    mean: float
    lower: float
    allowed: float


class AlignmentNotice(TypedDict):
    """How a newcomer's projection lies and leans, on the incumbent's states."""

    event: Literal["alignment"]
    seat: str
    alignment: NotRequired[Alignment]


class DistillationNotice(TypedDict):
    """A round of distillation is over."""

    event: Literal["distillation"]
    seat: str
    round: int
    kl: dict[str, float]
    reward: float


class Note(TypedDict):
    """One line for a person."""

    event: Literal["note"]
    text: str


Notice = LookNotice | AlignmentNotice | DistillationNotice | Note
"""What is shown while a swap goes on and not written as an event."""


def append_event(path: str | Path, event: Event, *, first: bool = False) -> None:
    """Add an event to a file of them, with ``time``: when it was written, in UTC. As the ``first``
    it takes the place of all that was there: complete, or not at all.

    Raises UserError where the disk refuses, TypeError for values that are not plain.
    """
    assert "time" not in event
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    row = {"event": event["event"], "time": now, **event}
    if first:
        write_atomically(path, f"{strict_json(row)}\n")
    else:
        append_lines(path, [row])


def read_events(path: str | Path) -> list[Event]:
    """All events in order; none if the file does not exist. A last line that was still being
    written is left out. Raises UserError with file and line for any other damaged line."""
    return cast(list[Event], read_lines(path))
