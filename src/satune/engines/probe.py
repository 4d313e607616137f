"""Which models the local engine can serve: looked at before a batch is sampled from one."""

from __future__ import annotations

from typing import Any

import torch

from satune.agents.policy import Policy
from satune.engines.cache import RowCache
from satune.types import UserError

_SERVED = {"full_attention", "sliding_attention", "chunked_attention"}


def token_bytes(agent: str, policy: Policy) -> int:
    """Bytes that a token's keys and values take while the local engine serves the policy.

    Raises: UserError where the policy's model keeps another state than keys and values, or is
    another model when its rows are of different length, one row's tokens behind another's."""
    for part in policy.parts:
        kinds = set(getattr(part.config, "layer_types", None) or [])
        other = kinds - _SERVED
        if other or getattr(part.config, "ssm_cfg", None) or hasattr(part.config, "state_size"):
            found = ", ".join(sorted(other)) or type(part.config).__name__
            raise UserError(
                f"agent {agent}: the local engine serves attention layers only, it has {found}; "
                "choose another model"
            )
    try:
        difference, held = _tried(policy)
    except Exception as error:  # whatever the model's own code comes to
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"agent {agent}: {_kind(policy)} does not decode in a batch with a cache "
            f"({type(error).__name__}: {reason}); choose another model"
        ) from error
    if not difference < 0.05:
        raise UserError(
            f"agent {agent}: {_kind(policy)} is another model in a batch of rows of different "
            "length (it counts positions from the cache's end, or masks on its own); choose "
            "another model"
        )
    return held


def _kind(policy: Policy) -> str:
    return " and ".join(type(part.causal_lm).__name__ for part in policy.parts)


@torch.no_grad()
def _tried(policy: Policy) -> tuple[float, int]:
    """How far logits of two rows, decoded together after prompts of four tokens and of one, lie
    from those of either row alone, as a share of the largest logit; and the bytes of a token."""
    lengths, new = (4, 1), 2
    vocabulary = min(part.config.vocab_size for part in policy.parts)
    ids = (torch.arange(1, 7, device=policy.device) * 7) % vocabulary
    places = torch.arange(4, device=policy.device)
    cache = RowCache(policy.parts[0].autocast)
    cache.reserve(6)

    def feed(ids_RS: torch.Tensor, positions_RS: torch.Tensor, used: int) -> torch.Tensor:
        cache.positions, cache.used = positions_RS, used
        return policy.hidden(
            ids_RS,
            attention_mask=policy.masks(positions_RS, used),
            position_ids=positions_RS,
            cache=cache,
        )

    feed(ids[:4].repeat(2, 1), places.repeat(2, 1), 4)
    written: list[Any] = []
    for step in range(new):
        at = torch.tensor([[length + step] for length in lengths], device=policy.device)
        written.append(policy.project(feed(ids[at], at, 4 + step + 1)[:, -1]))
    worst = 0.0
    for row, length in enumerate(lengths):
        alone = policy.project(policy.hidden(ids[None, : length + new])[0, length:])
        together = torch.stack([each[row] for each in written])
        seen = torch.isfinite(alone)
        scale = alone[seen].abs().max().clamp(min=1.0)
        worst = max(worst, float((together[seen] - alone[seen]).abs().max() / scale))
    return worst, cache.token_bytes
