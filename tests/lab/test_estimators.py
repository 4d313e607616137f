"""Multi-step estimates with exact values: their bias on enumerated conversations."""

from __future__ import annotations

import pytest
import torch

from satune.core.advantages import gae
from satune.lab import estimators
from satune.lab.conversations import Layout, Tree
from satune.lab.estimators import check_estimators, check_own_steps
from satune.lab.ledger import Ledger


def test_the_bias_of_two_thousand_teams_is_within_its_bounds() -> None:
    ledger = Ledger()
    assert check_estimators(ledger, torch.Generator().manual_seed(7), 2000, 7) >= 2000
    assert ledger.violations == []
    for name in ("traces_own_steps", "traces_moments"):
        tally = ledger.tallies[name].to_dict()
        assert tally["held"] == tally["checked"] >= 4000
        # The bounds are not idle: half of one would not do.
        assert tally["largest_tightness"] > 0.6


def test_without_the_steps_own_trace_the_bias_over_own_turns_is_larger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What others answer to the step itself counts as well: with the residual of a step whole and
    only later ones weighed, as over a team's moments, the estimate is off by more."""
    keep = estimators._estimate

    def untraced(tree, values, traces, gamma, lam):  # type: ignore[no-untyped-def]
        found, residual = keep(tree, values, traces, gamma, lam)
        return found / torch.stack(traces, -1).clamp(min=1e-9), residual

    monkeypatch.setattr(estimators, "_estimate", untraced)
    ledger = Ledger()
    check_estimators(ledger, torch.Generator().manual_seed(7), 2000, 7)
    assert any(line.startswith("traces_own_steps") for line in ledger.violations)


def test_a_bias_worked_out_by_hand() -> None:
    """0 speaks, 1 answers; reward 1 for answer 1. The old 1 answers 1 with 1/2, the new one with 1.

    V = 1 under the new team, and the advantage of either message is 0. The old answers have ratio 0
    and 2, c = 0 and 1: residuals -1 and 0, each half of the time: E c δ = 0 without any bias. With
    the roles of the answers turned, reward 1 for answer 0: V = 0, residuals 1 and 0 for answers of
    ratio 0 and 2, again 0. Where the new one answers 1 with 3/4: V = 3/4, residuals -3/4 and 1/4,
    c = 1/2 and 1: E c δ = (-3/8 + 1/4)/2 = -1/16. TV is 1/4, the largest residual 3/4; with one own
    turn nothing follows, and the bound is (1/4)(3/4)/(1 - γλ 3/4) = 3/16 at λ = 0."""
    layout = Layout("pair", ((0,), (1,)), (1,))
    tree = Tree.of(layout, torch.tensor([[0.0, 1.0, 0.0, 1.0]], dtype=torch.float64))
    half = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
    old = [half, half.expand(1, 2, 2)]
    new = [half, torch.tensor([[[0.25, 0.75]] * 2], dtype=torch.float64)]
    ledger = Ledger()
    check_own_steps(ledger, tree, old, new, 1.0, 0.0)
    (tightness,) = ledger.tallies["traces_own_steps"].tightness
    assert tightness.item() == pytest.approx((1 / 16) / (3 / 16), rel=1e-12)
    assert ledger.violations == []
    sure = torch.tensor([[[0.0, 1.0]] * 2], dtype=torch.float64)
    check_own_steps(ledger, tree, old, [half, sure], 1.0, 0.0)
    assert ledger.tallies["traces_own_steps"].tightness[1].item() == 0.0


def test_residuals_are_gae_without_a_look_ahead() -> None:
    # δ = r + γ V' - V, V = 0 at the end: .5 * .8 - .2 and 1 - .8.
    found = gae(
        torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 0.8]]), torch.zeros(1, 2), gamma=0.5, lam=0
    )
    assert found[0].tolist() == pytest.approx([0.2, 0.2])
