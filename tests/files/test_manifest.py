"""A team directory that is damaged is one line, and is never taken for a whole one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from satune.files.manifest import missing_part, read_manifest
from satune.types import UserError

AGENT = {"dir": "ann", "temperature": 1, "template": {}, "sharing": "separate", "delta": None}
WHOLE: dict[str, Any] = {
    "format": 1, "seats": {"one": "ann"}, "agents": {"ann": AGENT}, "protocol": {}, "task": {},
}  # fmt: skip


def test_a_whole_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(WHOLE))
    assert read_manifest(tmp_path) == WHOLE


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda m: m.pop("seats"), "damaged manifest (no seats)"),
        (lambda m: m.update(agents=[]), "damaged manifest (no agents)"),
        (lambda m: m.update(format=None), "format None, this satune reads 1"),
        (lambda m: m["agents"].update(ann=3), "damaged manifest (agents.ann: has no dir)"),
        (lambda m: m["agents"]["ann"].pop("dir"), "damaged manifest (agents.ann: has no dir)"),
        (lambda m: m["agents"]["ann"].update(dir=7), "damaged manifest (agents.ann: has no dir)"),
        (lambda m: m["agents"]["ann"].update(served="http://a"), "agents.ann: has no dir"),
        (lambda m: m["agents"]["ann"].pop("delta"), "damaged manifest (agents.ann: delta)"),
        (lambda m: m["agents"]["ann"].update(temperature="hot"), "(agents.ann: temperature)"),
        (lambda m: m["agents"]["ann"].update(temperature=True), "(agents.ann: temperature)"),
        (
            lambda m: m["agents"]["ann"].update(template=None),
            "(agents.ann: template)",
        ),
        (lambda m: m["seats"].update(two="bob"), "damaged manifest (seats.two: no agent)"),
        (lambda m: m["seats"].update(two=["ann"]), "damaged manifest (seats.two: no agent)"),
    ],
)
def test_a_damaged_one_is_one_line(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object], fault: str
) -> None:
    manifest = copy.deepcopy(WHOLE)
    damage(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'manifest.json'}: ")
    assert fault in str(caught.value) and "\n" not in str(caught.value)
    assert missing_part(tmp_path) == str(tmp_path / "manifest.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000])
def test_what_is_no_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="damaged") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)
