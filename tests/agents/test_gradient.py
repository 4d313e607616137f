"""Episodes cut between their turns have the gradient of whole ones, in micro-batches that fit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from satune.agents.learner import LocalLearner, OptimizerSettings
from satune.agents.packing import PackedTurns, pack
from satune.core.objectives import Metrics, ObjectiveBatch
from satune.core.settings import OBJECTIVES, ObjectiveSettings
from tiny_models import tiny_policy, turn

WHOLE = 10_000
CUT = 1  # a micro-batch of its own for every sequence


def some_turns() -> PackedTurns:
    """Four episodes: three turns that do not continue one another, one turn, two turns that share
    a sequence and one that stands apart, two turns."""
    random = torch.Generator().manual_seed(5)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 13, (length,), generator=random).tolist()

    first, reply = ids(4), ids(3)
    return pack(
        [
            [turn(ids(6), ids(4)), turn(ids(3), ids(8)), turn(ids(9), ids(2))],
            [turn(ids(5), ids(6))],
            [turn(first, reply), turn([*first, *reply, *ids(2)], ids(5)), turn(ids(2), ids(3))],
            [turn(ids(2), ids(7)), turn(ids(7), ids(1))],
        ]
    )


PACKED = some_turns()
ADVANTAGES_E = torch.tensor([0.7, -1.2, -0.4, 1.1], dtype=torch.float64)
WEIGHTS_E = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)


def shaken(learner: LocalLearner) -> None:
    random = torch.Generator().manual_seed(6)
    learner.load_weights(
        {
            n: w + (0.01 * torch.randn(w.shape, generator=random, dtype=torch.float64)).to(w)
            for n, w in learner.export().items()
        }
    )


def gradient(
    objective: ObjectiveSettings,
    tokens: int,
    dtype: torch.dtype = torch.float64,
    *,
    moved: bool = True,
) -> tuple[Tensor, dict[str, float], Tensor]:
    """The gradient of all episodes, its metrics, and the log-ratios [T] it was taken at."""
    policy = tiny_policy(family="gpt_neox", dtype=dtype)
    learner = LocalLearner(policy, OptimizerSettings(micro_batch_tokens=tokens))
    learner.keep_reference({n: 1.1 * w for n, w in learner.export().items()})
    anchor = learner.anchor(PACKED, reference=objective.reference_kl > 0)
    u_T = torch.zeros(PACKED.tokens)
    if moved:
        learner.complete(anchor)
        shaken(learner)
        u_T = learner.score(PACKED) - anchor.logprobs_T
    metrics = learner.accumulate(anchor, range(4), ADVANTAGES_E, WEIGHTS_E, objective)
    assert bool(anchor.known_T.all())
    gradients = [p.grad.flatten() for p in policy.trainable().values() if p.grad is not None]
    return torch.cat(gradients), metrics, u_T


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_which_episodes_are_cut():
    # The widths of the sequences are 10, 11, 11; 11; 14, 5; 9, 8: padded 33, 11, 28 and 18 tokens.
    assert PACKED.longer_than(28, range(4)) == {0}
    assert PACKED.longer_than(27, range(4)) == {0, 2}
    assert PACKED.longer_than(27, [1, 2]) == {2}
    assert PACKED.longer_than(1, range(4)) == {0, 2, 3}  # one sequence cannot be cut


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize("moved", [True, False])
def test_two_passes_have_the_gradient_of_one(name, dtype, tolerance, moved):
    objective = ObjectiveSettings(name, beta=0.3, reference_kl=0.2, entropy=0.1)
    whole, expected, u_T = gradient(objective, WHOLE, dtype, moved=moved)
    # No ratio, of a token or of an episode, is near an end of its clip.
    u_E = torch.zeros(4, dtype=u_T.dtype).index_add(0, PACKED.episode_T, u_T)
    mean_E = u_E / torch.bincount(PACKED.episode_T)
    for u in (u_T, u_E, mean_E):
        ends = torch.tensor([math.log(0.8), math.log(1.2), math.log(1.28), math.log(5)])
        assert float((u[:, None] - ends).abs().min()) > 1e-3
    assert bool((u_T != 0).any()) == moved
    for tokens in (CUT, 30):  # 30: the first episode alone is cut
        cut, metrics, _ = gradient(objective, tokens, dtype, moved=moved)
        assert relative(cut, whole) <= tolerance
        assert metrics == pytest.approx(expected, rel=100 * tolerance, abs=tolerance)


def squares(batch: ObjectiveBatch) -> tuple[Tensor, Metrics]:
    """Has a derivative that depends on the log-probabilities also where all ratios are 1."""
    by_episode = torch.zeros_like(batch.advantages_U).index_add(
        0, batch.episode_T, batch.logprobs_T
    )
    return (by_episode**2).sum() / batch.episode_total, {"squares": (by_episode**2).sum()}


@pytest.mark.parametrize("moved", [True, False])
def test_a_users_own_objective_is_cut_too(moved):
    objective = ObjectiveSettings("mine.py:squares", loss=squares, entropy=0.1)
    whole, expected, _ = gradient(objective, WHOLE, moved=moved)
    cut, metrics, _ = gradient(objective, CUT, moved=moved)
    assert relative(cut, whole) <= 1e-12 and metrics == pytest.approx(expected, rel=1e-12)
    # Its derivative 2 logprobs_E grows with the anchor's: it was not taken at a guess.
    other, _, _ = gradient(replace(objective, loss=lambda b: (b.logprobs_T.sum(), {})), CUT)
    assert relative(other, whole) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("moved", [False, True])
def test_an_episode_of_many_long_turns_stays_inside_the_budget(moved):
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(200, 2001, (32,), generator=random).tolist()
    lengths[7] = 2000

    def ids(length: int) -> list[int]:
        return torch.randint(1, 13, (length,), generator=random).tolist()

    packed = pack([[turn(ids(length // 2), ids(length - length // 2)) for length in lengths]])
    policy = tiny_policy(dtype=torch.float32, max_position_embeddings=2048)
    fed: list[int] = []
    hidden = policy.hidden
    policy.hidden = lambda ids, **more: (fed.append(ids.numel()), hidden(ids, **more))[1]  # type: ignore[method-assign]
    settings = OptimizerSettings(micro_batch_tokens=2048, lr=0.01)
    learner = LocalLearner(policy, settings)
    learner.wake()
    anchor = learner.anchor(packed)
    if moved:
        learner.complete(anchor)
        shaken(learner)
    before = learner.export()
    one_E = torch.ones(1, dtype=torch.float64)
    learner.accumulate(anchor, [0], one_E, one_E, ObjectiveSettings("grpo", beta=0.1))
    learner.complete(anchor)
    assert learner.step() > 0
    assert max(fed) <= 2048 and sum(fed) > 32_000
    assert any(not torch.equal(w, before[n]) for n, w in learner.export().items())
