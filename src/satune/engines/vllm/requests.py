"""A completion as vLLM is asked for it, and as it comes back: ids, and what was said of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from satune.agents.policy import Policy
from satune.types import Completion, Ids, Key, Sampling, ids_of, logprobs_of


def asked(policy: Policy, ids: Ids, sampling: Sampling, key: Key) -> dict[str, Any]:
    """The body of a request, without the model's name."""
    body: dict[str, Any] = {
        "prompt": list(ids),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": key.rng("server").getrandbits(31),
        "stop_token_ids": sorted(i for i in policy.eos_ids if i < policy.config.vocab_size),
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
    }
    if sampling.top_p < 1.0:
        body["top_p"] = sampling.top_p
    if sampling.top_k > 0:
        body["top_k"] = sampling.top_k
    return body


def completion_of(
    policy: Policy, version: int, ids: Ids, sampling: Sampling, choice: Mapping[str, Any]
) -> Completion:
    """What the server drew after ``ids``. It has no log-probabilities where a filter was set: the
    server's are of what that left."""
    written: list[int] = choice["token_ids"]
    filtered = sampling.top_p < 1.0 or sampling.top_k > 0
    return Completion(
        text=policy.tokenizer.decode(written, skip_special_tokens=True),
        finish_reason="stop" if written and written[-1] in policy.eos_ids else "length",
        version=version,
        ids=ids_of(written),
        logprobs=None if filtered else logprobs_of(choice["logprobs"]["token_logprobs"]),
        prompt_tokens=len(ids),
        completion_tokens=len(written),
    )
