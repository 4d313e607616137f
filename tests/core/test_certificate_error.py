"""How often certificates err and how often they find a gain, on simulated teams known exactly.

A task is a table of problem types, of which problems are drawn uniformly; the old and the new team
are a distribution over a few answers on each. So J(new) - J(old) and every u are exact. All
repetitions are simulated at once. Shape suffixes as in the module, with ``R`` repetitions, ``K``
types and ``A`` answers.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from satune.core.certificates import (
    balance_evidence,
    evidence_range,
    fresh_evidence,
    pessimistic_evidence,
)
from satune.core.confidence import Spending, lower_bounds

ALPHA, CLIP, TYPES = 0.05, 2.0, 200
EVIDENCE = ("fresh", "balance", "pessimistic")


@dataclass
class World:
    """What each answer to each type of problem pays, and how often each team gives it."""

    rewards_KA: Tensor
    old_KA: Tensor
    new_KA: Tensor

    @property
    def gain(self) -> float:
        return float((self.rewards_KA * (self.new_KA - self.old_KA)).sum(-1).mean())

    def play(self, team_KA: Tensor, type_RP: Tensor, episodes: int, generator) -> list[Tensor]:
        """Rewards and u of ``episodes`` answers to each problem."""
        flat = team_KA[type_RP.flatten()]
        answer = torch.multinomial(flat, episodes, replacement=True, generator=generator)
        answer_RPG = answer.unflatten(0, type_RP.shape)
        index = (type_RP[..., None], answer_RPG)
        u_KA = self.new_KA.log() - self.old_KA.log()
        return [self.rewards_KA[index], u_KA[index]]


def draw(world: World, kind: str, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Evidence [R, P] of honest certificates: types, old and new answers all drawn anew."""
    repetitions, problems, episodes = shape
    generator = torch.Generator().manual_seed(seed)
    type_RP = torch.randint(len(world.old_KA), (repetitions, problems), generator=generator)
    return evidence(world, kind, type_RP, episodes, generator)


def evidence(world: World, kind: str, type_RP: Tensor, episodes: int, generator) -> Tensor:
    old, old_u = (
        each.flatten(0, 1) for each in world.play(world.old_KA, type_RP, episodes, generator)
    )
    if kind == "pessimistic":
        return pessimistic_evidence(old, old_u, CLIP).view(type_RP.shape)
    new, new_u = (
        each.flatten(0, 1) for each in world.play(world.new_KA, type_RP, episodes, generator)
    )
    if kind == "fresh":
        return fresh_evidence(old, new).view(type_RP.shape)
    return balance_evidence(old, old_u, new, new_u).view(type_RP.shape)


def bounds(evidence_RP: Tensor, kind: str, alpha: float = ALPHA, method="betting") -> Tensor:
    return lower_bounds(evidence_RP, *evidence_range(kind, CLIP), alpha, method)  # pyright: ignore


def softmax_world(rewards_KA: Tensor, logits_KA: Tensor, step: float, seed: int) -> World:
    """The new team differs from the old by a random step in its logits."""
    generator = torch.Generator().manual_seed(seed)
    noise_KA = torch.randn(logits_KA.shape, generator=generator, dtype=torch.float64)
    return World(
        rewards_KA.double(), logits_KA.softmax(-1), (logits_KA + step * noise_KA).softmax(-1)
    )


def two_answers(old_K: Tensor, new_K: Tensor) -> World:
    """Right or wrong, with the given probabilities of being right."""
    rewards_KA = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(len(old_K), 2)
    return World(
        rewards_KA, torch.stack([old_K, 1 - old_K], -1), torch.stack([new_K, 1 - new_K], -1)
    )


def worlds() -> dict[str, World]:
    generator = torch.Generator().manual_seed(7)
    logits_KA = 1.5 * torch.randn(TYPES, 4, generator=generator, dtype=torch.float64)
    half_KA = torch.tensor([1, 1, 0, 0]).expand(TYPES, 4)
    graded_KA = torch.rand(TYPES, 4, generator=generator, dtype=torch.float64) ** 6
    never_K = torch.full((TYPES,), 1e-9, dtype=torch.float64)
    rarely_K = torch.where(torch.arange(TYPES) < 3, 0.9, never_K)
    return {
        "Bernoulli": softmax_world(half_KA, logits_KA, 0.5, 1),
        "Bernoulli, same policy": softmax_world(half_KA, logits_KA, 0.0, 1),
        "Bernoulli, large step": softmax_world(half_KA, logits_KA, 3.0, 2),
        "skewed": softmax_world(graded_KA, logits_KA, 0.5, 3),
        # In 3 of 200 types the new team fails where the old one succeeded, or the other way round.
        "rare falls": two_answers(1 - never_K, 1 - rarely_K),
        "rare rises": two_answers(never_K, rarely_K),
        "all 0": softmax_world(torch.zeros(TYPES, 4), logits_KA, 0.5, 4),
        "all 1": softmax_world(torch.ones(TYPES, 4), logits_KA, 0.5, 5),
    }


WORLDS = worlds()


def miss_rate(world: World, kind: str, shape: tuple[int, int, int], seed: int, method="betting"):
    evidence_RP = draw(world, kind, shape, seed)
    return float((bounds(evidence_RP, kind, method=method) > world.gain + 1e-12).double().mean())


@pytest.mark.parametrize("kind", EVIDENCE)
@pytest.mark.parametrize("name", ["Bernoulli, large step", "rare falls"])
def test_coverage_in_short(name: str, kind: str) -> None:
    assert miss_rate(WORLDS[name], kind, (500, 64, 2), seed=0) <= ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVIDENCE)
@pytest.mark.parametrize("name", list(WORLDS))
def test_coverage(name: str, kind: str) -> None:
    """At nominal 5%, over 2,000 repetitions, the betting bound misses in at most 5%."""
    rates = [miss_rate(WORLDS[name], kind, (2000, n, g), 1) for n, g in ((32, 2), (128, 4))]
    gain = WORLDS[name].gain
    print(f"| {name} | {kind} | {gain:+.4f} | {rates[0]:.2%} | {rates[1]:.2%} |")
    assert max(rates) <= ALPHA


def better(mean_gain: float, types: int) -> World:
    """Success p ~ Beta(.8, .8) a type, the gain in proportion to p(1 - p)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        p_K = torch.distributions.Beta(0.8, 0.8).sample((types,)).double().clamp(1e-6, 1 - 1e-6)
    room_K = p_K * (1 - p_K)
    return two_answers(p_K, p_K + mean_gain * room_K / room_K.mean())


def styled(world: World, spread: float) -> World:
    """The same team, each answer in one of two styles that pay alike and whose odds have moved.

    KL(old‖new) grows by log cosh(spread), the gain does not: u is no longer a function of R.
    """
    style = torch.tensor([0.5, 0.5], dtype=torch.float64)
    moved = torch.tensor([spread, -spread], dtype=torch.float64).softmax(-1)
    return World(
        world.rewards_KA.repeat_interleave(2, -1),
        (world.old_KA[..., None] * style).flatten(-2),
        (world.new_KA[..., None] * moved).flatten(-2),
    )


def power(world: World, kind: str, alphas: list[float], shape: tuple[int, int, int]) -> list[float]:
    evidence_RP = draw(world, kind, shape, seed=3)
    return [float((bounds(evidence_RP, kind, a) > 0).double().mean()) for a in alphas]


def spending_alphas() -> list[float]:
    """One decision, one of 30 declared, the 30th of an open sequence."""
    return [ALPHA, Spending(ALPHA, 30).share(1), Spending(ALPHA).share(30)]


def test_power_in_short() -> None:
    assert power(better(0.03, 4000), "fresh", [ALPHA], (100, 512, 8))[0] >= 0.75


@pytest.mark.slow
def test_power() -> None:
    """A mean gain of .03 in 512 problems, 8 episodes by each team; beside it 128 problems, 4."""
    world = better(0.03, 20_000)
    assert world.gain == pytest.approx(0.03, abs=1e-9)
    found = {}
    for problems, episodes in ((512, 8), (128, 4)):
        for spread in (0.0, 0.3, 1.0):
            shown = styled(world, spread)
            kl = float((shown.old_KA * (shown.old_KA / shown.new_KA).log()).sum(-1).mean())
            for kind in EVIDENCE:
                rates = power(shown, kind, spending_alphas(), (500, problems, episodes))
                found[problems, spread, kind] = rates
                shares = " | ".join(f"{rate:.1%}" for rate in rates)
                print(f"| {problems} × {episodes} | {kind} | {kl:.4f} | {shares} |")
    one, of_thirty, starved = found[512, 0.0, "fresh"]
    assert one >= 0.75
    assert one > of_thirty > starved
    assert found[512, 0.0, "balance"][0] > one


@pytest.mark.slow
def test_power_of_the_three_bounds() -> None:
    """Why betting decides: on the same evidence it finds what the other two miss."""
    evidence_RP = draw(better(0.03, 20_000), "fresh", (500, 512, 8), seed=3)
    found = {}
    for method in ("betting", "empirical_bernstein", "hoeffding"):
        lower_R = bounds(evidence_RP, "fresh", method=method)
        found[method] = float((lower_R > 0).double().mean())
        print(f"| {method} | {found[method]:.1%} | {float(lower_R.mean()):+.4f} |")
    assert found["betting"] >= 0.75 > max(found["empirical_bernstein"], found["hoeffding"])


def noise_update(
    repetitions: int, problems: int, episodes: int, seed: int
) -> tuple[Tensor, Tensor, World]:
    """A policy-gradient step on rewards that are coin flips, so that no policy is better.

    Returns the batch that made the gradient, its rewards and u [R P, G], and the two teams as a
    world with a type a problem and repetition.
    """
    generator = torch.Generator().manual_seed(seed)
    answers = 8
    old_KA = torch.full((repetitions * problems, answers), 1 / answers, dtype=torch.float64)
    answer_KG = torch.multinomial(old_KA, episodes, replacement=True, generator=generator)
    rewards_KG = torch.randint(2, answer_KG.shape, generator=generator).double()
    advantage_KG = rewards_KG - rewards_KG.mean(-1, keepdim=True)
    # The score of a softmax table is 1[a] - p, and the advantages of a problem add up to 0.
    logits_KA = torch.zeros_like(old_KA).scatter_add_(-1, answer_KG, 0.2 * advantage_KG)
    new_KA = logits_KA.softmax(-1)
    u_KG = (new_KA.log() - old_KA.log()).gather(-1, answer_KG)
    return rewards_KG, u_KG, World(torch.zeros_like(old_KA), old_KA, new_KA)


def coin_flips(world: World, team_KA: Tensor, episodes: int, generator) -> tuple[Tensor, Tensor]:
    """Rewards and u of episodes drawn anew, of which the rewards are coin flips."""
    type_RP = torch.arange(len(world.old_KA))[None]
    u_KG = world.play(team_KA, type_RP, episodes, generator)[1][0]
    return torch.randint(2, u_KG.shape, generator=generator).double(), u_KG


def certified(evidence_K: Tensor, repetitions: int, kind: str) -> float:
    return float((bounds(evidence_K.view(repetitions, -1), kind) > 0).double().mean())


@pytest.mark.parametrize("kind", EVIDENCE)
def test_pure_noise_is_not_certified_by_honest_draws(kind: str) -> None:
    repetitions, problems, episodes = 400, 128, 4
    *_, world = noise_update(repetitions, problems, episodes, seed=5)
    generator = torch.Generator().manual_seed(6)
    old, old_u = coin_flips(world, world.old_KA, episodes, generator)
    new, new_u = coin_flips(world, world.new_KA, episodes, generator)
    found = {
        "fresh": fresh_evidence(old, new),
        "balance": balance_evidence(old, old_u, new, new_u),
        "pessimistic": pessimistic_evidence(old, old_u, CLIP),
    }[kind]
    rate = certified(found, repetitions, kind)
    print(f"| {kind} | honest | {float(found.mean()):+.4f} | {rate:.1%} |")
    assert rate <= ALPHA


@pytest.mark.parametrize("kind", ["balance", "pessimistic"])
def test_the_gradient_batch_as_the_old_side_certifies_pure_noise(kind: str) -> None:
    """Why both sides are drawn anew: u is positive where the batch happened to pay.

    Nothing here can be improved, each episode's reward being a coin flip; the new side is even
    drawn honestly. The update has raised the odds of what was lucky in this batch.
    """
    repetitions, problems, episodes = 100, 512, 4
    batch, batch_u, world = noise_update(repetitions, problems, episodes, seed=5)
    new, new_u = coin_flips(
        world, world.new_KA, episodes, generator=torch.Generator().manual_seed(6)
    )
    found = (
        balance_evidence(batch, batch_u, new, new_u)
        if kind == "balance"
        else pessimistic_evidence(batch, batch_u, CLIP)
    )
    rate = certified(found, repetitions, kind)
    print(f"| {kind} | gradient batch | {float(found.mean()):+.4f} | {rate:.1%} |")
    assert float(found.mean()) > 0.01
    assert rate == 1


def test_problems_chosen_by_the_old_side_certify_pure_noise() -> None:
    """Why no episode that chose anything enters, fresh evidence included.

    Old and new are one team. The problems kept are those that its batch failed at more often than
    not, and the batch serves as the old side: the new side's average luck looks like a gain.
    """
    generator = torch.Generator().manual_seed(8)
    old, new = torch.randint(2, (2, 20_000, 4), generator=generator).double()
    kept = old.mean(-1) < 0.5
    wrong = fresh_evidence(old[kept], new[kept])[:5120].view(10, 512)
    assert bool((bounds(wrong, "fresh") > 0.1).all())
    again = torch.randint(2, old[kept].shape, generator=generator).double()
    honest = fresh_evidence(again, new[kept])[:5120].view(10, 512)
    assert int((bounds(honest, "fresh") > 0).sum()) <= 2


def finite_set(order: str, method: str, sure: float) -> float:
    """How often the bound on the mean gain, 0, over a set of 128 unlike problems misses.

    In the first half of the set the new team wins with probability ``sure`` and the old one with
    1 - sure, in the second half the other way round.
    """
    repetitions, generator = 2000, torch.Generator().manual_seed(9)
    old_K = torch.tensor([1 - sure, sure], dtype=torch.float64).repeat_interleave(64)
    type_RP = {
        "as listed": torch.arange(128).expand(repetitions, 128),
        "shuffled": torch.rand(repetitions, 128, generator=generator).argsort(-1),
        "with replacement": torch.randint(128, (repetitions, 128), generator=generator),
    }[order]
    found_RP = evidence(two_answers(old_K, 1 - old_K), "fresh", type_RP, 1, generator)
    return float((bounds(found_RP, "fresh", method=method) > 1e-12).double().mean())


def test_a_finite_set_and_the_order_of_its_problems() -> None:
    """The betting bound takes each problem for a draw from the set; a listing is none."""
    found = {
        (order, method, sure): finite_set(order, method, sure)
        for order in ("as listed", "shuffled", "with replacement")
        for method in ("betting", "empirical_bernstein", "hoeffding")
        for sure in (0.7, 1 - 1e-9)
    }
    for (order, method, sure), rate in found.items():
        print(f"| {order} | {method} | {sure:.1f} | {rate:.2%} |")
        if order != "as listed" or method != "betting":
            assert rate <= ALPHA
    # The wins come first: the capital has won before the losses arrive.
    assert found["as listed", "betting", 1 - 1e-9] == 1
    assert found["as listed", "betting", 0.7] > 0.5
