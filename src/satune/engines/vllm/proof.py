"""Whether a server has the weights that it was given: what it says of some tokens, held against
what the learner says.

Two things are asked. Does the server agree with the learner (``error``)? And is it the new weights
that it agrees with, and not the old ones (``slope``, ``z``)? By a small step the two hardly differ,
and in a type of two bytes by less than rounding does: then nothing is shown, and nothing claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from satune.agents.policy import Policy
from satune.engines.vllm.files import Published, read_weights
from satune.types import Ids, UserError, ids_of

SURE = 5.0
"""The z beyond which old and new weights are told apart."""
_NEXT = 5
"""How many log-probabilities of the token after the probe are compared, and by how many times what
is allowed on average the worst of them may be off."""
_WORST = 30.0
_ROUNDING = 1e-7
"""What a log-probability may be off by in whatever type (nats)."""

Ask = Callable[[Mapping[str, Any]], Any]
"""What a server answers to the body of a request for a completion."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a server said of a probe: of its tokens but the first, computed anew, and of some tokens
    that may follow, found with its cache of prefixes."""

    own_T: Sequence[float]
    next: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Finding:
    """``tokens`` were scored; server and learner differ by ``error`` nats on average, by ``most``
    at one of them, and at what may follow them by ``cached``. ``z`` says how many standard errors
    the answers lie from the old weights', towards the new ones' (None: there were none before), and
    ``slope`` where: 0 for the old weights, 1 for the new ones. ``resolved``: the standard error is
    small enough to tell the two apart."""

    tokens: int
    error: float
    most: float
    cached: float
    z: float | None = None
    slope: float | None = None
    resolved: bool = False

    @property
    def told_apart(self) -> bool:
        return self.resolved and self.slope is not None and self.slope > 0.5

    @property
    def unchanged(self) -> bool:
        """The server answers with the old weights."""
        return self.resolved and self.slope is not None and self.slope <= 0.5

    @property
    def figures(self) -> dict[str, Any]:
        """What events say of it."""
        found: dict[str, Any] = {"tokens": self.tokens, "error": self.error, "most": self.most}
        found["cached"] = self.cached
        return found if self.z is None else {**found, "z": self.z, "told_apart": self.told_apart}


def ask(complete: Ask, named: Mapping[str, Any], probe: Ids) -> Said:
    """What a server says of a probe; ``named`` are the model and the salt of its cache. The first
    request computes the probe anew, which puts it into the cache, and the second finds it there."""
    common = {
        **named, "prompt": list(probe), "max_tokens": 1, "temperature": 1.0, "seed": 0,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    scored = complete({**common, "prompt_logprobs": 0})["choices"][0]["prompt_logprobs"][1:]
    after = complete({**common, "logprobs": _NEXT})["choices"][0]["logprobs"]["top_logprobs"][0]
    own = zip(scored, probe[1:], strict=True)
    return Said(
        [float(said[str(token)]["logprob"]) for said, token in own],
        {int(name.removeprefix("token_id:")): float(value) for name, value in after.items()},
    )


def probe_of(written: Sequence[int], length: int, vocabulary: int) -> Ids:
    """``length`` tokens: those that were written last and, where they are fewer, some of the
    vocabulary. None where there are fewer than two to ask for."""
    if length < 2:
        return ids_of()
    last = list(written)[-length:]
    filling = range(length - len(last))
    return ids_of([*last, *((7919 * place + 13) % vocabulary for place in filling)])


@torch.no_grad()
def score(policy: Policy, published: Published, probe: Ids) -> tuple[list[float], Tensor]:
    """The learner's log-probabilities of the probe's tokens but the first under published weights,
    at temperature 1, and those [V] of what may follow."""
    ids_1S = torch.tensor([list(probe)], device=policy.device)
    with policy.holding(read_weights(policy, published)):
        logprobs_SV = policy.project(policy.hidden(ids_1S)[0]).log_softmax(-1)
    own_T = logprobs_SV[:-1].gather(-1, ids_1S[0, 1:, None])[:, 0]
    return own_T.tolist(), logprobs_SV[-1]


def hold(
    policy: Policy,
    new: Published,
    old: Published | None,
    probe: Ids,
    now: Said,
    before: Said | None,
) -> Finding:
    """What a server said of the probe, ``now`` and with the old weights, beside the learner."""
    new_T, next_V = score(policy, new, probe)
    cached = max(abs(said - float(next_V[token])) for token, said in now.next.items())
    found = finding(new_T, now.own_T, cached)
    if old is None or before is None:
        return found
    return compared(found, new_T, now.own_T, score(policy, old, probe)[0], before.own_T)


def finding(new_T: Sequence[float], said_T: Sequence[float], cached: float = 0.0) -> Finding:
    """What log-probabilities [T] of the same tokens differ by: the learner's and the server's."""
    difference_T = (_column(said_T) - _column(new_T)).abs()
    return Finding(len(difference_T), float(difference_T.mean()), float(difference_T.max()), cached)


def compared(
    found: Finding,
    new_T: Sequence[float],
    said_T: Sequence[float],
    old_T: Sequence[float],
    said_before_T: Sequence[float],
) -> Finding:
    """``found`` with what the learner's and the server's log-probabilities [T] show under the old
    weights.

    The change that the server shows is regressed on the learner's, without an intercept; what is
    left over gives the slope's standard error. In differences that part of the mismatch cancels
    which both sets of weights have in common.
    """
    learnt_T = _column(new_T) - _column(old_T)
    shown_T = _column(said_T) - _column(said_before_T)
    size = float(learnt_T.square().sum()) ** 0.5
    if size == 0.0:
        return found
    slope = float((learnt_T * shown_T).sum()) / size**2
    left_over = float((shown_T - slope * learnt_T).square().mean()) ** 0.5
    deviation = max(left_over, _ROUNDING) / size
    return replace(found, z=slope / deviation, slope=slope, resolved=1.0 / deviation > SURE)


def judge(
    found: Finding, new: Published, old: Published | None, dtype: torch.dtype, given: float | None
) -> None:
    """Raise UserError, with the likely cause, where a server has other weights than these.
    ``given`` is what it may differ by from the learner, in nats a token on average."""
    exact = dtype == torch.float32
    allowed = given or (1e-3 if exact else 0.1)
    where = f"agent {new.agent}: after weights {new.name} were given"
    # In smaller types the learner's own rounding may be what the server does not follow.
    if exact and found.unchanged and old is not None:
        raise UserError(
            f"{where}, vLLM still answers with version {old.version}: it moved by "
            f"{found.slope:.2f} of what the learner did; start the server anew"
        )
    if not found.error <= allowed:
        raise UserError(
            f"{where}, vLLM and learner differ by {found.error:.3g} nats a token on average (at "
            f"most {found.most:.3g}; allowed {allowed:g}): the server has other weights (a head "
            "that shares the embedding's, layers left out), or computes in another type"
        )
    if not found.cached <= _WORST * allowed:
        raise UserError(
            f"{where}, vLLM and learner agree where it computes anew ({found.error:.1g} nats) and "
            f"differ by {found.cached:.3g} where it goes by its cache of prefixes, which is of "
            "older weights"
        )


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
