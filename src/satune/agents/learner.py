"""The learner of one agent: what training talks to. It never hands out the module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from satune.agents.anchor import Anchor, Measurement, Snapshot, States
from satune.agents.critic import LocalCritic
from satune.agents.distillation import add_gradient, measure_distances
from satune.agents.gradient import MiniBatch, back_propagate, loss_scale
from satune.agents.memory import allowed_bytes
from satune.agents.mixture import Distances, MixturePolicy
from satune.agents.moments import Moments
from satune.agents.packing import PackedTurns, padded_budget
from satune.agents.policy import Policy
from satune.agents.ports import NonFinite
from satune.agents.rounding import Gauged, gauge
from satune.agents.scoring import Scorer
from satune.agents.specs import OptimizerSettings
from satune.core.settings import ObjectiveSettings, Per


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
    critic: LocalCritic | None = None
    moments: Moments = field(init=False)
    _parameters: dict[str, torch.nn.Parameter] = field(init=False)
    _scorer: Scorer = field(init=False)
    _reference: dict[str, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        settings, policy = self.settings, self.policy
        self._parameters = policy.trainable()
        for parameter in self._parameters.values():
            parameter.requires_grad_(not self.frozen)
        self._scorer = self._make_scorer(padded_budget(settings.micro_batch_tokens, policy.device))
        file = self.scratch and self.scratch / f"{policy.name}.optimizer.safetensors"
        self.moments = Moments(self._parameters, settings, file)

    @property
    def device(self) -> str:
        return str(self.policy.device)

    @property
    def _scale(self) -> float:
        """How many times as large as the gradient is what the parameters hold of it."""
        return loss_scale(self.policy)

    @property
    def _loss_scale(self) -> float:
        """What losses are multiplied with for it."""
        return self._scale

    def _make_scorer(self, budget: int) -> Scorer:
        # Checkpointed layers keep no keys and values to share.
        share_prompts = not self.settings.gradient_checkpointing
        return Scorer(self.policy, budget, share_prompts=share_prompts)

    def _anchor_room(self) -> int:
        """How many bytes of hidden states an anchor may hold."""
        return allowed_bytes(self.settings.anchor_memory, torch.device("cpu"))

    # -- scoring ---------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, packed: PackedTurns) -> Tensor:
        """Log-probabilities [T] (CPU) of the own tokens at the agent's temperature."""
        scorer = self._scorer
        logprobs_T = torch.zeros(packed.tokens, dtype=scorer.dtype)
        for batch in scorer.batches(packed):
            scores = scorer.score(scorer.states(batch), packed, batch)
            logprobs_T[batch.tokens_T] = scores.logprobs_T.cpu()
        return scorer.together(logprobs_T)[0]

    def anchor(
        self,
        packed: PackedTurns,
        weights: Mapping[str, Tensor] | None = None,
        *,
        reference: bool = False,
    ) -> Anchor:
        """Hold the present weights as the anchor of a step on this experience.

        ``weights`` are a copy of them, where the caller has one. The anchor's states are filled by
        the first mini-batch and by ``complete``. ``reference`` also holds states under the weights
        that the run began with (for a reference KL); each then has half of the memory.
        """
        room = self._anchor_room() // (1 + reference)
        anchor = Anchor(
            packed,
            self._states_of(self.export() if weights is None else weights, packed, room),
            logprobs_T=torch.zeros(packed.tokens, dtype=self._scorer.dtype),
            known_T=torch.zeros(packed.tokens, dtype=torch.bool),
        )
        if reference:
            assert self._reference is not None, "keep_reference() comes first"
            anchor.reference = self._states_of(self._reference, packed, room)
            anchor.reference.fill(self._scorer, packed)
        return anchor

    def _states_of(self, weights: Mapping[str, Tensor], packed: PackedTurns, room: int) -> States:
        return States(weights, self.policy.projection_with(weights), room, packed.tokens)

    @torch.no_grad()
    def complete(self, anchor: Anchor) -> None:
        """Score the anchor where no mini-batch has; only right while at the anchor.

        In a type of less than float32 all is scored again, once, in the cut in which a proposal
        will be measured: what rounding makes of a cut then stands on both sides of the KL."""
        scorer, packed = self._scorer, anchor.packed
        missing_E = torch.unique(packed.episode_T[~anchor.known_T])
        if not len(missing_E) and (self.policy.autocast is None or anchor.completed):
            return
        missing = missing_E.tolist()
        if self.policy.autocast is not None:
            anchor.states.forget()
            missing = None
        logprobs_T = torch.zeros_like(anchor.logprobs_T)
        for batch in scorer.batches(packed, missing):
            hidden_TH = scorer.states(batch)
            anchor.states.keep(scorer, batch.tokens_T, hidden_TH)
            scores = scorer.score(hidden_TH, packed, batch)
            logprobs_T[batch.tokens_T] = scores.logprobs_T.cpu()
        (logprobs_T,) = scorer.together(logprobs_T)
        scored_T = torch.ones_like(anchor.known_T)
        if missing is not None:
            scored_T = torch.isin(packed.episode_T, missing_E)
        anchor.note(scored_T.nonzero().squeeze(-1), logprobs_T[scored_T])
        anchor.completed = True

    @torch.no_grad()
    def measure(
        self, anchor: Anchor, stop: Callable[[Measurement], bool] | None = None
    ) -> Measurement:
        """Exact full-vocabulary KL per own token between the present weights and the anchor.

        ``stop`` is shown what is measured after each micro-batch but the last, and may end it."""
        scorer, packed = self._scorer, anchor.packed
        assert bool(anchor.known_T.all()), "the anchor was not completed"
        kl_T, reverse_T, logprobs_T = (
            torch.zeros(packed.tokens, dtype=scorer.dtype) for _ in range(3)
        )
        batches = list(scorer.batches(packed))
        for place, batch in enumerate(batches, 1):
            # The other weights first: the head is the present ones' after their states.
            before = anchor.states.at(scorer, batch)
            states_TH = scorer.states(batch)
            scores = scorer.score(states_TH, packed, batch, anchor=before, reverse=True)
            assert scores.kl_T is not None and scores.reverse_kl_T is not None
            kl_T[batch.tokens_T] = scores.kl_T.cpu()
            reverse_T[batch.tokens_T] = scores.reverse_kl_T.cpu()
            logprobs_T[batch.tokens_T] = scores.logprobs_T.cpu()
            if stop is not None and place < len(batches):
                found = scorer.together(kl_T, reverse_T, logprobs_T)
                so_far = Measurement(found[0], found[1], found[2], whole=False)
                if scorer.decided(stop(so_far)):
                    return so_far
        found = scorer.together(kl_T, reverse_T, logprobs_T)
        return Measurement(found[0], found[1], found[2])

    def gauge(self, packed: PackedTurns, anchor: Mapping[str, Tensor]) -> Gauged:
        """What rounding makes of the present weights' distance to an ``anchor``'s (as of
        ``export``), on a few own messages; takes copies of the model where it computes in a type
        of its own."""
        return gauge(self.policy, packed, anchor, self._scorer.budget)

    # -- learning --------------------------------------------------------------------------------

    def accumulate(
        self,
        anchor: Anchor,
        episodes: Sequence[int],
        advantages_U: Tensor,
        weights_U: Tensor,
        objective: ObjectiveSettings,
        per: Per = "episode",
    ) -> dict[str, float]:
        """Add the gradient of one mini-batch, ``episodes`` of the anchor's experience.

        ``advantages_U`` and ``weights_U`` cover the whole experience, one number ``per`` episode,
        turn or token, in the order of the packed turns. Micro-batches are cut by the
        token budget, between turns where an episode is longer (see ``agents.gradient``); the
        mini-batch's totals are the denominators, so any cut gives the same sum.
        Returns the objective's metrics as sums. Raises NonFinite.
        """
        mini_batch = MiniBatch(
            self._scorer,
            anchor,
            episodes,
            advantages_U,
            weights_U,
            objective,
            per,
            self._loss_scale,
        )
        with self.policy.checkpointing(self.settings.gradient_checkpointing):
            return mini_batch.accumulate(self.settings.micro_batch_tokens)

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
                self._scorer.budget,
                share_prompts=not checkpointed,
                scale=self._loss_scale,
            )

    def distances(self, packed: PackedTurns, mixture: MixturePolicy) -> Distances:
        """Exact full-vocabulary KL per own token between the present weights and a mixture's
        models. Raises NonFinite where logits are not finite."""
        return measure_distances(self.policy, mixture, packed, self._scorer.budget)

    def step(self, rate: float | None = None) -> float:
        """One optimiser step on the accumulated gradient; returns its norm before clipping.

        ``rate`` is the learning rate of this step where the caller has a schedule of its own; else
        it is the settings', which rises over their ``warmup_steps``.
        Raises NonFinite (gradients dropped, weights untouched) where the norm is not finite.
        """
        assert self.moments.awake, "wake() comes before step()"
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        for gradient in gradients if self._scale != 1.0 else ():
            gradient.div_(self._scale)
        norm = self._norm(gradients)
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
        self.moments.step(rate)
        self.drop_gradients()
        return norm

    def _norm(self, gradients: Sequence[Tensor]) -> float:
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def drop_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def gradient(self, packed: PackedTurns, coefficients_T: Tensor) -> dict[str, Tensor]:
        """Gradient of Σ_t c_t log π(token t) by parameter; leaves weights and gradients alone."""
        accumulated = self._take_gradients()
        scorer = self._scorer
        with self.policy.checkpointing(self.settings.gradient_checkpointing):
            for batch in scorer.batches(packed):
                scores = scorer.score(scorer.states(batch), packed, batch)
                back_propagate(
                    {"logprobs_T": scores.logprobs_T},
                    {"logprobs_T": self._loss_scale * coefficients_T[batch.tokens_T]},
                )
        gradients = self._take_gradients()
        for name, gradient in accumulated.items():
            self._parameters[name].grad = gradient
        return {name: gradient / self._scale for name, gradient in gradients.items()}

    def _take_gradients(self) -> dict[str, Tensor]:
        """What there is of gradients by parameter, of which nothing is left there."""
        found = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        self.drop_gradients()
        return found

    # -- weights ---------------------------------------------------------------------------------

    def export(self) -> dict[str, Tensor]:
        """The agent's own parameters, copied."""
        return self.policy.export()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.policy.load_weights(weights)

    def snapshot(self) -> Snapshot:
        """The agent as it is now; of the optimiser's state nothing more is held on the device."""
        critic = {} if self.critic is None else self.critic.state()
        return Snapshot(self.export(), self.optimizer_state(), self.steps, critic)

    def restore(self, snapshot: Snapshot) -> None:
        """Bit-exact return to a snapshot, optimiser and critic included."""
        self.load_weights(snapshot.weights)
        self.load_optimizer_state(snapshot.optimizer, snapshot.steps)
        if self.critic is not None:
            self.critic.load(snapshot.critic)

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

    # -- the optimiser's memory ------------------------------------------------------------------

    def wake(self) -> None:
        """Bring the optimiser into memory for this agent's step."""
        if not self.frozen:
            self.moments.wake()

    def rest(self) -> None:
        """Let the optimiser go; its moments rest on the CPU or on disk until the next step."""
        self.moments.rest()

    def optimizer_state(self) -> dict[str, Tensor]:
        """The moments as flat named tensors (``<parameter>|exp_avg``, ...) on the CPU, which are
        not to be written to: they may be what the optimiser rests with."""
        return self.moments.state()

    def load_optimizer_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Have these moments, which nobody may write to later, after so many steps."""
        self.steps = steps
        self.moments.load(state)
