"""Batches that are drawn before their stage, while earlier stages still update (THEORY §6).

A batch for stage t is drawn by the team as it was when stage t - k began, k being
``rollout.ahead``. It follows from those weights, its problems and its key alone: it may be drawn at
any time before stage t, and again after the run was cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from satune.agents.packing import PackedTurns, pack
from satune.agents.ports import Learner
from satune.core.ratios import sequence_log_ratio
from satune.training.ports import Agents, Drawer, Host
from satune.training.settings import TrainingSettings
from satune.training.state import Early, Held, Past, State
from satune.types import Episode, Key


@dataclass(slots=True)
class Ahead:
    """What a run draws ahead with. Without a ``drawer`` nothing is."""

    drawer: Drawer | None = None
    _under_way: dict[int, Future[list[Episode]]] = field(default_factory=dict)

    def missing(self, early: Sequence[Early], stage: int, ahead: int) -> list[int]:
        """The stages after ``stage`` for which a batch has to be begun now."""
        begun = {each.stage for each in early}
        return [s for s in range(stage + 1, stage + ahead + 1) if s not in begun]

    def weights_of(self, state: State, learners: Agents) -> Past:
        """The weights of every version that draws ahead, copied where they are the present ones
        and nobody has kept them yet."""
        found: Past = {}
        for agent, learner in learners.items():
            if learner.frozen:
                continue
            held = state.past.get(agent, {})
            for version in {each.versions[agent] for each in state.early}:
                if version not in held:
                    assert version == state.versions[agent], "the weights of an old version"
                    held = held | {version: {n: t.cpu() for n, t in learner.export().items()}}
                found.setdefault(agent, {})[version] = held[version]
        return found

    def begin(self, state: State, settings: TrainingSettings) -> None:
        """Have all batches under way that the run will come to."""
        for each in state.early:
            if each.stage in self._under_way or each.stage > settings.stages:
                continue
            assert self.drawer is not None
            team = {a: (each.versions[a], w[each.versions[a]]) for a, w in state.past.items()}
            key = Key(settings.seed, "train", each.stage, step=0)
            self._under_way[each.stage] = self.drawer.draw_ahead(
                key, each.offset, settings.problems, team
            )

    def drawn(self, early: Early) -> list[Episode]:
        """The episodes of a batch, as soon as they are there. Raises what drawing them raised."""
        return self._under_way.pop(early.stage).result()

    def drop(self, early: Sequence[Early], held: Mapping[str, Held]) -> list[Early]:
        """Forget, and name, those of ``early`` that agents draw which have changed since the last
        certificate: ``held`` is what they were then, and the gate has not kept the change as it
        was."""
        dropped = [
            each
            for each in early
            if any(each.versions[agent] > before.version for agent, before in held.items())
        ]
        for each in dropped:
            begun = self._under_way.pop(each.stage, None)
            if begun is not None:
                begun.cancel()
        return dropped

    def stop(self) -> None:
        """Give up what is under way."""
        if self.drawer is not None:
            self.drawer.stop_drawing()


@dataclass(frozen=True, slots=True)
class Correction:
    """``log_weights_E`` has log w of each episode, 0 of those that the world ended; ``figures`` how
    many tokens were ``scored`` for it, and the ``mismatch``: what the engine said of them minus
    ``written``, on average and at most."""

    log_weights_E: Tensor
    figures: dict[str, Any]


def correction(
    learners: Agents, episodes: Sequence[Episode], versions: Mapping[str, int], past: Past
) -> Correction:
    """w = exp Σ (anchor - written) over all turns of each episode, the anchor being the present
    weights, whose numbers are ``versions``, and written the learner's log-probability under the
    version that wrote the turn. Turns of the present version cost nothing; an episode may mix
    versions."""
    log_weights_E = torch.zeros(len(episodes), dtype=torch.float64)
    gaps: list[Tensor] = []
    scored = 0
    for agent, learner in learners.items():
        assert not isinstance(learner, Host)
        wrote = {t.version for e in episodes for t in e.turns if t.agent == agent}
        for version in sorted(wrote - {versions[agent]}):
            packed = _turns_of(agent, version, episodes)
            if packed.tokens == 0:
                continue
            anchor_T = learner.score(packed).double()
            with _holding(learner, past[agent][version]):
                written_T = learner.score(packed).double()
            log_weights_E += sequence_log_ratio(
                anchor_T, written_T, packed.episode_T, len(episodes)
            )
            scored += 2 * packed.tokens
            if packed.sampled_T is not None:
                gaps.append(packed.sampled_T.double() - written_T)
    figures: dict[str, Any] = {"scored": scored}
    if gaps:
        gap_T = torch.cat(gaps)
        figures["mismatch"] = {"mean": float(gap_T.mean()), "max": float(gap_T.abs().max())}
    return Correction(log_weights_E, figures)


def _turns_of(agent: str, version: int, episodes: Sequence[Episode]) -> PackedTurns:
    """What a version of the agent wrote in the episodes that the world did not end."""
    return pack(
        [
            [t for t in e.turns if t.agent == agent and t.version == version and not e.masked]
            for e in episodes
        ]
    )


@contextmanager
def _holding(learner: Learner, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the learner have these weights inside the block; the optimiser stays."""
    present = learner.export()
    learner.load_weights(weights)
    try:
        yield
    finally:
        learner.load_weights(present)
