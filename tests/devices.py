"""Devices without hardware: tensors that are said to lie on ``cuda:0``, ``cuda:1``, and so on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

HOST = torch.device("cpu")
"""Where a tensor is that lies on no device: in main memory."""
_MOVES = {"to", "cpu"}
_TENSOR: Any = torch.Tensor
_DEVICE, _GRADIENT = _TENSOR.device.__get__, _TENSOR.grad.__get__
_SET_DATA = _TENSOR.data.__set__
_COMPARES = {"_has_compatible_shallow_copy_type", "is_same_size"}
"""What looks at no numbers."""


class Devices(TorchFunctionMode):
    """While this is entered there is ``cuda:N`` for every N: a tensor gets there by ``to``, or by
    being made there, and away from it by ``to`` and ``cpu``. Whatever else is given tensors of two
    devices, or of a device and the host, raises AssertionError; ``copy_`` and numbers without
    dimensions of the host's may. The numbers are computed on the CPU as ever, and ``free`` bytes
    are there on each device.

    ``calls`` counts what was computed on each device. It sees what Python asks of torch, in the
    thread that has entered it; what torch's own code does inside of that stays where its tensors
    are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        # A storage is known by its address, which is not given away while a weak reference is kept.
        self._storages: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def place(self, tensor: torch.Tensor) -> torch.device:
        if tensor.device.type != "cpu":
            return tensor.device
        found = self._storages.get(tensor.untyped_storage()._cdata)
        return HOST if found is None else found[1]

    def put(self, found: Any, place: torch.device) -> Any:
        """Say that the tensors of ``found`` lie there."""
        for tensor in _tensors(found):
            if place.type == "cuda" and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), place)
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == _DEVICE:
            return self.place(args[0])
        if name in _MOVES and isinstance(args[0], torch.Tensor):
            return self._moved(func, args, kwargs)
        if func == _GRADIENT:
            return self.put(func(*args), self.place(args[0]))
        if func == _SET_DATA:
            return func(*args)  # the storage is taken over, and its place with it
        given = kwargs.get("device")
        if given is not None and _device(given).type == "cuda":
            return self.put(func(*args, **{**kwargs, "device": "cpu"}), _device(given))
        place = self._common(name, args, kwargs)
        if place.type == "cuda":
            self.calls[str(place)] = self.calls.get(str(place), 0) + 1
        return self.put(func(*args, **kwargs), place)

    def _common(self, name: str, args: Any, kwargs: Any) -> torch.device:
        """Where all tensors that were given lie."""
        if name in ("copy_", "__deepcopy__") or name in _COMPARES:
            return self.place(args[0])
        tensors = _tensors((args, kwargs))
        if name in ("__getitem__", "__setitem__"):  # here an index may be the host's
            index = [t for t in _tensors(args[1]) if self.place(t) != HOST]
            tensors = [args[0], *index, *_tensors(args[2:])]
        places = {self.place(t) for t in tensors if t.dim() > 0 or self.place(t) != HOST}
        assert len(places) < 2, f"{name}: tensors of {', '.join(sorted(map(str, places)))} meet"
        place = places.pop() if places else HOST
        assert name != "numpy" or place == HOST, f"numpy: the tensor lies on {place}"
        return place

    def _moved(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        tensor, place = args[0], self.place(args[0])
        wanted = place if func.__name__ == "to" else HOST
        plain: list[Any] = [tensor]
        for each in args[1:]:
            if isinstance(each, torch.Tensor):
                wanted = self.place(each)
            elif isinstance(each, torch.device | str):
                wanted = _device(each)
                each = "cpu" if wanted.type == "cuda" else each
            plain.append(each)
        if kwargs.get("device") is not None:
            wanted = _device(kwargs["device"])
            kwargs = {**kwargs, "device": "cpu" if wanted.type == "cuda" else wanted}
        found = func(*plain, **kwargs)
        if found.device.type != "cpu" or tensor.device.type != "cpu":
            return found
        if wanted != place and found.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            found = found.clone()
        return self.put(found, wanted)


def _device(given: Any) -> torch.device:
    device = torch.device(given)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def _tensors(values: Any) -> list[torch.Tensor]:
    """The tensors among values, in lists, tuples and mappings too."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for each in values for tensor in _tensors(each)]
