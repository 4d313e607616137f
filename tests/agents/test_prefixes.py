"""Prompts fed once against prompts fed once a sample."""

from __future__ import annotations

import pytest
import torch

from satune.agents import prefixes
from satune.agents.learner import LocalLearner, OptimizerSettings
from satune.agents.packing import MicroBatch, PackedTurns, pack
from satune.agents.prefixes import plan_sharing
from tiny_models import tiny_policy, turn


def grouped(problems: int = 3, samples: int = 4) -> PackedTurns:
    """One turn an episode; prompts of 9, 10, 11 tokens, completions of 2 to 6."""
    random = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1, 13, (count,), generator=random).tolist()

    prompts = [ids(9 + problem) for problem in range(problems)]
    return pack([[turn(p, ids(2 + i + i % 2))] for p in prompts for i in range(samples)])


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("budget", [4096, 150])
def test_scores_and_gradients_are_those_of_whole_sequences(family, budget, monkeypatch):
    policy = tiny_policy(family=family)
    learner = LocalLearner(policy, OptimizerSettings(micro_batch_tokens=budget))
    packed = grouped()
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
    assert plan.trunk_ids[plan.trunk_B].equal(ids[:, :2]) and plan.trunk_ids.shape == (2, 2)
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
