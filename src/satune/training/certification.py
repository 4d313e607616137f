"""Certificate and gate: what a change of the team can claim, and whether the team keeps it.

THEORY §5 and §8. A certificate compares the team as it is with the team at the last certificate, on
problems that gave no gradient. Both sides are drawn for it alone, with the same uniforms: the
difference is as unbiased as with independent draws, and less noisy. A refused change is shrunk
towards the old team and tested anew, on new problems; then it is reverted, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from satune.agents.anchor import Snapshot
from satune.agents.ports import Learner
from satune.core.certificates import (
    StatisticalCertificate,
    balance_evidence,
    certify,
    fresh_evidence,
    pessimistic_evidence,
)
from satune.core.confidence import Spending
from satune.core.ratios import sequence_log_ratio
from satune.training.settings import CertifySettings, TrainingSettings
from satune.training.theory import measure_own_steps, theory_rows
from satune.training.update import Outcome, own_turns
from satune.types import Episode, Key

if TYPE_CHECKING:
    from satune.training.run import Training

SHRINK = 0.25
"""How much of a refused change is tried next; KL falls with its square."""


@dataclass(frozen=True, slots=True)
class Held:
    """An agent as it was at the last certificate, resting on the CPU, and the version it had then.
    ``since`` is the (stage, step) of the first change that it has made after."""

    snapshot: Snapshot
    version: int
    since: tuple[int, int]


@dataclass(slots=True)
class CertifyState:
    """What certification has used up, and what the next certificate compares with.

    ``offset`` counts problems drawn, ``steps`` those since the last certificate, ``held`` has the
    agents that have changed since.
    """

    spending: Spending
    offset: int = 0
    steps: int = 0
    held: dict[str, Held] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """The agents that changed since the last certificate, in ``steps`` accepted steps: as they
    were, and, once a smaller change is tried, what was proposed."""

    learners: Mapping[str, Learner]
    held: Mapping[str, Held]
    steps: int = 1
    proposed: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def since(self) -> dict[str, int]:
        """The first step that the change consists of: what is old is the team before it."""
        stage, step = min(held.since for held in self.held.values())
        return {"stage": stage, "step": step}

    @contextmanager
    def undone(self, *names: str) -> Iterator[None]:
        """The old weights of these agents (none named: of all that changed) in place for as long
        as the block runs. Optimisers are let be."""
        learners = {name: self.learners[name] for name in names or self.learners}
        present = {name: learner.export() for name, learner in learners.items()}
        for name, learner in learners.items():
            learner.load_weights(self.held[name].snapshot.weights)
        try:
            yield
        finally:
            for name, learner in learners.items():
                learner.load_weights(present[name])

    def shrink(self, scale: float) -> None:
        """``scale`` of the way from the old weights to those in place before the first shrink."""
        for name, learner in self.learners.items():
            if name not in self.proposed:
                self.proposed[name] = learner.export()
            learner.interpolate(self.held[name].snapshot.weights, self.proposed[name], scale)

    def revert(self) -> None:
        for name, learner in self.learners.items():
            learner.restore(self.held[name].snapshot)


@dataclass(slots=True)
class Trial:
    """One change of the team before the gate: what was tried, and what that cost."""

    scale: float = 1.0
    candidates: list[list[float]] = field(default_factory=list)
    alpha: float = 0.0
    tokens: int = 0
    episodes: int = 0
    certificate: dict[str, Any] = field(default_factory=dict)
    verdict: str = "kept"
    reason: str = ""


def judge(training: Training, agent: str, outcome: Outcome, key: Key) -> Outcome:
    """Certify the change since the last certificate where one is due, and let the gate decide.

    ``outcome`` is the step that ``agent`` just made; its learner holds what the trust region
    accepted. Returns the outcome with the certificate and the gate's verdict in its event; after a
    shrink or a revert the learners hold that, and experience that no longer fits is marked spent.
    """
    settings, state = training.settings.certify, training.state
    if settings.problems == 0:
        return outcome
    if outcome.accepted:
        assert outcome.before is not None
        outcome.before.rest()  # the device is for the certificate's episodes, or the next step
        at = (key.stage, key.step)
        state.certify.held.setdefault(agent, Held(outcome.before, state.versions[agent], at))
    state.certify.steps += 1
    if not _due(training, key):
        return outcome
    held, state.certify.held, state.certify.steps = state.certify.held, {}, 0
    if not held:
        return outcome
    started = time.perf_counter()
    learners = {name: training.learners[name] for name in held}
    taken = sum(state.versions[name] - before.version for name, before in held.items())
    change = Change(learners, held, taken + outcome.accepted)
    trial = _try(training, change, key)
    _note_stage(training, change, trial)
    outcome = _settle(training, agent, outcome, change, trial)
    seconds = time.perf_counter() - started
    costs = {"episodes": trial.episodes, "tokens": trial.tokens, "seconds": seconds}
    for name, cost in costs.items():
        total = f"certify_{name}"
        state.totals[total] = state.totals.get(total, 0) + cost
    gate: dict[str, Any] = {
        "accept": settings.accept,
        "verdict": trial.verdict,
        "agents": list(held),
        "since": change.since,
        "candidates": trial.candidates,
    }
    if settings.accept == "certified":
        gate |= {"tolerance": settings.tolerance, "reason": trial.reason}
    event = outcome.event
    event |= ({"certificate": trial.certificate} if trial.certificate else {}) | {"gate": gate}
    event["tokens"] = {**event["tokens"], "certify": trial.tokens}
    event["seconds"] = {**event.get("seconds", {}), "certify": seconds}
    return replace(outcome, event=event)


def tests_left(
    settings: TrainingSettings, agents: int, stage: int, step: int, uncertified: int
) -> int:
    """The most tests that may come after ``stage`` whole stages and ``step`` steps of the next one,
    ``uncertified`` steps of which no certificate covers yet."""
    certify = settings.certify
    if settings.schedule.name == "simultaneous":
        windows = settings.stages - stage
    else:
        steps = (settings.stages - stage) * agents - step
        windows = -(-(uncertified + steps) // certify.every) if steps else 0
    return windows * (1 + certify.backtracks * (certify.accept == "certified"))


def _due(training: Training, key: Key) -> bool:
    settings, order = training.settings, training.state.order
    last = key.step == len(order)
    if settings.schedule.name == "simultaneous" and not last:
        # Nobody has been given the new weights before the sweep is over.
        return False
    finished = last and key.stage == settings.stages
    return finished or training.state.certify.steps >= settings.certify.every


def _try(training: Training, change: Change, key: Key) -> Trial:
    """Test the change, shrinking it as often as the settings allow; leaves the last candidate."""
    settings, spending = training.settings.certify, training.state.certify.spending
    gated = settings.accept == "certified"
    trial = Trial()
    while True:
        if spending.exhausted:
            trial.reason = "the declared number of decisions is used up"
            trial.verdict = "reverted" if gated else "not tested"
            return trial
        certificate = _test(training, change, key.at(draw=len(trial.candidates)), trial)
        trial.candidates.append([trial.scale, certificate.lower])
        if not gated or certificate.lower >= -settings.tolerance:
            trial.verdict = "kept" if trial.scale == 1.0 else "shrunk"
            trial.reason = f"lower bound {certificate.lower:+.4f} at scale {trial.scale:g}"
            return trial
        trial.reason = f"lower bound {certificate.lower:+.4f} below -{settings.tolerance:g}"
        if len(trial.candidates) > settings.backtracks:
            trial.verdict = "reverted"
            return trial
        trial.scale *= SHRINK
        change.shrink(trial.scale)


def _test(training: Training, change: Change, key: Key, trial: Trial) -> StatisticalCertificate:
    """One decision on the weights in place; its certificate goes into ``trial``."""
    settings, state = training.settings.certify, training.state.certify
    key = key.at(purpose="certify")
    offset = state.offset
    state.offset += settings.problems

    def draw(versions: Mapping[str, int]) -> list[Episode]:
        for name, version in versions.items():
            training.world.publish(name, version)
        found = training.world.certify(key, offset, settings.problems, settings.samples)
        trial.episodes += len(found)
        trial.tokens += sum(turn.completion_tokens for e in found for turn in e.turns)
        return found

    new = []
    if settings.evidence != "pessimistic":
        new = draw({name: training.state.versions[name] + 1 for name in change.held})
    with change.undone():
        old = draw({name: held.version for name, held in change.held.items()})
    alpha = state.spending.next()
    trial.alpha += alpha
    # Only the bounds of the theory need the divergences as well.
    steps = measure_own_steps(change, old) if settings.theory else None
    rewards = [_by_problem([e.reward for e in episodes], settings) for episodes in (old, new)]
    # What the world ended is not dropped: it takes the worst end.
    gone = [_by_problem([e.masked for e in episodes], settings).bool() for episodes in (old, new)]
    missing = (gone[0], gone[1])
    if settings.evidence == "fresh":
        evidence_P = fresh_evidence(*rewards, missing=missing)
    elif settings.evidence == "balance":
        u_old, u_new = (_by_problem(log_ratios(change, e), settings) for e in (old, new))
        evidence_P = balance_evidence(rewards[0], u_old, rewards[1], u_new, missing)
    else:
        u_old = _by_problem(log_ratios(change, old), settings)
        evidence_P = pessimistic_evidence(rewards[0], u_old, settings.clip, missing[0])
    certificate = certify(
        evidence_P,
        settings.evidence,
        alpha,
        settings.method,
        samples=(settings.samples, settings.samples if new else 0),
        decision=state.spending.used,
        held_out=training.world.certifies,
        clip=settings.clip,
    )
    trial.certificate = {"statistical": certificate.to_dict()}
    if steps is not None:
        regions = [training.region(name) for name in change.held]
        # A region is a claim about one step; of several together it says nothing.
        enforced = regions[0] if change.steps == 1 and regions[0].enabled else None
        trial.certificate["theory"] = theory_rows(old, steps, enforced)
    return certificate


def log_ratios(change: Change, episodes: Sequence[Episode]) -> Tensor:
    """u of THEORY §5 [E]: log(new/old) over the own tokens of every agent that changed."""
    total_E = torch.zeros(len(episodes), dtype=torch.float64)
    for name, learner in change.learners.items():
        packed = own_turns(name, episodes)
        if packed.tokens == 0:
            continue
        new_T = learner.score(packed).double()
        with change.undone(name):
            old_T = learner.score(packed).double()
        total_E += sequence_log_ratio(new_T, old_T, packed.episode_T, len(episodes))
    return total_E


def _by_problem(values_E: Tensor | Sequence[float], settings: CertifySettings) -> Tensor:
    """Values of episodes that stand problem by problem, as [P, G]."""
    return torch.as_tensor(values_E, dtype=torch.float64).reshape(-1, settings.samples)


def _settle(
    training: Training, agent: str, outcome: Outcome, change: Change, trial: Trial
) -> Outcome:
    """Put the verdict into effect: weights, versions, engine, experience, the step's outcome."""
    state = training.state
    if trial.verdict == "reverted":
        change.revert()
        # The team no longer has what it took in earlier steps; this one's it never took.
        state.totals["updates"] -= change.steps - outcome.accepted
    known = any(held.version != state.versions[name] for name, held in change.held.items())
    altered = trial.verdict in ("shrunk", "reverted")
    for name, held in change.held.items():
        taken = held.version != state.versions[name]
        proposal = name == agent and outcome.accepted
        if altered and taken and not (proposal and trial.verdict == "shrunk"):
            # What the team took in an earlier step is no longer what it has.
            state.versions[name] += 1
        training.publish(name)
    if not altered:
        return outcome
    assert state.batch is not None
    # What was not kept made its weights, or, which spoils it for every schedule, its episodes.
    drawn = (state.stage + 1, state.batch.drawn_before)
    played = any(held.since < drawn for held in change.held.values())
    weighted = training.settings.schedule.name in ("reuse", "hybrid")
    state.batch.spent |= played or (weighted and (trial.verdict == "shrunk" or known))
    if not outcome.accepted:
        return outcome
    reverted = trial.verdict == "reverted"
    event = outcome.event | {"scale": 0.0 if reverted else outcome.event["scale"] * trial.scale}
    if reverted:
        event |= {"accepted": False, "reason": f"gate: {trial.reason}"}
    nothing_E = torch.zeros_like(outcome.log_ratio_E)
    return replace(outcome, accepted=not reverted, log_ratio_E=nothing_E, event=event)


def _note_stage(training: Training, change: Change, trial: Trial) -> None:
    """Add to the stage's certificate: the bounds of its changes, which hold together with the sum
    of their error probabilities. A change that was reverted moves nothing. The first one may have
    begun in an earlier stage; the sum is then about the time ``since`` its first step."""
    noted = training.state.opening.setdefault(
        "certificate", {"since": change.since, "lower": 0.0, "alpha": 0.0, "decisions": 0}
    )
    noted["decisions"] += len(trial.candidates)
    noted["alpha"] += trial.alpha
    if trial.verdict == "not tested":
        noted["lower"] = -1.0
    elif trial.verdict != "reverted":
        noted["lower"] = max(-1.0, noted["lower"] + trial.candidates[-1][1])
