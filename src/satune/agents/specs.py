"""What an agent's adapter and optimiser are told; nothing here needs a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from satune.ranges import Count, MayChange, NotNegative, Positive, Range, Whole

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
