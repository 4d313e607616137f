"""What crosses between a run and a host, as JSON: texts, counts, rewards, weights w, labels of
problems; back texts, counts, sums a turn, figures and digests.

Floats are written so that they read back to the same bits; NaN and infinities are written as
Python does. A tensor is a list of float64. No ids, no log-probabilities of tokens and no weights
have a form here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from satune.types import (
    Completion,
    Entry,
    Episode,
    EpisodeFailure,
    Experience,
    Failure,
    Grade,
    Key,
    Problem,
    Sampling,
    Turn,
    UserError,
)

FORMAT = 2
"""What both sides have to speak."""

Plain = dict[str, Any]

_TURN = ("seat", "agent", "moment", "own_index", "text", "finish_reason", "version", "dropped")
_COUNTS = ("prompt_tokens", "completion_tokens")
_MOST = 2**31 - 1
_SAMPLING: dict[str, tuple[Any, int, int]] = {
    # the kind, the least and the most of each value
    "max_new_tokens": (int, 1, _MOST),
    "temperature": ((int, float), 0, _MOST),
    "top_p": ((int, float), 0, 1),
    "top_k": (int, 0, _MOST),
}


def to_bytes(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def from_bytes(data: bytes) -> Plain:
    """Raises ValueError for what is no JSON object."""
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


class Malformed(UserError):
    """A message that has not its form."""


class Estranged(UserError):
    """A run or a visitor asks on as if nothing had happened in between."""


@contextmanager
def reading() -> Iterator[None]:
    """Inside the block, where nothing is done but to read a message, what goes wrong is its fault.
    Raises Malformed; what is refused passes."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"a message of another form ({error!r})") from error


def numbers(tensor: Tensor | None) -> list[float] | None:
    return None if tensor is None else tensor.double().tolist()


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def key_to(key: Key) -> Plain:
    return asdict(key)


def key_from(plain: Mapping[str, Any]) -> Key:
    return Key(**plain)


# -- completions ---------------------------------------------------------------------------------


def sampling_to(sampling: Sampling) -> Plain:
    return asdict(sampling)


def sampling_from(plain: Mapping[str, Any]) -> Sampling:
    """Raises UserError for a value of another kind or out of range: an engine that fails at one
    request fails at all that it decodes."""
    for name, (kind, least, most) in _SAMPLING.items():
        value = plain.get(name, least)
        if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:
            raise UserError(f"is asked for a {name} that is not between {least} and {most}")
    return Sampling(**plain)


def entry_to(entry: Entry) -> Plain:
    return {**asdict(entry), "parts": [dict(part) for part in entry.parts]}


def entry_from(plain: Mapping[str, Any]) -> Entry:
    return Entry(**{**plain, "parts": tuple(plain["parts"])})


def answer_to(number: int, answer: Completion | EpisodeFailure) -> Plain:
    """A completion without its ids and their log-probabilities, or why there is none."""
    if isinstance(answer, EpisodeFailure):
        return {"number": number, "reason": answer.reason, "policy": answer.policy}
    said = replace(answer, ids=None, logprobs=None)
    return {"number": number, "said": {k: v for k, v in asdict(said).items() if v is not None}}


def answer_from(plain: Mapping[str, Any]) -> tuple[int, Completion | EpisodeFailure]:
    if "said" in plain:
        return plain["number"], Completion(**plain["said"])
    return plain["number"], EpisodeFailure(plain["reason"], policy=plain["policy"])


# -- experience ----------------------------------------------------------------------------------


def episodes_to(episodes: Sequence[Episode], agent: str) -> list[Plain]:
    """What an owner is told of episodes to learn from them: who said what, the rewards and a label
    of the problem; of a failure its kind. The problem's text, the reference answer, observations
    and the grader's remarks stay."""
    return [
        {
            "problem": episode.problem.id,
            "sample": episode.sample,
            "turns": [_turn_to(turn, agent) for turn in episode.turns],
            "answer": episode.answer,
            "score": episode.grade.score,
            "components": dict(episode.grade.components),
            "seats": None if episode.grade.seats is None else dict(episode.grade.seats),
            "failure": _failure_to(episode.failure),
        }
        for episode in episodes
    ]


def _failure_to(failure: Failure | None) -> Plain | None:
    return None if failure is None else asdict(Failure(failure.kind, failure.policy))


def _turn_to(turn: Turn, agent: str) -> Plain:
    plain = {name: getattr(turn, name) for name in (*_TURN, *_COUNTS)}
    return {**plain, "handle": turn.handle} if turn.agent == agent else plain


def episodes_from(plain: Sequence[Mapping[str, Any]]) -> list[Episode]:
    """Those episodes, without the ids of any turn."""
    return [
        Episode(
            problem=Problem(each["problem"], ()),
            sample=each["sample"],
            turns=tuple(Turn(**turn) for turn in each["turns"]),
            answer=each["answer"],
            grade=Grade(each["score"], each["components"], seats=each["seats"]),
            failure=None if each["failure"] is None else Failure(**each["failure"]),
        )
        for each in plain
    ]


def experience_to(experience: Experience, agent: str) -> Plain:
    return {
        "episodes": episodes_to(experience.episodes, agent),
        "log_weights": list(experience.log_weights),
        "log_ratios": experience.log_ratios,
    }


def experience_from(plain: Mapping[str, Any], episodes: Sequence[Episode]) -> Experience:
    """The experience over its ``episodes`` once their ids are filled in."""
    ratios = plain["log_ratios"]
    by_turn = None if ratios is None else tuple(map(tuple, ratios))
    return Experience(tuple(episodes), tuple(plain["log_weights"]), by_turn)
