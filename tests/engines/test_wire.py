"""Bytes from a server: lines, compression, bounds, encodings, whatever pieces they come in."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import re
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from satune.engines.failures import MALFORMED, OVERSIZED, Failed
from satune.engines.wire import LARGEST, Lines, Unpacker, known_charset, mended, parsed

CUTS = st.lists(st.integers(0, 60), max_size=8)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(c for c in cuts if c < len(data))})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n", b"\x85", "\u2028".encode()])), CUTS)
def test_lines_end_as_the_standard_says_whatever_the_pieces(parts: list[bytes], cuts: list[int]):
    data = b"".join(parts)
    lines = Lines()
    got = [line for piece in pieces(data, cuts) for line in lines.feed(piece)] + lines.end()
    assert got == re.split(b"\r\n|\r|\n", data)


def test_what_unicode_calls_a_line_end_is_text() -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    lines = Lines()
    assert lines.feed(f"{text}\n".encode()) == [text.encode()]


@pytest.mark.parametrize("encoding", ["", "identity", "gzip", "GZIP", "deflate"])
@given(data=st.binary(max_size=200), cuts=CUTS)
def test_bodies_are_unpacked(encoding: str, data: bytes, cuts: list[int]) -> None:
    packed = {"gzip": gzip.compress, "deflate": zlib.compress}.get(encoding.lower(), bytes)(data)
    unpacker = Unpacker(encoding)
    out = b"".join(p for piece in pieces(packed, cuts) for p in unpacker.feed(piece))
    unpacker.end()
    assert out == data


def drain(unpacker: Unpacker, data: bytes) -> None:
    for _ in unpacker.feed(data):
        pass


def test_a_little_that_would_become_much_is_stopped() -> None:
    # gzip shrinks zeros a thousandfold: these are 100 kB.
    bomb = gzip.compress(bytes(100 * 2**20), 9)
    tracemalloc.start()
    try:
        unpacker = Unpacker("gzip")
        with pytest.raises(Failed) as failed:
            drain(unpacker, bomb)
        assert tracemalloc.get_traced_memory()[1] < 4 * LARGEST
    finally:
        tracemalloc.stop()
    assert failed.value.kind is OVERSIZED and "more than 16 MiB" in failed.value.said
    plain = Unpacker()
    drain(plain, bytes(LARGEST))
    with pytest.raises(Failed, match="more than 16 MiB"):
        drain(plain, b"1")


def test_damaged_and_unknown_compression() -> None:
    packed = gzip.compress(b"text" * 99)
    with pytest.raises(Failed, match="compression is damaged"):
        drain(Unpacker("gzip"), b"no gzip at all")
    broken = Unpacker("gzip")
    drain(broken, packed[:-9])
    with pytest.raises(Failed, match="broke off"):
        broken.end()
    for unknown in ("br", "zstd", "gzip, gzip", "x" * 999):
        with pytest.raises(Failed, match="compressed as") as failed:
            Unpacker(unknown)
        assert failed.value.kind is MALFORMED and len(failed.value.said) < 80


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"]
)
def test_every_encoding_of_json_is_read(encoding: str) -> None:
    assert parsed('{"é": "ä\u2028"}'.encode(encoding)) == {"é": "ä\u2028"}


def test_other_charsets_are_read_where_they_are_text() -> None:
    body = '{"a": "é"}'.encode("latin-1")
    assert parsed(body, known_charset('application/json; charset="ISO-8859-1"')) == {"a": "é"}
    assert parsed(body, known_charset("application/json")) == {"a": "\ufffd"}
    # Mostly the type is wrong, and the text UTF-8 after all.
    assert parsed('{"a": "é"}'.encode(), known_charset("text/html;charset=latin1")) == {"a": "é"}
    odd = "undefined rot13 zip idna punycode unicode_escape utf-7 mbcs hex base64 no-such \0 é"
    for name in (*odd.split(" "), "x" * 9999, ""):
        assert known_charset(f"text/plain; charset={name}") == "utf-8"


def test_json_that_is_none_or_too_deep() -> None:
    for body in (b"", b"nonsense", b"{", b"1" * 5000, b"\xff\xfe\x00"):
        with pytest.raises(Failed, match="not JSON"):
            parsed(body)
    for deep in (b"[" * 200_000, b'{"a":' * 200_000, b"[" * 200_000 + b"]" * 200_000):
        with pytest.raises(Failed, match="too deep"):
            parsed(deep)


@given(st.text(st.characters(codec=None)))
def test_what_is_mended_can_be_written(text: str) -> None:
    assert mended(text).encode().decode() == mended(text)


def test_halves_of_pairs() -> None:
    assert mended("a\ud83d\ude00b") == "a\U0001f600b"  # two halves, from two pieces of a stream
    assert mended("a\ud83d b\ude00") == "a\ufffd b\ufffd"
    assert mended("\U0001f600é\u2028") == "\U0001f600é\u2028"
    assert json.loads(json.dumps(mended("\ud83d"))) == codecs.decode(b"\xef\xbf\xbd", "utf-8")
