"""The hand-over: coins, what a share allows, and how often a ramp breaks its promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest

from satune.core.confidence import Spending
from satune.files.events import Look
from satune.swap.handover import (
    HandOver,
    Pairs,
    allowed_share,
    hand_over,
    mixture_kl,
    newcomer_speaks,
)
from satune.swap.settings import HandOverSettings
from satune.types import Episode, Failure, Grade, Key, Problem, UserError

KEY = Key(0, "swap")


def draw(count: int, offset: int) -> list[Problem]:
    return [Problem.of(f"p{i}", "") for i in range(offset, offset + count)]


def players(old: float, new: float, seed: int) -> Callable:
    """Both sides of an invented task: the reward is 1 with a problem's own chance, which moves the
    newcomer's chance along; ``old`` and ``new`` are the means over all problems."""

    def play(pairs: Pairs, key: Key) -> tuple[list[Episode], list[Episode]]:
        sides: tuple[list[Episode], list[Episode]] = ([], [])
        for problem, samples in pairs:
            shift = Key(seed, "ease", problem=problem.id).rng().choice((-0.2, 0.2))
            for sample in samples:
                at = key.at(seed=seed, problem=problem.id, sample=sample)
                # Half of the luck is the episode's: both sides see the same uniforms.
                shared, apart = at.rng("shared"), at.rng("apart").random()
                luck = shared.random()
                split = shared.random() < 0.5
                for side, mean, own in ((0, old, luck), (1, new, luck if split else apart)):
                    reward = float(own < min(1.0, max(0.0, mean + shift)))
                    sides[side].append(Episode(problem, sample, (), None, Grade(reward)))
        return sides

    return play


def ramp(old: float, new: float, seed: int, **settings: float) -> HandOver:
    chosen = HandOverSettings(**{"problems": 512, "samples": 4, "looks": 4, **settings})  # type: ignore[arg-type]
    spending = Spending(chosen.confidence, chosen.looks)
    return hand_over(draw, players(old, new, seed), chosen, KEY.at(seed=seed), spending)


# The mixture


def test_the_reward_of_a_mixture_by_episode_is_linear_and_by_turn_is_not() -> None:
    # Two turns of the seat; each side says 0 or 1 with its own chances, the second turn's depend on
    # the first message, and the reward is 1 for (1, 1) or (0, 0). All by enumeration, exactly.
    third, half = Fraction(1, 3), Fraction(1, 2)
    says = {
        "old": lambda before: third if before is None else half,
        "new": lambda before: half if before is None else Fraction(before + 1, 4),
    }

    def chance(side: str, said: int, before: int | None) -> Fraction:
        one = says[side](before)
        return one if said else 1 - one

    def reward(first: str, second: str) -> Fraction:
        return sum(
            (
                chance(first, a, None) * chance(second, b, a)
                for a, b in product((0, 1), (0, 1))
                if a == b
            ),
            Fraction(0),
        )

    def by_episode(share: Fraction) -> Fraction:
        return (1 - share) * reward("old", "old") + share * reward("new", "new")

    def by_turn(share: Fraction) -> Fraction:
        weight = {"old": 1 - share, "new": share}
        return sum(
            (weight[a] * weight[b] * reward(a, b) for a, b in product(weight, weight)), Fraction(0)
        )

    quarter = Fraction(1, 4)
    old, new = by_episode(Fraction(0)), by_episode(Fraction(1))
    assert by_turn(Fraction(0)) == old and by_turn(Fraction(1)) == new
    assert by_episode(quarter) == old + quarter * (new - old)
    assert by_turn(quarter) != old + quarter * (new - old)


def test_exact_divergences_of_a_mixture() -> None:
    # Newcomer and incumbent with no trajectory in common: TV = ε and KL(old‖mix) = -log(1-ε), the
    # largest that they can be. p = (1, 0), q = (0, 1): mix = (1-ε, ε).
    assert mixture_kl(0.0) == 0.0
    assert mixture_kl(0.25) == pytest.approx(-math.log(0.75), rel=1e-15)
    assert mixture_kl(1.0) == math.inf


def test_coins_fall_as_often_as_they_should_and_stay_as_epsilon_grows() -> None:
    keys = [KEY.at(problem=f"p{i}", sample=s) for i in range(500) for s in range(4)]
    small = [newcomer_speaks(key, 0.1) for key in keys]
    large = [newcomer_speaks(key, 0.6) for key in keys]
    # Standard errors of the shares: .0067 and .011.
    assert sum(small) / 2000 == pytest.approx(0.1, abs=0.03)
    assert sum(large) / 2000 == pytest.approx(0.6, abs=0.05)
    assert all(b for a, b in zip(small, large, strict=True) if a)
    assert not any(newcomer_speaks(key, 0.0) for key in keys)
    assert all(newcomer_speaks(key, 1.0) for key in keys)


@pytest.mark.parametrize(
    ("lower", "tolerance", "share"),
    [(0.1, 0.02, 1.0), (0.0, 0.0, 1.0), (-0.02, 0.02, 1.0), (-0.08, 0.02, 0.25), (-1.0, 0.0, 0.0)],
)
def test_what_a_lower_bound_allows(lower: float, tolerance: float, share: float) -> None:
    assert allowed_share(lower, tolerance) == pytest.approx(share, rel=1e-12)
    assert allowed_share(lower, tolerance) * min(0.0, lower) >= -tolerance - 1e-15


# The ramp


def test_sizes_double_and_never_stand_still() -> None:
    assert HandOverSettings().sizes() == [128, 256, 512, 1024, 2048]
    assert HandOverSettings(problems=3, looks=3).sizes() == [1, 2, 3]


@pytest.mark.parametrize(
    "wrong",
    [{"tolerance": -0.01}, {"tolerance": 2.0}, {"confidence": 0.0}, {"looks": 0}, {"samples": 0}],
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        HandOverSettings(**wrong)  # type: ignore[arg-type]


def test_every_problem_holds_both_and_none_comes_twice() -> None:
    seen: list[tuple[Pairs, int]] = []
    real = players(0.5, 0.5, 0)

    def play(pairs: Pairs, key: Key) -> tuple[list[Episode], list[Episode]]:
        seen.append((pairs, key.draw))
        return real(pairs, key)

    settings = HandOverSettings(tolerance=0.05, problems=64, samples=4, looks=3)
    found = hand_over(draw, play, settings, KEY, Spending(0.05, 3), offset=7)
    assert [look["problems"] for look in found.looks] == settings.sizes()
    assert all(look.keys() == Look.__annotations__.keys() for look in found.looks)
    problems = [problem.id for pairs, _ in seen for problem, _ in pairs]
    assert len(problems) == len(set(problems)) == 64
    assert min(int(name[1:]) for name in problems) >= 7
    assert found.offset > max(int(name[1:]) for name in problems)
    for (pairs, at), look in zip(seen, found.looks, strict=True):
        for problem, samples in pairs:
            key = KEY.at(draw=at, problem=problem.id)
            coins = [newcomer_speaks(key.at(sample=s), look["epsilon"]) for s in range(4)]
            assert samples == tuple(s for s, coin in enumerate(coins) if coin) != ()
    coins = [row["coin"] for row in found.rows]
    assert coins.count("newcomer") == coins.count("incumbent") > 64


def test_without_a_tolerance_nothing_is_risked_before_it_is_shown() -> None:
    found = ramp(0.4, 0.8, 0, tolerance=0.0, problems=128, looks=2)
    assert found.looks[0]["epsilon"] == 0.0
    assert found.looks[0]["episodes"] == found.looks[0]["problems"]
    assert found.verdict == "accepted"


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-17])
def test_a_tiny_tolerance_draws_no_more_problems_than_none(tolerance: float) -> None:
    drawn: list[int] = []

    def counted(count: int, offset: int) -> list[Problem]:
        drawn.append(count)
        return draw(count, offset)

    settings = HandOverSettings(tolerance=tolerance, problems=32, samples=4, looks=2)
    found = hand_over(counted, players(0.5, 0.5, 0), settings, KEY, Spending(0.05, 2))
    # A share below 1/64 gives nobody an episode: one of each problem is played apart.
    assert sum(drawn) == found.offset == 32
    assert found.looks[0]["epsilon"] == 0.0 and found.looks[0]["allowed"] >= tolerance


def test_means_leave_out_what_the_world_ended_and_the_bound_does_not() -> None:
    """Of 64 problems the newcomer wins all and loses the connection in every other one."""

    def play(pairs: Pairs, key: Key) -> tuple[list[Episode], list[Episode]]:
        gone = Failure("connection: refused", policy=False)
        old, new = (
            [Episode(problem, 0, (), None, Grade(reward)) for problem, _ in pairs]
            for reward in (0.0, 1.0)
        )
        return old, [
            replace(e, grade=Grade(0.0), failure=gone) if i % 2 else e for i, e in enumerate(new)
        ]

    settings = HandOverSettings(tolerance=0.0, problems=64, samples=1, looks=1)
    look = hand_over(draw, play, settings, KEY, Spending(0.05, 1)).looks[0]
    assert (look["old"], look["new"]) == (0.0, 1.0)
    assert look["mean"] == 0.5  # what is missing is as bad as it can be: 0 - 0


def test_a_far_worse_newcomer_is_refused_at_the_first_look() -> None:
    found = ramp(0.7, 0.1, 0)
    assert found.verdict == "refused" and len(found.looks) == 1
    assert "worse" in found.reason and "\n" not in found.reason
    assert found.epsilon < 0.1


def test_an_equal_newcomer_on_little_evidence_is_stopped_and_the_reason_says_what_is_missing() -> (
    None
):
    found = ramp(0.5, 0.5, 1, problems=32, looks=2)
    assert found.verdict == "stopped"
    assert "--problems" in found.reason and 0 < found.epsilon < 1


@pytest.mark.parametrize(
    ("new", "often"),
    [
        pytest.param(0.65, "accepted", id="better", marks=pytest.mark.slow),
        pytest.param(0.5, None, id="equal", marks=pytest.mark.slow),
        pytest.param(0.47, None, id="slightly worse", marks=pytest.mark.slow),
        pytest.param(0.2, "refused", id="much worse"),
    ],
)
def test_the_tolerance_is_kept_as_often_as_was_promised(new: float, often: str | None) -> None:
    # At nominal 5% at most 2 of 40 are expected to break it; more than 5 has probability 1.4% if
    # the bound were exactly 5%, and the betting bound misses less than half as often.
    tolerance, runs = 0.02, 40
    found = [ramp(0.5, new, seed, tolerance=tolerance) for seed in range(runs)]
    broken = [
        run
        for run in found
        # Any share at which the mixture would lose more than the tolerance, at any look.
        if any(look["allowed"] * (new - 0.5) < -tolerance - 1e-12 for look in run.looks)
    ]
    assert len(broken) <= 5
    if often is not None:
        assert sum(run.verdict == often for run in found) >= 36
    if new < 0.5 - tolerance:
        assert sum(run.verdict == "accepted" for run in found) <= 5
