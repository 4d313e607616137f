"""Bytes as they come from a server: decompressed, bounded, cut into lines, read as JSON.

Standard library only.
"""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

from satune.engines.failures import MALFORMED, OVERSIZED, Failed

LARGEST = 16 * 2**20
"""Bytes of a body, decompressed."""


class Unpacker:
    """A body's bytes, decompressed a piece at a time, so that little data cannot become much.

    ``encoding`` is the reply's Content-Encoding. Raises Failed for one that is not known (none is
    asked for), for damaged data, and beyond ``LARGEST`` bytes.
    """

    def __init__(self, encoding: str = "") -> None:
        encoding = encoding.strip().lower()
        self._inflate = None
        if encoding in ("gzip", "x-gzip", "deflate"):
            # 32: with the header of gzip or of zlib, whichever comes.
            self._inflate = zlib.decompressobj(32 + zlib.MAX_WBITS)
        elif encoding not in ("", "identity"):
            raise Failed(MALFORMED, f"a reply compressed as {encoding[:40]!r}")
        self._left = LARGEST

    def feed(self, data: bytes) -> Iterator[bytes]:
        if self._inflate is None:
            yield self._counted(data)
            return
        while data and not self._inflate.eof:
            try:
                piece = self._inflate.decompress(data, self._left + 1)
            except zlib.error:
                raise Failed(MALFORMED, "a reply whose compression is damaged") from None
            yield self._counted(piece)
            data = self._inflate.unconsumed_tail

    def end(self) -> None:
        """Raises Failed if compressed data broke off."""
        if self._inflate is not None and not self._inflate.eof:
            raise Failed(MALFORMED, "a compressed reply that broke off")

    def _counted(self, piece: bytes) -> bytes:
        self._left -= len(piece)
        if self._left < 0:
            raise Failed(OVERSIZED, f"a reply of more than {LARGEST // 2**20} MiB")
        return piece


_ENDS = re.compile(rb"\r\n|\n|\r")


class Lines:
    """Lines of a stream of events. They end with LF, CR LF or CR and nothing else: what Unicode
    counts as a line end besides is text. https://html.spec.whatwg.org/#event-stream-interpretation
    """

    def __init__(self) -> None:
        self._line: list[bytes] = []
        self._held = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that ``piece`` ends."""
        piece = self._held + piece
        # A CR at the end of a piece may be half a line end.
        self._held = piece[-1:] if piece.endswith(b"\r") else b""
        first, *rest = _ENDS.split(piece[: len(piece) - len(self._held)])
        self._line.append(first)
        if not rest:
            return []
        lines = [b"".join(self._line), *rest]
        self._line = [lines.pop()]
        return lines

    def end(self) -> list[bytes]:
        """What is left, the last line having no end."""
        lines = self.feed(b"\n") if self._held else []
        return [*lines, b"".join(self._line)]


_TEXTS = {
    "iso8859-1", "iso8859-15", "cp1252", "gbk", "gb2312", "gb18030", "big5", "shift_jis", "euc_jp",
    "euc_kr",
}  # fmt: skip


def known_charset(content_type: str) -> str:
    """The charset that a Content-Type names, if text that is no UTF-8 can be read by it."""
    found = re.search(r"charset\s*=\s*[\"']?([\w.:-]{1,40})", content_type, re.ASCII | re.I)
    try:
        name = codecs.lookup(found[1]).name if found else ""
    except LookupError:
        name = ""
    return name if name in _TEXTS else "utf-8"


def parsed(body: bytes, charset: str = "utf-8") -> Any:
    """The value in ``body``: JSON in UTF-8, -16 or -32 with or without a mark, else in ``charset``
    with U+FFFD for what it does not know. Raises Failed."""
    try:
        try:
            return json.loads(body)
        except UnicodeDecodeError:
            return json.loads(body.decode(charset, "replace"))
    except RecursionError:
        raise Failed(MALFORMED, "a reply nested too deep") from None
    except ValueError:
        raise Failed(MALFORMED, "a reply that is not JSON") from None


def mended(text: str) -> str:
    """``text`` with halves of surrogate pairs joined, and U+FFFD for those without the other half:
    JSON can say what no encoding can write."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
