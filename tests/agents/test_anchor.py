"""Anchor states that are held and those computed again, snapshots, and how much memory is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from satune.agents import memory
from satune.agents.anchor import Anchor
from satune.agents.learner import LocalLearner, OptimizerSettings
from satune.agents.packing import PackedTurns, pack
from satune.agents.policy import Policy
from satune.core.settings import ObjectiveSettings
from tiny_models import Letters, tiny_lm, tiny_policy, turn

SETTINGS = ObjectiveSettings("sat", beta=0.3, reference_kl=0.2)
ONES_E = torch.ones(5, dtype=torch.float64)
ADVANTAGES_E = torch.tensor([0.7, -1.2, -0.4, 1.1, 0.2], dtype=torch.float64)


def one_turn_each() -> PackedTurns:
    """Five episodes of one turn: a micro-batch holds the same sequences wherever it may be cut."""
    random = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 13, (length,), generator=random).tolist()

    return pack([[turn(ids(3 + 2 * e), ids(4 + e % 3))] for e in range(5)])


PACKED = one_turn_each()


def step(
    policy: Policy, anchor_memory: float
) -> tuple[list[torch.Tensor], int, Anchor, LocalLearner]:
    """One step with both KLs, then the measurement: gradients and figures, and how many tokens the
    model was fed."""
    settings = OptimizerSettings(lr=0.01, micro_batch_tokens=20, anchor_memory=anchor_memory)
    learner = LocalLearner(policy, settings)
    learner.keep_reference({n: 1.1 * w for n, w in learner.export().items()})
    fed, hidden = [0], policy.hidden

    def counted(ids: torch.Tensor, **more: object) -> torch.Tensor:
        fed[0] += ids.numel()
        return hidden(ids, **more)

    policy.hidden = counted  # type: ignore[method-assign]
    learner.wake()
    anchor = learner.anchor(PACKED, reference=True)
    learner.complete(anchor)
    found: list[torch.Tensor] = []
    for _ in range(2):
        learner.accumulate(anchor, range(5), ADVANTAGES_E, ONES_E, SETTINGS)
        found += [p.grad.clone() for p in policy.trainable().values() if p.grad is not None]
        learner.step()
    measured = learner.measure(anchor)
    found += [measured.kl_T, measured.reverse_kl_T, measured.logprobs_T]
    return [*found, *learner.export().values()], fed[0], anchor, learner


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_states_held_and_computed_again_give_the_same_bits(autocast):
    def policy() -> Policy:
        lm = tiny_lm("qwen3", dtype=torch.float32)
        return Policy("a", lm, Letters(), 0.8, autocast=autocast)

    held, few, anchor, _ = step(policy(), 1.0)
    dtype = autocast or torch.float32  # what the head computes in
    assert anchor.states._held_NH is not None and anchor.states._held_NH.dtype == dtype
    assert anchor.states._held_NH.shape == (PACKED.tokens, 16)
    fed = [few]
    # Room for no state, for six and for half of them; the reference has as much as the anchor.
    for rows in (0, 6, PACKED.tokens // 2):
        allowed = 2 * rows * 16 * dtype.itemsize
        again, tokens, _, _ = step(policy(), allowed)
        assert all(map(torch.equal, again, held))
        fed.append(tokens)
    assert fed[0] < fed[3] < fed[2] < fed[1]


def test_other_weights_are_there_for_the_block_only():
    policy = tiny_policy(tie_word_embeddings=True)
    own = policy.trainable()
    before = {n: p.detach().clone() for n, p in own.items()}
    other = {n: 2 * w for n, w in before.items()}
    with pytest.raises(KeyboardInterrupt), policy.holding(other):
        assert all(torch.equal(p, other[n]) for n, p in own.items())
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[n]) for n, p in own.items())


def test_a_snapshot_shares_the_moments_that_rest():
    learner = LocalLearner(tiny_policy(), OptimizerSettings(lr=0.01))
    for _ in range(2):
        learner.wake()
        before = learner.snapshot()
        anchor = learner.anchor(PACKED, before.weights)
        learner.accumulate(anchor, range(5), ADVANTAGES_E, ONES_E, ObjectiveSettings("sat"))
        learner.step()
        learner.rest()
    resting = learner.optimizer_state()
    learner.wake()
    # The device holds the moments once: what the snapshot has is what lay on the CPU already.
    snapshot = learner.snapshot()
    assert snapshot.optimizer.keys() == resting.keys() and len(resting) > 0
    assert all(snapshot.optimizer[n] is tensor for n, tensor in resting.items())
    live = learner.moments._current()
    assert all(live[n].data_ptr() != tensor.data_ptr() for n, tensor in resting.items())
    held = {n: tensor.clone() for n, tensor in resting.items()}
    learner.accumulate(anchor, range(5), ADVANTAGES_E, ONES_E, ObjectiveSettings("sat"))
    learner.step()
    assert all(torch.equal(snapshot.optimizer[n], tensor) for n, tensor in held.items())
    assert not torch.equal(learner.optimizer_state()[min(held)], held[min(held)])
    learner.restore(snapshot)
    learner.rest()
    assert all(tensor is resting[n] for n, tensor in learner.optimizer_state().items())


def test_an_allowance_is_a_share_or_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n")
    monkeypatch.setattr(memory, "_SYSTEM", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    cpu = torch.device("cpu")
    assert memory.free_bytes(cpu) == 4_096_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.allowed_bytes(0.25, cpu) == 1_024_000
    # 3,000,000 allowed and 2,500,000 taken, of which 100,000 are pages of files.
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 2400000\ninactive_file 100000\n")
    assert memory.allowed_bytes(0.25, cpu) == 150_000
    (tmp_path / "memory.current").write_text("3200000\n")
    assert memory.allowed_bytes(0.25, cpu) == 0
    assert memory.allowed_bytes(5000.0, cpu) == 5000
