"""What crosses between a run and its hosts, looked at byte by byte."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_world
from owners import owners
from satune.files.arrays import read_rows
from satune.hosts import client as client_module
from satune.hosts.wire import (
    episodes_from,
    episodes_to,
    from_bytes,
    sampling_from,
    sampling_to,
    to_bytes,
)
from satune.types import (
    Episode,
    Failure,
    Grade,
    Problem,
    Sampling,
    Turn,
    UserError,
    ids_of,
    logprobs_of,
)

AGENTS = ("ann", "bob")
EVERYTHING = [
    "stages=1", "protocol=debate", "certify.problems=3", "certify.samples=2",
    "certify.evidence=balance", "certify.every=2", "credit={name: gae, traces: true}",
    "critic.kind=head",
]  # fmt: skip


def traces_of(weights: Mapping[str, torch.Tensor]) -> list[bytes]:
    """How weights would look in a message: as their bytes, or as a JSON number each."""
    found = []
    for tensor in weights.values():
        flat = tensor.detach().reshape(-1)[:64]
        found.append(flat[:3].numpy().tobytes())
        found += [repr(x).encode() for x in flat.tolist() if abs(x) > 1e-3 and not x.is_integer()]
    return found


def test_no_weight_id_or_log_probability_of_a_token_crosses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_world.build(tmp_path / "world")
    bodies: list[bytes] = []

    def sent(message: Mapping[str, Any]) -> bytes:
        bodies.append(to_bytes(message))
        return bodies[-1]

    def received(data: bytes) -> dict[str, Any]:
        bodies.append(data)
        return from_bytes(data)

    monkeypatch.setattr(client_module, "to_bytes", sent)
    monkeypatch.setattr(client_module, "from_bytes", received)
    secrets: list[bytes] = []
    with owners(recipe, tmp_path / "owners", AGENTS, EVERYTHING) as there:
        for agent in AGENTS:
            secrets += traces_of(there.owner(agent).learner.export())
        first = there.owner("ann").learner.export()
        there.train(tmp_path / "run")
        for agent in AGENTS:
            owner = there.owner(agent)
            secrets += traces_of(owner.learner.export())
            secrets += traces_of(owner.learner.optimizer_state())
            assert owner.learner.critic is not None
            secrets += traces_of(dict(owner.learner.critic.state()))
        ids, logprobs = [], []
        for agent in AGENTS:
            kept = tmp_path / "owners" / agent / "checkpoints"
            for row in [r for p in kept.glob("*/written.jsonl") for r in read_rows(p)]:
                for turn in row["turns"]:
                    ids.append(json.dumps(list(turn["prompt_ids"]), separators=(",", ":"))[1:-1])
                    logprobs += [repr(x) for x in turn["sampled_logprobs"]]
    wire = b"\n".join(bodies)
    assert len(secrets) > 500 and ids and logprobs

    def crossed(secrets: list[bytes], wire: bytes) -> list[bytes]:
        return [secret for secret in secrets if secret in wire]

    secrets += [text.encode() for text in ids]
    secrets += [text.encode() for text in logprobs if text not in ("0.0", "-0.0")]
    assert crossed(secrets, wire) == []
    # It would have been found.
    embedding = first["model.embed_tokens.weight"]
    assert crossed(secrets, to_bytes({"weights": embedding[0].tolist()}))
    assert crossed(secrets, embedding.numpy().tobytes())
    # No list of numbers is as long as the tokens are many: sums a turn or an episode at most.
    episodes = 3 * 4
    assert longest_list(bodies) <= 3 * episodes


def longest_list(bodies: list[bytes]) -> int:
    longest = 0
    left = [json.loads(body) for body in bodies]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            if value and all(isinstance(x, int | float) for x in value):
                longest = max(longest, len(value))
            left += value
    return longest


def test_an_episode_loses_ids_answers_and_remarks_and_nothing_else() -> None:
    turn = Turn(
        "s", "ann", 0, 0, "text", "stop", 3, ids_of([1, 2]), ids_of([3]), logprobs_of([-0.5]),
        dropped=1, prompt_tokens=2, completion_tokens=1, handle="train-1",
    )  # fmt: skip
    other = Turn("t", "bob", 1, 0, "more", "length", 4, completion_tokens=9, handle="train-2")
    grade = Grade(1 / 3, {"format": math.inf}, "the answer is 42", {"s": 0.1})
    problem = Problem.of("p1", "What?", 42, secret="x")
    episode = Episode(
        problem,
        2,
        (turn, other),
        "42",
        grade,
        failure=Failure("grader: ValueError: 42 is right", False),
    )
    (plain,) = episodes_to([episode], "ann")
    (back,) = episodes_from([from_bytes(to_bytes({"e": plain}))["e"]])
    assert (back.problem.id, back.problem.prompt, back.problem.answer) == ("p1", (), None)
    assert back.grade == Grade(1 / 3, {"format": math.inf}, "", {"s": 0.1})
    assert back.failure == Failure("grader", False)
    assert back.masked and back.sample == 2 and back.answer == "42"
    mine, theirs = back.turns
    assert mine == Turn(
        "s", "ann", 0, 0, "text", "stop", 3,
        dropped=1, prompt_tokens=2, completion_tokens=1, handle="train-1",
    )  # fmt: skip
    # The handle of another owner's message is not told.
    assert theirs == Turn("t", "bob", 1, 0, "more", "length", 4, completion_tokens=9)
    assert b"42 " not in to_bytes(plain) and b"What" not in to_bytes(plain)


@pytest.mark.parametrize("value", [0.1, 1e-310, -0.0, math.inf, -math.inf, 2**-52 / 3])
def test_numbers_cross_bit_for_bit(value: float) -> None:
    back = from_bytes(to_bytes({"x": [value]}))["x"][0]
    assert math.copysign(1, back) == math.copysign(1, value) and back == value
    assert math.isnan(from_bytes(to_bytes({"x": math.nan}))["x"])


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 10**30}, {"top_k": 2**31}, {"top_k": -1}, {"top_k": 1.0}, {"top_k": True},
        {"top_p": 1.1}, {"top_p": math.nan}, {"top_p": "1"}, {"top_p": None},
        {"temperature": -0.1}, {"temperature": math.inf}, {"temperature": 10**400},
        {"temperature": [1.0]}, {"max_new_tokens": 0}, {"max_new_tokens": 2.5},
    ],
)  # fmt: skip
def test_an_engine_is_asked_for_nothing_that_it_would_fail_at(changes: dict[str, Any]) -> None:
    plain = sampling_to(Sampling(8, 0.7, 0.9, 5))
    assert sampling_from(from_bytes(to_bytes(plain))) == Sampling(8, 0.7, 0.9, 5)
    widest = plain | {"top_k": 2**31 - 1, "temperature": 0}
    assert sampling_from(widest) == Sampling(8, 0, 0.9, 2**31 - 1)
    (name,) = changes
    with pytest.raises(UserError, match=f"^is asked for a {name} that is not between"):
        sampling_from(plain | changes)
