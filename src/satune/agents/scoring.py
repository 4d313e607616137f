"""Scoring an experience's own tokens with a policy, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from satune.agents.packing import MicroBatch, PackedTurns, micro_batches
from satune.agents.policy import Policy
from satune.agents.prefixes import states_of
from satune.core.logprobs import TokenScores, score_tokens


@dataclass(frozen=True, slots=True)
class Scorer:
    """How a learner feeds its policy: micro-batches of at most ``budget`` padded tokens, prompts
    that several of their sequences begin with once where ``share_prompts``."""

    policy: Policy
    budget: int
    share_prompts: bool

    @property
    def dtype(self) -> torch.dtype:
        """What log-probabilities and divergences are kept in."""
        trained = [p for part in self.policy.parts for p in part.trainable().values()]
        double = any(p.dtype == torch.float64 for p in trained)
        return torch.float64 if double else torch.float32

    def batches(
        self,
        packed: PackedTurns,
        episodes: Sequence[int] | None = None,
        *,
        whole_episodes: bool = False,
    ) -> Iterator[MicroBatch]:
        return micro_batches(packed, self.budget, episodes, whole_episodes=whole_episodes)

    @property
    def splits_episodes(self) -> bool:
        """Whether what is scored here is a part of an experience whose other parts are scored in
        other processes."""
        return False

    def together(self, *found: Tensor) -> tuple[Tensor, ...]:
        """What all processes found, summed; each has 0 where it did not score."""
        return found

    def everywhere(self, holds: bool) -> bool:
        """Whether something holds in every process."""
        return holds

    def decided(self, value: float) -> float:
        """A number that all processes go by."""
        return value

    def states(self, batch: MicroBatch) -> Tensor:
        """Hidden states [T, H] that predict the batch's own tokens."""
        here = batch.to(self.policy.device)
        return states_of(self.policy, here, share_prompts=self.share_prompts)

    def score(
        self, hidden_TH: Tensor, packed: PackedTurns, batch: MicroBatch, **wanted: Any
    ) -> TokenScores:
        """Scores of the batch's own tokens at their states; ``wanted`` as of ``score_tokens``."""
        return score_tokens(
            hidden_TH,
            packed.targets_T[batch.tokens_T].to(hidden_TH.device),
            self.policy.project,
            temperature=self.policy.temperature,
            **wanted,
        )
