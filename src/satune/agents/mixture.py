"""A seat filled by incumbent and newcomer together: the projection of THEORY §7 at decode time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from satune.agents.policy import Policy
from satune.core.projection import Projection, mixture_logprobs, project
from satune.types import UserError

# Texts that tokenizers of one vocabulary but other merges or splits take apart differently.
_PROBES = (
    "The answer is 1234567, isn't it?",
    "  def f(x):\n\treturn x**2  # two\r\n\n",
    "naïve Zürich 東京 🙂 <think>\n</think>",
)
_NAMED_SPECIALS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def tokenizer_difference(incumbent: Any, newcomer: Any) -> str | None:
    """What keeps two tokenizers from being the same, as one phrase; None where nothing does.

    The same means: every token has the same id, the same tokens are special, the same ids begin
    and end texts, and texts are taken apart alike.
    """
    ours, theirs = incumbent.get_vocab(), newcomer.get_vocab()
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            return f"token {token!r} has id {ours.get(token)} here and {theirs.get(token)} there"
    for name in _NAMED_SPECIALS:
        here, there = (getattr(each, name, None) for each in (incumbent, newcomer))
        if here != there:
            return f"{name} is {here} here and {there} there"
    if set(incumbent.all_special_ids) != set(newcomer.all_special_ids):
        return "other tokens are special"
    for text in _PROBES:
        if incumbent.encode(text, add_special_tokens=False) != newcomer.encode(
            text, add_special_tokens=False
        ):
            return f"{text!r} is taken apart differently"
    return None


@dataclass(frozen=True, slots=True)
class Distances:
    """KL [T] of a policy, the student, at own tokens, float64 on the CPU: to and from a mixture's
    incumbent, to the mixture and to its newcomer."""

    to_incumbent_T: Tensor
    from_incumbent_T: Tensor
    to_mixture_T: Tensor
    to_newcomer_T: Tensor


class MixturePolicy(Policy):
    """π_λ of an incumbent and a newcomer with the same tokenizer, λ solved anew at every state.

    Offers what engine and learner ask of a policy: hidden states of both models stand side by
    side, keys and values of the newcomer's layers behind the incumbent's in the same cache.
    Renders, ends turns and counts temperature as the incumbent; each model's own temperature acts
    before the mixture. ``delta`` (nats) bounds KL(π_λ‖incumbent) at every state. Nothing in it is
    trained, so its learner has to be ``frozen``.

    Ids beyond the narrower of two logits widths are padding that no text contains; they are masked
    in both. Both models lie on one device, in one precision.
    Raises UserError where the tokenizers are not the same, or δ is not positive.
    """

    def __init__(self, name: str, incumbent: Policy, newcomer: Policy, delta: float) -> None:
        assert incumbent.device == newcomer.device, "one device for both"
        difference = tokenizer_difference(incumbent.tokenizer, newcomer.tokenizer)
        if difference is not None:
            raise UserError(
                f"agent {name}: the newcomer has another tokenizer ({difference}); a mixture needs "
                "the same one, a hand-over works with any"
            )
        if not delta > 0:
            raise UserError(f"agent {name}: delta is {delta}; give a positive number of nats")
        self.name = name
        self.incumbent = incumbent
        self.newcomer = newcomer
        self.delta = delta
        self.tokenizer = incumbent.tokenizer
        self.temperature = incumbent.temperature
        self.adapter = None
        self.autocast = None
        self.config = incumbent.config
        self._vocabularies = [_head_shape(part)[0] for part in self.parts]
        narrow = self.vocabulary
        needed = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        if narrow < needed:
            raise UserError(
                f"agent {name}: a model has logits for {narrow} ids, the tokenizer has {needed}; "
                "choose a model that was made for this tokenizer"
            )

    @property
    def parts(self) -> tuple[Policy, ...]:
        return (self.incumbent, self.newcomer)

    @property
    def device(self) -> torch.device:
        return self.incumbent.device

    @property
    def vocabulary(self) -> int:
        """How many ids both have logits for."""
        return min(self._vocabularies)

    @property
    def context_limit(self) -> int:
        return min(part.context_limit for part in self.parts)

    @property
    def attends_to_everything(self) -> bool:
        return all(part.attends_to_everything for part in self.parts)

    @property
    def eos_ids(self) -> frozenset[int]:
        """The incumbent's: what ends a turn belongs to the seat, not to who fills it."""
        return self.incumbent.eos_ids

    def trainable(self) -> dict[str, nn.Parameter]:
        return {}

    def activate(self) -> None: ...

    def masks(self, positions_RS: Tensor, used: int) -> Any:
        return tuple(part.masks(positions_RS, used) for part in self.parts)

    def hidden(self, input_ids: Tensor, *, cache: Any = None, **kwargs: Any) -> Tensor:
        """Hidden states of both [B, S, H_incumbent + H_newcomer]."""
        masks = kwargs.pop("attention_mask", None)
        both = masks if isinstance(masks, tuple) else (masks, masks)
        first = self.incumbent.hidden(input_ids, cache=cache, attention_mask=both[0], **kwargs)
        if cache is not None:
            cache = _LayersBehind(cache, int(self.incumbent.config.num_hidden_layers))
        second = self.newcomer.hidden(input_ids, cache=cache, attention_mask=both[1], **kwargs)
        return torch.cat([first, second], dim=-1)

    @torch.no_grad()
    def logits_of_both(self, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, V] of incumbent and newcomer after each one's temperature, on their common
        ids, at states [N, H] as ``hidden`` gives them."""
        width = _head_shape(self.incumbent)[1]
        narrow = self.vocabulary
        return tuple(  # type: ignore[return-value]
            part.project(states_NH)[..., :narrow] / part.temperature
            for part, states_NH in zip(
                self.parts, (hidden_NH[..., :width], hidden_NH[..., width:]), strict=True
            )
        )

    def projection(self, hidden_NH: Tensor) -> Projection:
        """λ and both divergences from the incumbent at states [N, H]."""
        return project(*self.logits_of_both(hidden_NH), self.delta)

    @torch.no_grad()
    def logprobs(self, hidden_NH: Tensor) -> Tensor:
        """log π_λ [N, V] on the common ids."""
        p_NV, q_NV = self.logits_of_both(hidden_NH)
        return mixture_logprobs(p_NV, q_NV, project(p_NV, q_NV, self.delta).lambda_N)

    @torch.no_grad()
    def project(self, hidden: Tensor) -> Tensor:
        """Logits [n, V], which divided by the temperature are log π_λ; -inf on padding ids."""
        mixed_NV = self.logprobs(hidden.reshape(-1, hidden.shape[-1])) * self.temperature
        padding = self._vocabularies[0] - mixed_NV.shape[-1]
        if padding:
            mixed_NV = pad(mixed_NV, (0, padding), value=-torch.inf)
        return mixed_NV.reshape(*hidden.shape[:-1], -1)

    def projection_with(self, weights: Mapping[str, Tensor]) -> Any:
        assert not weights, "nothing in a mixture is trained"
        return self.project

    @contextmanager
    def checkpointing(self, enabled: bool) -> Iterator[None]:
        yield


class _LayersBehind(Cache):
    """A cache as the second model sees it: its layers come behind the first one's."""

    def __init__(self, cache: Any, first: int) -> None:
        super().__init__(layers=[])
        self.cache = cache
        self.first = first

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.cache.update(key_states, value_states, layer_idx + self.first, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.get_seq_length(layer_idx)


def _head_shape(policy: Policy) -> tuple[int, int]:
    """Vocabulary and hidden size of the output head."""
    weight: Any = policy.head.weight
    return int(weight.shape[0]), int(weight.shape[1])
