"""How tiny base models are taught, as ``tiny`` in a recipe says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from satune.ranges import Count, Positive, Range, Share, Whole


@dataclass(frozen=True, slots=True)
class TinySettings:
    """How a tiny base model is taught.

    ``error`` is the share of an expert's messages that are wrong on purpose and ``examples`` the
    number of demonstrated conversations of one seat each; whoever plays the demonstrations keeps to
    both. After ``steps`` updates of ``batch`` conversations, training goes on until the model's
    greedy success reaches ``greedy_target``, to at most ``max_steps``. ``lr`` is the peak rate of
    embeddings and norms; the weight matrices' is MATRIX_RATE times that.
    """

    error: Annotated[float, Range(ge=0, lt=1)] = 0.3
    steps: Count = 1000
    max_steps: Count = 2000
    batch: Count = 64
    lr: Positive = 3e-3
    greedy_target: Share = 0.98
    examples: Count = 24000
    seed: Whole = 0
