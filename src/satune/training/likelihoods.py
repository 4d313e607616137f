"""How likely what was written so far was to those who wrote it, for a critic to read.

A slip is rare to the model that makes it: the probability of its own tokens tells whether a message
can be trusted where the text alone would have to be checked. A value may read whatever came before
the token that it is subtracted from, so that nothing becomes biased.
Shape suffixes: ``T`` own tokens, ``F`` what is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from satune.agents.packing import PackedTurns
from satune.agents.specs import CriticSettings
from satune.types import Episode, Turn

_Logs = np.ndarray


def written(
    packed: PackedTurns, episodes: Sequence[Episode], agent: str, critic: CriticSettings
) -> Tensor:
    """What the critic of ``agent`` reads beside the states before its own tokens: [T, F], float64,
    F as ``critic.inputs``, from 0 to 1.

    The four are the smallest probability of a token and the geometric mean of all, among what has
    been written in the episode so far, and the same two among what was written in the moment before
    the turn. Where nothing was written they are 1, and a message whose author tells no
    probabilities counts as nothing. ``packed`` holds the agent's turns of ``episodes``.
    """
    if not critic.likelihoods:
        return torch.zeros(packed.tokens, 0, dtype=torch.float64)
    rows = [row for episode in episodes for row in _of_episode(episode.turns, agent)]
    found_TF = np.concatenate([np.zeros((0, critic.inputs)), *rows])
    assert len(found_TF) == packed.tokens, "an own token is packed that no episode has"
    return torch.from_numpy(found_TF)


def _of_episode(turns: Sequence[Turn], agent: str) -> list[_Logs]:
    """The rows of each own turn, in the order of the turns."""
    before: list[_Logs] = []
    last: _Logs = np.zeros(0)
    rows = []
    for _, moment in groupby(turns, key=lambda turn: turn.moment):
        together = list(moment)
        earlier = np.concatenate([np.zeros(0), *before])
        for turn in together:
            if turn.agent == agent:
                rows.append(_of_turn(turn, earlier, last))
        last = np.concatenate([_told(turn) for turn in together])
        before.append(last)
    return rows


def _of_turn(turn: Turn, earlier: _Logs, last: _Logs) -> _Logs:
    """A row for each token of ``turn``, which begins after ``earlier``, of which ``last`` is the
    last moment's."""
    assert turn.completion_ids is not None, "only what has ids is packed"
    count, own = len(turn.completion_ids), _told(turn)
    if len(own) < count:  # it tells none
        own = np.zeros(count)
    # Before the first token the turn has written nothing, before the second one token, ...
    so_far = np.concatenate([[0.0], own[:-1]])[:count]
    least = np.minimum(np.minimum.accumulate(so_far), earlier.min(initial=0.0))
    tokens = np.maximum(len(earlier) + np.arange(count), 1)
    mean = (earlier.sum() + so_far.cumsum()) / tokens
    logs = (least, mean, np.full(count, last.min(initial=0.0)), np.full(count, _mean(last)))
    return np.exp(np.stack(logs, axis=1))


def _told(turn: Turn) -> _Logs:
    """The log-probabilities of a turn's tokens; none where its author tells none."""
    told = () if turn.sampled_logprobs is None else turn.sampled_logprobs
    return np.asarray(told, dtype=np.float64)


def _mean(logs: _Logs) -> float:
    return float(logs.mean()) if len(logs) else 0.0
