"""The gradient of one mini-batch, in micro-batches whose size does not depend on the episodes'.

Episodes that fit into a micro-batch are fed, scored and back-propagated at once. A longer one is
cut between its turns. An objective is a function of its tokens' values (log-probability, KL,
entropy), so the gradient of its loss is Σ_t (∂loss/∂value_t) ∇value_t: a first pass gathers the
values without gradient, autograd on these alone gives the coefficients ∂loss/∂value_t, and a second
pass back-propagates the sum one micro-batch after the other. Any cut gives the same sum. A turn
itself cannot be cut: the gradient of a token flows through the keys of all tokens before it.
Where several processes share an experience, all episodes are cut like that: each process has some
of their turns, and what all of them found is summed before the coefficients are formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from satune.agents.anchor import Anchor
from satune.agents.packing import MicroBatch
from satune.agents.policy import Policy
from satune.agents.ports import NonFinite
from satune.agents.scoring import Scorer
from satune.core.objectives import ObjectiveBatch, objective_loss
from satune.core.settings import ObjectiveSettings, Per

HALF_SCALE = 2.0**12
"""What losses are multiplied with in float16, whose least number is 6e-8: gradients of a token are
about as small. The gradient is divided by it before anything is done with it."""

Values = dict[str, Tensor]
"""One number a token of each kind, by the name of TokenScores' and ObjectiveBatch's field."""


def loss_scale(policy: Policy) -> float:
    """What losses of this policy are multiplied with before they are propagated back."""
    return HALF_SCALE if policy.autocast == torch.float16 else 1.0


@dataclass(slots=True)
class MiniBatch:
    """``episodes`` of an anchor's experience that a gradient is of.

    ``advantages_U`` and ``weights_U`` cover the whole experience, one number ``per`` episode, turn
    or token. Where the anchor does not know all of the tokens, the weights are still the anchor's:
    what is scored is then kept for it. The gradient comes ``scale`` times as large.
    """

    scorer: Scorer
    anchor: Anchor
    episodes: Sequence[int]
    advantages_U: Tensor
    weights_U: Tensor
    objective: ObjectiveSettings
    per: Per = "episode"
    scale: float = 1.0
    at_anchor: bool = field(init=False)
    token_total: float = field(init=False)
    _totals: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        mask_T = self._of(self.episodes)
        self.token_total = float(mask_T.sum())
        self.at_anchor = not bool(self.anchor.known_T[mask_T].all())
        if self.at_anchor:
            # The KL and its gradient are zero there: nothing to add to the loss.
            self.objective = replace(self.objective, beta=0.0)

    def accumulate(self, micro_batch_tokens: int) -> dict[str, float]:
        """Add the gradient; episodes of more padded tokens than this are cut. Returns the
        objective's metrics as sums. Raises NonFinite."""
        if self.token_total == 0:
            return {}
        long = self.anchor.packed.longer_than(micro_batch_tokens, self.episodes)
        if self.objective.whole:
            long = set(self.episodes)
        elif self.scorer.splits_episodes:
            long = set(self.anchor.packed.episode_T[self._of(self.episodes)].tolist())
        whole = [episode for episode in self.episodes if episode not in long]
        if whole and not self.scorer.splits_episodes:
            self._at_once(whole)
        if long:
            self._in_two_passes(sorted(long))
        return self._totals

    def _at_once(self, episodes: Sequence[int]) -> None:
        for batch in self.scorer.batches(self.anchor.packed, episodes, whole_episodes=True):
            loss, metrics = self._loss(self._scored(batch), batch.tokens_T, batch.episodes)
            self._count(loss, metrics)
            (self.scale * loss).backward()

    def _in_two_passes(self, episodes: Sequence[int]) -> None:
        tokens_T = self._of(episodes).nonzero().squeeze(-1)
        # At the anchor all log-ratios are 0, and that is all that the objectives of this package
        # ask of the values there. A user's own may ask for more.
        guessed = self.at_anchor and self.objective.loss is None
        if guessed:
            values = dict.fromkeys(self._names, self.anchor.logprobs_T[tokens_T])
        else:
            with torch.no_grad():
                values = self._pass(episodes, tokens_T)
        leaves = {name: values_T.clone().requires_grad_() for name, values_T in values.items()}
        loss, metrics = self._loss(leaves, tokens_T, episodes)
        if not guessed:
            self._count(loss, metrics)
        derivatives = torch.autograd.grad(
            self.scale * loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        values = self._pass(episodes, tokens_T, dict(zip(leaves, derivatives, strict=True)))
        if guessed:
            self._count(*self._loss(values, tokens_T, episodes))

    def _pass(
        self, episodes: Sequence[int], tokens_T: Tensor, coefficients: Values | None = None
    ) -> Values:
        """The values of these episodes' tokens, which are the flat ones ``tokens_T``; their sum
        times ``coefficients`` is back-propagated where these are given."""
        nothing_T = torch.zeros(len(tokens_T), dtype=self.scorer.dtype)
        values = {name: nothing_T.clone() for name in self._names}
        new_T = ~self.anchor.known_T[tokens_T]
        for batch in self.scorer.batches(self.anchor.packed, episodes):
            place_T = torch.searchsorted(tokens_T, batch.tokens_T)
            scores = self._scored(batch)
            if coefficients is not None:
                back_propagate(scores, {name: c_T[place_T] for name, c_T in coefficients.items()})
            for name, scores_T in scores.items():
                values[name][place_T] = scores_T.detach().cpu()
        values = dict(zip(values, self.scorer.together(*values.values()), strict=True))
        if self.at_anchor:
            self.anchor.note(tokens_T[new_T], values["logprobs_T"][new_T])
        return values

    @property
    def _names(self) -> list[str]:
        """Which values of a token the loss is made of."""
        wanted = {
            "logprobs_T": True,
            "entropy_T": self.objective.entropy != 0.0,
            "kl_T": self.objective.beta > 0.0,
            "reference_kl_T": self.objective.reference_kl > 0.0,
        }
        return [name for name, is_wanted in wanted.items() if is_wanted]

    def _scored(self, batch: MicroBatch) -> Values:
        """The values of a batch's own tokens; what is new to the anchor is kept for it."""
        anchor, names = self.anchor, self._names
        others = {}
        if "kl_T" in names:
            others["anchor"] = anchor.states.at(self.scorer, batch)
        if "reference_kl_T" in names:
            assert anchor.reference is not None, "the anchor was made without the reference"
            others["reference"] = anchor.reference.at(self.scorer, batch)
        hidden_TH = self.scorer.states(batch)
        scores = self.scorer.score(
            hidden_TH, anchor.packed, batch, entropy="entropy_T" in names, **others
        )
        if not bool(anchor.known_T[batch.tokens_T].all()):
            anchor.keep(self.scorer, batch.tokens_T, hidden_TH, scores.logprobs_T)
        return {name: getattr(scores, name) for name in names}

    def _loss(
        self, values: Values, tokens_T: Tensor, episodes: Sequence[int]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The part of ``episodes`` (sorted), whose tokens have ``values``, in the mini-batch's loss
        and metrics."""
        packed, rows_E = self.anchor.packed, torch.tensor(list(episodes))
        device, dtype = values["logprobs_T"].device, values["logprobs_T"].dtype
        unit_T = packed.units(self.per)[tokens_T]
        rows_U = rows_E if self.per == "episode" else unit_T.unique()
        # A place among the sorted ones is the number.
        batch = ObjectiveBatch(
            anchor_logprobs_T=self.anchor.logprobs_T[tokens_T].to(device),
            episode_T=torch.searchsorted(rows_E, packed.episode_T[tokens_T]).to(device),
            turn_T=packed.turn_T[tokens_T].to(device),
            unit_T=torch.searchsorted(rows_U, unit_T).to(device),
            advantages_U=self.advantages_U[rows_U].to(device, dtype),
            weights_U=self.weights_U[rows_U].to(device, dtype),
            episode_total=float(len(self.episodes)),
            token_total=self.token_total,
            **values,
        )
        return objective_loss(batch, self.objective)

    def _count(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        if not math.isfinite(self.scorer.decided(float(loss.detach()))):
            raise NonFinite("the loss is not finite")
        for name, value in metrics.items():
            self._totals[name] = self._totals.get(name, 0.0) + float(value)

    def _of(self, episodes: Sequence[int]) -> Tensor:
        """True [T] at the own tokens of these episodes."""
        chosen_E = torch.zeros(self.anchor.packed.episodes, dtype=torch.bool)
        chosen_E[list(episodes)] = True
        return chosen_E[self.anchor.packed.episode_T]


def back_propagate(values: Values, coefficients: Values) -> None:
    """Add the gradient of Σ_t c_t value_t, over all kinds of values that are given."""
    parts = [(coefficients[name].to(each_T) * each_T).sum() for name, each_T in values.items()]
    torch.stack(parts).sum().backward()
