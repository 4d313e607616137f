"""What a step keeps of the policy before it, and what it measures against that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from satune.agents.packing import PackedTurns


@dataclass(slots=True)
class Snapshot:
    """An agent's parameters, and its optimiser's state, bit for bit."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    steps: int

    def rest(self) -> None:
        """Move to the CPU, bit for bit: whoever else has this snapshot lets the device go too."""
        self.weights = {name: tensor.cpu() for name, tensor in self.weights.items()}
        self.optimizer = {name: tensor.cpu() for name, tensor in self.optimizer.items()}


@dataclass(slots=True)
class Anchor:
    """The policy before the step on one experience: hidden states [T, H], log-probabilities [T].

    Filled where asked for (``known_T``): the first mini-batch of a step is scored at the anchor
    anyway, so its states are kept from there instead of computed twice.
    """

    snapshot: Snapshot
    packed: PackedTurns
    hidden_TH: Tensor | None
    logprobs_T: Tensor
    known_T: Tensor
    reference_TH: Tensor | None = None
    project: Any = None
    reference_project: Any = None

    def keep(self, tokens_T: Tensor, hidden_TH: Tensor, logprobs_T: Tensor) -> None:
        if self.hidden_TH is None:
            shape = (self.packed.tokens, hidden_TH.shape[-1])
            self.hidden_TH = torch.empty(shape, dtype=hidden_TH.dtype)
        self.hidden_TH[tokens_T] = hidden_TH.detach().cpu()
        self.logprobs_T[tokens_T] = logprobs_T.detach().cpu().to(self.logprobs_T.dtype)
        self.known_T[tokens_T] = True


@dataclass(frozen=True, slots=True)
class Measurement:
    """The proposal against the anchor at every own token: exact KL both ways, log-probabilities."""

    kl_T: Tensor
    reverse_kl_T: Tensor
    logprobs_T: Tensor
