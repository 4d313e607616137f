"""The learner of one agent: what training talks to. It never hands out the module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from satune.agents.anchor import Anchor, Measurement, Snapshot
from satune.agents.distillation import add_gradient, measure_distances
from satune.agents.mixture import Distances, MixturePolicy
from satune.agents.packing import MicroBatch, PackedTurns, micro_batches, padded_budget
from satune.agents.policy import Policy
from satune.agents.ports import NonFinite
from satune.agents.prefixes import states_of
from satune.agents.specs import OptimizerSettings
from satune.core.logprobs import Reference, TokenScores, score_tokens
from satune.core.objectives import ObjectiveBatch, ObjectiveSettings, objective_loss


@dataclass(slots=True)
class LocalLearner:
    """A learner over a policy in this process; ``agents.ports.Learner`` is what training sees.

    Trainable parameters are the master weights (float32, or float64 where the team is); compute may
    run under autocast. The optimiser's moments exist between ``wake`` and ``rest`` on the device.
    """

    policy: Policy
    settings: OptimizerSettings
    frozen: bool = False
    scratch: Path | None = None
    steps: int = 0
    _parameters: dict[str, torch.nn.Parameter] = field(init=False)
    _budget: int = field(init=False)
    _optimizer: torch.optim.AdamW | None = field(init=False, default=None)
    _resting: dict[str, Tensor] = field(init=False, default_factory=dict)
    _resting_file: Path | None = field(init=False, default=None)
    _reference: dict[str, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._budget = padded_budget(self.settings.micro_batch_tokens, self.policy.device)
        self._parameters = self.policy.trainable()
        for parameter in self._parameters.values():
            parameter.requires_grad_(not self.frozen)

    @property
    def device(self) -> str:
        return str(self.policy.device)

    # -- scoring ---------------------------------------------------------------------------------

    def _states(self, batch: MicroBatch) -> Tensor:
        # Checkpointed layers keep no keys and values to share.
        share = not self.settings.gradient_checkpointing
        return states_of(self.policy, batch.to(self.policy.device), share_prompts=share)

    @torch.no_grad()
    def score(self, packed: PackedTurns) -> Tensor:
        """Log-probabilities [T] (CPU) of the own tokens at the agent's temperature."""
        logprobs_T = torch.empty(packed.tokens, dtype=self._statistics_dtype())
        for batch in micro_batches(packed, self._budget, whole_episodes=False):
            scores = self._score(self._states(batch), packed, batch)
            logprobs_T[batch.tokens_T] = scores.logprobs_T.cpu()
        return logprobs_T

    def _score(
        self, hidden_TH: Tensor, packed: PackedTurns, batch: MicroBatch, **wanted: Any
    ) -> TokenScores:
        targets_T = packed.targets_T[batch.tokens_T].to(hidden_TH.device)
        return score_tokens(
            hidden_TH,
            targets_T,
            self.policy.project,
            temperature=self.policy.temperature,
            **wanted,
        )

    def anchor(self, packed: PackedTurns, *, reference: bool = False) -> Anchor:
        """Hold the present weights as the anchor of a step on this experience.

        Its states are filled by the first mini-batch and by ``complete``. ``reference`` also scores
        the experience under the weights the run began with (for a reference KL).
        """
        anchor = Anchor(
            snapshot=self.snapshot(),
            packed=packed,
            hidden_TH=None,
            logprobs_T=torch.zeros(packed.tokens, dtype=self._statistics_dtype()),
            known_T=torch.zeros(packed.tokens, dtype=torch.bool),
        )
        anchor.project = self.policy.projection_with(anchor.snapshot.weights)
        if reference:
            assert self._reference is not None, "keep_reference() comes first"
            anchor.reference_TH = self._reference_states(packed, self._reference)
            anchor.reference_project = self.policy.projection_with(self._reference)
        return anchor

    @torch.no_grad()
    def complete(self, anchor: Anchor) -> None:
        """Fill the anchor's states where no mini-batch has; only right while at the anchor."""
        missing = torch.unique(anchor.packed.episode_T[~anchor.known_T]).tolist()
        if not missing:
            return
        for batch in micro_batches(anchor.packed, self._budget, missing, whole_episodes=False):
            hidden_TH = self._states(batch)
            scores = self._score(hidden_TH, anchor.packed, batch)
            anchor.keep(batch.tokens_T, hidden_TH, scores.logprobs_T)

    @torch.no_grad()
    def measure(self, anchor: Anchor) -> Measurement:
        """Exact full-vocabulary KL per own token between the present weights and the anchor."""
        packed = anchor.packed
        shape, dtype = (packed.tokens,), self._statistics_dtype()
        kl_T, reverse_T, logprobs_T = (torch.zeros(shape, dtype=dtype) for _ in range(3))
        for batch in micro_batches(packed, self._budget, whole_episodes=False):
            scores = self._score(
                self._states(batch),
                packed,
                batch,
                anchor=self._held(anchor.hidden_TH, anchor.project, batch),
                reverse=True,
            )
            assert scores.kl_T is not None and scores.reverse_kl_T is not None
            kl_T[batch.tokens_T] = scores.kl_T.cpu()
            reverse_T[batch.tokens_T] = scores.reverse_kl_T.cpu()
            logprobs_T[batch.tokens_T] = scores.logprobs_T.cpu()
        return Measurement(kl_T, reverse_T, logprobs_T)

    def _held(self, hidden_TH: Tensor | None, project: Any, batch: MicroBatch) -> Reference:
        assert hidden_TH is not None, "the anchor was not completed"
        return Reference(hidden_TH[batch.tokens_T].to(self.policy.device), project)

    def _statistics_dtype(self) -> torch.dtype:
        trained = [p for part in self.policy.parts for p in part.trainable().values()]
        double = any(p.dtype == torch.float64 for p in trained)
        return torch.float64 if double else torch.float32

    # -- learning --------------------------------------------------------------------------------

    def accumulate(
        self,
        anchor: Anchor,
        episodes: Sequence[int],
        advantages_E: Tensor,
        weights_E: Tensor,
        objective: ObjectiveSettings,
    ) -> dict[str, float]:
        """Add the gradient of one mini-batch, ``episodes`` of the anchor's experience.

        ``advantages_E`` and ``weights_E`` cover the whole experience. Micro-batches are cut by the
        token budget; the mini-batch's totals are the denominators, so any cut gives the same sum.
        Returns the objective's metrics as sums. Raises NonFinite.
        """
        packed = anchor.packed
        chosen = torch.zeros(packed.episodes, dtype=torch.bool)
        chosen[list(episodes)] = True
        mask_T = chosen[packed.episode_T]
        token_total = float(mask_T.sum())
        if token_total == 0:
            return {}
        known = bool(anchor.known_T[mask_T].all())
        # At the anchor the KL and its gradient are zero: nothing to add to the loss.
        here = objective if known else replace(objective, beta=0.0)
        totals: dict[str, float] = {}
        with self.policy.checkpointing(self.settings.gradient_checkpointing):
            for batch in micro_batches(packed, self._budget, episodes, whole_episodes=True):
                hidden_TH = self._states(batch)
                wanted: dict[str, Any] = {"entropy": here.entropy != 0.0}
                if here.beta > 0.0:
                    wanted["anchor"] = self._held(anchor.hidden_TH, anchor.project, batch)
                if here.reference_kl > 0.0:
                    wanted["reference"] = self._held(
                        anchor.reference_TH, anchor.reference_project, batch
                    )
                scores = self._score(hidden_TH, packed, batch, **wanted)
                if not known:
                    anchor.keep(batch.tokens_T, hidden_TH, scores.logprobs_T)
                device, rows = hidden_TH.device, list(batch.episodes)
                # The batch's episodes are sorted: an episode's place among them is its number.
                episode_T = torch.searchsorted(torch.tensor(rows), packed.episode_T[batch.tokens_T])
                loss, metrics = objective_loss(
                    ObjectiveBatch(
                        logprobs_T=scores.logprobs_T,
                        anchor_logprobs_T=anchor.logprobs_T[batch.tokens_T].to(device),
                        episode_T=episode_T.to(device),
                        turn_T=packed.turn_T[batch.tokens_T].to(device),
                        advantages_E=advantages_E[rows].to(device, scores.logprobs_T.dtype),
                        weights_E=weights_E[rows].to(device, scores.logprobs_T.dtype),
                        episode_total=float(len(episodes)),
                        token_total=token_total,
                        kl_T=scores.kl_T,
                        reference_kl_T=scores.reference_kl_T,
                        entropy_T=scores.entropy_T,
                    ),
                    here,
                )
                if not math.isfinite(float(loss.detach())):
                    raise NonFinite("the loss is not finite")
                loss.backward()
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    def distil(self, packed: PackedTurns, episodes: Sequence[int], mixture: MixturePolicy) -> float:
        """Add the gradient of the mean of KL(present weights‖mixture) over the own tokens of
        ``episodes``, a part of the experience; returns that mean in nats. Raises NonFinite."""
        checkpointed = self.settings.gradient_checkpointing
        with self.policy.checkpointing(checkpointed):
            return add_gradient(
                self.policy,
                mixture,
                packed,
                episodes,
                self._budget,
                share_prompts=not checkpointed,
            )

    def distances(self, packed: PackedTurns, mixture: MixturePolicy) -> Distances:
        """Exact full-vocabulary KL per own token between the present weights and a mixture's
        models. Raises NonFinite where logits are not finite."""
        return measure_distances(self.policy, mixture, packed, self._budget)

    def step(self, rate: float | None = None) -> float:
        """One optimiser step on the accumulated gradient; returns its norm before clipping.

        ``rate`` is the learning rate of this step where the caller has a schedule of its own; else
        it is the settings', which rises over their ``warmup_steps``.
        Raises NonFinite (gradients dropped, weights untouched) where the norm is not finite.
        """
        assert self._optimizer is not None, "wake() comes before step()"
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not math.isfinite(norm):
            self.drop_gradients()
            raise NonFinite("the gradient is not finite")
        limit = self.settings.max_grad_norm
        if limit > 0 and norm > limit:
            for gradient in gradients:
                gradient.mul_(limit / norm)
        self.steps += 1
        if rate is None:
            rate = self.settings.lr * min(1.0, self.steps / (self.settings.warmup_steps + 1))
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self.drop_gradients()
        return norm

    def drop_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def gradient(self, packed: PackedTurns, coefficients_T: Tensor) -> dict[str, Tensor]:
        """Gradient of Σ_t c_t log π(token t) by parameter; leaves weights and gradients alone."""
        accumulated = {name: p.grad for name, p in self._parameters.items()}
        self.drop_gradients()
        for batch in micro_batches(packed, self._budget, whole_episodes=False):
            hidden_TH = self._states(batch)
            logprobs_T = self._score(hidden_TH, packed, batch).logprobs_T
            (logprobs_T * coefficients_T[batch.tokens_T].to(logprobs_T)).sum().backward()
        gradients = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        for name, parameter in self._parameters.items():
            parameter.grad = accumulated[name]
        return gradients

    # -- weights ---------------------------------------------------------------------------------

    def export(self) -> dict[str, Tensor]:
        """The agent's own parameters, copied."""
        return self.policy.export()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.policy.load_weights(weights)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.export(), self.optimizer_state(copy=True), self.steps)

    def restore(self, snapshot: Snapshot) -> None:
        """Bit-exact return to a snapshot, optimiser included."""
        self.load_weights(snapshot.weights)
        self.load_optimizer_state(snapshot.optimizer, snapshot.steps)

    @torch.no_grad()
    def interpolate(
        self, anchor: Mapping[str, Tensor], target: Mapping[str, Tensor], scale: float
    ) -> None:
        """Weights anchor + scale (target - anchor); scale 1 is the target exactly. Moments stay."""
        if scale == 1.0:
            self.load_weights(target)
            return
        for name, parameter in self._parameters.items():
            start = anchor[name].to(parameter.device)
            parameter.copy_(start + scale * (target[name].to(parameter.device) - start))

    def keep_reference(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Hold the weights the run began with, on the CPU, for a reference KL."""
        source = self.export() if weights is None else weights
        self._reference = {name: tensor.to("cpu", copy=True) for name, tensor in source.items()}

    @property
    def reference_weights(self) -> dict[str, Tensor] | None:
        return self._reference

    @torch.no_grad()
    def _reference_states(self, packed: PackedTurns, reference: Mapping[str, Tensor]) -> Tensor:
        present = self.export()
        self.load_weights(reference)
        hidden: Tensor | None = None
        for batch in micro_batches(packed, self._budget, whole_episodes=False):
            states_TH = self._states(batch).cpu()
            if hidden is None:
                hidden = torch.empty(packed.tokens, states_TH.shape[-1], dtype=states_TH.dtype)
            hidden[batch.tokens_T] = states_TH
        self.load_weights(present)
        assert hidden is not None
        return hidden

    # -- the optimiser's memory ------------------------------------------------------------------

    def wake(self) -> None:
        """Bring the optimiser into memory for this agent's step."""
        if self._optimizer is not None or self.frozen:
            return
        state, self._resting = self.optimizer_state(), {}
        self._resting_file = None
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=self.settings.lr,
            betas=self.settings.betas,
            eps=self.settings.eps,
            weight_decay=self.settings.weight_decay,
            foreach=True,
        )
        self._fill(state)

    def rest(self) -> None:
        """Let the optimiser go; its moments rest on the CPU or on disk until the next step."""
        if self._optimizer is None:
            return
        state, self._optimizer = self.optimizer_state(), None
        self._put_away(state)

    def _put_away(self, state: Mapping[str, Tensor]) -> None:
        stays = self.settings.offload == "none"
        state = {n: t if stays else t.cpu() for n, t in state.items()}
        self._resting, self._resting_file = state, None
        if self.settings.offload == "disk" and self.scratch is not None and state:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._resting_file = self.scratch / f"{self.policy.name}.optimizer.safetensors"
            save_file({n: t.contiguous() for n, t in state.items()}, self._resting_file)
            self._resting = {}

    def optimizer_state(self, *, copy: bool = False) -> dict[str, Tensor]:
        """The moments as flat named tensors (``<parameter>|exp_avg``, ...), wherever they are."""
        if self._optimizer is None:
            found = load_file(self._resting_file) if self._resting_file else self._resting
        else:
            found = {
                f"{name}|{key}": value
                for name, parameter in self._parameters.items()
                for key, value in self._optimizer.state.get(parameter, {}).items()
            }
        return {n: t.detach().clone() for n, t in found.items()} if copy else dict(found)

    def load_optimizer_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        self.steps = steps
        if self._optimizer is None:
            self._put_away(state)
        else:
            self._fill(state)

    def _fill(self, state: Mapping[str, Tensor]) -> None:
        assert self._optimizer is not None
        self._optimizer.state.clear()
        for entry, value in state.items():
            name, key = entry.rsplit("|", 1)
            parameter = self._parameters[name]
            device = "cpu" if key == "step" else parameter.device
            self._optimizer.state[parameter][key] = value.to(device, copy=True)
