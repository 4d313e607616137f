"""The critic of one agent: what its states are worth, learnt from what became of them.

A head reads the agent's own hidden states and passes no gradient on to them, so that ratios, KL and
the trust region stay those of a step on the objective alone. A model of its own has its states to
itself and learns them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from satune.agents.anchor import Anchor
from satune.agents.gradient import loss_scale
from satune.agents.moments import Moments
from satune.agents.packing import MicroBatch, mini_batches, padded_budget
from satune.agents.policy import Policy
from satune.agents.ports import NonFinite, ValueTargets
from satune.agents.scoring import Scorer
from satune.agents.specs import CriticSettings, OptimizerSettings
from satune.core.values import value_loss
from satune.types import Key


class LocalCritic:
    """A critic in this process; ``agents.ports.Critic`` is what training sees.

    ``policy`` is whose states it reads: the agent's, or with kind "model" one that is the critic's
    alone. ``optimizer`` is the agent's, whose rate and decay are not the critic's; ``file`` where
    moments rest if they rest on the disk. Every value is 0 before the first fit.

    ``written_TF`` [T, F], F as the settings' ``inputs``, is read beside the hidden states: numbers
    from 0 to 1, √H times as large inside, so that one of them moves a value in a step as much as
    all H numbers of a normed state do.
    """

    def __init__(
        self,
        policy: Policy,
        settings: CriticSettings,
        optimizer: OptimizerSettings,
        file: Path | None = None,
    ) -> None:
        assert settings.kind != "none"
        self.settings = settings
        self._optimizer = replace(optimizer, lr=settings.rate, weight_decay=0.0)
        self._scorer = Scorer(
            policy,
            padded_budget(optimizer.micro_batch_tokens, policy.device),
            share_prompts=not optimizer.gradient_checkpointing,
        )
        self._own = settings.kind == "model"
        hidden = policy.config.hidden_size
        self._louder = math.sqrt(hidden)
        self._head = nn.Linear(hidden + settings.inputs, 1, dtype=self._scorer.dtype)
        for parameter in self._head.to(policy.device).parameters():
            nn.init.zeros_(parameter)
        self._parameters: dict[str, nn.Parameter] = {
            f"head.{name}": parameter for name, parameter in self._head.named_parameters()
        }
        if self._own:
            for name, parameter in policy.backbone.named_parameters():
                parameter.requires_grad_()
                self._parameters[f"model.{name}"] = parameter
        self._moments = Moments(self._parameters, self._optimizer, file)

    @torch.no_grad()
    def values(self, anchor: Anchor, written_TF: Tensor) -> Tensor:
        """The value [T] (CPU) of the state before each own token of an anchor's experience."""
        values_T = torch.empty(anchor.packed.tokens, dtype=self._scorer.dtype)
        for batch in self._scorer.batches(anchor.packed):
            states_TH = self._states(anchor, batch)
            values_T[batch.tokens_T] = self._values(states_TH, written_TF[batch.tokens_T]).cpu()
        return values_T

    def fit(self, anchor: Anchor, written_TF: Tensor, lesson: ValueTargets, key: Key) -> float:
        """Learn the targets, in as many passes and mini-batches of episodes as the settings say,
        shuffled by ``key``; returns the mean loss a state. Raises NonFinite."""
        packed, settings = anchor.packed, self.settings
        place_T = torch.full((packed.tokens,), -1)
        place_T[lesson.tokens_N] = torch.arange(len(lesson.tokens_N))
        episode_N = packed.episode_T[lesson.tokens_N]
        total = 0.0
        self._moments.wake()
        try:
            for epoch in range(settings.epochs):
                order = episode_N.unique().tolist()
                key.rng("values", epoch).shuffle(order)
                for mini in mini_batches(order, settings.mini_batches):
                    count = int(torch.isin(episode_N, torch.tensor(mini)).sum())
                    total += count * self._step(
                        anchor, written_TF, lesson, place_T, sorted(mini), count
                    )
        finally:
            self._moments.rest()
        return total / (settings.epochs * len(lesson.tokens_N))

    def _step(
        self,
        anchor: Anchor,
        written_TF: Tensor,
        lesson: ValueTargets,
        place_T: Tensor,
        episodes: list[int],
        count: int,
    ) -> float:
        """One optimiser step on the ``count`` states of some episodes; returns its loss."""
        policy, total = self._scorer.policy, 0.0
        scale = loss_scale(policy) if self._own else 1.0
        with policy.checkpointing(self._own and self._optimizer.gradient_checkpointing):
            for batch in self._scorer.batches(anchor.packed, episodes):
                place_N = place_T[batch.tokens_T]
                asked_T = place_N >= 0
                place_N = place_N[asked_T]
                if not len(place_N):
                    continue
                states_TH = self._states(anchor, batch)
                values_N = self._values(
                    states_TH[asked_T.to(states_TH.device)], written_TF[batch.tokens_T][asked_T]
                )
                told = (lesson.before_N, lesson.targets_N, lesson.weights_N)
                before_N, targets_N, weights_N = (each_N[place_N].to(values_N) for each_N in told)
                clip = self.settings.clip
                loss = value_loss(values_N, before_N, targets_N, weights_N, clip) / count
                total += float(loss.detach())
                (scale * loss).backward()
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        for gradient in gradients if scale != 1.0 else ():
            gradient.div_(scale)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        finite = math.isfinite(total) and math.isfinite(norm)
        if finite:
            limit = self._optimizer.max_grad_norm
            for gradient in gradients if norm > limit else ():
                gradient.mul_(limit / norm)
            self._moments.step(self._optimizer.lr)
        for parameter in self._parameters.values():
            parameter.grad = None
        if not finite:
            raise NonFinite("the loss of the values is not finite")
        return total

    def _states(self, anchor: Anchor, batch: MicroBatch) -> Tensor:
        if self._own:
            return self._scorer.states(batch)
        return anchor.states.at(self._scorer, batch).hidden_TH

    def _values(self, hidden_NH: Tensor, written_NF: Tensor) -> Tensor:
        read = (hidden_NH, self._louder * written_NF)
        return self._head(torch.cat([each.to(self._head.weight) for each in read], -1)).squeeze(-1)

    # -- what it is made of ----------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """Its parameters by name, copied: ``head.weight`` [1, H + F] and ``head.bias`` [1] over
        hidden states and what is read beside them, and under ``model.`` those of a model of its
        own."""
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments as flat named tensors, which are not to be written to."""
        parts = {"weights": self.weights(), "optimizer": self._moments.state()}
        return {f"{part}|{name}": t for part, each in parts.items() for name, t in each.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Be bit for bit what ``state`` was given of."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
        for flat, tensor in state.items():
            part, name = flat.split("|", 1)
            parts[part][name] = tensor
        for name, parameter in self._parameters.items():
            parameter.copy_(parts["weights"][name])
        self._moments.load(parts["optimizer"])
