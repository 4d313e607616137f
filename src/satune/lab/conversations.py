"""Conversations enumerated to the last leaf, and every bound of THEORY §4 against them.

A layout says which agent acts at which moment; whoever acts sees all earlier moments. Policies are
tables over those histories, the reward a number in [0, 1] at each leaf, γ = 1.
Shape suffixes: ``B`` instances, ``L`` leaves, ``C`` histories, ``A`` actions, ``H`` own steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from satune.core import horizon_bounds as bounds
from satune.lab.ledger import Ledger
from satune.lab.mdp import _simplex, divergence, total_variation

ACTIONS = 2
ROUNDING = 1e-11
"""Sums of at most some hundred leaves, of ratios that may reach some thousands."""


@dataclass(frozen=True)
class Layout:
    """``speakers`` has, moment by moment, the agents that act in it; ``changed`` those updated."""

    name: str
    speakers: tuple[tuple[int, ...], ...]
    changed: tuple[int, ...]

    @property
    def slots(self) -> list[tuple[int, int]]:
        """(moment, agent) of each message."""
        return [(m, agent) for m, agents in enumerate(self.speakers) for agent in agents]

    @property
    def own(self) -> list[int]:
        """The moments in which an updated agent acts."""
        return [m for m, agents in enumerate(self.speakers) if set(agents) & set(self.changed)]


LAYOUTS = (
    Layout("one turn, others before and after", ((0,), (1,), (2,), (0,)), (1,)),
    Layout("one turn, at once with another", ((0, 1), (2,), (2,)), (1,)),
    Layout("one moment, two seats of one agent", ((2,), (0, 0), (1,)), (0,)),
    Layout("two turns", ((0,), (1,), (0,), (1,)), (0,)),
    Layout("three turns", ((0,), (1,), (0,), (0,)), (0,)),
    Layout("three turns, two seats", ((0,), (0, 1), (0,), (1,)), (0,)),
    Layout("two agents at once, two rounds", ((0, 1), (0, 1)), (0, 1)),
    Layout("two agents, one moment", ((2,), (0, 1), (2,)), (0, 1)),
    Layout("the whole team", ((0,), (1,), (2,), (0,)), (0, 1, 2)),
)


@dataclass(frozen=True)
class Tree:
    """For each message its history and action at every leaf [slots][L], and the leaves' rewards."""

    layout: Layout
    history: list[Tensor]
    action: list[Tensor]
    histories: list[int]
    reward: Tensor

    @staticmethod
    def of(layout: Layout, reward: Tensor) -> Tree:
        slots = layout.slots
        leaves = torch.tensor(list(itertools.product(range(ACTIONS), repeat=len(slots))))
        history, sizes = [], []
        for moment, _ in slots:
            earlier = [i for i, (m, _) in enumerate(slots) if m < moment]
            code = torch.zeros(len(leaves), dtype=torch.long)
            for index in earlier:
                code = code * ACTIONS + leaves[:, index]
            history.append(code)
            sizes.append(ACTIONS ** len(earlier))
        return Tree(layout, history, list(leaves.T), sizes, reward)

    def leaf(self, tables: Sequence[Tensor], slots: Sequence[int] | None = None) -> Tensor:
        """The probability of each leaf's actions [B, L], of some messages or of all."""
        chosen = range(len(tables)) if slots is None else slots
        found = torch.ones_like(self.reward)
        for slot in chosen:
            found = found * tables[slot][:, self.history[slot], self.action[slot]]
        return found


def check_conversations(ledger: Ledger, rng: torch.Generator, instances: int, seed: int) -> int:
    """Check about ``instances`` conversations, equally many of each layout; how many it were."""
    batch = -(-instances // len(LAYOUTS))
    for layout in LAYOUTS:
        ledger.where = f"seed {seed}, conversation of {layout.name}"
        reward = torch.rand(batch, ACTIONS ** len(layout.slots), generator=rng, dtype=torch.float64)
        coarse = torch.rand(batch, 1, generator=rng) < 0.5
        tree = Tree.of(layout, torch.where(coarse, reward.round(), reward))
        old = [_simplex(rng, (batch, size, ACTIONS)) for size in tree.histories]
        # Small steps and large ones, one size a conversation.
        share = 10 ** (-3 * torch.rand(batch, 1, 1, generator=rng, dtype=torch.float64))
        new = [
            _moved(rng, table, share) if agent in layout.changed else table
            for table, (_, agent) in zip(old, layout.slots, strict=True)
        ]
        _check(ledger, rng, tree, old, new)
    return batch * len(LAYOUTS)


def _moved(rng: torch.Generator, old: Tensor, share: Tensor) -> Tensor:
    """A step of that size that puts no mass where the old policy has none."""
    other = _simplex(rng, tuple(old.shape)) * (old > 0)
    other = other / other.sum(-1, keepdim=True).clamp(min=1e-300)
    usable = other.sum(-1, keepdim=True) > 0.5
    return torch.where(usable, (1 - share) * old + share * other, old)


def _check(
    ledger: Ledger, rng: torch.Generator, tree: Tree, old: list[Tensor], new: list[Tensor]
) -> None:
    layout, reward = tree.layout, tree.reward
    p_old, p_new = tree.leaf(old), tree.leaf(new)
    change = ((p_new - p_old) * reward).sum(-1)
    baseline = torch.rand(len(reward), 1, generator=rng, dtype=torch.float64)

    ratio_LH, tv, kl, sup_tv, sup_kl = [], [], [], [], []
    for moment in layout.own:
        slots = [i for i, (m, a) in enumerate(layout.slots) if m == moment and a in layout.changed]
        joint_old, joint_new = (_joint(tables, slots) for tables in (old, new))
        visits = _visits(tree, p_old, slots[0])
        tv_C = total_variation(joint_old, joint_new)
        kl_C = divergence(joint_old, joint_new)
        before, after = tree.leaf(old, slots), tree.leaf(new, slots)
        ratio_LH.append(torch.where(before > 0, after / before.clamp(min=1e-300), 1.0))
        tv.append((visits * tv_C).sum(-1))
        kl.append((visits * kl_C).sum(-1))
        sup_tv.append(tv_C.amax(-1))
        sup_kl.append(kl_C.amax(-1))
    ratio = torch.stack(ratio_LH, -1)
    mean_tv_H, mean_kl_H = torch.stack(tv, -1).clamp(max=1.0), torch.stack(kl, -1)
    sup_tv_H, sup_kl_H = torch.stack(sup_tv, -1), torch.stack(sup_kl, -1)

    centred = (reward - baseline)[..., None]
    gain = (p_old[..., None] * (ratio - 1) * centred).sum((1, 2))
    turns = len(layout.own)

    if turns == 1:
        error = (change - gain).abs()
        ledger.limit("one_turn", error, bounds.penalty_one_turn(1).expand_as(error), ROUNDING)
    forms = bounds.prefix_tv_forms(mean_tv_H=mean_tv_H, sup_tv_H=sup_tv_H, mean_kl_H=mean_kl_H)
    for name, form in forms.items():
        penalty = bounds.penalty_horizon(sup_tv_H, form.clamp(max=1.0))
        ledger.certificate(f"turns_{name}", change, gain, penalty, ROUNDING)
    least = bounds.prefix_tv(mean_tv_H=mean_tv_H, sup_tv_H=sup_tv_H, mean_kl_H=mean_kl_H)
    ledger.certificate("turns", change, gain, bounds.penalty_horizon(sup_tv_H, least), ROUNDING)
    uniform = bounds.penalty_uniform(sup_kl_H.amax(-1), turns)
    ledger.certificate("turns_uniform", change, gain, uniform, ROUNDING)
    sup_free = bounds.penalty_sup_free(ratio.log(), p_old)
    ledger.certificate("sup_free", change, gain, sup_free, ROUNDING)
    most = bounds.largest_gain(mean_kl_H.sum(-1))
    ledger.limit("largest_gain", change, most, ROUNDING)
    _check_prefixes(ledger, tree, old, new, forms)
    _check_together(ledger, tree, old, new, p_old, change, gain)
    _check_identities(ledger, tree, old, new, p_old, p_new, change, baseline)


def _joint(tables: Sequence[Tensor], slots: Sequence[int]) -> Tensor:
    """The product over messages of one moment [B, C, joint actions]."""
    found = tables[slots[0]]
    for slot in slots[1:]:
        found = (found[..., :, None] * tables[slot][..., None, :]).flatten(-2)
    return found


def _visits(tree: Tree, p_old: Tensor, slot: int) -> Tensor:
    """How probable each history before a message is [B, C]."""
    empty = p_old.new_zeros(len(p_old), tree.histories[slot])
    return empty.index_add(1, tree.history[slot], p_old)


def _check_prefixes(
    ledger: Ledger, tree: Tree, old: list[Tensor], new: list[Tensor], forms: dict[str, Tensor]
) -> None:
    """TV_{<h}: the histories before an own step under the old team and under the new one."""
    p_old, p_new = tree.leaf(old), tree.leaf(new)
    for place, moment in enumerate(tree.layout.own):
        slot = next(i for i, (m, _) in enumerate(tree.layout.slots) if m == moment)
        truth = total_variation(_visits(tree, p_old, slot), _visits(tree, p_new, slot))
        for name, form in forms.items():
            ledger.limit(f"prefix_{name}", truth, form[:, place], ROUNDING)


def _check_together(
    ledger: Ledger, tree: Tree, old: list[Tensor], new: list[Tensor],
    p_old: Tensor, change: Tensor, gain: Tensor,
) -> None:  # fmt: skip
    """Agents, or seats of shared weights, moved at once: from what each of them did alone."""
    layout = tree.layout
    parts = [i for i, (_, agent) in enumerate(layout.slots) if agent in layout.changed]
    if len(parts) == len(layout.own):
        return
    places = {moment: place for place, moment in enumerate(layout.own)}
    shape = (len(change), len(parts), len(layout.own))
    sup_tv, mean_tv, mean_kl = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for row, slot in enumerate(parts):
        place = places[layout.slots[slot][0]]
        visits = _visits(tree, p_old, slot)
        tv_C = total_variation(old[slot], new[slot])
        sup_tv[:, row, place] = tv_C.amax(-1)
        mean_tv[:, row, place] = (visits * tv_C).sum(-1).clamp(max=1.0)
        mean_kl[:, row, place] = (visits * divergence(old[slot], new[slot])).sum(-1)
    joint = bounds.updated_together(sup_tv_NH=sup_tv, mean_tv_NH=mean_tv, mean_kl_NH=mean_kl)
    penalty = bounds.penalty_horizon(joint["sup_tv_H"], bounds.prefix_tv(**joint))
    ledger.certificate("together", change, gain, penalty, ROUNDING)


def _check_identities(
    ledger: Ledger, tree: Tree, old: list[Tensor], new: list[Tensor],
    p_old: Tensor, p_new: Tensor, change: Tensor, baseline: Tensor,
) -> None:  # fmt: skip
    """(a) to (d) of THEORY §4 with r the ratio of the whole conversation."""
    reward = tree.reward
    centred = reward - baseline
    ratio = torch.where(p_old > 0, p_new / p_old.clamp(min=1e-300), 1.0)
    zero = torch.zeros_like(change)
    ledger.limit("identity_a", (p_old * (ratio - 1) * centred).sum(-1) - change, zero, ROUNDING)
    clipped = ratio.clamp(0.8, 1.2)
    pessimistic = (p_old * torch.minimum(ratio * centred, clipped * centred)).sum(-1)
    lower = pessimistic - (p_old * centred).sum(-1)
    ledger.certificate("identity_b", change, lower, zero, ROUNDING, one_sided=True)
    share = torch.tanh(ratio.log() / 2)
    balance = ((p_old + p_new) * share * centred).sum(-1)
    ledger.limit("identity_d", balance - change, zero, ROUNDING)
    # (c): the agents one after the other, each on the first team's conversations with weights.
    weight, total = torch.ones_like(p_old), torch.zeros_like(change)
    for agent in tree.layout.changed:
        slots = [i for i, (_, a) in enumerate(tree.layout.slots) if a == agent]
        before = tree.leaf(old, slots)
        own = torch.where(before > 0, tree.leaf(new, slots) / before.clamp(min=1e-300), 1.0)
        total = total + (p_old * weight * (own - 1) * centred).sum(-1)
        weight = weight * own
    ledger.limit("identity_c", total - change, zero, ROUNDING)
