"""Keys of conversations that are known by what is asked, whoever asks it and under whatever id."""

from __future__ import annotations

import hashlib

from satune.types import Key, Problem


def text_digest(problem: Problem) -> str:
    """The SHA-256 of the problem's text, in hexadecimal."""
    # JSON can hold half a surrogate pair, which no encoding can.
    return hashlib.sha256(problem.text.encode("utf-8", "surrogatepass")).hexdigest()


def text_key(seed: int, problem: Problem, sample: int = 0) -> Key:
    """The key of a conversation that a served team has on a problem: equal seeds, texts and samples
    are answered alike."""
    return Key(seed, "serve", problem=text_digest(problem), sample=sample)
