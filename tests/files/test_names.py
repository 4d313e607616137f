"""Names from other people's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from satune.files.names import is_plain, refuse_links
from satune.types import UserError


@pytest.mark.parametrize("name", ["a", "stage-0001.jsonl", "base-0", "ann.weights.safetensors"])
def test_a_name_beside_others(name: str):
    assert is_plain(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc", "a\\b", ".hidden", "a\n", "a\0", "x" * 300, None, 7, []],
)  # fmt: skip
def test_a_name_that_leads_elsewhere(name: object):
    assert not is_plain(name)


def test_links_may_not_lead_out(tmp_path: Path):
    run = tmp_path / "run"
    (run / "episodes").mkdir(parents=True)
    (run / "events.jsonl").touch()
    (run / "inside").symlink_to(run / "events.jsonl")
    refuse_links(run)
    (run / "episodes" / "stage-0001.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"stage-0001.jsonl: is a link that leads out"):
        refuse_links(run)
