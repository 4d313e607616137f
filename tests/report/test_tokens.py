"""Where tokens end in what was written, by the tokenizer that lies with the team."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from report_runs import write_run
from satune.report.tokens import Pieces
from satune.report.write import write_report

EOS = "<eos>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte level: a character outside ASCII takes several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the answer is seven, the answer is eight"] * 9, trainer)
    return made


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    folder = tmp_path / "run" / "team" / "ada"
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    entry = {"dir": "ada", "temperature": 1.0, "template": {}, "sharing": "separate", "delta": None}
    manifest = {"format": 1, "seats": {"ada": "ada"}, "agents": {"ada": entry}, "protocol": {},
                "task": {}}  # fmt: skip
    (tmp_path / "run" / "team" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "run"


@pytest.mark.parametrize("text", ["the answer is seven", "né 🦊🦊 the", "\x00\n", "ქართული"])
def test_lengths_add_up(run: Path, tokenizer: Tokenizer, text: str) -> None:
    encoded = tokenizer.encode(text)
    lengths = Pieces(run).lengths("ada", [*encoded.ids, 0], text)
    assert lengths is not None
    assert len(lengths) == len(encoded.ids) + 2
    assert lengths[0] == lengths[-1] == 0  # nothing before the first; the end is no text
    assert sum(lengths) == len(text.encode("utf-16-le")) // 2  # as JavaScript counts
    if text.isascii():
        assert lengths[1:-1] == [end - start for start, end in encoded.offsets]


def test_the_end_of_a_cut_message(run: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦊").ids[:-1]  # the last character lacks a byte
    text = tokenizer.decode(ids)
    assert text == "a\ufffd"
    assert Pieces(run).lengths("ada", ids, text) == [0, 1, *[0] * (len(ids) - 2), 1]


def test_a_thought_that_the_prompt_opened(run: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the answer").ids
    lengths = Pieces(run).lengths("ada", ids, "<think>\nthe answer")
    assert lengths is not None
    assert (lengths[0], sum(lengths)) == (8, 18)


def test_why_it_is_not_known(run: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the answer is").ids
    pieces = Pieces(run, budget=len(ids))
    assert pieces.lengths("ada", ids, "the answer is") is not None
    assert pieces.lengths("ada", ids, "the answer is") is None
    assert pieces.reasons == {"ada": f"beyond the first {len(ids):,} tokens"}
    pieces = Pieces(run)
    assert pieces.lengths("ada", ids, "something else") is None
    assert "does not write what was written" in pieces.reasons["ada"]
    assert pieces.lengths("ada", [10**6, -1], "x") is None
    assert pieces.lengths("ben", ids, "x") is None
    assert "no tokenizer.json" in pieces.reasons["ben"]
    (run / "team" / "ada" / "tokenizer.json").write_text("{")
    pieces = Pieces(run)
    assert pieces.lengths("ada", ids, "x") is None
    assert "damaged" in pieces.reasons["ada"]
    (run / "team" / "manifest.json").unlink()
    pieces = Pieces(run)
    assert pieces.lengths("ada", ids, "x") is None
    assert pieces.reasons == {"ada": "the run has no whole team/ and so no tokenizer"}


def test_a_team_leads_nowhere_else(run: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    manifest = run / "team" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"dir": "ada"', '"dir": "../.."'))
    pieces = Pieces(run)
    assert pieces.lengths("ada", tokenizer.encode("the").ids, "the") is None
    assert "no tokenizer.json" in pieces.reasons["ada"]


def test_the_page_says_why_messages_are_shaded_as_a_whole(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=1)
    page = write_report([run], figures=False).page.read_text()
    assert '"shading":{"ada":"the run has no whole team/ and so no tokenizer"' in page
