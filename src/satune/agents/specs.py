"""What an agent's adapter, optimiser and critic are told; nothing here needs a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from satune.ranges import Count, MayChange, NotNegative, Part, Positive, Range, Share, Text, Whole

# What AdamW is asked to do with float32 weights has to be a float32 number.
Rate = Annotated[float, Range(gt=0, le=1e30)]
Decay = Annotated[float, Range(ge=0, lt=1)]
ALL_LINEAR = ("all-linear",)


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """A LoRA adapter. ``targets`` names modules; "all-linear" alone is every linear layer but the
    head. ``dropout`` must stay 0: scoring has to repeat what sampling did."""

    rank: Count = 16
    alpha: Positive = 32.0
    targets: Annotated[tuple[str, ...], Range(min_length=1)] = ALL_LINEAR
    dropout: NotNegative = 0.0


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, how a step's mini-batches are cut and what is held between them.

    ``micro_batch_tokens`` counts padded tokens. ``anchor_memory`` bounds the hidden states that are
    held: up to 1 a share of the memory that is free, above 1 bytes.
    """

    lr: Rate = 1e-5
    weight_decay: Annotated[float, Range(ge=0, le=1e6)] = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[float, Range(ge=1e-30, le=1e30)] = 1e-8
    warmup_steps: Whole = 0
    max_grad_norm: Positive = 1.0
    micro_batch_tokens: Annotated[Count, MayChange()] = 16384
    anchor_memory: Annotated[float, Range(ge=0), MayChange()] = 0.25
    gradient_checkpointing: Annotated[bool, MayChange()] = False
    offload: Annotated[Literal["cpu", "disk", "none"], MayChange()] = "cpu"


@dataclass(frozen=True, slots=True)
class ShardingSettings:
    """How the processes that torchrun started share each agent's weights and work. The weights are
    cut over all processes, or over each of ``replicas`` equal parts of them. A process that is not
    heard of for ``timeout`` seconds counts as lost."""

    replicas: Count = 1
    timeout: Annotated[float, Range(ge=1)] = 600.0


@dataclass(frozen=True, slots=True)
class CriticSettings:
    """A value function an agent, which ``credit: gae`` estimates advantages with.

    ``kind`` "head" reads the agent's own hidden states and leaves the agent as it is, "model" is a
    whole model of its own that starts as ``model`` (None: as the agent's), "none" is no critic.
    A value is that of the state in which a turn begins, or with ``boundary`` "token" of every
    token's. ``gamma`` discounts from one boundary to the next (None: .99 between turns, 1 between
    tokens), ``lam`` weighs longer looks ahead. ``lr`` None is 1e-3 for a head, 1e-5 for a model;
    ``clip`` bounds how far a fit may move a value and gain by it (None: no bound). With
    ``likelihoods`` values also read how likely what was written so far was to those who wrote it
    (``training.likelihoods``).
    """

    kind: Literal["none", "head", "model"] = "none"
    model: Text | None = None
    boundary: Literal["turn", "token"] = "turn"
    gamma: Part | None = None
    lam: Share = 0.95
    lr: Rate | None = None
    epochs: Count = 4
    mini_batches: Count = 4
    clip: Positive | None = 0.5
    likelihoods: bool = False

    @property
    def inputs(self) -> int:
        """How many numbers a value is read from beside a hidden state."""
        return 4 if self.likelihoods else 0

    @property
    def discount(self) -> float:
        if self.gamma is not None:
            return self.gamma
        return 0.99 if self.boundary == "turn" else 1.0

    @property
    def rate(self) -> float:
        return self.lr or (1e-3 if self.kind == "head" else 1e-5)
