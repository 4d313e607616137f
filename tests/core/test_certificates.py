"""Evidence by hand and by enumeration, and what a certificate says."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from satune.core.certificates import (
    balance_evidence,
    certify,
    evidence_range,
    fresh_evidence,
    pessimistic_evidence,
)

NAN, INF = math.nan, math.inf


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_fresh_evidence_by_hand():
    # Counts may differ: 3/4 - 1/2 and 0 - 1.
    found = fresh_evidence(table([0, 1], [1, 1]), table([1, 1, 1, 0], [0, 0, 0, 0]))
    assert found.tolist() == [0.25, -1]


def test_balance_evidence_by_hand():
    # tanh(log(3)/2) = (3 - 1)/(3 + 1) = 1/2. Old: 1/2 * (1 - 1/2) = 1/4, and -1/2 * (0 - 1/2) =
    # 1/4, mean 1/4; new: u = inf gives 1 * (1 - 1/2) = 1/2.
    u = math.log(3)
    found = balance_evidence(table([1, 0]), table([u, -u]), table([1]), table([INF]))
    assert found.tolist() == pytest.approx([0.75], abs=1e-15)
    # The ends of the range: what the new team never does failed, what only it does succeeded.
    ends = balance_evidence(
        table([0, 0], [1, 1]),
        table([-INF, -INF], [-INF, -INF]),
        table([1], [0]),
        table([INF], [INF]),
    )
    assert ends.tolist() == [1, -1]


def test_pessimistic_evidence_by_hand():
    # r = 3, 1/3, inf, 0 capped at 2: (2 - 1) * 1, (1/3 - 1) * 1, (2 - 1) * 1/2, -1 * 1.
    u = math.log(3)
    found = pessimistic_evidence(table([1, 1, 0.5, 1]), table([u, -u, INF, -INF]), 2.0)
    assert found.tolist() == pytest.approx([(1 - 2 / 3 + 0.5 - 1) / 4], abs=1e-15)
    assert pessimistic_evidence(table([0, 0]), table([INF, -INF]), 2.0).tolist() == [0]
    # Rounding leaves no value outside of the range, at which the bounds would refuse it.
    for clip in (1.1, 1.3, 1.7):
        found = pessimistic_evidence(torch.ones(3, 7), torch.full((3, 7), INF), clip)
        assert certify(found, "pessimistic", 0.05, samples=(7, 0), clip=clip).high == clip - 1


def test_ranges():
    assert evidence_range("fresh") == evidence_range("balance") == (-1, 1)
    assert evidence_range("pessimistic", 1.5) == (-1, 0.5)
    for clip in (None, 0.9, INF, NAN):
        with pytest.raises(ValueError, match="clip"):
            evidence_range("pessimistic", clip)


def test_refusals():
    good, u = table([0, 1]), table([0, 0])
    for bad in (table([0, 1.01]), table([-0.01, 1]), table([NAN, 1]), torch.ones(2)):
        for call in (
            lambda bad=bad: fresh_evidence(bad, good),
            lambda bad=bad: fresh_evidence(good, bad),
            lambda bad=bad: balance_evidence(bad, u, good, u),
            lambda bad=bad: balance_evidence(good, u, bad, u),
            lambda bad=bad: pessimistic_evidence(bad, u, 2.0),
        ):
            with pytest.raises(ValueError, match="reward"):
                call()
    with pytest.raises(ValueError, match="NaN"):
        balance_evidence(good, table([0, NAN]), good, u)
    with pytest.raises(ValueError, match="an episode"):
        pessimistic_evidence(good, table([0]), 2.0)
    with pytest.raises(ValueError, match="same problems"):
        fresh_evidence(good, torch.ones(2, 2))
    with pytest.raises(ValueError, match="held_out"):
        certify(good[0], "fresh", 0.05, samples=(1, 1), held_out="train")  # pyright: ignore
    with pytest.raises(ValueError, match="method"):
        certify(good[0], "fresh", 0.05, "normal", samples=(1, 1))  # pyright: ignore
    with pytest.raises(ValueError, match="outside"):
        certify(table([1.5])[0], "fresh", 0.05, samples=(1, 1))


def test_a_certificate_says_what_it_is():
    better = certify(torch.ones(512), "fresh", 0.05 / 3, samples=(8, 4), decision=2)
    assert better.positive and better.lower == better.betting > 0.9
    assert (better.problems, better.samples, better.decision) == (512, (8, 4), 2)
    assert better.claim == (
        f"The mean reward rises by at least {math.floor(better.lower * 1000) / 1000} "
        "(error probability 0.0167) over the task's distribution of problems."
    )
    values = json.loads(json.dumps(better.to_dict()))
    assert values["claim"] == better.claim and values["samples"] == [8, 4]
    assert values["empirical_bernstein"] < values["betting"]

    same = certify(torch.zeros(512), "fresh", 0.05, samples=(8, 8), held_out="finite")
    assert not same.positive and -0.1 < same.lower < 0
    assert same.claim.startswith("The mean reward falls by at most 0.0")
    assert same.claim.endswith("over this finite set of problems, and nothing beyond it.")
    # Rounded to the safe side.
    fall = float(same.claim.split("at most ")[1].split(" ")[0])
    assert -fall <= same.lower < -fall + 1e-3

    nothing = certify(torch.zeros(1), "fresh", 0.05, "hoeffding", samples=(1, 1))
    assert nothing.lower == -1 and nothing.claim.startswith("Nothing is shown")
    assert "standard_error" not in nothing.to_dict()


def test_the_method_decides_and_the_others_stand_beside_it():
    values = torch.linspace(-0.2, 0.4, 200)
    found = {
        method: certify(values, "fresh", 0.05, method, samples=(8, 8))
        for method in ("betting", "empirical_bernstein", "hoeffding")
    }
    for method, one in found.items():
        assert one.method == method and one.lower == getattr(one, method)
        assert one.betting == found["betting"].lower and one.hoeffding == found["hoeffding"].lower


def conversation(seed: int, scale: float):
    """Seat A says x, seat B says y, seat A says z; three words each, every path rewarded.

    Returns a function from the agents that have changed to (rewards [27], old and new
    probabilities [27], u [27]) of all conversations; old means no agent has changed.
    """
    generator = torch.Generator().manual_seed(seed)

    def policy(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.randn(*shape, generator=generator, dtype=torch.float64)
        step = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return logits.log_softmax(-1), (logits + step).log_softmax(-1)

    rewards = torch.rand(3, 3, 3, generator=generator, dtype=torch.float64)
    first, reply, last = policy(3), policy(3, 3), policy(3, 3, 3)

    def paths(changed: str):
        a, b = int("A" in changed), int("B" in changed)
        old = first[0][:, None, None] + reply[0][:, :, None] + last[0]
        new = first[a][:, None, None] + reply[b][:, :, None] + last[a]
        # Own tokens alone: those of an agent that has not changed cancel.
        u = torch.zeros(3, 3, 3, dtype=torch.float64)
        if a:
            u = u + (first[1] - first[0])[:, None, None] + (last[1] - last[0])
        if b:
            u = u + (reply[1] - reply[0])[:, :, None]
        return rewards.flatten(), old.exp().flatten(), new.exp().flatten(), u.flatten()

    return paths


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.01, 0.3, 3.0]),
    changed=st.sampled_from(["A", "B", "AB"]),
    clip=st.sampled_from([1.0, 1.2, 3.0, 1e9]),
)
def test_evidence_is_unbiased_or_pessimistic_by_enumeration(seed, scale, changed, clip):
    rewards, old, new, u = conversation(seed, scale)(changed)
    gain = float((rewards * (new - old)).sum())
    # Every pair of an old and a new conversation is a problem with one episode each.
    left, right = torch.tensor(list(itertools.product(range(27), repeat=2))).T
    weight = old[left] * new[right]
    before, after = rewards[left, None], rewards[right, None]
    fresh = fresh_evidence(before, after)
    balance = balance_evidence(before, u[left, None], after, u[right, None])
    assert float((weight * fresh).sum()) == pytest.approx(gain, abs=1e-12)
    assert float((weight * balance).sum()) == pytest.approx(gain, abs=1e-12)
    pessimistic = float((old * pessimistic_evidence(rewards[:, None], u[:, None], clip)).sum())
    assert pessimistic <= gain + 1e-12
    if clip > float(u.exp().max()):
        assert pessimistic == pytest.approx(gain, abs=1e-12)
    for values, kind in ((fresh, "fresh"), (balance, "balance")):
        low, high = evidence_range(kind)
        assert low <= float(values.min()) and float(values.max()) <= high


def test_two_episodes_a_problem_are_unbiased_by_enumeration():
    # Two old and one new conversation, 27^3 combinations: counts that differ change no mean.
    rewards, old, new, u = conversation(3, 1.0)("AB")
    gain = float((rewards * (new - old)).sum())
    one, two, three = torch.tensor(list(itertools.product(range(27), repeat=3))).T
    weight = old[one] * old[two] * new[three]
    pair = torch.stack([one, two], -1)
    balance = balance_evidence(rewards[pair], u[pair], rewards[three, None], u[three, None])
    assert float((weight * balance).sum()) == pytest.approx(gain, abs=1e-12)


def test_a_missing_episode_takes_the_worst_end_by_hand():
    # What stands in its place is not read.
    gone = torch.tensor([[True, False]])
    there = torch.tensor([[False, False]])
    new, old = table([1, 1]), table([0, 0])
    assert fresh_evidence(old, new, (there, gone)).tolist() == [0.5]
    assert fresh_evidence(old, new, (gone, there)).tolist() == [0.5]
    assert fresh_evidence(table([NAN, 0]), table([NAN, 1]), (gone, gone)).tolist() == [0]
    # -1/2 in its side's mean; the episode beside it adds tanh(log(3)/2) (1 - 1/2) = 1/4.
    u = math.log(3)
    there, zero = torch.tensor([[False, False]]), table([0, 0])
    for missing in ((gone, there), (there, gone)):
        found = balance_evidence(
            table([1, 1]), table([NAN, u]) if missing[0] is gone else zero,
            table([1, 1]), table([NAN, u]) if missing[1] is gone else zero, missing,
        )  # fmt: skip
        assert found.tolist() == pytest.approx([(-0.5 + 0.25) / 2], abs=1e-15)
    # -1; the other (min(3, 2) - 1) * 1.
    assert pessimistic_evidence(table([0, 1]), table([NAN, u]), 2.0, gone).tolist() == [0]
    with pytest.raises(ValueError, match="say of each episode"):
        fresh_evidence(old, new, (gone, torch.tensor([[True]])))


sides = st.lists(
    st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.floats(-30, 30) | st.sampled_from([-INF, INF])),
    min_size=3, max_size=3,
)  # fmt: skip
masks = st.lists(st.booleans(), min_size=3, max_size=3)


@given(sides, sides, masks, masks)
def test_no_missing_episode_could_have_given_less(old, new, gone_old, gone_new):
    rewards = [table([reward for reward, _ in side]) for side in (old, new)]
    u = [table([each for _, each in side]) for side in (old, new)]
    gone = (torch.tensor([gone_old]), torch.tensor([gone_new]))
    pairs = [
        (fresh_evidence(*rewards, gone), fresh_evidence(*rewards)),
        (
            balance_evidence(rewards[0], u[0], rewards[1], u[1], gone),
            balance_evidence(rewards[0], u[0], rewards[1], u[1]),
        ),
        (
            pessimistic_evidence(rewards[0], u[0], 1.5, gone[0]),
            pessimistic_evidence(rewards[0], u[0], 1.5),
        ),
    ]
    for worst, true in pairs:
        assert float(worst) <= float(true) + 1e-12


def test_noise_that_fails_on_the_new_side_is_hardly_ever_certified():
    """Rewards are coins on both sides, and a fifth of the new side's episodes fails: of those with
    reward 0, two in five. What is left of the new side has mean .5 / .8 = .625."""
    generator = torch.Generator().manual_seed(0)
    runs, problems, samples = 400, 64, 4
    certified = {"worst end": 0, "dropped": 0}
    for _ in range(runs):
        old, new, luck = torch.rand((3, problems, samples), generator=generator).double()
        old, new = (old < 0.5).double(), (new < 0.5).double()
        gone = (new == 0) & (luck < 0.4)
        there = torch.zeros_like(gone)
        kept = torch.where(gone, math.nan, new).nanmean(-1, keepdim=True).nan_to_num(0.5)
        for name, evidence in (
            ("worst end", fresh_evidence(old, new, (there, gone))),
            ("dropped", fresh_evidence(old, kept)),
        ):
            found = certify(evidence, "fresh", 0.05, samples=(samples, samples))
            certified[name] += found.positive
    assert certified["worst end"] <= 0.05 * runs
    # The test can tell: without the rule it is certified most of the time.
    assert certified["dropped"] > 0.5 * runs
