"""The order of a stage's sweep, from the settings and what the stage before it did."""

from __future__ import annotations

from collections.abc import Mapping

from satune.agents.ports import Learner
from satune.training.gain import predicted_gain
from satune.training.ordering import Sweep
from satune.training.settings import TrainingSettings
from satune.training.state import State
from satune.training.update import advantages_by_token, own_turns
from satune.types import Key, UserError


def sweep_order(
    settings: TrainingSettings,
    learners: Mapping[str, Learner],
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
        update = settings.update
        for name in names:
            if name not in scores:
                packed = own_turns(name, heard)
                advantages_T = advantages_by_token(learners[name], name, heard, packed, update)
                delta = settings.region(name).delta
                scores[name] = predicted_gain(learners[name], packed, advantages_T, delta, key)
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
