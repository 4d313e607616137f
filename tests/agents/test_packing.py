"""Packing by hand, and what holds for any turns and any token budget."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from satune.agents import packing
from satune.agents.packing import TokenSequence, micro_batches, pack
from satune.types import Turn, ids_of, logprobs_of
from tiny_models import turn
from yardstick import at_most


def places(sequence: TokenSequence) -> list[tuple[int, int]]:
    """Where each own token of a sequence stands: its position and its flat number."""
    return [(p + k, t + k) for p, t, count in sequence.spans for k in range(count)]


def test_turns_that_extend_one_another_share_a_sequence():
    # Prompt 1 2, completion 3 4; the next prompt begins with 1 2 3 4, then 5, completion 6.
    packed = pack([[turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 5], [6])]])
    (sequence,) = packed.sequences
    assert sequence.ids == ids_of([1, 2, 3, 4, 5, 6])
    assert sequence.spans == ((2, 0, 2), (5, 2, 1))  # position, own token, count
    assert packed.targets_T.tolist() == [3, 4, 6]
    assert packed.turn_T.tolist() == [0, 0, 1] and packed.episode_T.tolist() == [0, 0, 0]
    assert packed.turns == 2 and packed.episodes == 1 and packed.tokens == 3


def test_turns_that_do_not_extend_stand_apart():
    # The second prompt stops short of the first's completion; the third extends the second.
    packed = pack(
        [[], [turn([1], [2, 3]), turn([1, 2], [4]), turn([1, 2, 4], [5])], [turn([9], [8])]]
    )
    assert [list(s.ids) for s in packed.sequences] == [[1, 2, 3], [1, 2, 4, 5], [9, 8]]
    assert [s.spans for s in packed.sequences] == [
        ((1, 0, 2),),
        ((2, 2, 1), (3, 3, 1)),
        ((1, 4, 1),),
    ]
    assert packed.episode_T.tolist() == [1, 1, 1, 1, 2]
    assert packed.turn_T.tolist() == [0, 0, 1, 2, 3]
    assert packed.episodes == 3  # the first, in which the agent never spoke, counts


def test_equal_prompts_of_two_episodes_stay_apart():
    packed = pack([[turn([1], [2])], [turn([1, 2], [3])]])
    assert [s.episode for s in packed.sequences] == [0, 1]


@pytest.mark.parametrize("missing", [turn(None, [1]), turn([1], None)])
def test_a_turn_without_ids_is_refused(missing):
    with pytest.raises(ValueError, match="seat 'a' has no token ids"):
        pack([[missing]])


def test_the_hidden_state_before_a_token_predicts_it():
    packed = pack([[turn([7, 8], [3, 4])], [turn([5], [6])]])
    (batch,) = micro_batches(packed, 100, whole_episodes=True)
    # Shorter first; the last token of a sequence is not fed; padding is 0.
    assert batch.input_ids.tolist() == [[5, 0, 0], [7, 8, 3]]
    assert batch.row_T.tolist() == [0, 1, 1] and batch.column_T.tolist() == [0, 1, 2]
    assert batch.tokens_T.tolist() == [2, 0, 1] and batch.episodes == (0, 1)


def test_two_turns_of_one_sequence_in_one_batch():
    # 1 2 | 3 4 | 5 | 6 as above, one row: the states before 3, 4 and 6, at columns 1, 2 and 4.
    packed = pack([[turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 5], [6])]])
    (batch,) = micro_batches(packed, 100, whole_episodes=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.row_T.tolist() == [0, 0, 0] and batch.column_T.tolist() == [1, 2, 4]
    assert batch.tokens_T.tolist() == [0, 1, 2]


def test_the_turns_are_left_as_they_are():
    first, second = turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 5], [6])
    pack([[first, second]])
    assert (first.prompt_ids, first.completion_ids) == (ids_of([1, 2]), ids_of([3, 4]))
    assert second.prompt_ids == ids_of([1, 2, 3, 4, 5])


def test_sampled_log_probabilities_are_flat_or_none():
    first = replace(turn([1], [2, 3]), sampled_logprobs=logprobs_of([-0.5, -1.0]))
    second = replace(turn([4], [5]), sampled_logprobs=logprobs_of([-0.25]))
    sampled_T = pack([[first], [second]]).sampled_T
    assert sampled_T is not None and sampled_T.tolist() == [-0.5, -1.0, -0.25]
    assert pack([[first], [turn([4], [5])]]).sampled_T is None


def test_an_agent_that_wrote_nothing():
    packed = pack([[], []])
    assert packed.tokens == packed.turns == 0 and packed.episodes == 2
    assert list(micro_batches(packed, 9, whole_episodes=True)) == []


def test_the_plan_of_the_whole_experience_is_made_once(monkeypatch):
    packed = pack([[turn([1] * n, [2])] for n in (3, 1, 2)])
    made = []
    filled = packing._filled
    monkeypatch.setattr(packing, "_filled", lambda *a: made.append(a) or filled(*a))
    for _ in range(3):
        widths = [b.input_ids.shape for b in micro_batches(packed, 6, whole_episodes=False)]
    # Sequences of 2, 3 and 4 ids: 2 x 3 padded are allowed, 3 x 4 are not; one a row is not fed.
    assert widths == [(2, 2), (1, 3)] and len(made) == 1
    assert len(list(micro_batches(packed, 4, whole_episodes=False))) == 3 and len(made) == 2


def operations(work: Callable[[], object]) -> int:
    """How many lines of Python ``work`` runs, and how many calls it makes."""
    count = 0

    def trace(*_: object) -> Any:
        nonlocal count
        count += 1
        return trace

    def profile(*_: object) -> None:
        nonlocal count
        count += 1

    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.settrace(None)
        sys.setprofile(None)
    return count


def experience(turns: int, tokens: int) -> list[list[Turn]]:
    """Episodes of ``turns`` turns of ``tokens`` ids each, which extend one another."""
    episodes = []
    for start in range(4):
        prompt, written = ids_of([start + 1]), []
        for number in range(turns):
            completion = ids_of(range(number, number + tokens))
            written.append(
                replace(turn(prompt, completion), sampled_logprobs=logprobs_of(completion))
            )
            prompt = prompt + completion + ids_of([7])
        episodes.append(written)
    return episodes


def test_no_python_runs_for_a_token():
    def work(tokens: int) -> int:
        drawn = experience(3, tokens)

        def pack_and_collate() -> None:
            list(micro_batches(pack(drawn), 10**9, whole_episodes=True))

        pack_and_collate()  # what torch and numpy import at their first use is not counted
        return operations(pack_and_collate)

    # Turns a hundred times as long take the same steps.
    assert work(1000) == work(10)


@pytest.mark.slow
def test_a_million_tokens_are_packed_in_no_time():
    rows = [e for _ in range(32) for e in experience(8, 1000)]
    with at_most(20):  # about 2 where nothing else runs
        packed = pack(rows)
        batches = list(micro_batches(packed, 16384, whole_episodes=True))
    assert packed.tokens == sum(b.tokens_T.numel() for b in batches) == 1_024_000


ids = st.lists(st.integers(1, 3), min_size=1, max_size=5)
episodes = st.lists(st.lists(st.tuples(ids, ids), max_size=3), min_size=1, max_size=5)


@given(episodes, st.integers(1, 40), st.booleans(), st.data())
def test_any_budget_covers_every_token_once(drawn, budget, whole, data):
    turns = [[turn(prompt, completion) for prompt, completion in each] for each in drawn]
    packed = pack(turns)
    chosen = data.draw(st.none() | st.sets(st.integers(0, len(turns) - 1)))
    seen: list[int] = []
    at: dict[int, int] = {}
    for index, batch in enumerate(
        micro_batches(
            packed, budget, None if chosen is None else sorted(chosen), whole_episodes=whole
        )
    ):
        seen += batch.tokens_T.tolist()
        rows = batch.input_ids.shape[0]
        alone = whole and len(batch.episodes) == 1
        # Budgets count the padded ids, of which one a row is not fed.
        assert rows * (batch.input_ids.shape[1] + 1) <= budget or rows == 1 or alone
        for e in batch.episodes:
            assert not whole or at.setdefault(e, index) == index
        # The id after the state, where it was fed, is the target.
        for row, column, token in zip(
            batch.row_T.tolist(), batch.column_T.tolist(), batch.tokens_T.tolist(), strict=True
        ):
            if column + 1 < batch.input_ids.shape[1]:
                after = batch.input_ids[row, column + 1]
                assert after in (packed.targets_T[token], 0)
    wanted = range(len(turns)) if chosen is None else chosen
    assert sorted(seen) == [t for t, e in enumerate(packed.episode_T.tolist()) if e in wanted]


@given(episodes)
def test_merging_keeps_every_turn_readable(drawn):
    turns = [[turn(prompt, completion) for prompt, completion in each] for each in drawn]
    packed = pack(turns)
    for sequence in packed.sequences:
        for position, token in places(sequence):
            # What precedes an own token in its sequence is its prompt and completion so far.
            episode, number = int(packed.episode_T[token]), int(packed.turn_T[token])
            first = int((packed.turn_T == number).nonzero()[0])
            prompt, completion = drawn[episode][number - sum(len(d) for d in drawn[:episode])]
            assert list(sequence.ids[:position]) == [*prompt, *completion[: token - first]]
