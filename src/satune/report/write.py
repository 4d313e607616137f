"""From directories of runs to a report: one page, and the figures beside it."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from satune.files.writing import disk_errors, write_atomically
from satune.report import sections
from satune.report.charts import OUTCOMES, Chart, Section, Timeline
from satune.report.claims import warnings
from satune.report.conversations import Conversations, as_json
from satune.report.drawing import can_draw, draw_files
from satune.report.palette import css
from satune.report.source import Source, read_sources
from satune.report.tokens import Pieces
from satune.report.training import Rewards

_STYLES = ("report.css", "conversations.css")
_SCRIPTS = ("charts.js", "conversations.js", "page.js")


@dataclass(frozen=True, slots=True)
class Report:
    """What was written. ``figures`` is empty where matplotlib is not installed; ``complaints`` are
    lines about what is damaged or missing."""

    page: Path
    figures: list[Path]
    conversations: int
    complaints: list[str]


def write_report(
    runs: Sequence[Path], out: Path | None = None, *, figures: bool = True, stamp: str = ""
) -> Report:
    """Write ``out`` (of the first run: ``report.html``), and beside it a directory of its name that
    holds the figures, if they are asked for, and of many conversations their texts. A page with a
    ``stamp`` asks whoever serves it for the newest one, and loads itself anew when that differs.

    Raises UserError where a path is no run, and where the place cannot be written.
    """
    sources = read_sources(runs)
    page = out or sources[0].path / "report.html"
    beside = page.with_name(f"{page.stem}-files")
    with disk_errors(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir(exist_ok=True)
        for old in beside.glob("conversations-[0-9][0-9][0-9][0-9].js"):
            old.unlink()  # an earlier report's, which may have had more

    def keep(number: int, chunk: str) -> None:
        text = f"satuneChunk({number},{chunk});\n"
        write_atomically(beside / f"conversations-{number:04d}.js", text)

    conversations = Conversations(keep)
    runs_data, drawn = [], []
    for number, source in enumerate(sources):
        rewards, pieces = Rewards(), Pieces(source.path)
        for row in source.episodes():
            rewards.add(row)
            conversations.add(number, row, pieces)
        found = sections.of_run(source, rewards)
        runs_data.append(_run(source, found, pieces))
        drawn += [found] if number == 0 else []
    several = sections.of_several(sources) if len(sources) > 1 else []
    index = conversations.finish()
    data = {
        "runs": runs_data,
        "several": [asdict(section) for section in several],
        "outcomes": OUTCOMES,
        "conversations": index,
        "files": beside.name,
        "stamp": stamp,
    }
    write_atomically(page, _page(data, conversations.inline, sources))
    paths: list[Path] = []
    if figures and can_draw():
        charts = [item for found in (*drawn, several) for s in found for item in s.items]
        with disk_errors(beside):
            paths = draw_files([c for c in charts if isinstance(c, Chart | Timeline)], beside)
    if not any(beside.iterdir()):
        beside.rmdir()
    complaints = [line for source in sources for line in source.complaints]
    return Report(page, paths, len(index["columns"]["run"]), complaints)


def _run(source: Source, found: Sequence[Section], pieces: Pieces) -> dict[str, Any]:
    return {
        "name": source.name,
        "path": str(source.path),
        "head": sections.head(source),
        "warnings": warnings(source),
        "sections": [asdict(section) for section in found],
        "shading": pieces.reasons,
    }


def _page(data: dict[str, Any], chunks: dict[int, str], sources: Sequence[Source]) -> str:
    """The whole page. Nothing of a run reaches it but as JSON in elements that no browser runs, and
    the policy lets it run its own script, by hash, and what that loads."""
    style = css() + "".join(map(_asset, _STYLES))
    script = "".join(map(_asset, _SCRIPTS))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}' 'strict-dynamic'; "
        f"style-src '{_hash(style)}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    policy += "; connect-src 'self'" if data["stamp"] else ""
    held = "\n".join(
        f'<script type="application/json" id="chunk-{number}">{chunk}</script>'
        for number, chunk in chunks.items()
    )
    parts = {
        "policy": policy,
        "title": html.escape(f"{', '.join(source.name for source in sources)}: satune report"),
        "style": style,
        "data": as_json(data),
        "chunks": held,
        "script": script,
    }
    pieces = _asset("report.html").split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def _asset(name: str) -> str:
    return (files("satune.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
