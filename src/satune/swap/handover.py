"""The stochastic hand-over: a seat changes hands episode by episode (THEORY §7).

One coin an episode says whether the newcomer or the incumbent speaks in all of the seat's turns.
With share ε of the newcomer, TV of whole trajectories <= ε, KL(old‖mix) <= -log(1-ε), and
J(mix) = (1-ε) J(old) + ε J(new) exactly: no log-probabilities, no common tokenizer. ε is what the
evidence allows: with J(new) - J(old) >= l, the mixture loses at most -ε l.
Problems that hold both sides give the evidence: their episodes that fell to the newcomer, and the
same episodes, drawn with the same uniforms, by the team as it is. Which problems these are depends
on coins alone, so they are as independent as all problems, and their number is fixed beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from satune.core.certificates import HeldOut, StatisticalCertificate, certify, fresh_evidence
from satune.core.confidence import Spending, lower_bound
from satune.files.events import Look
from satune.play.match import Match
from satune.play.rollout import Job, play_jobs, run_alone
from satune.swap.settings import HandOverSettings
from satune.task_parts import is_fresh
from satune.types import Episode, Key, Problem

LEAST_SHARE = 1 / 64
"""A smaller share is none: hardly a problem would hold a newcomer's episode by its coins."""

Verdict = Literal["accepted", "refused", "stopped"]
Pairs = Sequence[tuple[Problem, tuple[int, ...]]]
"""Problems, each with the samples whose coin fell to the newcomer: at least one."""
Play = Callable[[Pairs, Key], tuple[list[Episode], list[Episode]]]
"""(pairs, key of the look) to the episodes of both sides, old and new, as ``pairs`` has them."""
Stream = Callable[[int, int], list[Problem]]
"""(how many, from which position of an endless sequence on) to independent problems."""


@dataclass(slots=True)
class HandOver:
    """A hand-over and how it ended. ``rows``: problem, sample, coin and reward of each episode."""

    verdict: Verdict
    reason: str
    epsilon: float
    looks: list[Look] = field(default_factory=list)
    certificate: StatisticalCertificate | None = None
    offset: int = 0
    sampled_tokens: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


def mixture_kl(epsilon: float) -> float:
    """Upper bound -log(1-ε) on KL(old‖mix) of trajectories; infinite at 1."""
    return math.inf if epsilon >= 1 else -math.log1p(-epsilon)


def newcomer_speaks(key: Key, epsilon: float) -> bool:
    """The coin of the episode ``key`` names. With a larger ε the newcomer keeps what it had."""
    return key.rng("coin").random() < epsilon


def allowed_share(lower: float, tolerance: float) -> float:
    """The largest ε at which J(new) - J(old) >= ``lower`` costs at most ``tolerance``."""
    return 1.0 if lower >= -tolerance else tolerance / -lower


def hand_over(
    draw: Stream,
    play: Play,
    settings: HandOverSettings,
    key: Key,
    spending: Spending,
    *,
    offset: int = 0,
    held_out: HeldOut = "fresh",
    watch: Callable[[Look], None] = lambda look: None,
) -> HandOver:
    """Raise the newcomer's share as the evidence allows, until the seat is its own or looks end.

    The share begins where even a total loss stays within the tolerance. "accepted": a change of
    the reward by less than -tolerance is ruled out, ε = 1. "refused": the opposite is shown.
    "stopped": neither, after the last look. Each look spends one share of ``spending``.

    Args:
        key: names the hand-over; a look takes its ``draw``.
        offset: position in the sequence of problems from which on none has been used.
    """
    found = HandOver("stopped", "", allowed_share(-1.0, settings.tolerance), offset=offset)
    differences: list[float] = []
    for number, size in enumerate(settings.sizes()):
        at = key.at(draw=number)
        epsilon = found.epsilon if found.epsilon >= LEAST_SHARE else 0.0
        pairs, found.offset = _pairs(
            draw, size - len(differences), found.offset, settings.samples, at, epsilon
        )
        old, new = play(pairs, at)
        differences += _differences(pairs, old, new)
        evidence_P = torch.tensor(differences, dtype=torch.float64)
        alpha = spending.next()
        found.certificate = certify(
            evidence_P, "fresh", alpha, samples=(1, 1), decision=spending.used, held_out=held_out
        )
        lower = found.certificate.lower
        upper = -lower_bound(-evidence_P, -1.0, 1.0, alpha)
        allowed = allowed_share(lower, settings.tolerance)
        look = Look(
            epsilon=epsilon,
            problems=size,
            episodes=len(new),
            old=_mean(old),
            new=_mean(new),
            mean=found.certificate.mean,
            lower=lower,
            upper=upper,
            alpha=alpha,
            allowed=allowed,
            tv=allowed,
            kl=mixture_kl(allowed),
        )
        found.looks.append(look)
        found.epsilon = allowed
        found.sampled_tokens += sum(t.completion_tokens for e in old + new for t in e.turns)
        for coin, episodes in (("incumbent", old), ("newcomer", new)):
            found.rows += [
                {
                    "look": number + 1,
                    "problem": episode.problem.id,
                    "sample": episode.sample,
                    "coin": coin,
                    "reward": episode.reward,
                }
                for episode in episodes
            ]
        watch(look)
        bounds = f"J(new) - J(old) in [{lower:+.4f}, {upper:+.4f}] at look {number + 1}"
        if allowed == 1.0:
            found.verdict = "accepted"
            found.reason = f"{bounds}: not below -{settings.tolerance:g}"
            return found
        if upper < -settings.tolerance:
            found.verdict = "refused"
            found.reason = f"the newcomer is worse: {bounds}, below -{settings.tolerance:g}"
            return found
    found.reason = (
        f"not shown to be good enough: {bounds}, which allows the newcomer {found.epsilon:.1%} of "
        "the episodes; give more --problems or a larger --tolerance"
    )
    return found


def _pairs(
    draw: Stream, wanted: int, offset: int, samples: int, key: Key, epsilon: float
) -> tuple[Pairs, int]:
    """The next ``wanted`` problems that hold a newcomer's episode, and the position after them.

    At ε = 0 no episode may be the newcomer's yet; one of each problem is then played apart.
    """
    if epsilon == 0.0:
        return [(problem, (0,)) for problem in draw(wanted, offset)], offset + wanted
    share = 1 - (1 - epsilon) ** samples
    count = math.ceil(1.2 * wanted / share)
    while True:
        # Drawn anew from the same position when too few: ids of repeated rows depend on it.
        pairs: list[tuple[Problem, tuple[int, ...]]] = []
        for position, problem in enumerate(draw(count, offset), start=offset + 1):
            at = key.at(problem=problem.id)
            chosen = tuple(s for s in range(samples) if newcomer_speaks(at.at(sample=s), epsilon))
            if chosen:
                pairs.append((problem, chosen))
            if len(pairs) == wanted:
                return pairs, position
        count *= 2


def _differences(pairs: Pairs, old: Sequence[Episode], new: Sequence[Episode]) -> list[float]:
    """Mean reward of the newcomer's episodes minus the incumbent's, of each problem. Episodes that
    the world ended take the worst end, as ``certificates.fresh_evidence`` has it."""
    found, start = [], 0
    for _, samples in pairs:
        end = start + len(samples)
        sides = [side[start:end] for side in (old, new)]
        before_1G, after_1G = (
            torch.tensor([[e.reward for e in side]], dtype=torch.float64) for side in sides
        )
        lost, gone = (torch.tensor([[e.masked for e in side]]) for side in sides)
        found.append(float(fresh_evidence(before_1G, after_1G, missing=(lost, gone))))
        start = end
    assert start == len(old) == len(new)
    return found


def _mean(episodes: Sequence[Episode]) -> float | None:
    heard = [episode.reward for episode in episodes if not episode.masked]
    return sum(heard) / len(heard) if heard else None


# -- between two teams that play ----------------------------------------------------------------


def hand_over_between(
    old: Match,
    new: Match,
    draw: Stream,
    settings: HandOverSettings,
    key: Key,
    spending: Spending,
    *,
    offset: int = 0,
    watch: Callable[[Look], None] = lambda look: None,
) -> HandOver:
    """The ramp from one team to another, which have one task and one protocol, on the problems of
    ``draw``; both sides play an episode with the same uniforms. The other arguments are those of
    ``hand_over``.
    """

    def play(pairs: Pairs, at: Key) -> tuple[list[Episode], list[Episode]]:
        chosen = [(problem, sample) for problem, samples in pairs for sample in samples]
        # One after the other: an engine that serves both knows an episode by its key.
        first, second = (
            _played([Job(match, p, at.at(problem=p.id, sample=s)) for p, s in chosen])
            for match in (old, new)
        )
        return first, second

    return hand_over(
        draw,
        play,
        settings,
        key,
        spending,
        offset=offset,
        held_out="fresh" if is_fresh(old.task) else "finite",
        watch=watch,
    )


def play_mixture(
    old: Match,
    new: Match,
    problems: Sequence[Problem],
    samples: int,
    key: Key,
    epsilon: float,
) -> list[tuple[Episode, bool]]:
    """Episodes of the mixture, each with its coin: whether the newcomers spoke in it."""
    at = [(p, key.at(problem=p.id, sample=s)) for p in problems for s in range(samples)]
    coins = [newcomer_speaks(each, epsilon) for _, each in at]
    jobs = [
        Job(new if coin else old, problem, each)
        for (problem, each), coin in zip(at, coins, strict=True)
    ]
    return list(zip(_played(jobs), coins, strict=True))


def _played(jobs: Sequence[Job]) -> list[Episode]:
    engines = list({id(job.match.engine): job.match.engine for job in jobs}.values())
    return run_alone(lambda: play_jobs(jobs, label="hand-over"), engines)
