import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from satune.tiny.zoo import SPECS, tiny_tokenizer

TOKENIZERS = {spec: tiny_tokenizer(spec) for spec in SPECS}


@settings(max_examples=200)
@given(
    spec=st.sampled_from(SPECS), text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
)
def test_any_text_survives_a_round_trip(spec, text):
    tokenizer = TOKENIZERS[spec]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_sizes_of_a_family_share_the_tokenizer(family):
    small, medium = TOKENIZERS[f"tiny:{family}-s"], TOKENIZERS[f"tiny:{family}-m"]
    assert small.backend_tokenizer.to_str() == medium.backend_tokenizer.to_str()
    assert small.chat_template == medium.chat_template


def test_vocabularies_are_small_and_hold_every_byte():
    for tokenizer in TOKENIZERS.values():
        assert 256 < len(tokenizer) <= 512
        every = bytes(range(256)).decode("latin-1")
        assert tokenizer.decode(tokenizer(every, add_special_tokens=False)["input_ids"]) == every


# Pieces read off the rules of each family: Qwen splits every digit, but a capital stays with the
# digit before it; Llama groups two digits; roles are one token in both.
@pytest.mark.parametrize(
    ("spec", "text", "pieces"),
    [
        ("tiny:qwen3-s", "17-2+1", ["1", "7", "-", "2", "+", "1"]),
        ("tiny:qwen3-s", "1A2B", ["1A", "2B"]),
        ("tiny:qwen3-s", "assistant\nuser\n", ["assistant\n", "user\n"]),
        ("tiny:qwen3-s", "continue", ["continue"]),
        ("tiny:qwen3-s", "a: 4", ["a", ": ", "4"]),
        ("tiny:llama-s", "17-2+1", ["17", "-", "2", "+", "1"]),
        ("tiny:llama-s", "1234", ["12", "34"]),
        ("tiny:llama-s", "assistant\n\n", ["assistant", "\n\n"]),
        ("tiny:llama-s", "continue", ["continue"]),
    ],
)
def test_pieces(spec, text, pieces):
    tokenizer = TOKENIZERS[spec]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([id]) for id in ids] == pieces


def test_families_differ_in_ids_and_special_tokens():
    qwen3, llama = TOKENIZERS["tiny:qwen3-s"], TOKENIZERS["tiny:llama-s"]
    assert (qwen3.eos_token, llama.eos_token) == ("<|im_end|>", "<|eot_id|>")
    assert qwen3.eos_token_id == len(qwen3) - 1
    assert llama.eos_token_id == 4
    assert qwen3.encode("7") != llama.encode("7")
    for tokenizer in (qwen3, llama):
        assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
