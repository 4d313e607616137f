"""An engine that shares nothing with the learners: what it samples from is what it was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from satune.agents.mixture import MixturePolicy
from satune.agents.policy import Policy
from satune.agents.weights import weights_digest
from satune.engines.local import LocalEngine
from satune.types import Completion, Key, Prompt, Sampling


class FarEngine(LocalEngine):
    """A local engine over copies of the policies. A copy holds NaN until weights are published.

    ``names`` has the digest of each (agent, version) ever published; a number that comes with
    other weights is refused. Engines that are given the same ``names`` hold one another to it.
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        seats: Mapping[str, str],
        names: dict[tuple[str, int], str] | None = None,
        **options: Any,
    ) -> None:
        copies = {
            name: policy if isinstance(policy, MixturePolicy) else policy.copied(name)
            for name, policy in policies.items()
        }
        super().__init__(copies, seats, **options)
        self.names = {} if names is None else names
        self.holds: set[str] = set()
        with torch.no_grad():
            for copied in copies.values():
                for parameter in copied.trainable().values():
                    parameter.fill_(float("nan"))

    def publish(self, agent: str, version: int, weights: Mapping[str, Any]) -> None:
        digest = weights_digest(weights)
        known = self.names.setdefault((agent, version), digest)
        assert known == digest, f"{agent}@{version} names two sets of weights"
        parameters = self.policies[agent].trainable()
        assert parameters.keys() == weights.keys()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        self.holds.add(agent)
        super().publish(agent, version, weights)

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        assert self.seats[seat] in self.holds, f"nothing of {self.seats[seat]} was published"
        return await super().generate(seat, prompt, sampling, key)
