"""docs/theory.md holds what "THEORY §n" cites, and the functions that it names exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THEORY = (ROOT / "docs" / "theory.md").read_text()
HEADINGS = {int(number) for number in re.findall(r"^## ([0-9]+)\. ", THEORY, re.MULTILINE)}
CITATION = re.compile(r"THEORY((?:[\s#,]|and|§[0-9n]+)*)")
PLACES = ("satune.core.", "satune.training.", "satune.", "")


def citing() -> list[Path]:
    kinds = {"src": "*.py", "tests": "*.py", "benchmarks": "*.py", "docs": "*.md", "recipes": "*"}
    found = [path for place, kind in kinds.items() for path in (ROOT / place).rglob(kind)]
    found += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [path for path in found if path.is_file() and path != Path(__file__)]


def test_every_cited_section_is_there() -> None:
    cited = []
    for path in citing():
        for rest in CITATION.findall(path.read_text()):
            sections = re.findall(r"§([0-9]+|n)", rest)
            assert sections, f"{path}: cites THEORY without a section"
            cited += [(path.name, int(s)) for s in sections if s != "n"]
    assert len(cited) > 50
    assert [citation for citation in cited if citation[1] not in HEADINGS] == []


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z_]\w*(?:\.\w+)+)`", THEORY))))
def test_every_function_that_it_names_exists(name: str) -> None:
    if name.startswith("certify."):  # a key of the recipe
        return
    module, _, attribute = name.rpartition(".")
    for place in PLACES:
        try:
            found = importlib.import_module(place + module)
        except ModuleNotFoundError:
            continue
        if hasattr(found, attribute):
            return
    raise AssertionError(f"docs/theory.md names {name}, which is nowhere")


def test_no_row_of_theory_is_left_out() -> None:
    from satune.core.theory import PAPER, PAPER_REGION, SUP_FREE
    from satune.training.own_steps import ONE_TURN, TURNS

    for row in (PAPER, PAPER_REGION, SUP_FREE, ONE_TURN, TURNS):
        assert f"| `{row}` |" in THEORY
