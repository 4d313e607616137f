"""Where in a message each token of it ends, by the tokenizer of a saved team, without a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from satune.files.manifest import MANIFEST, read_manifest
from satune.files.names import is_plain
from satune.types import UserError

BUDGET = 2_000_000
"""How many tokens a report cuts messages into; what comes after them is shaded by message."""


class Pieces:
    """The tokenizers of a run's team, read when they are first needed.

    ``reasons`` says by agent why some of its messages are shaded as a whole, where they are.
    """

    def __init__(self, run: Path, budget: int = BUDGET) -> None:
        self.reasons: dict[str, str] = {}
        self._team = run / "team"
        self._left = self._budget = budget
        self._tokenizers: dict[str, Any] = {}

    def lengths(self, agent: str, ids: Sequence[int], text: str) -> list[int] | None:
        """How much of ``text`` stands before the first token, and how much each token wrote, in
        UTF-16 units as JavaScript counts: 0 for a special token, or for a part of a character that
        a later one completes. None where that is not known."""
        if agent not in self._tokenizers:
            self._tokenizers[agent] = self._load(agent)
        tokenizer = self._tokenizers[agent]
        if tokenizer is None:
            return None
        if self._left < len(ids):
            self.reasons[agent] = f"beyond the first {self._budget:,} tokens"
            return None
        self._left -= len(ids)
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        try:
            written = [stream.step(tokenizer, id) or "" for id in ids]
        except Exception:  # the library raises nothing finer for ids that are not the tokenizer's
            self.reasons[agent] = "the team's tokenizer cannot read these ids"
            return None
        joined, lengths = "".join(written), [_units(piece) for piece in written]
        if text.startswith(joined) and lengths:
            # A character that was never completed belongs to the token that began it.
            lengths[-1] += _units(text) - _units(joined)
            return [0, *lengths]
        if text.endswith(joined) and lengths:
            return [_units(text) - _units(joined), *lengths]  # behind a thought that was opened
        self.reasons[agent] = "the team's tokenizer does not write what was written"
        return None

    def _load(self, agent: str) -> Any:
        try:
            folder = read_manifest(self._team)["agents"].get(agent, {}).get("dir", "")
        except UserError:
            self.reasons[agent] = "the run has no whole team/ and so no tokenizer"
            return None
        path = self._team / folder / "tokenizer.json"
        if not is_plain(folder) or not path.is_file():
            self.reasons[agent] = f"no tokenizer.json of it beside {MANIFEST}"
            return None
        if importlib.util.find_spec("tokenizers") is None:
            self.reasons[agent] = "the package tokenizers is not installed"
            return None
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(path))
        except Exception:  # nor for a damaged file
            self.reasons[agent] = f"{path} is damaged"
            return None


def _units(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2
