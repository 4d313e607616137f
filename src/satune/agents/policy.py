"""One agent's model as engine and learner share it: ids in, hidden states and logits out."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from satune.types import UserError

_DROPOUTS = (
    "dropout",
    "attention_dropout",
    "hidden_dropout",
    "activation_dropout",
    "resid_pdrop",
    "attn_pdrop",
    "embd_pdrop",
    "layerdrop",
)
"""What architectures call their dropout rates where they apply it as a function."""


ENDLESS = 1 << 30
"""The context of a model that names none, in tokens."""


class Policy:
    """A Hugging Face causal LM (or one adapter of a shared one) and its sampling temperature.

    The backbone and the output head are called apart, so that logits are only made for the states
    that need them. ``adapter`` names the PEFT adapter when several agents share one base.
    ``checked`` holds the head against the model's own logits, which takes weights with values.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Any,
        temperature: float,
        *,
        adapter: str | None = None,
        autocast: torch.dtype | None = None,
        checked: bool = True,
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.adapter = adapter
        self.autocast = autocast
        self.causal_lm: Any = model.get_base_model() if adapter else model  # type: ignore[operator]
        self.backbone = _backbone(name, self.causal_lm)
        # Renamed by transformers 5.24, in the models that it has come to so far.
        known = inspect.signature(self.backbone.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        self.head = _head(name, self.causal_lm)
        # A model that reads pictures too has a config of its own for what it does with text.
        self.config = self.causal_lm.config.get_text_config()
        self._adjust = _logit_adjustment(self.config)
        _count_places(self.backbone)
        _keep_windows(self.backbone)
        # Dropout would make the scored policy another one than the sampled.
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for rate in _DROPOUTS:
                if isinstance(getattr(module, rate, None), float):
                    setattr(module, rate, 0.0)
        model.eval()
        if checked:
            self._check_head()

    def copied(self, name: str, copies: dict[int, Any] | None = None) -> Policy:
        """A policy called ``name`` over a copy of the model, parameter by parameter. Policies that
        share a model share its copy where they are given the same ``copies``, empty at first."""
        return Policy(
            name,
            copy.deepcopy(self.model, copies),
            self.tokenizer,
            self.temperature,
            adapter=self.adapter,
            autocast=self.autocast,
        )

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The models whose hidden states this policy's are made of: here it alone."""
        return (self,)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device  # type: ignore[return-value]

    @property
    def context_limit(self) -> int:
        """Longest sequence in tokens the model takes."""
        return int(getattr(self.config, "max_position_embeddings", ENDLESS))

    @property
    def attends_to_everything(self) -> bool:
        """Whether every layer is attention over all earlier tokens, by the model's own word."""
        kinds = set(getattr(self.config, "layer_types", None) or [])
        return kinds == {"full_attention"} or (not kinds and self.config.model_type == "llama")

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end a turn: the tokenizer's EOS and what the model's own settings add."""
        ids: set[int] = set()
        generation = getattr(self.causal_lm, "generation_config", None)
        for source in (self.tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
            if source is not None:
                ids.update([source] if isinstance(source, int) else source)
        return frozenset(ids)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The agent's own parameters by name, tied ones once."""
        if self.adapter is None:
            return dict(self.model.named_parameters())
        # A part of the model may be called like the agent; only LoRA's own parts hold adapters.
        own = re.compile(rf"\.lora_\w+\.{re.escape(self.adapter)}(\.|$)")
        return {name: p for name, p in self.model.named_parameters() if own.search(name)}

    def export(self) -> dict[str, Tensor]:
        """The agent's own parameters by name, copied."""
        return {name: p.detach().clone() for name, p in self.trainable().items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take the agent's own parameters from ``weights``, which ``export`` gave."""
        for name, parameter in self.trainable().items():
            parameter.copy_(weights[name])

    def activate(self) -> None:
        """Make this agent's adapter the active one of a shared base."""
        if self.adapter and self.model.active_adapter != self.adapter:
            self.model.set_adapter(self.adapter)  # type: ignore[operator]

    def computing(self) -> Any:
        """The autocast context that engine and learner both run under."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def hidden(self, input_ids: Tensor, *, cache: Any = None, **kwargs: Any) -> Tensor:
        """Last hidden states [B, S, H] of right-padded ids [B, S] (causality hides the padding)
        after what ``cache`` holds, which grows by them."""
        self.activate()
        if cache is not None:
            kwargs[self._cache_name] = cache
        kwargs["use_cache"] = cache is not None
        if self.config._attn_implementation == "eager" and "attention_mask" in kwargs:
            kwargs["attention_mask"] = _added(kwargs["attention_mask"], self.causal_lm.dtype)
        with self.computing():
            return self._states(input_ids=input_ids, **kwargs)

    def _states(self, **kwargs: Any) -> Tensor:
        return self.backbone(**kwargs).last_hidden_state

    def masks(self, positions_RS: Tensor, used: int) -> Any:
        """``attention_mask`` of ``hidden`` for new tokens at these positions [R, S] of a cache of
        which ``used`` places count: each sees the places up to its own, in its layer's window."""
        kinds = set(getattr(self.config, "layer_types", None) or [])
        places_C = torch.arange(used, device=positions_RS.device)
        mask = (places_C <= positions_RS[..., None])[:, None]
        if positions_RS.shape[1] == 1 and kinds == {"full_attention"} and bool(mask.all()):
            # Rows of one length see all that is held, and attention without a mask is faster.
            return {"full_attention": None}
        by_kind = {"full_attention": mask}
        window = getattr(self.config, "sliding_window", None)
        if window is not None and (not kinds or "sliding_attention" in kinds):
            near = mask & (places_C > positions_RS[..., None] - window)[:, None]
            if not kinds:
                return near
            by_kind["sliding_attention"] = near
        if "chunked_attention" in kinds:
            chunk = self.config.attention_chunk_size
            same = places_C // chunk == positions_RS[..., None] // chunk
            by_kind["chunked_attention"] = mask & same[:, None]
        return by_kind if len(by_kind) > 1 else mask

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, H], before temperature, in at least float32."""
        with self.computing():
            logits = self.head(hidden)
        return self._adjust(logits if logits.dtype == torch.float64 else logits.float())

    def projection_with(self, weights: Mapping[str, Tensor]) -> Any:
        """``project`` with the head's parameters taken from ``weights`` (names as in trainable)."""
        held = self._of_head(weights)
        if not held:
            return self.project

        def project(hidden: Tensor) -> Tensor:
            with self.computing():
                logits = torch.func.functional_call(self.head, held, (hidden,))
            return self._adjust(logits if logits.dtype == torch.float64 else logits.float())

        return project

    def _of_head(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of ``weights`` is the head's, by its own names, on the device."""
        by_identity = {id(p): name for name, p in self.trainable().items()}
        return {
            name: weights[by_identity[id(p)]].to(self.device)
            for name, p in self.head.named_parameters()
            if id(p) in by_identity and by_identity[id(p)] in weights
        }

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block the policy's own parameters are ``weights`` (names as in trainable),
        without a copy of those that lie on its device already."""
        own = self.trainable()
        present = {name: parameter.data for name, parameter in own.items()}
        for name, parameter in own.items():
            parameter.data = weights[name].to(parameter)
        try:
            yield
        finally:
            for name, parameter in own.items():
                parameter.data = present[name]

    @contextmanager
    def checkpointing(self, enabled: bool) -> Iterator[None]:
        """Gradient checkpointing for the block; the models only do it in training mode."""
        if not enabled:
            yield
            return
        # transformers 5 has renamed it on its way, and the old name warns.
        model: Any = self.causal_lm
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()
            getattr(model, f"{kind}_checkpointing_disable")()

    @torch.no_grad()
    def _check_head(self) -> None:
        ids = torch.arange(1, 5, device=self.device).clamp(max=self.config.vocab_size - 1)[None]
        self.activate()
        with self.computing():
            expected = self.causal_lm(input_ids=ids, use_cache=False).logits.float()
        actual = self.project(self.hidden(ids)[0]).float()
        scale = expected.abs().max().clamp(min=1.0)
        if not torch.allclose(actual / scale, expected[0] / scale, atol=1e-2):
            raise UserError(
                f"agent {self.name}: {type(self.causal_lm).__name__} does something to its logits "
                "that satune does not know; choose another model"
            )


def _backbone(agent: str, causal_lm: Any) -> nn.Module:
    found = causal_lm.base_model
    if found is causal_lm:  # Llama 4's text part names its backbone otherwise than it says
        parts = [part for part in causal_lm.children() if isinstance(part, PreTrainedModel)]
        if len(parts) != 1:
            raise UserError(_not_known(agent, causal_lm, "does not keep its layers apart"))
        found = parts[0]
    return found


def _head(agent: str, causal_lm: Any) -> nn.Module:
    found = causal_lm.get_output_embeddings()
    if found is None:
        raise UserError(_not_known(agent, causal_lm, "has no output head that can be called"))
    return found


def _not_known(agent: str, causal_lm: Any, what: str) -> str:
    return f"agent {agent}: {type(causal_lm).__name__} {what}; choose another model"


def _added(mask: Any, dtype: torch.dtype) -> Any:
    """A mask that says which places are seen, as what eager attention adds to its scores."""
    if isinstance(mask, dict):
        return {kind: _added(each, dtype) for kind, each in mask.items()}
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _count_places(backbone: nn.Module) -> None:
    """BLOOM reads the distances of its biases off a mask of one row a sequence. Of the engine's
    and the learner's masks, which have one a token, it is to count the places."""
    biases: Any = getattr(backbone, "build_alibi_tensor", None)
    if biases is None:
        return

    def counted(mask: Tensor, *further: Any, **named: Any) -> Tensor:
        if mask.dim() == 4:
            mask = mask.new_ones(mask.shape[0], mask.shape[-1], dtype=torch.long)
        return biases(mask, *further, **named)

    backbone.build_alibi_tensor = counted  # type: ignore[assignment]


def _keep_windows(backbone: nn.Module) -> None:
    """GPT-Neo's local layers count their window back from the batch's last place. It is to end at
    each token's own, which is the last place that the mask lets it see."""
    for module in backbone.modules():
        if getattr(module, "attention_type", None) != "local" or not hasattr(module, "bias"):
            continue
        causal: Tensor = module.bias  # type: ignore[assignment]
        window = int(causal[0, 0].sum(-1).max())
        module.bias.fill_(True)  # type: ignore[union-attr,operator]

        def near(_: nn.Module, args: Any, kwargs: Any, window: int = window) -> Any:
            mask = kwargs["attention_mask"]
            places_C = torch.arange(mask.shape[-1], device=mask.device)
            own = torch.where(mask == 0, places_C, -1).amax(-1, keepdim=True)
            far = places_C <= own - window
            kwargs["attention_mask"] = mask.masked_fill(far, torch.finfo(mask.dtype).min)
            return args, kwargs

        module.register_forward_pre_hook(near, with_kwargs=True)


def _logit_adjustment(config: Any) -> Any:
    """What an architecture does to its logits: soft cap (Gemma) or scale (Cohere, Granite)."""
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0

    def adjust(logits: Tensor) -> Tensor:
        if scale != 1.0 or divisor != 1.0:
            logits = logits * (scale / divisor)
        return torch.tanh(logits / cap) * cap if cap else logits

    return adjust
