"""Prompts fed once against prompts fed once a sample."""

from __future__ import annotations

import pytest
import torch

from satune.agents import prefixes
from satune.agents.learner import LocalLearner, OptimizerSettings
from satune.agents.packing import MicroBatch, PackedTurns, micro_batches, pack
from satune.agents.prefixes import plan_sharing
from tiny_models import tiny_policy, turn


def grouped(
    lengths: tuple[int, ...] = (9, 10, 11), samples: int = 4, system: int = 0
) -> PackedTurns:
    """One turn an episode; prompts of ``lengths`` tokens behind ``system`` tokens that are the same
    in all of them, completions of 2 to 6."""
    random = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1, 13, (count,), generator=random).tolist()

    opening = ids(system)
    prompts = [opening + ids(length) for length in lengths]
    return pack([[turn(p, ids(2 + i + i % 2))] for p in prompts for i in range(samples)])


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize(
    ("packed", "budget", "levels"),
    [
        (grouped(), 4096, 2),
        (grouped(), 150, 2),
        (grouped((2, 9, 20), 6), 4096, 2),
        (grouped((2, 9, 20), 6, system=16), 4096, 3),
        (grouped((4,) * 8, 2, system=24), 4096, 3),
    ],
    ids=["alike", "cut", "uneven", "opening and uneven", "opening"],
)
def test_scores_and_gradients_are_those_of_whole_sequences(
    family, packed, budget, levels, monkeypatch
):
    policy = tiny_policy(family=family)
    learner = LocalLearner(policy, OptimizerSettings(micro_batch_tokens=budget))
    plans = [plan_sharing(batch) for batch in micro_batches(packed, budget, whole_episodes=False)]
    assert {len(plan.levels) for plan in plans if plan} == {levels}
    coefficients_T = torch.randn(packed.tokens, generator=torch.Generator().manual_seed(1))
    fed: list[int] = []
    hidden = policy.hidden

    def counted(input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
        fed.append(input_ids.numel())
        return hidden(input_ids, **kwargs)

    policy.hidden = counted  # type: ignore[method-assign]

    def both() -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        fed.clear()
        logprobs_T = learner.score(packed)
        tokens = sum(fed)
        return logprobs_T, learner.gradient(packed, coefficients_T.double()), tokens

    shared_T, shared, few = both()
    monkeypatch.setattr(prefixes, "plan_sharing", lambda batch: None)
    whole_T, whole, many = both()
    assert few < 0.9 * many
    # Both families round to float32 inside their norms.
    assert torch.allclose(shared_T, whole_T, rtol=0, atol=1e-6)
    for name, gradient in whole.items():
        assert (shared[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_what_is_shared():
    # Rows 0 and 2 begin alike; the first state asked for stands at column 2 (of row 1).
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 2, 7, 8, 9], [1, 2, 3, 5, 5], [1, 2, 9, 9, 9]])
    batch = MicroBatch(
        ids,
        row_T=torch.tensor([0, 1, 1, 2, 3]),
        column_T=torch.tensor([3, 2, 4, 3, 3]),
        tokens_T=torch.arange(5),
        episodes=(0, 1, 2, 3),
    )
    plan = plan_sharing(batch)
    assert plan is not None  # 2 of 4 rows × 2 columns = 4 of 20 tokens saved
    trunk, own = plan.levels
    assert trunk.ids_RS.shape == (2, 2) and own.parent_R is not None
    assert trunk.ids_RS[own.parent_R].equal(ids[:, :2]) and own.ids_RS.equal(ids[:, 2:])
    # A row that is asked for its first state has nothing to share.
    early = MicroBatch(
        ids,
        torch.tensor([0, 1, 2, 3]),
        torch.tensor([3, 0, 3, 3]),
        torch.arange(4),
        (0, 1, 2, 3),
    )
    assert plan_sharing(early) is None
    # All different: nothing either.
    ids[:, 0] = torch.arange(4)
    assert plan_sharing(batch) is None


def test_beginnings_of_unequal_length_are_padded_where_that_saves_enough():
    # Prompts of 18, 25 and 36 tokens begin with the same 16; the last of each belongs to the row.
    (batch,) = micro_batches(grouped((2, 9, 20), 6, system=16), 4096, whole_episodes=False)
    plan = plan_sharing(batch)
    assert plan is not None
    opening, trunk, own = plan.levels
    assert opening.ids_RS.shape == (1, 16) and trunk.ids_RS.shape == (3, 35 - 16)
    assert sorted(trunk.length_R.tolist()) == [1, 8, 19]
    assert own.ids_RS.shape == (18, 1 + 8 - 1)  # the last token of eight predicts nothing
    assert plan.tokens == 16 + 3 * 19 + 18 * 8
    assert sorted(set(plan.first_B.tolist())) == [17, 24, 35]
    # Fewer than 16 are fed with each prompt.
    (batch,) = micro_batches(grouped((2, 9, 20), 6, system=15), 4096, whole_episodes=False)
    plan = plan_sharing(batch)
    assert plan is not None and [len(level.ids_RS) for level in plan.levels] == [3, 18]
    # Prompts of 9, 10 and 11 tokens: padding them would save 1 of 14 columns.
    (batch,) = micro_batches(grouped(), 4096, whole_episodes=False)
    plan = plan_sharing(batch)
    assert plan is not None and set(plan.first_B.tolist()) == {8}
