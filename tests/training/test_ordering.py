"""In which order agents are updated, and what a step of each is predicted to gain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

import tiny_world
from satune.agents.ports import Learner
from satune.core.confidence import Spending
from satune.training.gain import DAMPING, predicted_gain
from satune.training.ordering import ORDERS
from satune.training.run import Training
from satune.training.settings import TrainingSettings
from satune.training.state import Batch, State
from satune.training.sweep import sweep_order
from satune.training.update import own_turns
from satune.types import Episode, Grade, Key, Problem, Turn

AGENTS = ("ann", "bob", "cat")


def swept(
    settings: TrainingSettings,
    learners: Mapping[str, Learner],
    episodes: list[Episode],
    stage: int,
) -> tuple[list[str], dict[str, float]]:
    """The order of a stage of a run whose first rollout was ``episodes``."""
    state = State.beginning(list(learners), 0.0, Spending(0.05))
    state.batch = Batch(episodes, [0.0] * len(episodes), 1, 0.0)
    return sweep_order(settings, learners, state, stage)


KEY = Key(0, "train", 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("world")
    return tiny_world.training(tiny_world.build(folder, AGENTS), folder / "run")


def episode(problem: int, sample: int, reward: float, **said: tuple[int, ...]) -> Episode:
    """An episode in which each agent named in ``said`` wrote those ids after one prompt."""
    turns = tuple(
        Turn(
            agent, agent, moment, 0, "", "stop", 0, (7, 8, 9), ids, (0.0,) * len(ids),
            completion_tokens=len(ids),
        )
        for moment, (agent, ids) in enumerate(said.items())
    )  # fmt: skip
    return Episode(Problem.of(f"p{problem}", "?"), sample, turns, None, Grade(reward))


def informative(agent: str, count: int = 8) -> list[Episode]:
    """The reward is 1 exactly where ``agent`` wrote 20 and not 30; the others always write 40."""
    episodes = []
    for index in range(count):
        for sample, (reward, token) in enumerate([(1.0, 20), (0.0, 30)]):
            said = {name: (token if name == agent else 40,) for name in AGENTS}
            episodes.append(episode(index, sample, reward, **said))
    return episodes


def test_static_is_the_teams_order_without_the_frozen(run: Training) -> None:
    assert swept(run.settings, run.learners, [], 1) == (list(AGENTS), {})
    run.learners["bob"].frozen = True
    try:
        assert swept(run.settings, run.learners, [], 1) == (["ann", "cat"], {})
    finally:
        run.learners["bob"].frozen = False


def test_random_orders_follow_the_seed_and_the_stage(run: Training) -> None:
    settings = replace(run.settings, order=ORDERS["random"])
    orders = [tuple(swept(settings, run.learners, [], stage)[0]) for stage in range(1, 61)]
    again = [tuple(swept(settings, run.learners, [], stage)[0]) for stage in range(1, 61)]
    assert orders == again
    # All six orders of three agents: one is missing from 60 draws with chance 6·(5/6)^60 = 1e-4.
    assert len(set(orders)) == 6
    other = replace(settings, seed=1)
    assert orders != [tuple(swept(other, run.learners, [], s)[0]) for s in range(1, 61)]


@pytest.mark.parametrize("agent", AGENTS)
def test_greedy_takes_the_agent_that_the_reward_depends_on_first(run: Training, agent: str) -> None:
    settings = replace(run.settings, order=ORDERS["greedy"])
    order, scores = swept(settings, run.learners, informative(agent), 1)
    assert order[0] == agent and scores[agent] > 0
    # The others write the same whatever the reward: with opposite advantages their two half
    # gradients are opposite as well (or both 0), and no gain is predicted.
    assert all(scores[other] == 0.0 for other in AGENTS if other != agent)


def test_predicted_gain_grows_with_the_root_of_delta(run: Training) -> None:
    settings = replace(run.settings, order=ORDERS["greedy"], deltas={"ann": 0.2})
    scores = swept(settings, run.learners, informative("ann"), 1)[1]
    base = swept(replace(settings, deltas={}), run.learners, informative("ann"), 1)[1]
    assert scores["ann"] == pytest.approx(base["ann"] * math.sqrt(0.2 / 0.05))


def test_predicted_gain_against_the_formula_from_one_gradient_an_episode(run: Training) -> None:
    learner = run.learners["ann"]
    generator = torch.Generator().manual_seed(1)
    episodes = [
        episode(i // 2, i % 2, 0.0, ann=tuple(torch.randint(0, 300, (3,), generator=generator)))
        for i in range(6)
    ]
    episodes = [
        replace(
            e, turns=tuple(replace(t, completion_ids=tuple(map(int, t.completion_ids or ())))
                           for t in e.turns),
        )
        for e in episodes
    ]  # fmt: skip
    advantages_E = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64)
    packed = own_turns("ann", episodes)

    def gradient(index: int) -> torch.Tensor:
        """∇ log π of episode ``index`` alone, by autograd on the model itself, flat."""
        turn = episodes[index].turns[0]
        assert turn.prompt_ids is not None and turn.completion_ids is not None
        ids = torch.tensor([[*turn.prompt_ids, *turn.completion_ids]])
        logprobs = learner.policy.causal_lm(input_ids=ids).logits[0].log_softmax(-1)
        total = sum(logprobs[2 + k, token] for k, token in enumerate(turn.completion_ids))
        parameters = list(learner.policy.trainable().values())
        found = torch.autograd.grad(total, parameters)  # type: ignore[arg-type]
        return torch.cat([g.flatten() for g in found]).double()

    g_EP = torch.stack([gradient(index) for index in range(6)])
    # The halves and the signs are drawn as documented: from the key's own two streams.
    order = list(range(6))
    KEY.rng("greedy halves").shuffle(order)
    signs = KEY.rng("greedy signs")
    sign_E = torch.tensor([signs.choice((-1.0, 1.0)) for _ in range(6)]).double()
    half, rest = order[:3], order[3:]
    first = (advantages_E[half, None] * g_EP[half]).sum(0) / 3
    second = (advantages_E[rest, None] * g_EP[rest]).sum(0) / 3
    fisher = (sign_E[:, None] * g_EP).sum(0).square() / 6
    product = float((first * second / (fisher + DAMPING * fisher.mean())).sum())
    wanted = math.sqrt(2 * 0.05 * max(0.0, product))
    found = predicted_gain(learner, packed, advantages_E[packed.episode_T], 0.05, KEY)
    flipped_T = _flip(advantages_E, half)[packed.episode_T]
    flipped = predicted_gain(learner, packed, flipped_T, 0.05, KEY)
    # One of the two has a positive product: turning one half's advantages round turns its sign.
    assert found == pytest.approx(wanted, rel=1e-3)
    assert flipped == pytest.approx(math.sqrt(2 * 0.05 * max(0.0, -product)), rel=1e-3)
    assert (found > 0) != (flipped > 0)


def _flip(advantages_E: torch.Tensor, half: list[int]) -> torch.Tensor:
    flipped = advantages_E.clone()
    flipped[half] *= -1
    return flipped


def test_no_gain_is_predicted_for_an_agent_that_was_silent(run: Training) -> None:
    packed = own_turns("bob", [episode(0, 0, 1.0, ann=(5,)), episode(0, 1, 0.0, ann=(6,))])
    assert predicted_gain(run.learners["bob"], packed, torch.tensor([1.0, -1.0]), 0.05, KEY) == 0.0


def test_predicting_leaves_no_trace(run: Training) -> None:
    before = run.learners["ann"].export()
    swept(replace(run.settings, order=ORDERS["greedy"]), run.learners, informative("ann"), 1)
    assert tiny_world.same(run.learners["ann"].export(), before)
    assert all(p.grad is None for p in run.learners["ann"].policy.trainable().values())
