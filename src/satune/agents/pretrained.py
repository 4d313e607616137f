"""Models and adapters from disk or hub, shared or apart; every failure is one line for the user."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from satune.agents.policy import Policy
from satune.agents.rendering import TemplateSettings
from satune.agents.sources import (
    SavedAdapter,
    misspelt_path,
    read_model,
    read_tokenizer,
    saved_adapter,
    source_of,
)
from satune.agents.specs import ALL_LINEAR, LoraSpec
from satune.loading import HOST_VARIABLE
from satune.types import ServedModel, UserError

_UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """What an agent is made from. ``model`` is a directory, a file or a hub id, or a served model;
    ``server`` has how that is asked, as ``team.agents.*.server`` of a recipe. ``attention`` names
    an implementation of transformers', None what the model says is best for it. ``device`` is where
    the model lies, None where the team does. With a ``host``, the address at which its owner keeps
    it, nothing of the model is here; ``host_token_env`` names the environment variable with the
    token that is sent there."""

    name: str
    model: str | ServedModel
    temperature: float = 1.0
    template: TemplateSettings = field(default_factory=TemplateSettings)
    lora: LoraSpec | None = None
    delta: float | None = None
    trust_remote_code: bool = False
    attention: str | None = None
    device: str | None = None
    server: Mapping[str, Any] = field(default_factory=dict)
    host: str | None = None
    host_token_env: str = HOST_VARIABLE

    @property
    def here(self) -> bool:
        """Whether the model is loaded in this process."""
        return self.host is None and self.served is None

    @property
    def served(self) -> ServedModel | None:
        """The model where it is a served one."""
        return self.model if isinstance(self.model, ServedModel) else None

    @property
    def source(self) -> str:
        """Where a model that is loaded here comes from."""
        assert isinstance(self.model, str)
        return self.model


@dataclass(frozen=True, slots=True)
class Precision:
    """``master`` holds what is trained, ``frozen`` a base under adapters; ``autocast`` computes."""

    master: torch.dtype = torch.float32
    frozen: torch.dtype = torch.float32
    autocast: torch.dtype | None = None

    @staticmethod
    def of(name: str, autocast: str | None = None) -> Precision:
        """float32, float64, or a type of two bytes: float32 masters computed under its autocast,
        which may also be given alone."""
        small = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        if name in small:
            return Precision(torch.float32, small[name], small[name])
        dtype = {"float32": torch.float32, "float64": torch.float64}[name]
        return Precision(dtype, dtype, small[autocast] if autocast else None)


def load_policies(
    specs: Sequence[AgentSpec], *, shared_base: bool, precision: Precision, device: str, seed: int
) -> dict[str, Policy]:
    """A policy an agent, on the device of its spec or else on ``device``. With ``shared_base``,
    agents of one model share its weights in memory, an adapter each. Raises UserError naming the
    agent whose model cannot be loaded, or whose base lies on another device than the agent."""
    bases: dict[tuple[str, str | None], tuple[PeftModel, Any]] = {}
    places: dict[tuple[str, str | None], tuple[str, torch.device]] = {}

    def load(spec: AgentSpec) -> Policy:
        where = _device_of(spec, device)
        saved = saved_adapter(spec.source)
        if saved and not Path(spec.source, "adapter_model.safetensors").is_file():
            raise UserError(  # a .bin is a pickle, and opening one may run what is written in it
                f"agent {spec.name}: {spec.source} has no adapter_model.safetensors, and adapters "
                "in another form (.bin) are not opened; save it anew with PEFT's save_pretrained"
            )
        base_id = saved.base if saved else spec.source
        lora = spec.lora or (LoraSpec() if shared_base else None)
        adapter = None
        if lora is None:
            model: nn.Module = _load_model(spec, base_id, precision.master)
            if saved:
                model = _merged(spec, model)
            tokenizer = _load_tokenizer(spec, spec.source)
        else:
            # PEFT cuts an adapter's name out of parameter names: it must be no part of the model's.
            adapter = f"agent_{spec.name}"
            config = _lora_config(spec, lora, saved)
            if (base_id, spec.attention) in bases and shared_base:
                model, tokenizer = bases[base_id, spec.attention]
                _check_together(spec, where, *places[base_id, spec.attention])
                _with_adapter(model, adapter, config, seed)
            else:
                base = _load_model(spec, base_id, precision.frozen)
                tokenizer = _load_tokenizer(spec, base_id)
                model = _with_adapter(base, adapter, config, seed)
                bases[base_id, spec.attention] = model, tokenizer
                places[base_id, spec.attention] = spec.name, where
            if saved:
                set_peft_model_state_dict(model, load_peft_weights(spec.source, "cpu"), adapter)
        return Policy(
            spec.name,
            model.to(where),
            tokenizer,
            spec.temperature,
            adapter=adapter,
            autocast=precision.autocast,
        )

    policies: dict[str, Policy] = {}
    for spec in specs:
        misspelt = misspelt_path(spec.source)
        if misspelt:
            raise UserError(_cannot_load(spec, spec.source, misspelt))
        try:
            policies[spec.name] = load(spec)
        except UserError:
            raise
        except (*_UNLOADABLE, TypeError, AttributeError, IndexError) as error:
            raise UserError(_cannot_load(spec, spec.source, _said(error))) from error
    return policies


def hollow_policy(spec: AgentSpec, config: PretrainedConfig, precision: Precision) -> Policy:
    """The policy of a spec as ``load_policies`` makes it (an adapter where ``spec.lora`` says so),
    without a tokenizer. Its weights are empty ones of the mode that is active, which may be that of
    fake tensors."""
    assert isinstance(spec.model, str)
    options = {} if spec.attention is None else {"attn_implementation": spec.attention}
    adapter = None
    dtype = precision.frozen if spec.lora else precision.master
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        if spec.lora is not None:
            adapter = f"agent_{spec.name}"
            lora = _lora_config(spec, spec.lora, saved_adapter(spec.model))
            model = _with_adapter(model, adapter, lora, seed=0)
    _lay_out(model)
    return Policy(
        spec.name,
        model,
        None,
        spec.temperature,
        adapter=adapter,
        autocast=precision.autocast,
        checked=False,
    )


def _lay_out(model: nn.Module) -> None:
    """Give parameters and buffers without memory empty memory on the CPU; shared ones stay so."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu")
                    same = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if same else empty
                held[name] = made[id(tensor)]


def _device_of(spec: AgentSpec, team: str) -> torch.device:
    """Where an agent's model is to lie, in a team that lies on the device ``team``."""
    key = "team.device" if spec.device is None else f"team.agents.{spec.name}.device"
    name = spec.device or team
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{key}: {name!r} cannot be used ({reason}); give auto, cpu or cuda:N"
        ) from error
    return device


def _check_together(spec: AgentSpec, where: torch.device, first: str, device: torch.device) -> None:
    """Raise UserError where an agent is to lie elsewhere than the ``first`` one of its base."""
    if (where.type, where.index or 0) != (device.type, device.index or 0):
        raise UserError(
            f"team.agents.{spec.name}.device: {where} is not where the base lies that it shares "
            f"with {first} ({device}); give both one device, or set team.sharing to separate"
        )


def _lora_config(spec: AgentSpec, lora: LoraSpec, saved: SavedAdapter | None) -> LoraConfig:
    """What the adapter looks like: a saved one as it was saved, a new one as the recipe says."""
    if saved is None:
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules="all-linear" if lora.targets == ALL_LINEAR else list(lora.targets),
            task_type="CAUSAL_LM",
        )
    if saved.config.get("peft_type") != "LORA":
        raise UserError(
            f"agent {spec.name}: the adapter in {spec.source} is of type "
            f"{saved.config.get('peft_type')}, and only LoRA adapters are trained"
        )
    config: LoraConfig = LoraConfig.from_pretrained(spec.source)  # type: ignore[assignment]
    if spec.lora is not None and (lora.rank, lora.alpha) != (config.r, config.lora_alpha):
        raise UserError(
            f"agent {spec.name}: lora has rank {lora.rank} and alpha {lora.alpha:g}, but the "
            f"adapter in {spec.source} has rank {config.r} and alpha {config.lora_alpha:g}; "
            "give those, or leave lora out"
        )
    config.inference_mode, config.lora_dropout = False, 0.0
    return config


def _with_adapter(model: nn.Module, adapter: str, config: LoraConfig, seed: int) -> PeftModel:
    with torch.random.fork_rng(), _wrapped_by_peft():
        torch.manual_seed(seed)
        if isinstance(model, PeftModel):
            model.add_adapter(adapter, config)
            return model
        return get_peft_model(model, config, adapter_name=adapter)  # type: ignore[arg-type,return-value]


@contextmanager
def _wrapped_by_peft() -> Iterator[None]:
    """PEFT asks a model whether it is checkpointed by a name that transformers has given up, which
    transformers says to the user; that alone is left unsaid here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is", FutureWarning)
        yield


def _merged(spec: AgentSpec, model: Any) -> nn.Module:
    """The model with the adapter saved in ``spec.source`` put into its weights.

    A head that shares the embedding's weights gets its own where the adapter changes one of them:
    PEFT adds to the one alone. Raises UserError where the merged logits are not the adapter's.
    """
    with _wrapped_by_peft():
        peft: Any = PeftModel.from_pretrained(model, spec.source)
    if not hasattr(peft, "merge_and_unload"):
        raise UserError(
            f"agent {spec.name}: the adapter in {spec.source} is of type {peft.peft_type.value}, "
            "which is no change of weights; give a LoRA adapter"
        )
    ids = torch.arange(1, 9)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        peft.eval()
        expected = peft(input_ids=ids, use_cache=False).logits
        _untie(peft.get_base_model())
        merged: Any = peft.merge_and_unload()
        found = merged(input_ids=ids, use_cache=False).logits
    scale = expected.abs().max().clamp(min=1.0)
    if not torch.allclose(found / scale, expected / scale, atol=1e-3):
        raise UserError(
            f"agent {spec.name}: merged into the weights, the adapter in {spec.source} is another "
            "model than beside them; give the agent a lora block with the adapter's rank and alpha"
        )
    if merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight:
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    return merged


def _untie(causal_lm: Any) -> None:
    """Give the head weights of its own if it shares the embedding's and one of them is adapted."""
    layers = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    adapted = any(isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for layer in layers)
    embedding, head = (
        getattr(layer, "base_layer", getattr(layer, "original_module", layer)) for layer in layers
    )
    if adapted and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())


def _load_model(spec: AgentSpec, model_id: str, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if spec.attention is not None:
        options["attn_implementation"] = spec.attention
    try:
        return read_model(source_of(model_id), dtype, **options)
    except _UNLOADABLE as error:
        raise UserError(_cannot_load(spec, model_id, _said(error))) from error


def _load_tokenizer(spec: AgentSpec, model_id: str) -> Any:
    try:
        return read_tokenizer(source_of(model_id), trust_remote_code=spec.trust_remote_code)
    except _UNLOADABLE as error:
        raise UserError(_cannot_load(spec, model_id, _said(error))) from error


def _said(error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if len(reason) > 160:
        reason = reason[:157] + "..."
    return f"{type(error).__name__}: {reason}"


def _cannot_load(spec: AgentSpec, model_id: str, reason: str) -> str:
    otherwise = "leave attention out, or " if spec.attention else ""
    return (
        f"agent {spec.name}: cannot load model {model_id!r} ({reason}); {otherwise}"
        "give a directory with config.json and safetensors weights, a .gguf file, or a hub id that "
        "can be reached"
    )
