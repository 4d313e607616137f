"""Which numbers the weights of a swap have."""

from __future__ import annotations

import gc

from satune.agents.policy import Policy
from satune.commands.reseat import Numbers


def some_policy() -> Policy:
    """A policy of which nothing but its identity is asked for."""
    return object.__new__(Policy)


def test_a_number_names_one_set_of_weights() -> None:
    incumbent, newcomer, other = (some_policy() for _ in range(3))
    numbers = Numbers({"bob": 5})
    numbers.give("bob", incumbent, 3)
    # What has a number keeps it; what has none takes the next that the run never issued.
    assert numbers.of("bob", incumbent) == 3
    assert [numbers.of("bob", newcomer) for _ in range(2)] == [6, 6]
    # An agent that the run does not know begins with 0, also where a known policy plays it.
    assert numbers.of("seat", newcomer) == 0 and numbers.of("bob", newcomer) == 6
    # Four rounds of distillation gave the newcomer's weights four more numbers.
    numbers.give("bob", newcomer, 10)
    assert numbers.of("bob", newcomer) == 10 and numbers.of("bob", other) == 11
    assert numbers.issued == {"bob": 11, "seat": 0}


def test_a_number_is_not_given_again_when_its_policy_is_gone() -> None:
    numbers = Numbers({"bob": 0})
    assert numbers.of("bob", some_policy()) == 1
    gc.collect()
    assert numbers.of("bob", some_policy()) == 2
