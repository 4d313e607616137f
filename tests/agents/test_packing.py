"""Packing by hand, and what holds for any turns and any token budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from satune.agents.packing import micro_batches, pack
from tiny_models import turn


def test_turns_that_extend_one_another_share_a_sequence():
    # Prompt 1 2, completion 3 4; the next prompt begins with 1 2 3 4, then 5, completion 6.
    packed = pack([[turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 5], [6])]])
    (sequence,) = packed.sequences
    assert sequence.ids == (1, 2, 3, 4, 5, 6)
    assert sequence.positions == (2, 3, 5) and sequence.tokens == (0, 1, 2)
    assert packed.targets_T.tolist() == [3, 4, 6]
    assert packed.turn_T.tolist() == [0, 0, 1] and packed.episode_T.tolist() == [0, 0, 0]
    assert packed.turns == 2 and packed.episodes == 1 and packed.tokens == 3


def test_turns_that_do_not_extend_stand_apart():
    # The second prompt stops short of the first's completion; the third extends the second.
    packed = pack(
        [[], [turn([1], [2, 3]), turn([1, 2], [4]), turn([1, 2, 4], [5])], [turn([9], [8])]]
    )
    assert [s.ids for s in packed.sequences] == [(1, 2, 3), (1, 2, 4, 5), (9, 8)]
    assert [s.positions for s in packed.sequences] == [(1, 2), (2, 3), (1,)]
    assert [s.tokens for s in packed.sequences] == [(0, 1), (2, 3), (4,)]
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
        for position, token in zip(sequence.positions, sequence.tokens, strict=True):
            # What precedes an own token in its sequence is its prompt and completion so far.
            episode, number = int(packed.episode_T[token]), int(packed.turn_T[token])
            first = int((packed.turn_T == number).nonzero()[0])
            prompt, completion = drawn[episode][number - sum(len(d) for d in drawn[:episode])]
            assert sequence.ids[:position] == (*prompt, *completion[: token - first])
