"""The gauge of rounding against models whose weights are rounded by hand."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from satune.agents import rounding
from satune.agents.learner import LocalLearner, OptimizerSettings
from satune.agents.packing import PackedTurns, pack
from satune.agents.policy import Policy
from satune.core.settings import ObjectiveSettings
from tiny_models import Letters, next_token_logprobs, tiny_lm, turn

BF16 = torch.bfloat16


def some_turns() -> PackedTurns:
    random = torch.Generator().manual_seed(4)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 13, (length,), generator=random).tolist()

    return pack([[turn(ids(5), ids(9))], [turn(ids(3), ids(4)), turn(ids(8), ids(6))]])


PACKED = some_turns()


def learner_of(autocast: torch.dtype | None, *, family: str = "llama", **changes: Any) -> Any:
    lm = tiny_lm(family, dtype=torch.float32, **changes)
    policy = Policy("a", lm, Letters(), 0.8, autocast=autocast)
    return LocalLearner(policy, OptimizerSettings())


def moved(learner: LocalLearner, size: float) -> dict[str, Tensor]:
    """Moves the learner by ``size`` in random directions; gives what it was."""
    before = learner.export()
    random = torch.Generator().manual_seed(1)
    learner.load_weights(
        {n: w + size * torch.randn(w.shape, generator=random) for n, w in before.items()}
    )
    return before


def model_with(learner: LocalLearner, weights: dict[str, Tensor], *, rounded: bool) -> Policy:
    """The same model in float32 with these weights, those of linear layers rounded by hand, their
    biases and GPT-2's own kind of them included."""
    lm = copy.deepcopy(learner.policy.model)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            parameter.copy_(weights[name])
        for module in lm.modules():
            if rounded and type(module).__name__ in ("Linear", "Conv1D"):
                # As a new parameter, so that an embedding tied to it stays as it is.
                module.weight = nn.Parameter(module.weight.to(BF16).float())
                if module.bias is not None:
                    module.bias = nn.Parameter(module.bias.to(BF16).float())
    return Policy("a", lm, Letters(), 0.8)


def logprobs(policy: Policy) -> Tensor:
    """Log-probabilities [T, V] at the states before all own tokens, in their flat order."""
    rows: dict[int, Tensor] = {}
    for sequence in PACKED.sequences:
        all_SV = next_token_logprobs(policy, sequence.ids.tolist())
        for span in sequence.spans:
            for place in range(span.count):
                rows[span.token + place] = all_SV[span.position + place - 1]
    return torch.stack([rows[token] for token in range(PACKED.tokens)]).double()


def kl(new_TV: Tensor, old_TV: Tensor) -> Tensor:
    return (new_TV.exp() * (new_TV - old_TV)).sum(-1)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_the_gauge_is_that_of_models_rounded_by_hand(family: str) -> None:
    learner = learner_of(BF16, family=family)
    before = moved(learner, 0.01)
    now = learner.export()
    gauged = learner.gauge(PACKED, before)
    masters = [logprobs(model_with(learner, w, rounded=False)) for w in (now, before)]
    rounded = [logprobs(model_with(learner, w, rounded=True)) for w in (now, before)]
    assert torch.allclose(gauged.masters_kl_T, kl(*masters), rtol=1e-3, atol=1e-7)
    assert torch.allclose(gauged.rounded_kl_T, kl(*rounded), rtol=1e-3, atol=1e-7)
    assert not torch.allclose(gauged.rounded_kl_T, gauged.masters_kl_T, rtol=1e-3, atol=1e-7)

    def of_targets(each_TV: Tensor) -> Tensor:
        return each_TV.gather(1, PACKED.targets_T[:, None])[:, 0]

    exact_T = of_targets(rounded[0]) - of_targets(rounded[1])
    computed_T = learner.score(PACKED).double()
    learner.load_weights(before)
    computed_T = computed_T - learner.score(PACKED).double()
    assert torch.allclose(gauged.error_T, computed_T - exact_T, atol=1e-5)
    assert float(gauged.error_T.abs().max()) > 1e-3


def test_in_the_masters_type_nothing_is_lost() -> None:
    learner = learner_of(None)
    before = moved(learner, 0.01)
    gauged = learner.gauge(PACKED, before)
    assert gauged.rounded_kl_T is gauged.masters_kl_T is gauged.error_T is None
    exact_T = kl(*(logprobs(model_with(learner, w, rounded=False))
                   for w in (learner.export(), before)))  # fmt: skip
    assert torch.allclose(gauged.kl_T, exact_T, rtol=1e-3, atol=1e-7)
    assert float(gauged.cut_T.abs().max()) < 1e-5 and float(gauged.floor_T.max()) < 1e-9


def test_a_step_below_the_grid_is_not_seen() -> None:
    learner = learner_of(BF16)
    learner.load_weights({n: w.to(BF16).float() for n, w in learner.export().items()})
    before = moved(learner, 1e-5)
    now = learner.export()
    # Norms and the embedding are not rounded.
    learner.load_weights({n: w if "proj" in n else before[n] for n, w in now.items()})
    gauged = learner.gauge(PACKED, before)
    assert float(gauged.rounded_kl_T.mean()) < 0.1 * float(gauged.masters_kl_T.mean())


def test_a_step_from_the_ties_is_seen_too_large() -> None:
    learner = learner_of(BF16)

    def tie(weights_N: Tensor) -> Tensor:
        """Midway between two neighbours of the grid."""
        low = weights_N.to(BF16).float()
        high = torch.nextafter(low.to(BF16), torch.tensor(9.0, dtype=BF16)).float()
        return (low + high) / 2

    learner.load_weights({n: tie(w) for n, w in learner.export().items()})
    gauged = learner.gauge(PACKED, moved(learner, 1e-6))
    assert float(gauged.rounded_kl_T.mean()) > 100 * float(gauged.masters_kl_T.mean())


@pytest.mark.parametrize("autocast", [None, BF16, torch.float16], ids=str)
def test_the_gauge_leaves_everything_as_it_was(autocast: torch.dtype | None) -> None:
    learner = learner_of(autocast, family="gpt2")
    before = moved(learner, 0.01)
    held = learner.export()
    parameters = {n: p.data_ptr() for n, p in learner.policy.model.named_parameters()}
    learner.gauge(PACKED, before)
    assert all(torch.equal(held[n], w) for n, w in learner.export().items())
    assert parameters == {n: p.data_ptr() for n, p in learner.policy.model.named_parameters()}
    assert learner.policy.autocast == autocast


def test_the_gauge_holds_two_copies_of_the_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made, twins, alive = rounding._twin, [], []

    def counted(*given: Any) -> Policy:
        twin = made(*given)
        twins.append(weakref.ref(twin.model))
        alive.append(sum(each() is not None for each in twins))
        return twin

    monkeypatch.setattr(rounding, "_twin", counted)
    learner = learner_of(BF16)
    learner.gauge(PACKED, moved(learner, 0.01))
    assert alive == [1, 2, 1, 2]


@pytest.mark.parametrize("first", [[1], [0, 1]], ids=["a part", "all"])
def test_anchor_and_proposal_are_measured_in_one_cut(first: list[int]) -> None:
    """Where nothing moved the KL is 0 to the bit, whatever cut the first mini-batch had."""

    learner = LocalLearner(learner_of(BF16).policy, OptimizerSettings(micro_batch_tokens=30))
    anchor = learner.anchor(PACKED)
    ones_E = torch.ones(2, dtype=torch.float64)
    learner.accumulate(anchor, first, ones_E, ones_E, ObjectiveSettings())
    learner.complete(anchor)
    measured = learner.measure(anchor)
    assert float(measured.kl_T.abs().max()) == 0.0
    assert torch.equal(measured.logprobs_T, anchor.logprobs_T)
    learner.drop_gradients()


def test_losses_are_scaled_in_float16_and_gradients_are_not() -> None:
    gradients = []
    for autocast in (None, torch.float16):
        learner = learner_of(autocast)
        found = learner.gradient(PACKED, torch.full((PACKED.tokens,), 1e-6))
        gradients.append(torch.cat([g.flatten() for g in found.values()]))
    exact, half = gradients
    assert float((half - exact).norm() / exact.norm()) < 0.02
    learner = learner_of(torch.float16)
    learner.wake()
    anchor = learner.anchor(PACKED)
    ones_E = torch.tensor([1.0, -1.0], dtype=torch.float64)

    learner.accumulate(anchor, [0, 1], ones_E, ones_E, ObjectiveSettings())
    plain = learner_of(None)
    plain.wake()
    anchor = plain.anchor(PACKED)
    plain.accumulate(anchor, [0, 1], ones_E, ones_E, ObjectiveSettings())
    assert learner.step() == pytest.approx(plain.step(), rel=0.02)
