"""An agent's model cut into shards by FSDP2, a shard a process.

What a learner writes to is the shard that lies in this process, as a plain tensor. The embedding
and the head, which may be one tensor, lie in the outermost group with the last norm; each layer is
a group of its own. A group is gathered in the type of the masters: autocast rounds what it computes
with as it does in one process.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from satune.agents.policy import Policy
from satune.agents.processes import Processes
from satune.types import UserError

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_METHOD = "satune_states"


def check_layers(policy: Policy) -> list[nn.Module]:
    """The layers that a model is cut at. Raises UserError where it cannot be cut."""
    what = f"agent {policy.name}: {type(policy.causal_lm).__name__}"
    if any(getattr(policy.config, name, None) for name in _EXPERTS):
        raise UserError(
            f"{what} is a mixture of experts, which is not sharded; leave sharding out, or choose"
            " another model"
        )
    names = set(getattr(policy.causal_lm, "_no_split_modules", None) or ())
    layers = [module for module in policy.backbone.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"{what} does not say what its layers are; leave sharding out, or choose another model"
        )
    return layers


def shard(
    policies: Mapping[str, Policy], frozen: Mapping[str, bool], processes: Processes
) -> dict[str, ShardedPolicy]:
    """Cut the one model of ``policies`` (by agent), which are not to be used any more; ``frozen``
    tells which agents are never trained. Raises UserError for a model that cannot be cut."""
    policy = next(iter(policies.values()))
    causal_lm, backbone = policy.causal_lm, policy.backbone
    layers = check_layers(policy)
    policy.model.requires_grad_(False)
    for name, each in policies.items():
        for parameter in each.trainable().values():
            parameter.requires_grad_(not frozen[name])
    heads = {name: _head_names(each) for name, each in policies.items()}
    for layer in layers:
        fully_shard(layer, mesh=processes.mesh)
    fully_shard(causal_lm, mesh=processes.mesh)

    def states(_: Any, **kwargs: Any) -> Tensor:
        return backbone(**kwargs).last_hidden_state

    setattr(causal_lm, _METHOD, types.MethodType(states, causal_lm))
    # A call of the backbone itself would find its parameters cut.
    register_fsdp_forward_method(causal_lm, _METHOD)
    # FSDP settles where its shards lie when it is first used.
    with torch.no_grad(), policy.computing():
        ids = torch.zeros(1, 1, dtype=torch.long, device=policy.device)
        getattr(causal_lm, _METHOD)(input_ids=ids, use_cache=False)
    causal_lm.reshard()
    return {name: ShardedPolicy(each, heads[name], processes) for name, each in policies.items()}


def _head_names(policy: Policy) -> dict[str, str]:
    """What the head's own names are for those of its parameters that are the agent's."""
    names = {id(parameter): name for name, parameter in policy.trainable().items()}
    found = policy.head.named_parameters()
    return {part: names[id(p)] for part, p in found if id(p) in names}


class ShardedPolicy(Policy):
    """A policy over a model that ``shard`` has cut. ``trainable``, and whatever is named like its
    parameters, has this process's shards [rows / processes, ...] as plain tensors."""

    def __init__(self, policy: Policy, head_names: Mapping[str, str], processes: Processes) -> None:
        super().__init__(
            policy.name,
            policy.model,
            policy.tokenizer,
            policy.temperature,
            adapter=policy.adapter,
            autocast=policy.autocast,
            checked=False,
        )
        self.processes = processes
        self._head_names = head_names
        self._placements = [Replicate()] * (processes.mesh.ndim - 1) + [Shard(0)]
        self._whole: dict[str, DTensor] = super().trainable()  # type: ignore[assignment]
        self._own = {
            name: nn.Parameter(whole.to_local().detach(), requires_grad=whole.requires_grad)
            for name, whole in self._whole.items()
        }

    def reshard(self) -> None:
        """Let go of what is gathered: it would not see what is written to the shards."""
        self.causal_lm.reshard()

    def trainable(self) -> dict[str, nn.Parameter]:
        self.reshard()
        return dict(self._own)

    def computing(self) -> Any:
        if self.autocast is None:
            return super().computing()
        # Autocast would keep what it rounded of every gathered layer until the forward's end.
        return torch.autocast(self.device.type, dtype=self.autocast, cache_enabled=False)

    def _states(self, **kwargs: Any) -> Tensor:
        return getattr(self.causal_lm, _METHOD)(**kwargs)

    def _of_head(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As of a policy, gathered from shards in every process: the projection holds it whole."""
        return {part: self.gathered(name, weights[name]) for part, name in self._head_names.items()}

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """As of a policy; the shards are copied, because FSDP gathers from where they lie."""
        present = self.export()
        self.load_weights(weights)
        try:
            yield
        finally:
            self.load_weights(present)

    def collect_gradients(self) -> None:
        """Add what a backward left at FSDP's parameters to the gradients of the shards."""
        for name, whole in self._whole.items():
            if whole.grad is None:
                continue
            gradient: Tensor = whole.grad.to_local()  # type: ignore[attr-defined]
            own = self._own[name]
            own.grad = gradient if own.grad is None else own.grad + gradient
            whole.grad = None

    def drop_gradients(self) -> None:
        for whole in self._whole.values():
            whole.grad = None

    # -- whole tensors ---------------------------------------------------------------------------

    def gathered(self, name: str, tensor: Tensor) -> Tensor:
        """The whole tensor in every process. ``name`` is a parameter's, or one of its moments'
        (``<parameter>|exp_avg``); what is no shard, a count of steps, comes back as it is."""
        whole = self._whole[name.split("|")[0]]
        if tensor.dim() != whole.dim():
            return tensor
        return DTensor.from_local(
            tensor.to(self.device),
            self.processes.mesh,
            self._placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        ).full_tensor()

    def scattered(self, name: str, tensor: Tensor | None) -> Tensor:
        """This process's shard of a tensor that rank 0 has; the others give None."""
        whole = self._whole[name.split("|")[0]]
        if tensor is None:
            tensor = torch.empty(whole.shape, dtype=whole.dtype)
        cut = distribute_tensor(
            tensor.to(self.device, whole.dtype), self.processes.mesh, self._placements
        )
        return cut.to_local().clone()
