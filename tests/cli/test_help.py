"""How the commands' help reads on terminals of two widths."""

from __future__ import annotations

import re

import pytest

from command_line import Run

PANELS = {
    "eval": ["Options", "Sampling", "Servers", "Roles that are not players", "Files of others"],
    "swap": ["Options", "Projection", "Hand-over", "Servers", "Files of others"],
    "train": ["Options", "Files of others"],
}


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", PANELS)
def test_options_stand_in_panels_and_none_is_cut_off(
    satune: Run, monkeypatch: pytest.MonkeyPatch, command: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = satune(command, "--help")
    assert code == 0
    assert re.findall("╭─ (.+?) ─", out) == ["Arguments", *PANELS[command]]
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= columns
