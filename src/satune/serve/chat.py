"""A chat with a served team: what was said so far is the next problem."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from satune.serve.requests import Ask, chat_problem
from satune.serve.served import Answer, ServedTeam
from satune.types import Turn


@dataclass(slots=True)
class Chat:
    """``model`` is asked, with the seed ``seed`` each time (None: with another each time)."""

    served: ServedTeam
    model: str
    seed: int | None = None
    history: list[tuple[Literal["user", "assistant"], str]] = field(default_factory=list)

    async def say(self, text: str, tell: Callable[[Turn], None]) -> Answer:
        """The answer, told of turn by turn. What was not answered is not remembered.

        Raises Refusal where it does not fit, and as ``ServedTeam.ask``.
        """
        asked = [*self.history, ("user", text)]
        seed = secrets.randbits(31) if self.seed is None else self.seed
        ask = Ask(self.model, chat_problem(asked), seed)
        (answer,) = await self.served.ask(ask, lambda _, turn: tell(turn))
        self.history = [*asked, ("assistant", answer.text)]
        return answer

    def forget(self) -> None:
        """Begin anew."""
        self.history = []
