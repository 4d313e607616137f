"""``satune swap`` as a person meets it: one line for bad input, and the team stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny_world
from command_line import Run, refused
from satune.tiny.zoo import tiny_model, tiny_tokenizer
from swapped_teams import ANY, digests, trained

HANDOVER = ("--method", "handover", "--tolerance", "1", "--problems", "8", "--looks", "1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    recipe = tiny_world.build(folder)
    tiny_world.save_model(folder / "newcomer", seed=7)
    other = folder / "llama"
    tiny_model("tiny:llama-s", 0).save_pretrained(other)
    tiny_tokenizer("tiny:llama-s").save_pretrained(other)
    (folder / "nothing").mkdir()
    damaged = folder / "damaged"
    shutil.copytree(folder / "newcomer", damaged)
    (damaged / "model.safetensors").write_bytes(b"nonsense")
    trained(recipe, folder / "run", ["stages=1"])
    empty = folder / "empty"
    empty.mkdir()
    shutil.copy2(folder / "run" / "recipe.yaml", empty / "recipe.yaml")
    return folder


BAD = {
    "no such seat": (["{run}", "--seat", "bop"], "the team has no such seat (nearest: b"),
    "no run or team": (["{nothing}"], "holds neither a run nor a team"),
    "no directory": (["{missing}"], "no such directory"),
    "nothing trained yet": (["{empty}"], "no complete checkpoint yet"),
    "delta 0": (["{run}", "--delta", "0"], "--delta 0: give a positive"),
    "delta below": (["{run}", "--delta", "-1"], "--delta -1: give a positive"),
    "rounds below": (["{run}", "--rounds", "-1"], "--rounds -1: give 0"),
    "nothing to distil": (["{run}", "--rounds", "0"], "leaves only the mixture"),
    "tolerance below": (["{run}", "--tolerance", "-0.1"], "--tolerance -0.1: give a loss"),
    "confidence": (["{run}", "--confidence", "0.9"], "--confidence 0.9: give a small"),
    "unknown method": (["{run}", "--method", "hand-over"], "nearest: handover"),
    "another vocabulary": (["{run}", "--with", "{llama}", "--method", "project"], "its tokenizer"),
    "no model there": (["{run}", "--with", "{missing}"], "cannot load model"),
    "a damaged model": (["{run}", "--with", "{damaged}"], "cannot load model"),
    "an unknown tiny model": (["{run}", "--with", "tiny:llama-xl"], "did you mean tiny:llama"),
    "out exists": (["{run}", "--out", "{nothing}"], "is there already"),
    "a seat twice": (["{run}", "--seat", "bob", "--seat", "bob"], "named twice"),
    "too many models": (["{run}", "--with", "a", "--with", "b"], "2 models for 1 seats"),
    "a recipe for a run": (["{run}", "--recipe", "{recipe}"], "a run has its own recipe"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_touches_nothing(
    world: Path,
    satune: Run,
    name: str,
) -> None:
    given, message = BAD[name]
    places = {
        "run": world / "run", "nothing": world / "nothing", "missing": world / "missing",
        "empty": world / "empty", "llama": world / "llama", "damaged": world / "damaged",
        "recipe": world / "recipe.yaml",
    }  # fmt: skip
    arguments = [text.format(**places) for text in given]
    for option, value in (("--seat", "bob"), ("--with", str(world / "newcomer"))):
        if option not in arguments:
            arguments += [option, value]
    before = digests(world)
    line = refused(satune("swap", *arguments))
    assert message in line
    assert digests(world) == before


def test_a_swap_prints_one_json_object(
    world: Path,
    satune: Run,
    tmp_path: Path,
) -> None:
    arguments = ("swap", world / "run", "--seat", "bob", "--with", world / "newcomer", *HANDOVER)
    code, out, _ = satune(*arguments, "--out", tmp_path / "out", "--json")
    result = json.loads(out)
    assert code == 0 and result["verdict"] == "accepted" and out.count("\n") == 1
    assert result["out"] == str(tmp_path / "out") and result["swaps"][0]["seats"] == ["bob"]
    code, out, err = satune(*arguments, "--out", tmp_path / "text")
    assert code == 0 and "bob" in out and str(tmp_path / "text") in out
    assert "hand-over of bob: 8 problems" in err
    # What it prints as the way on is the way on.
    code, out, _ = satune(
        "train", tmp_path / "out" / "recipe.yaml", "stages=2", "--out", tmp_path / "out",
        "--resume", "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["stages"] == 2


def test_a_newcomer_of_another_family_takes_a_seat_by_hand_over(
    world: Path,
    satune: Run,
    tmp_path: Path,
) -> None:
    settings = ("--tolerance", "1", "--problems", str(ANY.problems), "--looks", "1")
    arguments = ("swap", world / "run", "--seat", "bob", "--with", world / "llama", *settings)
    code, out, _ = satune(*arguments, "--out", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["swaps"][0]["method"] == "handover"
    code, _, _ = satune(
        "train", tmp_path / "out" / "recipe.yaml", "stages=2", "--out", tmp_path / "out", "--resume"
    )
    assert code == 0


def test_a_refused_newcomer_ends_with_2_and_its_figures(
    world: Path,
    satune: Run,
    tmp_path: Path,
) -> None:
    arguments = ("swap", world / "run", "--seat", "bob", "--with", world / "newcomer", *HANDOVER)
    code, out, _ = satune(*arguments, "--tolerance", "0", "--out", tmp_path / "out", "--json")
    result = json.loads(out)
    assert code == 2 and result["verdict"] == "stopped" and result["out"] is None
    assert "--tolerance" in result["reason"] and not (tmp_path / "out").exists()
