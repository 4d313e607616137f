"""Credit rules: what an episode was worth to one agent, and which episodes have a say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from satune.core.advantages import group_advantages
from satune.training.advantages import advantages, groups
from satune.training.credit import (
    CREDIT,
    GroupCredit,
    SeatCredit,
    load_credit,
)
from satune.types import Episode, Failure, Grade, Problem, Turn, UserError

LOST = Failure("the server is gone", policy=False)
OVERFLOW = Failure("the context is full", policy=True)
PLAIN = GroupCredit(normalise=False)


def turn(seat: str = "s", agent: str = "ann", length: int = 0) -> Turn:
    return Turn(seat, agent, 0, 0, "", "stop", 0, completion_tokens=length)


def episode(
    problem: str,
    reward: float,
    *turns: Turn,
    seats: dict[str, float] | None = None,
    failure: Failure | None = None,
) -> Episode:
    grade = Grade(reward, seats=seats)
    return Episode(Problem.of(problem, "?"), 0, turns or (turn(),), None, grade, failure=failure)


# group


def test_a_reward_is_compared_with_those_of_its_problem() -> None:
    episodes = [episode("p", 1.0), episode("q", 0.5), episode("p", 0.0), episode("q", 0.5)]
    assert groups(episodes).tolist() == [0, 1, 0, 1]
    # p: mean .5, deviation .5; q: constant.
    found = advantages(GroupCredit(), episodes, "ann", 10)
    assert found.dtype == torch.float64
    torch.testing.assert_close(
        found, torch.tensor([1.0, 0.0, -1.0, 0.0]).double(), atol=1e-5, rtol=0
    )


@given(st.lists(st.tuples(st.sampled_from("pqr"), st.floats(0, 1)), min_size=2, max_size=12))
def test_group_is_the_core_functions_value_to_the_last_bit(drawn: list[tuple[str, float]]) -> None:
    # Every problem twice, so that none is alone.
    episodes = [episode(problem, reward) for problem, reward in drawn + drawn]
    rewards_E = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
    expected_E = group_advantages(rewards_E, groups(episodes))
    assert torch.equal(advantages(GroupCredit(), episodes, "ann", 10), expected_E)


def test_overlong_messages_are_charged_to_their_agent() -> None:
    episodes = [episode("p", 1.0, turn(length=10)), episode("p", 1.0, turn(length=8))]
    rule = GroupCredit(normalise=False, overlong_buffer=4)
    # Limit 10, buffer 4: free up to 6 tokens, then a quarter a token. 10 costs 1, 8 costs .5.
    assert advantages(rule, episodes, "ann", 10).tolist() == pytest.approx([-0.25, 0.25])
    assert advantages(rule, episodes, "bob", 10).tolist() == [0.0, 0.0]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"credit\.clip 0: give a number above 0"):
        GroupCredit(clip=0)
    with pytest.raises(ValueError, match=r"credit\.baseline 'best': choose one of mean"):
        SeatCredit(baseline="best")  # type: ignore[arg-type]


# What the world ended


def test_what_the_world_ended_has_no_advantage_and_no_say_in_its_group() -> None:
    episodes = [
        episode("p", 1.0),
        episode("p", 0.0, failure=LOST),
        episode("p", 0.5),
        episode("q", 1.0),
        episode("q", 0.0, failure=LOST),
    ]
    # p: mean of 1 and .5; with the lost one it would be .5. q has one left: nothing to compare.
    assert advantages(PLAIN, episodes, "ann", 10).tolist() == [0.25, 0.0, -0.25, 0.0, 0.0]


def test_the_policys_own_failure_is_a_reward_like_any_other() -> None:
    episodes = [episode("p", 1.0), episode("p", 0.0, failure=OVERFLOW)]
    assert advantages(PLAIN, episodes, "ann", 10).tolist() == [0.5, -0.5]


@given(
    st.lists(
        st.tuples(st.sampled_from("pq"), st.floats(0, 1), st.booleans()), min_size=1, max_size=12
    )
)
def test_advantages_do_not_depend_on_what_the_world_ended(
    drawn: list[tuple[str, float, bool]],
) -> None:
    episodes = [
        episode(problem, reward, failure=LOST if lost else None) for problem, reward, lost in drawn
    ]
    found = advantages(GroupCredit(), episodes, "ann", 10)
    heard = [index for index, e in enumerate(episodes) if not e.masked]
    alone = advantages(GroupCredit(), [episodes[i] for i in heard], "ann", 10)
    assert torch.equal(found[heard], alone)
    assert all(found[i] == 0 for i in range(len(episodes)) if i not in heard)
    # The value that a lost episode happens to carry is nowhere.
    spoilt = [replace(e, grade=Grade(math.nan)) if e.masked else e for e in episodes]
    assert torch.equal(advantages(GroupCredit(), spoilt, "ann", 10), found)


# seats


def test_each_agent_gets_the_credit_of_its_own_seats() -> None:
    turns = (turn("plan", "ann"), turn("check", "ann"), turn("solve", "bob"))
    episodes = [
        episode("p", 0.5, *turns, seats={"plan": 1.0, "check": 0.0, "solve": 0.2}),
        episode("p", 0.5, *turns, seats={"plan": 0.0, "check": 0.0, "solve": 0.8}),
    ]
    rule = SeatCredit(normalise=False)
    # ann: the mean of plan and check, .5 and 0. bob: .2 and .8. The team's rewards are equal.
    assert advantages(rule, episodes, "ann", 10).tolist() == [0.25, -0.25]
    assert advantages(rule, episodes, "bob", 10).tolist() == pytest.approx([-0.3, 0.3])
    assert advantages(PLAIN, episodes, "ann", 10).tolist() == [0.0, 0.0]


def test_where_no_seat_is_named_the_teams_reward_stands_for_it() -> None:
    turns = (turn("plan", "ann"), turn("check", "ann"))
    rule = SeatCredit()
    named = episode("p", 0.5, *turns, seats={"plan": 0.9})
    assert rule.reward(named, "ann") == 0.9  # check is not named and is left out
    assert rule.reward(episode("p", 0.5, *turns, seats={"solve": 0.9}), "ann") == 0.5
    assert rule.reward(episode("p", 0.0, *turns, failure=OVERFLOW), "ann") == 0.0
    # A seat that did not speak has no part in it.
    assert rule.reward(episode("p", 0.5, turns[0], seats={"plan": 0.4, "check": 0.9}), "ann") == 0.4


# The user's own


def test_a_rule_of_the_users_own_by_class_or_function(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(
        """
import torch
from satune.training.credit import GroupCredit
from dataclasses import dataclass


@dataclass(frozen=True)
class Doubled(GroupCredit):
    by: float = 2.0

    def reward(self, episode, agent):
        return self.by * episode.reward


def raw(episodes, agent, max_new_tokens, less: float = 0.0):
    return torch.tensor([e.reward - less for e in episodes])


def wrong(episodes, agent, max_new_tokens):
    return torch.zeros(1)
"""
    )
    episodes = [episode("p", 1.0), episode("p", 0.0), episode("p", 0.0, failure=LOST)]
    doubled = load_credit("rules.py:Doubled", {"normalise": False, "by": 3.0}, tmp_path)
    assert advantages(doubled, episodes, "ann", 10).tolist() == [1.5, -1.5, 0.0]
    raw = load_credit("rules.py:raw", {"less": 0.25}, tmp_path)
    assert advantages(raw, episodes, "ann", 10).tolist() == [0.75, -0.25, 0.0]
    with pytest.raises(UserError, match=r"gave the shape \(1,\) for 2 episodes"):
        advantages(load_credit("rules.py:wrong", {}, tmp_path), episodes, "ann", 10)
    with pytest.raises(UserError, match=r"unknown option 'lss' \(nearest: less"):
        load_credit("rules.py:raw", {"lss": 1}, tmp_path)
    with pytest.raises(UserError, match=r"unknown credit 'grup' \(nearest: group; there are"):
        load_credit("grup")
    assert load_credit("seats", {"clip": 3.0}) == CREDIT["seats"](clip=3.0)
