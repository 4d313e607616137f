"""What a server of vLLM has written of one start, and what its end says of the next one."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

_READ = 1 << 20
"""The bytes at a log's end that are read."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ERROR = re.compile(r"Error\b|error: |Exception\b")
_NO_CAUSE = re.compile(r"root cause|Traceback|\b(?:DEBUG|INFO|WARNING) \d\d-\d\d ")
"""Lines that say of an error that it stands elsewhere, and that tell of none."""
_PASSES = re.compile(r"address already in use|Failed core proc\(s\): \{[^}]*: -\d+", re.IGNORECASE)
"""A port that somebody took first, and a process of the server that was killed."""


class Log:
    """The file that a server writes to, from where it ends now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = path.stat().st_size if path.exists() else 0

    def lines(self) -> list[str]:
        """The last lines of this start, without colours; none where the file cannot be read."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(self._start, file.seek(0, os.SEEK_END) - _READ))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        lines = (_COLOURS.sub("", line) for line in text.splitlines())
        shown = ("".join(c for c in line if c.isprintable()).strip() for line in lines)
        return [line for line in shown if line]

    def errors(self) -> list[str]:
        """The lines that name a cause."""
        return [x for x in self.lines() if _ERROR.search(x) and not _NO_CAUSE.search(x)]

    def last(self) -> str:
        """The last line that names a cause, else the last one."""
        said = (self.errors() or self.lines() or ["it said nothing"])[-1]
        return said if len(said) <= 300 else f"{said[:300]}..."

    def kept(self) -> Path | None:
        """A copy, which stays; None where the disk has no room for one."""
        copy: str | None = None
        try:
            handle, copy = tempfile.mkstemp(prefix="satune-vllm-", suffix=".log")
            os.close(handle)
            shutil.copyfile(self.path, copy)
        except OSError:
            if copy is not None:
                Path(copy).unlink(missing_ok=True)
            return None
        return Path(copy)


def may_pass(code: int, log: Log) -> bool:
    """Whether a server that ended before it had answered may live the next time: it was killed, it
    lost its port to somebody, or nothing in its log is an error. ``code`` is its exit code,
    negative for a signal, above 128 where a shell saw the signal."""
    if code < 0 or code > 128:
        return True
    return any(map(_PASSES.search, log.lines())) or not log.errors()
