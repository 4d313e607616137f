"""How long a run waits for the hosts of its agents. Nothing here needs a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from satune.ranges import MayChange, NotNegative, Positive


@dataclass(frozen=True, slots=True)
class HostSettings:
    """``timeout`` is what one answer of a host may take, in seconds: a step, a batch of
    completions. A host that gave none, or that cannot be reached, is lost. The run then waits up to
    ``wait`` seconds for it to be there again and goes on from the last checkpoint; 0 ends it."""

    timeout: Annotated[Positive, MayChange()] = 3600.0
    wait: Annotated[NotNegative, MayChange()] = 0.0
