"""Models and adapters from disk or hub, shared or apart; every failure is one line for the user."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from satune.agents.policy import Policy
from satune.agents.rendering import TemplateSettings
from satune.agents.specs import ALL_LINEAR, LoraSpec
from satune.types import UserError

_UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """What an agent is made from. ``model`` is a directory or a hub id, or says where the model is
    served; ``server`` has how that is asked, as ``team.agents.*.server`` of a recipe."""

    name: str
    model: str
    temperature: float = 1.0
    template: TemplateSettings = field(default_factory=TemplateSettings)
    lora: LoraSpec | None = None
    delta: float | None = None
    trust_remote_code: bool = False
    server: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Precision:
    """``master`` holds what is trained, ``frozen`` a base under adapters; ``autocast`` computes."""

    master: torch.dtype = torch.float32
    frozen: torch.dtype = torch.float32
    autocast: torch.dtype | None = None

    @staticmethod
    def of(name: str, autocast: str | None = None) -> Precision:
        """float32, float64, or bfloat16: float32 masters computed under bfloat16 autocast."""
        if name == "bfloat16":
            return Precision(torch.float32, torch.bfloat16, torch.bfloat16)
        dtype = {"float32": torch.float32, "float64": torch.float64}[name]
        return Precision(dtype, dtype, torch.bfloat16 if autocast else None)


def load_policies(
    specs: Sequence[AgentSpec], *, shared_base: bool, precision: Precision, device: str, seed: int
) -> dict[str, Policy]:
    """A policy an agent. With ``shared_base``, agents of one model share its weights in memory, an
    adapter each. Raises UserError naming the agent whose model cannot be loaded."""
    where = _device(device)
    bases: dict[str, tuple[PeftModel, Any]] = {}

    def load(spec: AgentSpec) -> Policy:
        saved = _adapter_base(spec)
        base_id = saved or spec.model
        lora = spec.lora or (LoraSpec() if shared_base else None)
        adapter = None
        if lora is None:
            model: nn.Module = _load_model(spec, base_id, precision.master)
            if saved:
                model = PeftModel.from_pretrained(model, spec.model).merge_and_unload()
            tokenizer = _load_tokenizer(spec, spec.model)
        else:
            # PEFT cuts an adapter's name out of parameter names: it must be no part of the model's.
            adapter = f"agent_{spec.name}"
            config = _lora_config(spec, lora, bool(saved))
            if base_id in bases and shared_base:
                model, tokenizer = bases[base_id]
                _with_adapter(model, adapter, config, seed)
            else:
                base = _load_model(spec, base_id, precision.frozen)
                tokenizer = _load_tokenizer(spec, base_id)
                model = _with_adapter(base, adapter, config, seed)
                bases[base_id] = model, tokenizer
            if saved:
                set_peft_model_state_dict(model, load_peft_weights(spec.model), adapter)
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
        misspelt = misspelt_path(spec.model)
        if misspelt:
            raise UserError(_cannot_load(spec, spec.model, misspelt))
        try:
            policies[spec.name] = load(spec)
        except UserError:
            raise
        except (*_UNLOADABLE, TypeError) as error:
            raise UserError(_cannot_load(spec, spec.model, _said(error))) from error
    return policies


def misspelt_path(model: str) -> str:
    """What is wrong with a model in a directory that lies here and holds nothing of the name, where
    the hub's cache has none of it either; "" for any other. The hub would be asked again and again
    for what is no id of it.
    """
    path = Path(model)
    cached = Path(constants.HF_HUB_CACHE, "models--" + model.replace("/", "--"))
    if "/" not in model or path.exists() or not path.parent.is_dir() or cached.is_dir():
        return ""
    names = [item.name for item in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    mend = f"did you mean {path.parent / close[0]}?" if close else "nothing there is named like it"
    return f"{path.parent} has no {path.name}; {mend}"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"team.device: {name!r} cannot be used ({reason}); give auto, cpu or cuda:N"
        ) from error
    return device


def _lora_config(spec: AgentSpec, lora: LoraSpec, saved: bool) -> LoraConfig:
    """What the adapter looks like: a saved one as it was saved, a new one as the recipe says."""
    if not saved:
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules="all-linear" if lora.targets == ALL_LINEAR else list(lora.targets),
            task_type="CAUSAL_LM",
        )
    config: LoraConfig = LoraConfig.from_pretrained(spec.model)  # type: ignore[assignment]
    if spec.lora is not None and (lora.rank, lora.alpha) != (config.r, config.lora_alpha):
        raise UserError(
            f"agent {spec.name}: lora has rank {lora.rank} and alpha {lora.alpha:g}, but the "
            f"adapter in {spec.model} has rank {config.r} and alpha {config.lora_alpha:g}; "
            "give those, or leave lora out"
        )
    config.inference_mode, config.lora_dropout = False, 0.0
    return config


def _with_adapter(model: nn.Module, adapter: str, config: LoraConfig, seed: int) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(model, PeftModel):
            model.add_adapter(adapter, config)
            return model
        return get_peft_model(model, config, adapter_name=adapter)  # type: ignore[arg-type,return-value]


def _adapter_base(spec: AgentSpec) -> str | None:
    config = Path(spec.model) / "adapter_config.json"
    if not config.is_file():
        return None
    base = json.loads(config.read_text())["base_model_name_or_path"]
    beside = Path(spec.model).parent / Path(base).name
    return str(beside) if beside.is_dir() else base


def _load_model(spec: AgentSpec, model_id: str, dtype: torch.dtype) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            model_id,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            attn_implementation="sdpa",
        )
    except _UNLOADABLE as error:
        raise UserError(_cannot_load(spec, model_id, _said(error))) from error


def _load_tokenizer(spec: AgentSpec, model_id: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model_id, trust_remote_code=spec.trust_remote_code)
    except _UNLOADABLE as error:
        raise UserError(_cannot_load(spec, model_id, _said(error))) from error


def _said(error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if len(reason) > 160:
        reason = reason[:157] + "..."
    return f"{type(error).__name__}: {reason}"


def _cannot_load(spec: AgentSpec, model_id: str, reason: str) -> str:
    return (
        f"agent {spec.name}: cannot load model {model_id!r} ({reason}); "
        "give a directory with config.json and safetensors weights, or a hub id that can be reached"
    )
