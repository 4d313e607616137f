"""What is said to a request that is not answered, in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from satune.engines.wire import mended


class Refusal(Exception):
    """A request is not answered: the ``status`` says whose doing that is, ``message`` is one line
    with the mend, ``param`` the field at fault and ``code`` a name for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        # Both may repeat what a request said, which no encoding may be able to write.
        self.message = mended(message)
        self.param = None if param is None else mended(param)
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        match self.status:
            case 401 | 403:
                kind = "authentication_error"
            case 429:
                kind = "rate_limit_error"
            case status if status >= 500:
                kind = "server_error"
            case _:
                kind = "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
