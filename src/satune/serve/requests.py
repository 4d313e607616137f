"""A chat request as it comes, and what a team is asked by it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from satune.engines.wire import mended
from satune.loading import nearest_hint
from satune.serve.refusal import Refusal
from satune.tasks.chats import chat_parts
from satune.types import Problem, Sampling

COLDEST = 1e-3
"""The lowest temperature that is divided by; what lies below is greedy."""
LARGEST = 2**31 - 1
"""The largest top_k: beyond it no tensor holds the number, and no vocabulary is as large."""
STOPS = 16
"""Stop sequences of one request."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a team is asked: ``samples`` answers of ``model`` to a problem, drawn by ``seed``. What
    is None is the team's own; a message may be shortened by ``max_new_tokens``, not lengthened."""

    model: str
    problem: Problem
    seed: int
    samples: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None

    def sampling(self, own: Sampling) -> Sampling:
        """How a seat samples whose own way is ``own``."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        changes: dict[str, Any] = {name: v for name, v in given.items() if v is not None}
        if self.max_new_tokens is not None:
            changes["max_new_tokens"] = min(self.max_new_tokens, own.max_new_tokens)
        return replace(own, **changes)


@dataclass(frozen=True, slots=True)
class Request:
    """A chat request: what is asked, and how it is to be answered."""

    ask: Ask
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


class _Message(BaseModel):
    """What clients send back of earlier answers beside these fields is not heeded."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: str
    content: Any = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class _Body(BaseModel):
    """The fields that are heeded, then those that change nothing about an answer."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=LARGEST)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    metadata: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None
    verbosity: Any = None


_TOOLS = "a team calls no tools"
_NO_LOGPROBS = "a team's answer has no log-probability of its own: several models came to it"
_PLAIN = "a team samples from its policies as they are"
_TEXT = "a team writes text alone"
CANNOT: dict[str, tuple[tuple[Any, ...], str]] = {
    # field: the values that ask for nothing, and why any other is refused
    "audio": ((), _TEXT),
    "frequency_penalty": ((0,), _PLAIN),
    "function_call": (("none", "auto"), _TOOLS),
    "functions": (([],), _TOOLS),
    "logit_bias": (({},), _PLAIN),
    "logprobs": ((False,), _NO_LOGPROBS),
    "modalities": ((["text"],), _TEXT),
    "prediction": ((), _PLAIN),
    "presence_penalty": ((0,), _PLAIN),
    "response_format": (({"type": "text"},), "a team writes as it was trained, in no format"),
    "tool_choice": (("none", "auto"), _TOOLS),
    "tools": (([],), _TOOLS),
    "top_logprobs": ((0,), _NO_LOGPROBS),
    "web_search_options": ((), _TOOLS),
}


def read_request(body: bytes, models: Collection[str], choices: int, seed: int | None) -> Request:
    """The request in a body. ``seed`` is that of a request which gives none; where that is None
    too, one is drawn for it alone. Raises Refusal for whatever is wrong with the request, and for
    what a team cannot do."""
    data = _parsed(body)
    if not isinstance(data, dict):
        raise Refusal(400, "the body is no JSON object; send model and messages", code="bad_body")
    for name, (harmless, why) in CANNOT.items():
        value = data.pop(name, None)
        if value is not None and value not in harmless:
            raise Refusal(400, f"{name}: {why}; leave it out", param=name, code="unsupported")
    try:
        given = _Body.model_validate(data)
    except ValidationError as error:
        _refuse(error)
    if given.model not in models:
        near = nearest_hint(given.model, models)
        raise Refusal(
            404, f"model: no {given.model[:200]!r}{near}", param="model", code="model_not_found"
        )
    samples = given.n or 1
    if samples > choices:
        raise Refusal(400, f"n: is {samples}; give at most {choices}", param="n", code="too_many")
    stops = (given.stop,) if isinstance(given.stop, str) else tuple(given.stop or ())
    if len(stops) > STOPS or not all(stops):
        raise Refusal(400, f"stop: give up to {STOPS} texts, none of them empty", param="stop")
    temperature = given.temperature
    if temperature is not None and temperature < COLDEST:
        temperature = 0.0
    if seed is None:
        seed = secrets.randbits(31)
    ask = Ask(
        model=given.model,
        problem=problem_of(given.messages),
        seed=seed if given.seed is None else given.seed,
        samples=samples,
        temperature=temperature,
        top_p=given.top_p,
        top_k=None if given.top_k is None else max(0, given.top_k),
        max_new_tokens=_limit(given),
    )
    usage = given.stream_options is not None and bool(given.stream_options.include_usage)
    return Request(ask, stops, bool(given.stream), usage)


def problem_of(messages: Sequence[_Message]) -> Problem:
    """The chat as one problem, by ``tasks.chats``. Raises Refusal for messages of a tool, for what
    is no text, and for a chat that does not end with the user's word."""
    read: list[dict[str, str]] = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        role = _role(message.role, place)
        if message.tool_calls or message.function_call:
            raise Refusal(
                400, f"{place}: {_TOOLS}; leave the call out", param=place, code="unsupported"
            )
        if message.audio:
            raise Refusal(400, f"{place}.audio: {_TEXT}", param=f"{place}.audio")
        read.append({"role": role, "content": _content(message.content, role, place)})
    last = f"messages[{len(read) - 1}]"
    if read[-1]["role"] != "user":
        raise Refusal(400, f"{last}: a team answers the user; end with a user message", param=last)
    if not read[-1]["content"].strip():
        raise Refusal(400, f"{last}.content: is empty; ask something", param=f"{last}.content")
    return Problem("chat", chat_parts(read))


def chat_problem(history: Sequence[tuple[Literal["user", "assistant"], str]]) -> Problem:
    """The problem of a chat whose messages are (role, text)."""
    return problem_of([_Message(role=role, content=text) for role, text in history])


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_no_number)
    except RecursionError:
        said = "is nested too deep"
    except ValueError:  # not UTF-8, no JSON, or a number of thousands of digits
        said = "is not JSON"
    raise Refusal(400, f"the body {said}; send one JSON object", code="bad_body")


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _limit(given: _Body) -> int | None:
    old, new = given.max_tokens, given.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise Refusal(
            400, "max_tokens: differs from max_completion_tokens; give one", param="max_tokens"
        )
    return old if new is None else new


def _role(role: str, place: str) -> str:
    if role in ("tool", "function"):
        raise Refusal(400, f"{place}: {_TOOLS}; leave its message out", param=f"{place}.role",
                      code="unsupported")  # fmt: skip
    if role not in ("system", "developer", "user", "assistant"):
        raise Refusal(
            400,
            f"{place}.role: is {role[:40]!r}; give system, developer, user or assistant",
            param=f"{place}.role",
        )
    return "system" if role == "developer" else role


def _content(content: Any, role: str, place: str) -> str:
    if content is None and role == "assistant":
        return ""
    if isinstance(content, str):
        return mended(content)
    if not isinstance(content, list):
        raise Refusal(400, f"{place}.content: is no text", param=f"{place}.content")
    texts: list[str] = []
    for at, part in enumerate(content):
        here = f"{place}.content[{at}]"
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            said = f"of type {kind[:40]!r}" if isinstance(kind, str) else "no text"
            raise Refusal(
                400, f"{here}: is {said}; a team reads text alone", param=here, code="unsupported"
            )
        texts.append(mended(text))
    return "".join(texts)


def _refuse(error: ValidationError) -> NoReturn:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if not first["loc"]:
        raise Refusal(400, "the body has a name that is no text", code="bad_body")
    # A union's branches have their types' names behind the field's.
    path = first["loc"][:3] if first["loc"][0] == "messages" else first["loc"][:1]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    if first["type"] == "extra_forbidden":
        known = [*_Body.model_fields, *CANNOT]
        said = f"{place[:200]}: is not known{nearest_hint(place[:200], known)}"
        raise Refusal(400, said, param=place[:200], code="unknown_parameter")
    raise Refusal(400, f"{place}: {first['msg'].lower()}", param=place, code="invalid_value")
