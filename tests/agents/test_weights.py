"""Weights on their way: copied for who looks, and told apart by their digest."""

from __future__ import annotations

import pytest
import torch

from satune.agents.weights import Weights, weights_digest

SET = {"a": torch.tensor([[1.0, -0.0], [2.0, 3.0]]), "b": torch.tensor(4.0, dtype=torch.bfloat16)}


def test_weights_are_exported_once_and_only_for_who_looks() -> None:
    exports: list[int] = []

    def export() -> dict[str, torch.Tensor]:
        exports.append(1)
        return dict(SET)

    weights = Weights(export)
    assert not exports
    assert set(weights) == {"a", "b"} and len(weights) == 2 and "a" in weights
    assert weights["b"] is SET["b"] and dict(weights) == SET
    assert len(exports) == 1


def test_a_digest_depends_on_what_the_weights_are_and_on_nothing_else() -> None:
    digest = weights_digest(SET)
    assert len(digest) == 32 and int(digest, 16) >= 0
    columns = SET["a"].T.contiguous().T  # the same numbers, laid out by columns
    assert not columns.is_contiguous()
    assert weights_digest({"b": SET["b"].clone(), "a": columns}) == digest
    assert weights_digest(Weights(lambda: SET)) == digest


@pytest.mark.parametrize(
    "changed",
    [
        {"a": SET["a"]},
        {"a": SET["a"], "c": SET["b"]},
        {"a": SET["a"].abs(), "b": SET["b"]},  # -0 is 0
        {"a": SET["a"].nextafter(torch.tensor(9.0)), "b": SET["b"]},
        {"a": SET["a"].reshape(1, 4), "b": SET["b"]},
        {"a": SET["a"].view(torch.int32), "b": SET["b"]},
        {"a": SET["a"], "b": SET["b"].view(torch.float16)},
    ],
    ids=["fewer", "name", "sign", "ulp", "shape", "type", "half"],
)
def test_other_weights_have_another_digest(changed: dict[str, torch.Tensor]) -> None:
    assert weights_digest(changed) != weights_digest(SET)
