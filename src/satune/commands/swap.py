"""Giving seats of a trained team to other models, from the request to the new directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from satune.agents.mixture import MixturePolicy, tokenizer_difference
from satune.commands.assemble import Cast
from satune.commands.project import PREVIEWED, preview, project_seat
from satune.commands.reseat import Found, Reseated, load_found, with_newcomer
from satune.commands.swap_request import (
    Given,
    Pair,
    SwapRequest,
    check_request,
    kept_answers,
    swap_lock,
)
from satune.commands.trust import remember
from satune.config.load import save_recipe
from satune.core.confidence import Spending
from satune.engines.servers import Servers
from satune.files.events import Distillation, Event, Notice, SwapEvent, SwapRecord
from satune.play.evaluation import Evaluation, paired_difference
from satune.swap.directory import Outcome, Source, write_result
from satune.swap.handover import hand_over_between, mixture_kl
from satune.swap.settings import DELTA, DELTA_OF_ALL
from satune.tasks.catalog import draw
from satune.types import Key, Progress, UserError, no_progress

TAKEN = ("accepted", "mixture")
"""Verdicts after which the seat is not the incumbent's alone any more."""
Watch = Callable[[Event | Notice], None]
Tell = Callable[[str, Mapping[str, Any]], None]
"""(kind, fields) of what is shown as the swap goes on."""


class SwapResult(TypedDict):
    """What came of a swap, in plain values; ``out`` is the new directory, None where nothing was
    written. The other keys are those of the ``swap`` event."""

    source: str
    checkpoint: str | None
    dry_run: bool
    verdict: str
    reason: str
    tolerance: float
    confidence: float
    delta: float
    swaps: list[SwapRecord]
    tokens: int
    seconds: float
    out: str | None


def swap(
    request: SwapRequest, progress: Progress = no_progress, watch: Watch | None = None
) -> SwapResult:
    """Do what ``request`` asks and return what came of it.

    A new directory is written where a newcomer was accepted; the source is only read. Raises
    UserError for a request that cannot be met, before anything is written.
    """
    pairs = request.pairs()
    found, out = check_request(request, pairs)

    def tell(kind: str, fields: Mapping[str, Any]) -> None:
        if watch is not None:
            watch(cast(Event | Notice, {"event": kind, **fields}))

    with swap_lock(request, out), kept_answers(request, pairs, found, out) as answers:
        return _perform(request, pairs, found, out, Servers(answers=answers), progress, tell)


def _perform(
    request: SwapRequest,
    pairs: Sequence[Pair],
    found: Found,
    out: Path,
    servers: Servers,
    progress: Progress,
    tell: Tell,
) -> SwapResult:
    started = time.perf_counter()
    for line in found.passed:
        tell("note", {"text": line})
    team = load_found(found, progress, servers)
    groups = [pairs] if request.together else [[pair] for pair in pairs]
    job = _Swap(request, found, team, len(groups), progress, tell)
    # Every model is loaded, and every method found fit, before the first is measured.
    base, ready = team, []
    for group in groups:
        reseated = job.seat(base, group)
        ready.append((base, reseated, job.method(base, reseated, group)))
        base = reseated
    for group, (base, reseated, method) in zip(groups, ready, strict=True):
        # Where an earlier newcomer was refused, the others are seated in the team without it.
        fits = job.team is base
        job.give(group, reseated if fits else job.seat(job.team, group), method)
    verdicts = [record["verdict"] for record in job.records]
    result: SwapResult = {
        "source": str(request.source),
        "checkpoint": found.checkpoint,
        "dry_run": request.dry_run,
        "verdict": _overall(verdicts),
        "reason": "; ".join(r["reason"] for r in job.records if r["reason"]),
        "tolerance": request.hand_over.tolerance,
        "confidence": request.hand_over.confidence,
        "delta": job.delta,
        "swaps": job.records,
        "tokens": sum(record["tokens"] for record in job.records),
        "seconds": time.perf_counter() - started,
        "out": None,
    }
    if job.team is not team:
        event = _event(request, found, result)
        source = Source(found.path, found.run, found.checkpoint)
        write_result(source, job.outcome(), out, event)
        result["out"] = str(out)
        tell("swap", event)
        remember(job.team.cast.recipe.model_dump(mode="json"))
    return result


def _event(request: SwapRequest, found: Found, result: SwapResult) -> SwapEvent:
    return {
        "event": "swap",
        "stage": found.stage,
        "seats": [s for r in result["swaps"] if r["verdict"] in TAKEN for s in r["seats"]],
        "source": str(request.source.resolve()),
        "checkpoint": result["checkpoint"],
        "verdict": result["verdict"],
        "reason": result["reason"],
        "tolerance": result["tolerance"],
        "confidence": result["confidence"],
        "delta": result["delta"],
        "swaps": result["swaps"],
        "tokens": result["tokens"],
        "seconds": result["seconds"],
    }


def _overall(verdicts: Sequence[str]) -> str:
    if len(set(verdicts)) == 1:
        return verdicts[0]
    if all(verdict in TAKEN for verdict in verdicts):
        return "mixture"
    return "partly accepted" if any(v in TAKEN for v in verdicts) else "refused"


@dataclass(slots=True)
class _Swap:
    """A swap in progress: the team with what was accepted so far, and what it cost."""

    request: SwapRequest
    found: Found
    original: Reseated
    groups: int
    progress: Progress
    tell: Tell
    team: Reseated = field(init=False)
    spending: Spending = field(init=False)
    offset: int = field(init=False)
    before: Evaluation | None = None
    records: list[SwapRecord] = field(default_factory=list)
    evidence: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = self.request.hand_over
        self.team = self.original
        self.spending = Spending(settings.confidence, settings.looks * self.groups)
        self.offset = self.found.certify_offset

    @property
    def delta(self) -> float:
        if self.request.delta is not None:
            return self.request.delta
        return DELTA_OF_ALL if len(self.request.seats) == len(self.found.seats) else DELTA

    def seat(self, team: Reseated, group: Sequence[Pair]) -> Reseated:
        for seat, model in group:
            team = with_newcomer(
                team, seat, model, tiny=self.request.tiny, server=self.request.server
            )
        return team

    def method(self, old: Reseated, new: Reseated, group: Sequence[Pair]) -> Given:
        """The method of a group. Raises UserError where projection is asked for and impossible."""
        asked = self.request.method
        for seat, model in group:
            incumbent = old.cast.team.policies.get(old.agent_of(seat))
            newcomer = new.cast.team.policies.get(new.agent_of(seat))
            if incumbent is None or newcomer is None:
                if asked == "project":
                    raise UserError(
                        f"--seat {seat}: is filled by a model whose weights are elsewhere, and a "
                        "projection needs them; use --method handover"
                    )
                return "handover"
            difference = tokenizer_difference(incumbent.tokenizer, newcomer.tokenizer)
            if difference is not None and asked == "project":
                raise UserError(
                    f"--with {model}: its tokenizer is not that of seat {seat} ({difference}); "
                    "use --method handover"
                )
            if isinstance(incumbent, MixturePolicy):
                if asked == "project":
                    raise UserError(
                        f"--seat {seat}: is filled by a mixture of two models already; use "
                        "--method handover"
                    )
                return "handover"
            if difference is not None:
                return "handover"
        return "project" if asked == "auto" else asked

    def give(self, group: Sequence[Pair], reseated: Reseated, method: Given) -> None:
        """Measure one group of seats and, unless it is a dry run, hand them over or refuse."""
        started = time.perf_counter()
        record = self._measured(group, reseated, method)
        if method == "project":
            self._preview(reseated, group, record)
        if not self.request.dry_run:
            if method == "project":
                self._project(reseated, group, record)
            else:
                self._hand_over(reseated, record)
                if record["verdict"] == "accepted":
                    record["after"] = record["naive"]
                    record["difference"] = record["naive_difference"]
        record["seconds"] = time.perf_counter() - started
        self.records.append(record)

    def _measured(self, group: Sequence[Pair], reseated: Reseated, method: Given) -> SwapRecord:
        """A record with held-out reward before, and with the newcomers as they are."""
        tokens = 0
        if self.before is None:
            self.before = _evaluate(self.original.cast)
            tokens += self.before.tokens
        naive = _evaluate(reseated.cast)
        gain = paired_difference(self.before, naive)
        return {
            "seats": [seat for seat, _ in group],
            "agents": {seat: reseated.agent_of(seat) for seat, _ in group},
            "models": {seat: str(model) for seat, model in group},
            "method": method,
            "verdict": "measured",
            "reason": "",
            "tokens": tokens + naive.tokens,
            "seconds": 0.0,
            "before": self.before.avg_at_k,
            "naive": naive.avg_at_k,
            "naive_difference": (gain.mean, gain.low, gain.high),
            "problems": gain.problems,
        }

    def _preview(self, reseated: Reseated, group: Sequence[Pair], record: SwapRecord) -> None:
        """What a projection would be, before one is tried."""
        record["projection"] = {}
        for number, (seat, _) in enumerate(group):
            key = swap_key(self.found, len(self.records)).at(draw=number)
            figures, tokens = preview(
                self.team,
                reseated,
                seat,
                delta=self.delta,
                key=key,
                offset=self.found.train_offset,
            )
            record["projection"][seat] = figures
            record["tokens"] += tokens
            self.tell("alignment", {"seat": seat, **figures})

    def _project(self, reseated: Reseated, group: Sequence[Pair], record: SwapRecord) -> None:
        """Draw each newcomer of the group to its incumbent's neighbourhood: all of them or none."""
        team: Reseated | None = self.team
        distillation: dict[str, Distillation] = {}
        record["distillation"] = distillation
        previewed = record.get("projection", {})
        for seat, _ in group:
            assert team is not None
            team, found, tokens = project_seat(
                team,
                reseated,
                seat,
                delta=self.delta,
                otherwise=self.request.fallback,
                rounds=self.request.rounds,
                key=swap_key(self.found, len(self.records)),
                offset=self.found.train_offset + PREVIEWED,
                watch=lambda row, seat=seat: self.tell("distillation", {"seat": seat, **row}),
            )
            distillation[seat] = found.event
            record["tokens"] += tokens
            record["reason"], record["kl"] = found.reason, found.event.get("kl")
            if found.decision == "mixture":
                # Of the seat as it is filled now; the student's figures stand with its rounds.
                record["kl"] = {"mixture": previewed[seat]["kl"]}
                record["reason"] += "; the mixture of both, inside it everywhere, fills the seat"
            if team is None:
                record["verdict"] = "refused"
                return
        assert team is not None and self.before is not None
        after = _evaluate(team.cast)
        gain = paired_difference(self.before, after)
        record["tokens"] += after.tokens
        record["after"] = after.avg_at_k
        record["difference"] = (gain.mean, gain.low, gain.high)
        decisions = {found["decision"] for found in distillation.values()}
        if "outside" in decisions:
            # Too far to be taken by its divergence; its reward may still speak for it.
            record["projection_reason"] = record["reason"]
            self._hand_over(team, record)
            return
        record["verdict"] = "mixture" if "mixture" in decisions else "accepted"
        self.team = team

    def _hand_over(self, reseated: Reseated, record: SwapRecord) -> None:
        """Hand the seats over from the team that was found to the one with newcomers. All seats of
        the request share one tolerance."""
        task = self.original.cast.task
        found = hand_over_between(
            self.original.cast.match(),
            reseated.cast.match(),
            lambda count, start: draw(task, "certify", count, start),
            self.request.hand_over,
            swap_key(self.found, len(self.records)),
            self.spending,
            offset=self.offset,
            watch=lambda look: self.tell("look", {"seats": record["seats"], **look}),
        )
        self.offset = found.offset
        self.evidence += [{"seats": record["seats"], **row} for row in found.rows]
        record["verdict"], record["reason"] = found.verdict, found.reason
        record["epsilon"] = record["tv"] = found.epsilon
        record["mixture_kl"] = mixture_kl(found.epsilon)
        record["looks"] = found.looks
        if found.certificate is not None:
            record["lower"], record["claim"] = found.certificate.lower, found.certificate.claim
        record["tokens"] += found.sampled_tokens
        if found.verdict == "accepted":
            self.team = reseated

    def outcome(self) -> Outcome:
        """The team as it is now, as it is to be written."""
        cast, numbers = self.team.cast, self.team.numbers
        team, recipe = cast.team, cast.recipe
        sections = recipe.team.resolved().agents

        def write_recipe(path: Path, models: Mapping[str, str]) -> dict[str, Any]:
            agents = {
                name: section.model_copy(update={"model": models.get(name, section.model)})
                for name, section in recipe.team.agents.items()
            }
            placed = recipe.team.model_copy(update={"agents": agents})
            new = recipe.model_copy(update={"team": placed})
            save_recipe(new, path)
            return new.model_dump(mode="json")

        return Outcome(
            team=team,
            newcomers=self.team.newcomers,
            digests={name: host.digest for name, host in cast.visited.items()},
            versions={name: numbers.of(name, policy) for name, policy in team.policies.items()},
            issued=numbers.issued,
            trainable=any(not sections[name].frozen for name in team.policies),
            beta=recipe.trust_region.beta,
            reference=recipe.objective.reference_kl > 0,
            certify_offset=self.offset,
            write_recipe=write_recipe,
            evidence=self.evidence,
        )


def swap_key(found: Found, number: int) -> Key:
    return Key(found.recipe.seed, "swap", stage=found.stage, step=number + 1)


def _evaluate(cast: Cast) -> Evaluation:
    """On the problems and with the uniforms of training's evaluations."""
    return cast.evaluate(greedy=False, key=Key(cast.recipe.seed, "evaluate"))
