"""An owner's checkpoints on the disk: what is removed when, and what a run is told of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from satune.hosts.vault import Refused, Vault, unplaced
from satune.types import UserError


def keep(vault: Vault, name: str, steps: int) -> str:
    weights = {"weight": torch.tensor([float(steps)])}
    return vault.write(name, {"weights": lambda: weights}, {}, [], {"version": steps})


def there(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_dir()}


def test_what_no_host_has_written_stays(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    (place / "stage-0001").mkdir(parents=True)
    (place / "stage-0001" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="that no host has written; start the host with another"):
        Vault(place).begin("r1")
    assert there(place) == {"stage-0001"} and not (place / "run.json").exists()


def test_a_run_that_begins_takes_the_place_of_one_that_has_nothing(tmp_path: Path) -> None:
    vault = Vault(tmp_path)
    vault.begin("r1")
    keep(vault, "stage-0000", 0)
    vault.begin("r2")
    assert there(tmp_path) == set()


def test_later_checkpoints_stay_until_the_run_has_its_next_one(tmp_path: Path) -> None:
    """Where another host refuses the earlier one, the run goes on from the later one after all."""
    vault = Vault(tmp_path)
    vault.begin("r1")
    names = [f"stage-000{number}" for number in range(4)]
    digests = {name: keep(vault, name, number) for number, name in enumerate(names)}
    vault.commit("r1", names)
    vault = Vault(tmp_path)  # the host was started anew
    vault.read("stage-0001", digests["stage-0001"])
    vault.adopt("r1")
    assert there(tmp_path) == set(names)
    found = vault.read("stage-0003", digests["stage-0003"]).parts["weights"]["weight"]
    assert found.item() == 3

    vault.read("stage-0001", digests["stage-0001"])
    vault.adopt("r1")
    second = keep(vault, "stage-0002", 20)
    vault.commit("r1", ["stage-0001", "stage-0002"])
    keep(vault, "stage-0003", 30)
    vault.commit("r1", ["stage-0002", "stage-0003"])
    assert there(tmp_path) == {"stage-0002", "stage-0003"}
    assert vault.read("stage-0002", second).plain == {"version": 20}


def test_no_place_on_the_disk_is_told(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    vault = Vault(place)
    vault.begin("r1")
    digest = keep(vault, "stage-0000", 0)
    vault.commit("r1", ["stage-0000"])
    (place / "stage-0000" / "weights.safetensors").write_bytes(b"x")
    (place / "stage-0001.writing").write_text("")
    for ask in (
        lambda: vault.begin("r2"),
        lambda: vault.read("stage-0000", digest),
        lambda: vault.read("stage-0000", "another"),
        lambda: vault.read("stage-0009", digest),
        lambda: keep(vault, "../x", 1),
        lambda: keep(vault, "stage-0001", 1),
    ):
        with pytest.raises(Refused) as caught:
            ask()
        assert str(tmp_path) not in str(caught.value) and "\n" not in str(caught.value)


def test_the_owner_is_told_where(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(Refused, match="its log says why"),
        unplaced(),
    ):
        raise UserError("/home/owner/out: cannot be written: the disk is full")
    assert "/home/owner/out" in caplog.text
