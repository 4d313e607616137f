"""Certificate and gate: what a change of the team can claim, and whether the team keeps it.

THEORY §5 and §8. A certificate compares the team as it is with the team at the last certificate, on
problems that gave no gradient. Both sides are drawn for it alone, with the same uniforms: the
difference is as unbiased as with independent draws, and less noisy. A refused change is shrunk
towards the old team and tested anew, on new problems; then it is reverted, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from satune.agents.weights import Weights
from satune.core.certificates import (
    StatisticalCertificate,
    balance_evidence,
    certify,
    fresh_evidence,
    pessimistic_evidence,
)
from satune.core.confidence import Spending
from satune.training.change import Change, log_ratios, region_of
from satune.training.ledger import Ledger, Test
from satune.training.own_steps import measure_own_steps, theory_rows
from satune.training.ports import Agents, Outcome, World
from satune.training.settings import CertifySettings, TrainingSettings
from satune.training.state import CertifyState, Held, State
from satune.types import Episode, Key

SHRINK = 0.25
"""How much of a refused change is tried next; KL falls with its square."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a step; ``run_stage`` has it written into the run's state.

    ``accepted``, ``log_ratio_E``, ``log_ratio_H`` and ``event`` are the step's as the gate left
    them. ``versions`` names every agent whose weights the engine has to be given, and their number.
    ``issued`` and ``certify`` take the place of the state's, ``totals`` are added to its totals
    and, where there was a test, ``claim`` is what the stage's certificate says now.
    ``spent`` tells that the experience in use is of a change that was not kept as it was, and
    ``reverted`` names the agents whose steps since the last certificate were all taken back.
    """

    accepted: bool
    beta: float
    log_ratio_E: Tensor
    log_ratio_H: Tensor | None
    event: dict[str, Any]
    versions: Mapping[str, int]
    issued: dict[str, int]
    certify: CertifyState
    totals: Mapping[str, float]
    claim: dict[str, Any] | None = None
    spent: bool = False
    reverted: tuple[str, ...] = ()


@dataclass(slots=True)
class Trial:
    """One change of the team before the gate: what was tried, and what that used up.

    ``versions`` has the number of every weights that the change has put in place, ``issued`` the
    highest given out; ``spending`` and ``offset`` are those of ``CertifyState``.
    """

    change: Change
    versions: dict[str, int]
    issued: dict[str, int]
    spending: Spending
    offset: int
    scale: float = 1.0
    candidates: list[list[float]] = field(default_factory=list)
    alpha: float = 0.0
    tokens: int = 0
    episodes: int = 0
    certificate: dict[str, Any] = field(default_factory=dict)
    verdict: str = "kept"
    reason: str = ""

    def shrink(self) -> None:
        """Put a smaller candidate in place of the one that was refused, under new numbers."""
        self.scale *= SHRINK
        self.change.shrink(self.scale)
        for name in self.versions:
            self.issued[name] += 1
            self.versions[name] = self.issued[name]


def judge(
    agent: str,
    outcome: Outcome,
    key: Key,
    *,
    state: State,
    settings: TrainingSettings,
    learners: Agents,
    world: World,
    ledger: Ledger,
) -> Verdict:
    """Certify the change since the last certificate where one is due, and let the gate decide.

    ``outcome`` is the step that ``agent`` just made; its learner holds what the trust region
    accepted. ``state`` is the run's before the step and is only read. When this returns, the
    learners hold what the gate decided, and the engine has been given candidates only: it has to
    be given the verdict's versions.
    """
    issued, versions = dict(state.issued), dict[str, int]()
    certify = state.certify
    if outcome.accepted:
        issued[agent] += 1
        versions[agent] = issued[agent]
    verdict = Verdict(
        outcome.accepted,
        outcome.beta,
        outcome.log_ratio_E,
        outcome.log_ratio_H,
        outcome.event,
        versions,
        issued,
        certify,
        {"updates": int(outcome.accepted)},
    )
    if settings.certify.problems == 0:
        return verdict
    held = dict(certify.held)
    if outcome.accepted:
        assert outcome.before is not None
        outcome.before.rest()  # the device is for the certificate's episodes, or the next step
        first = Held(outcome.before, state.versions[agent], (key.stage, key.step), changes=0)
        before = held.get(agent, first)
        held[agent] = replace(before, changes=before.changes + 1)
    steps = certify.steps + 1
    if not _due(settings, state.order, steps, key):
        return replace(verdict, certify=replace(certify, steps=steps, held=held))
    if not held:
        return replace(verdict, certify=replace(certify, steps=0))

    started = time.perf_counter()
    change = Change({name: learners[name] for name in held}, held)
    trial = Trial(
        change,
        {name: (state.versions | versions)[name] for name in held},
        issued,
        replace(certify.spending),
        certify.offset,
    )
    _try(trial, settings, world, ledger, key)
    if trial.verdict == "reverted":
        change.revert()
        trial.versions = {name: before.version for name, before in held.items()}
    seconds = time.perf_counter() - started

    verdict = replace(
        verdict,
        event=outcome.event | _said(outcome.event, trial, settings.certify, seconds),
        versions=trial.versions,
        certify=CertifyState(trial.spending, trial.offset),
        totals={
            "updates": int(outcome.accepted),
            "certify_episodes": trial.episodes,
            "certify_tokens": trial.tokens,
            "certify_seconds": seconds,
        },
        claim=_claim(state.opening.get("certificate"), trial),
    )
    if trial.verdict in ("shrunk", "reverted"):
        return _altered(verdict, outcome, trial, state, settings)
    return verdict


def tests_left(
    settings: TrainingSettings, agents: int, stage: int, step: int, uncertified: int
) -> int:
    """The most tests that may come after ``stage`` whole stages and ``step`` steps of the next one,
    ``uncertified`` steps of which no certificate covers yet."""
    certify = settings.certify
    if settings.schedule.together:
        windows = settings.stages - stage
    else:
        steps = (settings.stages - stage) * agents - step
        windows = -(-(uncertified + steps) // certify.every) if steps else 0
    return windows * (1 + certify.backtracks * (certify.accept == "certified"))


def decisions_missing(settings: TrainingSettings, agents: int, state: State) -> str | None:
    """Why a run that goes on from ``state`` with ``agents`` that learn might run out of tests: its
    gate would then refuse all that later stages bring. None where it cannot."""
    spending = state.certify.spending
    if not settings.certify.gated or spending.decisions is None:
        return None
    left = tests_left(settings, agents, state.stage, state.step, state.certify.steps)
    if spending.used + left <= spending.decisions:
        return None
    return (
        f"the run declared {spending.decisions} tests of its confidence and has used "
        f"{spending.used}, more stages may need another {left}; a new run with certify.decisions: "
        "open has no such end"
    )


def decisions_spent_ahead(
    settings: TrainingSettings, agents: int, state: State, ledger: Ledger
) -> str | None:
    """What a run that goes back to ``state`` has to know of the tests that it made after it: they
    stay spent, and those that are declared may not be enough for all that may come. None where they
    are, or where nothing is ahead."""
    spending = state.certify.spending
    if not settings.certify.problems or spending.decisions is None:
        return None
    left = tests_left(settings, agents, state.stage, state.step, state.certify.steps)
    if ledger.used <= spending.used or ledger.used + left <= spending.decisions:
        return None
    return (
        f"{ledger.used} of {spending.decisions} declared tests are made, up to {left} more may "
        "come: those that were made already, with the same weights, count once; others find "
        f"{spending.decisions - ledger.used} left, and then what they should test is "
        + ("refused" if settings.certify.accept == "certified" else "not certified")
    )


def _due(settings: TrainingSettings, order: Sequence[str], steps: int, key: Key) -> bool:
    """Whether ``steps`` steps without a certificate get one after the step that ``key`` names."""
    last = key.step == len(order)
    if settings.schedule.together and not last:
        # All agents learn from what the team wrote before the sweep, and are judged together.
        return False
    finished = last and key.stage == settings.stages
    return finished or steps >= settings.certify.every


def _try(trial: Trial, settings: TrainingSettings, world: World, ledger: Ledger, key: Key) -> None:
    """Test the change, shrinking it as often as the settings allow. The last candidate stays in
    place; a refused one is the caller's to revert."""
    certify = settings.certify
    gated = certify.accept == "certified"
    while True:
        key = key.at(purpose="certify", draw=len(trial.candidates))
        test = ledger.enter(
            key,
            *trial.change.digests(),
            spending=trial.spending,
            offset=trial.offset,
            problems=certify.problems,
        )
        if test is None:
            trial.reason = "the declared number of decisions is used up"
            trial.verdict = "reverted" if gated else "not tested"
            return
        certificate = _test(trial, test, settings, world, key)
        trial.candidates.append([trial.scale, certificate.lower])
        if not gated or certificate.lower >= -certify.tolerance:
            trial.verdict = "kept" if trial.scale == 1.0 else "shrunk"
            trial.reason = f"lower bound {certificate.lower:+.4f} at scale {trial.scale:g}"
            return
        trial.reason = f"lower bound {certificate.lower:+.4f} below -{certify.tolerance:g}"
        if len(trial.candidates) > certify.backtracks:
            trial.verdict = "reverted"
            return
        trial.shrink()


def _test(
    trial: Trial, test: Test, settings: TrainingSettings, world: World, key: Key
) -> StatisticalCertificate:
    """One decision on the weights in place; its certificate goes into ``trial``."""
    change, certify_by = trial.change, settings.certify
    # Both count on from whatever test was the last one; one that comes again sets nothing back.
    trial.offset = max(trial.offset, test.end)
    trial.spending.used = max(trial.spending.used, test.number)

    def draw() -> list[Episode]:
        found = world.certify(key, test.offset, certify_by.problems, certify_by.samples)
        trial.episodes += len(found)
        trial.tokens += sum(turn.completion_tokens for e in found for turn in e.turns)
        return found

    new = []
    if certify_by.evidence != "pessimistic":
        for name, version in trial.versions.items():
            world.publish(name, version, Weights(change.learners[name].export))
        new = draw()
    with change.undone():
        for name, before in change.held.items():
            world.publish(name, before.version, before.snapshot.weights)
        old = draw()
    trial.alpha += test.alpha
    # Only the bounds of the theory need the divergences as well. They are estimates, for which the
    # world's failures are no rewards.
    heard = [episode for episode in old if not episode.masked]
    steps = measure_own_steps(change, heard) if certify_by.theory and heard else None
    certificate = certify(
        _evidence(change, old, new, certify_by),
        certify_by.evidence,
        test.alpha,
        certify_by.method,
        samples=(certify_by.samples, certify_by.samples if new else 0),
        decision=test.number,
        held_out=world.certifies,
        clip=certify_by.clip,
    )
    trial.certificate = {"statistical": certificate.to_dict()}
    if steps is not None:
        regions = [region_of(change.learners[name], name, settings) for name in change.held]
        # A region is a claim about one step; of several together it says nothing.
        enforced = regions[0] if change.steps == 1 and regions[0].enabled else None
        trial.certificate["theory"] = theory_rows(heard, steps, enforced)
    return certificate


def _evidence(
    change: Change, old: Sequence[Episode], new: Sequence[Episode], certify_by: CertifySettings
) -> Tensor:
    """D of THEORY §5 [P] for each problem of the two sides."""

    def by_problem(values_E: Tensor | Sequence[float]) -> Tensor:
        values_E = torch.as_tensor(values_E, dtype=torch.float64)
        return values_E.reshape(-1, certify_by.samples)

    rewards_old, rewards_new = (by_problem([e.reward for e in side]) for side in (old, new))
    # What the world ended is not dropped: it takes the worst end.
    gone_old, gone_new = (by_problem([e.masked for e in side]).bool() for side in (old, new))
    if certify_by.evidence == "fresh":
        return fresh_evidence(rewards_old, rewards_new, (gone_old, gone_new))
    u_old = by_problem(log_ratios(change, old))
    if certify_by.evidence == "pessimistic":
        return pessimistic_evidence(rewards_old, u_old, certify_by.clip, gone_old)
    u_new = by_problem(log_ratios(change, new))
    return balance_evidence(rewards_old, u_old, rewards_new, u_new, (gone_old, gone_new))


def _said(
    event: Mapping[str, Any], trial: Trial, settings: CertifySettings, seconds: float
) -> dict[str, Any]:
    """What the step's event says of the trial."""
    gate: dict[str, Any] = {
        "accept": settings.accept,
        "verdict": trial.verdict,
        "agents": list(trial.change.held),
        "since": trial.change.since,
        "candidates": trial.candidates,
    }
    if settings.accept == "certified":
        gate |= {"tolerance": settings.tolerance, "reason": trial.reason}
    return ({"certificate": trial.certificate} if trial.certificate else {}) | {
        "gate": gate,
        "tokens": {**event["tokens"], "certify": trial.tokens},
        "seconds": {**event.get("seconds", {}), "certify": seconds},
    }


def _altered(
    verdict: Verdict, outcome: Outcome, trial: Trial, state: State, settings: TrainingSettings
) -> Verdict:
    """The verdict on a change that was shrunk or reverted: what follows for its steps and for the
    experience in use."""
    reverted, held = trial.verdict == "reverted", trial.change.held
    earlier = trial.change.steps - outcome.accepted
    if reverted:
        # The team no longer has what it took in earlier steps; this one's it never took.
        totals = {**verdict.totals, "updates": -earlier}
        verdict = replace(verdict, totals=totals, reverted=tuple(held))
    assert state.batch is not None
    # What was not kept made its weights, or, which spoils it for every schedule, its episodes.
    drawn = (state.stage + 1, state.batch.drawn_before)
    played = any(before.since < drawn for before in held.values())
    weighted = settings.schedule.weighted
    verdict = replace(verdict, spent=played or (weighted and (not reverted or earlier > 0)))
    if not outcome.accepted:
        return verdict
    event = verdict.event | {"scale": 0.0 if reverted else verdict.event["scale"] * trial.scale}
    if reverted:
        event |= {"accepted": False, "reason": f"gate: {trial.reason}"}
    nothing = {"log_ratio_E": torch.zeros_like(outcome.log_ratio_E), "log_ratio_H": None}
    return replace(verdict, accepted=not reverted, event=event, **nothing)


def _claim(noted: Mapping[str, Any] | None, trial: Trial) -> dict[str, Any]:
    """The stage's certificate with this trial in it: the bounds of the stage's changes, which hold
    together with the sum of their error probabilities. A change that was reverted moves nothing.
    The first one may have begun in an earlier stage; the sum is then about the time ``since`` its
    first step."""
    since = trial.change.since
    found = dict(noted or {"since": since, "lower": 0.0, "alpha": 0.0, "decisions": 0})
    found["decisions"] += len(trial.candidates)
    found["alpha"] += trial.alpha
    if trial.verdict == "not tested":
        found["lower"] = -1.0
    elif trial.verdict != "reverted":
        found["lower"] = max(-1.0, found["lower"] + trial.candidates[-1][1])
    return found
