"""The order of a stage's sweep, from the settings and what the stage before it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from satune.agents.ports import Learner
from satune.training.ascent import advantages_by_token, own_turns
from satune.training.gain import predicted_gain
from satune.training.ordering import Sweep
from satune.training.ports import Agents, Host
from satune.training.settings import TrainingSettings, UpdateSettings
from satune.training.state import State
from satune.types import Episode, Key, UserError


def sweep_order(
    settings: TrainingSettings,
    learners: Agents,
    state: State,
    stage: int,
) -> tuple[list[str], dict[str, float]]:
    """The agents to update in this stage, first to last, and the predicted gains if the order asked
    for them. Frozen agents are left out.

    ``state`` has the stage's first rollout, and the order of the stage before with what the team
    took of it. Raises UserError for an order that names nobody, somebody who does not learn, or an
    agent twice.
    """
    assert state.batch is not None
    episodes = state.batch.episodes
    names = tuple(name for name, learner in learners.items() if not learner.frozen)
    key = Key(settings.seed, "train", stage)
    scores: dict[str, float] = {}

    heard = [episode for episode in episodes if not episode.masked]

    def gains() -> Mapping[str, float]:
        assert state.batch is not None
        if state.batch.drawn_before == 0:
            raise UserError(
                "order: gains are predicted from what the present team wrote, which a batch of "
                "rollout.ahead is not; use another order or remove that key"
            )
        for name in names:
            if name not in scores:
                update = settings.update_of(name)
                scores[name] = gain_of(learners[name], name, heard, update, key)
        return scores

    last, accepted = tuple(state.order), dict(state.accepted)
    sweep = Sweep(stage, names, last, accepted, episodes, key.rng("order"), gains)
    order = list(settings.order(sweep))
    known = set(order) <= set(names)
    if not order or not known or len(set(order)) < len(order):
        raise UserError(
            f"order: gave {', '.join(map(str, order)) or 'nobody'} for stage {stage}; give some of "
            f"{', '.join(names)}, each once"
        )
    return order, scores


def gain_of(
    learner: Learner | Host,
    agent: str,
    heard: Sequence[Episode],
    settings: UpdateSettings,
    key: Key,
) -> float:
    """What a step of the agent can be expected to gain on episodes right after their rollout, which
    the world ended none of."""
    if isinstance(learner, Host):
        return learner.gain(heard, key)
    packed = own_turns(agent, heard)
    advantages_T = advantages_by_token(learner, agent, heard, packed, settings)
    return predicted_gain(learner, packed, advantages_T, settings.trust_region.delta, key)
