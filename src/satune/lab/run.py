"""The whole lab: thousands of instances, a tally a bound, the studies beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from satune.lab.conversations import check_conversations
from satune.lab.estimators import check_estimators
from satune.lab.ledger import Ledger
from satune.lab.steps import check_steps
from satune.lab.studies import growth, softmax_rate, xor_team

CONVERSATIONS = 0.75
"""The share of instances that are conversations: some of their bounds see three layouts of nine."""


def run_lab(
    seeds: int, instances: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Check ``instances`` instances for each seed 0, 1, ...; what came of them, as plain values.

    ``violations`` has a line for every bound that did not hold on an instance; ``bounds`` the
    tallies; ``exponents`` those fitted to penalties and actual errors in the number of agents.
    """
    ledger = Ledger()
    done = 0
    series: dict[str, Any] = {}
    for seed in range(seeds):
        rng = torch.Generator().manual_seed(seed)
        conversations = round(CONVERSATIONS * instances)
        done += check_steps(ledger, rng, instances - conversations, seed)
        done += check_conversations(ledger, rng, conversations, seed)
        # Random numbers of its own, so that the others' instances stay what they were.
        apart = torch.Generator().manual_seed(1_000_000 + seed)
        done += check_estimators(ledger, apart, instances // 4, seed)
        rate = softmax_rate(ledger, rng, max(8, instances // 100))
        if seed == 0:
            series = {"growth": growth(rng), "rate": rate, "xor": xor_team()}
        progress(seed + 1, seeds)
    return {
        "seeds": seeds,
        "instances": done,
        "bounds": {name: tally.to_dict() for name, tally in ledger.tallies.items()},
        "exponents": series["growth"]["exponents"],
        "series": series,
        "violations": ledger.violations,
    }
