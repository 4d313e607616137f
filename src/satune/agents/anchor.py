"""What a step keeps of the policy before it, and what it measures against that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from satune.agents.packing import MicroBatch, PackedTurns
from satune.agents.scoring import Scorer
from satune.core.logprobs import Project, Reference


@dataclass(slots=True)
class Snapshot:
    """An agent's parameters, its optimiser's state and its critic's, if any, bit for bit.

    The optimiser's state lies on the CPU and may be what a learner rests with: it is not to be
    written to.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    steps: int
    critic: Mapping[str, Tensor] = field(default_factory=dict)

    def rest(self) -> None:
        """Move to the CPU, bit for bit: whoever else has this snapshot lets the device go too."""
        self.weights = {name: tensor.cpu() for name, tensor in self.weights.items()}
        self.optimizer = {name: tensor.cpu() for name, tensor in self.optimizer.items()}
        self.critic = {name: tensor.cpu() for name, tensor in self.critic.items()}


@dataclass(slots=True)
class States:
    """Hidden states that ``weights`` give at the own tokens of an experience.

    As many as ``room`` bytes are enough for are held on the CPU, in the type that the head computes
    in; the others are computed again when they are asked for. ``project`` is the head with
    ``weights``.
    """

    weights: Mapping[str, Tensor]
    project: Project
    room: int
    tokens: int
    _held_NH: Tensor | None = None
    _place_T: Tensor = field(init=False)
    _count: int = 0

    def __post_init__(self) -> None:
        self._place_T = torch.full((self.tokens,), -1)

    def keep(self, scorer: Scorer, tokens_T: Tensor, hidden_TH: Tensor) -> bool:
        """Hold the states [T, H] of these tokens if all of them fit; tells whether they do."""
        if self._held_NH is None:
            dtype = scorer.policy.autocast or hidden_TH.dtype
            width = hidden_TH.shape[-1]
            rows = min(self.tokens, self.room // (width * dtype.itemsize))
            self._held_NH = torch.empty(rows, width, dtype=dtype)
        end = self._count + len(tokens_T)
        if end > len(self._held_NH):
            return False
        self._held_NH[self._count : end] = hidden_TH.detach().cpu()
        self._place_T[tokens_T] = torch.arange(self._count, end)
        self._count = end
        return True

    def forget(self) -> None:
        """Hold none of them, until they are given again."""
        self._place_T.fill_(-1)
        self._count = 0

    @torch.no_grad()
    def fill(self, scorer: Scorer, packed: PackedTurns) -> None:
        """Compute and hold what there is room for."""
        with scorer.policy.holding(self.weights):
            for batch in scorer.batches(packed):
                kept = self.keep(scorer, batch.tokens_T, scorer.states(batch))
                if not scorer.everywhere(kept):
                    return

    @torch.no_grad()
    def at(self, scorer: Scorer, batch: MicroBatch) -> Reference:
        """The states of a batch's own tokens on the policy's device, held or computed again."""
        place_T = self._place_T[batch.tokens_T]
        held_NH = self._held_NH
        if held_NH is None and scorer.splits_episodes:
            held_NH = torch.empty(0, 0)  # this process may have had no token yet
        held = held_NH is not None and bool((place_T >= 0).all())
        if scorer.everywhere(held):
            assert held_NH is not None
            return Reference(held_NH[place_T].to(scorer.policy.device), self.project)
        with scorer.policy.holding(self.weights):
            return Reference(scorer.states(batch), self.project)


@dataclass(slots=True)
class Anchor:
    """The policy before the step on one experience: its states, and log-probabilities [T].

    Filled where asked for (``known_T``): the first mini-batch of a step is scored at the anchor
    anyway, so its states are kept from there instead of computed twice. ``reference`` has the
    states under the weights the run began with, where a reference KL needs them. ``completed`` says
    that it was scored in the cut in which a proposal is measured, where that can differ.
    """

    packed: PackedTurns
    states: States
    logprobs_T: Tensor
    known_T: Tensor
    reference: States | None = None
    completed: bool = False

    def keep(self, scorer: Scorer, tokens_T: Tensor, hidden_TH: Tensor, logprobs_T: Tensor) -> None:
        """Take what was scored at the anchor."""
        self.states.keep(scorer, tokens_T, hidden_TH)
        self.note(tokens_T, logprobs_T)

    def note(self, tokens_T: Tensor, logprobs_T: Tensor) -> None:
        """Take the log-probabilities [T] of these tokens at the anchor."""
        self.logprobs_T[tokens_T] = logprobs_T.detach().cpu().to(self.logprobs_T.dtype)
        self.known_T[tokens_T] = True


@dataclass(frozen=True, slots=True)
class Measurement:
    """The proposal against the anchor at every own token: exact KL both ways, log-probabilities.
    Where it is not ``whole``, all three are 0 at what was not measured."""

    kl_T: Tensor
    reverse_kl_T: Tensor
    logprobs_T: Tensor
    whole: bool = True
