"""Names that a file gives to its neighbours: what somebody else wrote must not lead elsewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from satune.types import UserError

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def is_plain(name: Any) -> bool:
    """Whether ``name`` is the name of one file or directory: letters, digits, ".", "_" and "-",
    beginning with a letter or digit, hence no path and not hidden."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def refuse_links(directory: Path) -> None:
    """Raise UserError naming a link in ``directory``, at whatever depth, that leads out of it:
    what is written or cut there would be somebody else's."""
    whole = directory.resolve()
    for folder, folders, files in os.walk(directory):
        for path in (Path(folder, name) for name in sorted(folders + files)):
            if path.is_symlink() and not path.resolve().is_relative_to(whole):
                raise UserError(
                    f"{path}: is a link that leads out of {directory}; put in its place what it "
                    "leads to"
                )
