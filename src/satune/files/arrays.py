"""Arrays of token ids and log-probabilities."""

from __future__ import annotations

import numpy as np

from satune.types import Ids


def shared_prefix(a: Ids, b: Ids) -> int:
    """With how many equal ids ``a`` and ``b`` begin."""
    length = min(len(a), len(b))
    differ = np.asarray(a)[:length] != np.asarray(b)[:length]
    return int(differ.argmax()) if differ.any() else length
