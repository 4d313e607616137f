"""How many bytes the tensors that are alive take, and the most that they ever took at once."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside the block, ``now`` counts the bytes of every storage that an operation of this thread
    has made and that is still there, and ``peak`` the most that ``now`` was. Views share a storage,
    which counts once; what an operation takes and gives back within itself is not seen. Fake
    tensors count as the real ones would.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def count(self, tensors: Sequence[Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            name, size = storage._cdata, storage.nbytes()
            if name not in self._known:
                self._known[name] = weakref.ref(storage, self._forget(name, size))
                self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, name: int, size: int) -> Any:
        def gone(_: weakref.ref[Any]) -> None:
            del self._known[name]
            self.now -= size

        return gone

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count([leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)])
        return made
