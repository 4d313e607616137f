"""The one place that makes an engine. A new one is a module of its own and an entry in ``ENGINES``.

Settings load no model and no library for one: the recipe's schema is derived from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

from satune.engines.vllm.settings import VLLMSettings
from satune.loading import check_options, load_object
from satune.ranges import Count, MayChange, Positive
from satune.types import Engine, UserError

if TYPE_CHECKING:
    from satune.agents.policy import Policy


class EngineSettings(Protocol):
    """What is known of an engine before it is made. One that, once it is made, neither draws nor
    checks anything with the policies that it was made over may say so by a further attribute,
    ``own_weights = True``: nothing is then copied for it where they change while it draws
    (``rollout.ahead``)."""

    @property
    def conversations(self) -> int:
        """How many conversations may be open at a time, so that the engine is never short of
        requests."""
        ...

    def make(self, policies: Mapping[str, Policy], seats: Mapping[str, str]) -> Engine:
        """The engine over policies by agent; ``seats`` maps each seat to its agent. Raises
        UserError for a model that it does not serve."""
        ...


@runtime_checkable
class MayWait(Protocol):
    """An engine that may wait long in ``publish``, as for a server that starts."""

    def cut(self) -> None:
        """Have a ``publish`` that waits in another thread end, with whatever error. Later ones wait
        as ever."""
        ...


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """Completions are drawn in this process. ``max_rows`` bounds a batch, ``cache_tokens`` what is
    kept an agent between the turns of a conversation (null: the engine's own bound). ``memory``
    bounds keys and values: up to 1 a share of what is free when the engine is made, above 1 bytes.
    In the order ``exact`` batches depend on the conversations alone, so that a resumed run equals
    an uninterrupted one; ``throughput`` waits for nobody; null is exact on the CPU."""

    max_rows: Annotated[Count, MayChange()] = 256
    cache_tokens: Annotated[Count | None, MayChange()] = None
    memory: Annotated[Positive, MayChange()] = 0.5
    order: Literal["exact", "throughput"] | None = None

    @property
    def conversations(self) -> int:
        return 2 * self.max_rows

    def divided(self, among: int) -> LocalSettings:
        """These, of which so many engines on one device take the ``memory`` together."""
        share = self.memory / among
        # Less than two bytes would be read as a share.
        return replace(self, memory=share if self.memory <= 1 else max(share, 2.0))

    def make(self, policies: Mapping[str, Policy], seats: Mapping[str, str]) -> Engine:
        from satune.engines.local import LocalEngine

        given: dict[str, Any] = {
            "max_rows": self.max_rows, "memory": self.memory, "order": self.order,
        }  # fmt: skip
        if self.cache_tokens is not None:
            given["cache_tokens"] = self.cache_tokens
        return LocalEngine(policies, seats, **given)


def keeps_weights(settings: EngineSettings) -> bool:
    """Whether the engine has weights of its own, and does not look at the policies'."""
    return getattr(settings, "own_weights", False)


class VLLM(VLLMSettings):
    __doc__ = VLLMSettings.__doc__

    def make(self, policies: Mapping[str, Policy], seats: Mapping[str, str]) -> Engine:
        """No server is started before it is needed. Raises UserError without the package that asks,
        and as ``VLLMEngine``."""
        try:
            from satune.engines.vllm.engine import VLLMEngine
        except ModuleNotFoundError as error:
            raise UserError(
                f"engine: to ask vLLM needs {error.name}; pip install 'satune[openai]'"
            ) from None
        return VLLMEngine(policies, seats, self)


ENGINES: dict[str, Callable[..., EngineSettings]] = {"local": LocalSettings, "vllm": VLLM}


def engine_settings(name: str, options: Mapping[str, Any]) -> EngineSettings:
    """The settings of an engine by its name in ``ENGINES``, or of the user's own
    (``path/to/file.py:name``). Raises UserError for what cannot be loaded, or options that it does
    not take."""
    kind = ENGINES.get(name)
    if kind is None:
        kind = load_object(name)
        check_options(f"engine {name}", kind, options)
    return kind(**options)
