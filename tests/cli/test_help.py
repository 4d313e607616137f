"""How the commands' help reads on terminals of two widths."""

from __future__ import annotations

import re

import pytest

from command_line import Run, refused

PANELS = {
    "chat": ["Options", "Sampling", "Files of others", "Servers"],
    "eval": ["Options", "Sampling", "Servers", "Roles that are not players", "Files of others"],
    "serve": ["Options", "Who may ask", "Sampling", "Limits", "Files of others", "Servers"],
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


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lab", "--seeds", "0"], "Invalid value for '--seeds': .*; see satune lab --help"),
        (["train"], "Missing argument '?RECIPE'?; see satune train --help"),
        (["train", "relay", "--nope"], "No such option: --nope.*; see satune train --help"),
        (["trian"], "No such command 'trian'.*; see satune --help"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_words_that_are_wrong_are_one_line(satune: Run, words: list[str], line: str) -> None:
    assert re.fullmatch(line, refused(satune(*words)), re.IGNORECASE)


def test_no_word_at_all_shows_the_help(satune: Run) -> None:
    code, out, err = satune()
    assert code == 2 and "Usage: satune" in out + err
