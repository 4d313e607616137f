"""Weights on their way from a learner to an engine, and what tells two sets of them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


class Weights(Mapping[str, Tensor]):
    """An agent's parameters by name, exported when somebody first looks at them.

    An engine that shares the learner's parameters never looks, and nothing is copied for it. An
    engine with parameters of its own has to look while it is given them: afterwards the learner
    may hold other ones.
    """

    def __init__(self, export: Callable[[], Mapping[str, Tensor]]) -> None:
        self._export = export
        self._found: Mapping[str, Tensor] | None = None

    def _tensors(self) -> Mapping[str, Tensor]:
        if self._found is None:
            self._found = self._export()
        return self._found

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors())

    def __len__(self) -> int:
        return len(self._tensors())


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits that tell two sets of weights apart: a BLAKE2b digest of names, types,
    shapes and bytes. Where the tensors lie and in which order they stand makes no difference.

    Tensors are hashed by several threads, one tensor each on the CPU at a time.
    """
    names = sorted(weights)
    with ThreadPoolExecutor() as pool:
        parts = pool.map(lambda name: _tensor_digest(name, weights[name]), names)
        whole = hashlib.blake2b(digest_size=16)
        for part in parts:
            whole.update(part)
    return whole.hexdigest()


def _tensor_digest(name: str, tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    head = repr((name, str(plain.dtype), tuple(plain.shape))).encode()
    found = hashlib.blake2b(head, digest_size=32)
    # Bytes and not numbers: numpy has no bfloat16, and NaN and -0 count as they are.
    found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()
