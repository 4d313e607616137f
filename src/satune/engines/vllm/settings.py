"""How completions are drawn by vLLM. Nothing here needs vLLM, or the package that asks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from satune.ranges import Count, MayChange, Positive, Text, Whole


@dataclass(frozen=True, slots=True)
class VLLMSettings:
    """Completions are drawn by vLLM's servers, which run in an environment of their own; the
    environment variable SATUNE_VLLM_PYTHON names its interpreter. Agents with weights of their own
    have a server each, those with adapters on one base share one.

    ``servers`` are addresses of servers that were started otherwise, one a model in the order of
    the team's agents; without them they are started here, on ``devices`` (CUDA's numbers) in turn.
    ``max_rows`` bounds the sequences that a server decodes at once; ``memory`` what is taken: up to
    1 a share of each GPU, weights included, which the servers on it divide evenly (without
    ``devices`` all are on one), on a CPU of its free memory, which all divide; above 1 bytes of
    keys and values, a server. ``context`` is the longest sequence in tokens (null: the model's).
    ``probe`` tokens are scored by server and learner after weights were given (0: none), and
    ``tolerance`` is what they may differ by on average, in nats a token (null: 1e-3 in float32, 0.1
    in types of two bytes). A server that dies, also while it starts, is started again, ``restarts``
    times between two updates; it has ``start_seconds`` to be there, and ``timeout`` seconds for an
    answer."""

    servers: Annotated[tuple[Text, ...], MayChange()] = ()
    devices: Annotated[tuple[Whole | Text, ...], MayChange()] = ()
    max_rows: Annotated[Count, MayChange()] = 256
    memory: Annotated[Positive, MayChange()] = 0.25
    context: Count | None = None
    probe: Annotated[Whole, MayChange()] = 320
    tolerance: Annotated[Positive | None, MayChange()] = None
    restarts: Annotated[Whole, MayChange()] = 3
    start_seconds: Annotated[Positive, MayChange()] = 900.0
    timeout: Annotated[Positive, MayChange()] = 1200.0

    @property
    def conversations(self) -> int:
        return 2 * self.max_rows

    def sharing(self, number: int, servers: int) -> int:
        """How many of so many ``servers`` are on the device of one of them, it included; without
        ``devices`` all are on one."""
        if not self.devices:
            return servers
        names = [str(self.devices[n % len(self.devices)]) for n in range(servers)]
        return names.count(names[number])
