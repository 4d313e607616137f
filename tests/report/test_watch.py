"""A report that is served: to whoever has its address, and to nobody else."""

from __future__ import annotations

import json
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import Run, refused
from report_runs import write_run
from satune.report import conversations
from satune.report.watch import watching


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", stages=1)


@pytest.fixture
def address(run: Path) -> Iterator[str]:
    with watching([run]) as (found, server):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


def get(address: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_the_page_follows_its_run(run: Path, address: str) -> None:
    stamp = address.replace("report.html", "stamp")
    code, page = get(address)
    assert code == 200
    assert "connect-src 'self'" in page
    first = get(stamp)[1]
    assert json.dumps(first) in page
    assert get(stamp)[1] == first
    line = (run / "events.jsonl").read_text().splitlines()[1]
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps(json.loads(line) | {"tokens": 987_654_321}) + "\n")
    second = get(stamp)[1]
    assert second != first
    assert "987,6" in get(address)[1] and json.dumps(second) in get(address)[1]
    assert not (run / "report.html").exists()


def test_nobody_else_is_answered(run: Path, address: str) -> None:
    root, token, _ = address.rsplit("/", 2)
    # The page lies in a directory beside this file.
    with tempfile.NamedTemporaryFile(suffix=".js") as secret:
        assert get(f"{root}/{token}/report.html")[0] == 200
        for path in ("", "report.html", f"{token}x/report.html", f"{token[:-1]}/stamp", "x/stamp"):
            assert get(f"{root}/{path}")[0] == 404, path
        name = Path(secret.name).name
        for path in ("", "other.html", f"../{name}", f"..%2f{name}", f"/{secret.name}"):
            assert get(f"{root}/{token}/{path}")[0] == 404, path
    assert get(address, Host="evil.example")[0] == 404
    assert len(token) > 20


def test_texts_beside_the_page_are_served(
    run: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "satune.report.write.Conversations",
        lambda keep: conversations.Conversations(keep, inline_limit=0),
    )
    assert get(address)[0] == 200
    code, text = get(address.replace("report.html", "report-files/conversations-0000.js"))
    assert code == 200 and text.startswith("satuneChunk(0,")


def test_what_cannot_be_watched(tmp_path: Path, run: Path, satune: Run) -> None:
    assert "no such directory" in refused(satune("report", tmp_path / "none", "--watch"))
    with watching([run]) as (address, _):
        port = address.split(":")[2].split("/")[0]
        assert f"port {port}" in refused(satune("report", run, "--watch", "--port", port))
