"""AdamW over an agent's parameters, and where its moments lie between steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from satune.agents.specs import OptimizerSettings


class Moments:
    """The moments of one agent, flat and by name (``<parameter>|exp_avg``, ...).

    Between ``wake`` and ``rest`` the optimiser has them on the parameters' device. Else they lie
    where ``settings.offload`` says: on the CPU, in ``file``, or where they were. Nobody writes to
    moments that rest, so that snapshots and checkpoints share them instead of copying.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: OptimizerSettings,
        file: Path | None,
    ) -> None:
        self._parameters = parameters
        self._settings = settings
        self._file = file if settings.offload == "disk" else None
        self._adamw: torch.optim.AdamW | None = None
        # What rests; of an optimiser that is awake, what it began with, until it has stepped.
        self._resting: dict[str, Tensor] | None = {}
        self._on_disk = False

    @property
    def awake(self) -> bool:
        return self._adamw is not None

    def wake(self) -> None:
        """Bring the optimiser into memory for this agent's steps."""
        if self._adamw is not None:
            return
        settings, state = self._settings, self._at_rest()
        self._adamw = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            foreach=True,
        )
        self._fill(state)

    def rest(self) -> None:
        """Let the optimiser go until the next step."""
        if self._adamw is None:
            return
        state = self._current() if self._resting is None else self._resting
        self._adamw = None
        self._put_away(state)

    def step(self, rate: float) -> None:
        """One step of AdamW with this learning rate on the parameters' gradients."""
        assert self._adamw is not None, "wake() comes before step()"
        self._resting = None
        self._adamw.param_groups[0]["lr"] = rate
        self._adamw.step()

    def state(self) -> dict[str, Tensor]:
        """The moments on the CPU. They stay as they are, whatever the optimiser does later, and may
        be shared: they are not to be written to."""
        if self._settings.offload == "none":
            here = self._at_rest() if self._adamw is None else self._current()
            return {name: tensor.to("cpu", copy=True) for name, tensor in here.items()}
        if self._adamw is None:
            return dict(self._at_rest())
        if self._resting is None:
            state = self._current()
            self._resting = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        return dict(self._resting)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Have these moments, as ``state`` gives them; nobody may write to them later."""
        if self._adamw is None:
            self._put_away(state)
        else:
            self._fill(state)

    def _current(self) -> dict[str, Tensor]:
        """What the optimiser works on, not copied."""
        assert self._adamw is not None
        return {
            f"{name}|{key}": value.detach()
            for name, parameter in self._parameters.items()
            for key, value in self._adamw.state.get(parameter, {}).items()
        }

    def _at_rest(self) -> dict[str, Tensor]:
        if self._on_disk:
            assert self._file is not None
            return load_file(self._file)
        assert self._resting is not None
        return self._resting

    def _put_away(self, state: Mapping[str, Tensor]) -> None:
        stays = self._settings.offload == "none"
        resting = {name: tensor if stays else tensor.cpu() for name, tensor in state.items()}
        self._on_disk = self._file is not None and bool(resting)
        if self._on_disk:
            assert self._file is not None
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # Beside and renamed: tensors that were read from the file may still lie in it.
            beside = self._file.with_name(f"{self._file.name}.writing")
            save_file({name: t.contiguous() for name, t in resting.items()}, beside)
            beside.replace(self._file)
            resting = {}
        self._resting = resting

    def _fill(self, state: Mapping[str, Tensor]) -> None:
        assert self._adamw is not None
        self._adamw.state.clear()
        for entry, value in state.items():
            name, key = entry.rsplit("|", 1)
            parameter = self._parameters[name]
            device = "cpu" if key == "step" else parameter.device
            self._adamw.state[parameter][key] = value.to(device, copy=True)
        # On the device they are held once only.
        self._resting = None if self._settings.offload == "none" else dict(state)
        self._on_disk = False
