"""What a vLLM worker does for satune: put an agent's weights into its model.

Runs in vLLM's environment, where satune is not: it imports nothing of it. vLLM mixes ``Extension``
into its worker (``--worker-extension-cls``) and calls its methods by name (``/collective_rpc``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file

_PIECE = 1 << 24


class Extension:
    """Mixed into vLLM's worker, which has the ``model_runner`` and its configuration."""

    model_runner: Any
    reload_weights: Callable[..., None]
    satune_digest: str | None = None

    def satune_load(self, path: str) -> dict[str, str]:
        """Load a model's weights, whole and in a checkpoint's names, from a safetensors file; gives
        the ``digest`` of the file. Gives a ``fault``, and loads nothing, where it lacks tensors
        that the model was started with (but a head, which may be the embedding once more): they
        would silently stay as they were."""
        digest = digest_of(Path(path))
        tensors = load_file(path)
        expected = _names(Path(self.model_runner.vllm_config.model_config.model))
        missing = sorted(expected - set(tensors) - {"lm_head.weight"})
        if missing:
            return {"fault": f"{len(missing)} tensors are missing, {missing[0]} first"}
        self.satune_digest = ""
        self.reload_weights(weights_iterator=iter(tensors.items()), is_checkpoint_format=True)
        _pack_tied_head(self.model_runner.get_model())
        self.satune_digest = digest
        return {"digest": digest}

    def satune_loaded(self) -> dict[str, str]:
        """The ``digest`` of the weights that were loaded last; empty where none were."""
        return {"digest": self.satune_digest or ""}

    def satune_has(self) -> dict[str, str]:
        """The ``digest`` of the weights that were loaded last or, where none were, of the file that
        the server was started with."""
        if self.satune_digest is None:
            directory = Path(self.model_runner.vllm_config.model_config.model)
            self.satune_digest = digest_of(directory / "model.safetensors")
        return {"digest": self.satune_digest}


def digest_of(path: Path) -> str:
    """32 hexadecimal digits that tell files apart."""
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def _names(directory: Path) -> set[str]:
    """The tensors of a checkpoint; none where it does not lie in this directory."""
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return names


def _pack_tied_head(model: Any) -> None:
    """vLLM's CPU backend keeps a packed copy of each matrix. A head that shares the embedding's is
    not packed anew by a reload, and would go on with the old weights."""
    for module in model.modules():
        head = getattr(module, "lm_head", None)
        embedding = getattr(getattr(module, "model", None), "embed_tokens", None)
        # Adapters stand around the layers that they change.
        head, embedding = (getattr(each, "base_layer", each) for each in (head, embedding))
        weights = getattr(head, "weight", None), getattr(embedding, "weight", None)
        if any(weight is None for weight in weights):
            continue
        if head is embedding or weights[0].data_ptr() == weights[1].data_ptr():
            head.quant_method.process_weights_after_loading(head)
