"""The page and what lies beside it: whole runs, damaged ones, texts that would do harm."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from command_line import Run, refused
from report_runs import AGENTS, episode, write_run
from satune.files.arrays import append_rows
from satune.report import conversations
from satune.report.source import read_source
from satune.report.tokens import Pieces
from satune.report.write import Report, write_report
from satune.types import UserError

HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"
    "<!-- \u2028\u202eabc\x00\x1b[31m {{script}} ${1}`"
)


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time and have tests of their own."""
    monkeypatch.setattr("satune.report.write.can_draw", lambda: False)


def parts(page: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """The page's text, its data, and the chunks that it holds."""
    text = page.read_text()
    scripts = re.findall(r'<script type="application/json" id="([^"]*)">(.*?)</script>', text, re.S)
    found = {name: json.loads(content) for name, content in scripts}
    data = found.pop("data")
    return text, data, list(found.values())


def test_the_page_holds_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    report = write_report([run])
    assert report == Report(run / "report.html", [], 8 * 24 + 6, [])
    _, data, chunks = parts(report.page)
    (one,) = data["runs"]
    assert one["name"] == "run"
    assert [section["id"] for section in one["sections"]] == [
        "reward", "trust-region", "experience", "certificates", "cost", "swaps", "trouble",
        "recipe",
    ]  # fmt: skip
    head = dict(one["head"])
    assert head["stages"] == "6 of 6"
    assert head["steps"] == "12 accepted, 2 shrunk, 2 reverted, 1 refused, 1 idle"
    assert one["warnings"] == [
        "3 of 18 steps were taken back", "1 of them because a number was not finite",
        "agent cleo: rounding decides: it clips", "17 conversations failed",
    ]  # fmt: skip
    assert sum(len(chunk["episodes"]) for chunk in chunks) == 8 * 24 + 6
    assert data["several"] == []


def test_every_conversation_can_be_found_by_the_index(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=2)
    _, data, chunks = parts(write_report([run]).page)
    index = data["conversations"]
    columns = index["columns"]
    rows = [
        json.loads(line)
        for name in ("evaluation-0000", "stage-0001", "stage-0002", "evaluation-0002")
        for path in [run / "episodes" / f"{name}.jsonl"]
        for line in path.read_text().splitlines()
    ]
    assert len(rows) == len(columns["run"]) == 54
    for at, row in enumerate(rows):
        body = chunks[columns["chunk"][at]]["episodes"][columns["place"][at]]
        assert index["problems"][columns["problem"][at]] == row["problem"]["id"]
        assert [turn["text"] for turn in body["turns"]] == [t["text"] for t in row["turns"]]
        assert body["detail"] == row["grade"]["detail"]
        assert columns["reward"][at] == row["grade"]["score"]
        assert (columns["stage"][at], columns["step"][at]) == (row["stage"], row.get("step", 0))
        part = "training" if "step" in row else "evaluation"
        assert index["parts"][columns["part"][at]] == part
        cut = any(turn["finish_reason"] == "length" for turn in row["turns"])
        status = "failed" if row["failure"] else "truncated" if cut else "finished"
        assert index["statuses"][columns["status"][at]] == status
        assert columns["tokens"][at] == sum(t["completion_tokens"] for t in row["turns"])
        names = [
            name for bit, (name, _) in enumerate(index["flags"]) if columns["flags"][at] >> bit & 1
        ]
        assert ("no answer" in names) == (row["answer"] is None)
        assert ("dropped" in names) == any(turn["dropped"] for turn in row["turns"])
        assert ("masked" in names) == bool(row["failure"] and not row["failure"]["policy"])
    spoke = [index["seats"][bit] for bit in range(3) if columns["speakers"][0] >> bit & 1]
    assert spoke == list(AGENTS)


def test_log_probabilities_are_kept_to_a_hundredth(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "events.jsonl").touch()
    row = {"stage": 1, "step": 1, **episode("p", 0, 1.0, ["ada"], random.Random(0))}
    row["turns"][0]["sampled_logprobs"][:4] = type(row["turns"][0]["sampled_logprobs"])(
        "f", [0.0, -0.126, float("-inf"), float("nan")]
    )
    (run / "episodes").mkdir()
    append_rows(run / "episodes" / "stage-0001.jsonl", [row])
    report = write_report([run])
    _, data, (chunk,) = parts(report.page)
    assert chunk["episodes"][0]["turns"][0]["surprise"][:4] == [0, 13, 9900, 0]
    assert "unlikely" in [
        name
        for bit, (name, _) in enumerate(data["conversations"]["flags"])
        if data["conversations"]["columns"]["flags"][0] >> bit & 1
    ]


def test_many_conversations_do_not_stay_in_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=2)
    whole = parts(write_report([run]).page)[2]
    kept: dict[int, str] = {}
    taken = conversations.Conversations(kept.__setitem__, inline_limit=20_000, chunk_size=9_000)
    source = read_source(run)
    for row in source.episodes():
        taken.add(0, row, Pieces(run))
    assert taken.finish()["chunks"] == len(kept) > 3  # beyond the limit none stays in the page
    assert taken.inline == {}
    found = [e for number in sorted(kept) for e in json.loads(kept[number])["episodes"]]
    assert found == [e for chunk in whole for e in chunk["episodes"]]


def test_a_later_report_leaves_no_earlier_conversations_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", stages=2)
    monkeypatch.setattr(
        "satune.report.write.Conversations",
        lambda keep: conversations.Conversations(keep, inline_limit=0, chunk_size=9_000),
    )
    beside = write_report([run]).page.parent / "report-files"
    first = sorted(path.name for path in beside.iterdir())
    assert first[0] == "conversations-0000.js"
    text = (beside / first[0]).read_text()
    assert text.startswith('satuneChunk(0,{"problems"')
    assert text.endswith(");\n")
    (beside / "mine.png").touch()
    (run / "episodes" / "stage-0002.jsonl").unlink()
    write_report([run])
    left = sorted(path.name for path in beside.iterdir())
    assert "mine.png" in left
    assert len(left) - 1 < len(first)


def test_what_a_run_says_cannot_leave_its_place(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=1)
    row = episode(HOSTILE, 0, 1.0, [HOSTILE], random.Random(0), HOSTILE)
    row["grade"] |= {"detail": HOSTILE, "components": {HOSTILE: HOSTILE}, "seats": {HOSTILE: 1}}
    row |= {"answer": HOSTILE, "failure": {"reason": HOSTILE, "policy": True}}
    row["problem"] |= {"answer": {"a": HOSTILE}, "prompt": [{"type": "text", "text": HOSTILE}]}
    append_rows(run / "episodes" / "stage-0001.jsonl", [{"stage": 1, "step": 1, **row}])
    with open(run / "events.jsonl", "a") as file:
        note = json.loads((run / "events.jsonl").read_text().splitlines()[4])
        assert note["event"] == "update"
        file.write(json.dumps(note | {"agent": HOSTILE, "reason": HOSTILE}) + "\n")
    (run / "recipe.yaml").write_text(f"task: {json.dumps(HOSTILE)}\n")
    named = run.rename(tmp_path / "<b>run &amp; {{data}}")
    text, data, chunks = parts(write_report([named]).page)
    # The page's own elements, whatever the run says.
    bare = write_report([write_run(tmp_path / "bare", stages=1)]).page.read_text()
    assert re.findall(r"<\s*/?\s*[a-z!]+", text) == re.findall(r"<\s*/?\s*[a-z!]+", bare)
    said = [turn["text"] for body in chunks[0]["episodes"] for turn in body["turns"]]
    assert said.count(HOSTILE) == 1
    assert chunks[0]["problems"][HOSTILE]["text"] == HOSTILE
    assert dict(data["runs"][0]["sections"][-1]["items"][-1]["rows"]) == {"task": HOSTILE}
    assert "<title>&lt;b&gt;run &amp;amp; {{data}}: satune report</title>" in text


def test_the_policy_allows_the_page_alone(tmp_path: Path) -> None:
    text = write_report([write_run(tmp_path / "run", stages=1)]).page.read_text()
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert found is not None
    policy = dict(rule.strip().split(" ", 1) for rule in html.unescape(found[1]).split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["base-uri"] == policy["form-action"] == "'none'"

    def digest(tag: str) -> str:
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        assert len(content) == 1
        return base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()

    assert policy["script-src"] == f"'sha256-{digest('script')}' 'strict-dynamic'"
    assert policy["style-src"] == f"'sha256-{digest('style')}'"
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


def drop_key(line: str, key: str) -> str:
    event = json.loads(line)
    del event[key]
    return json.dumps(event)


def test_damaged_lines_are_told_and_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=2)
    path = run / "events.jsonl"
    lines = path.read_text().splitlines()
    assert json.loads(lines[4])["event"] == "update"
    lines[4] = drop_key(lines[4], "delta")
    lines[5] = json.dumps(json.loads(lines[5]) | {"kl": {"quantile": "many"}})
    lines[7] = "{not json"
    lines.insert(8, '{"event": "from another version"}')
    path.write_text("\n".join(lines) + '\n{"event": "upd')
    episodes = run / "episodes" / "stage-0001.jsonl"
    rows = episodes.read_text().splitlines()
    rows[0], rows[1] = "[1, 2]", drop_key(rows[1], "grade")
    episodes.write_text("\n".join(rows) + "\n")
    shutil.copy(run / "episodes" / "stage-0002.jsonl", run / "episodes" / "stage-0009.jsonl")
    (run / "recipe.yaml").write_text("a: [")
    (run / "summary.json").write_text("{")
    report = write_report([run])
    told = "\n".join(report.complaints).replace(str(run), "RUN")
    assert "RUN/events.jsonl, line 5: an update event without a readable 'delta'; left out" in told
    assert "RUN/events.jsonl, line 6: an update event without a readable 'kl.mean'" in told
    assert "RUN/events.jsonl, line 8: not JSON" in told
    assert "RUN/events.jsonl, line 9: an event of a kind this satune does not know" in told
    assert "RUN/events.jsonl: ends in a line that was being written" in told
    assert "RUN/episodes/stage-0001.jsonl, line 1: not JSON, or no object" in told
    assert "(and 1 more lines of that file)" in told
    assert "RUN/episodes/stage-0009.jsonl, line 1: names" in told
    assert "RUN/recipe.yaml: damaged" in told
    assert "RUN/summary.json: damaged" in told
    assert report.conversations == 54 - 2
    _, data, _ = parts(report.page)
    (table,) = [
        item
        for section in data["runs"][0]["sections"]
        for item in section["items"]
        if item["title"] == "What this report could not read"
    ]
    assert [row[0] for row in table["rows"]] == report.complaints


@pytest.mark.parametrize("kept", ["events.jsonl", "recipe.yaml", "summary.json", "episodes"])
def test_one_part_of_a_run_is_enough(tmp_path: Path, kept: str) -> None:
    whole = write_run(tmp_path / "whole", stages=1)
    (whole / "summary.json").write_text('{"stages": 1}')
    run = tmp_path / "run"
    run.mkdir()
    (whole / kept).rename(run / kept)
    report = write_report([run])
    assert report.page.is_file()
    missing = {"events.jsonl", "recipe.yaml"} - {kept}
    assert {name for name in missing if any(name in line for line in report.complaints)} == missing


@pytest.mark.parametrize("lines", range(8))
def test_a_run_at_its_beginning(tmp_path: Path, lines: int) -> None:
    run = write_run(tmp_path / "run", stages=1)
    path = run / "events.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:lines]))
    assert write_report([run]).page.is_file()


@pytest.mark.parametrize(
    "damage",
    [b"", b"\n", b"\x00\xff\n", b"null\n", b'{"event": []}\n', b'{"event": "update"}\n',
     b"[" * 5000 + b"\n", b'{"event": "eval", "reward": NaN}\n'],
)  # fmt: skip
@pytest.mark.parametrize("name", ["events.jsonl", "episodes/stage-0001.jsonl"])
def test_no_damage_ends_in_a_traceback(tmp_path: Path, name: str, damage: bytes) -> None:
    run = write_run(tmp_path / "run", stages=1)
    (run / name).write_bytes(damage)
    report = write_report([run])
    assert any(name in line for line in report.complaints) == (damage != b"" or "events" in name)


def test_values_of_any_kind_at_any_place(tmp_path: Path) -> None:
    """Each value of each kind of event, and of a conversation, becomes something else in turn."""
    run = write_run(tmp_path / "run", stages=1)
    events, episodes = run / "events.jsonl", run / "episodes" / "stage-0001.jsonl"
    whole = [json.loads(line) for line in events.read_text().splitlines()]
    kinds = {event["event"]: event for event in whole}
    others: list[Any] = [None, "x", [], {}, [[1]], {"x": {"x": []}}, True, -1, 0, "nan", "inf",
                         1e308, -1e308, 10**400, [1, 2, 3], 2**53]  # fmt: skip
    rng = random.Random(0)
    for path, rows in ((events, list(kinds.values())), (episodes, None)):
        text = path.read_text()
        rows = rows or [json.loads(text.splitlines()[0])]
        changed = []
        for row in rows:
            for key in list(row):
                for other in rng.sample(others, 6):
                    changed.append(row | {key: other})
                for inner in row[key] if isinstance(row[key], dict) else ():
                    changed.append(row | {key: row[key] | {inner: rng.choice(others)}})
        path.write_text(text + "".join(json.dumps(row) + "\n" for row in changed))
        assert write_report([run]).complaints
        path.write_text(text)


def test_an_evaluation_is_a_baseline(tmp_path: Path) -> None:
    run, baseline = write_run(tmp_path / "run", stages=1), tmp_path / "eval"
    baseline.mkdir()
    row = episode("p", 0, 0.0, ["solo"], random.Random(0))
    for turn in row["turns"]:
        turn |= {"completion_ids": None, "sampled_logprobs": None, "prompt_ids": None}
    (baseline / "conversations.jsonl").write_text(json.dumps(row) + "\n")
    (baseline / "settings.json").write_text('{"benchmark": {"name": "relay"}, "seed": 1}')
    found = {
        "problems": 2, "k": 2, "tokens": 99, "temperature": {"solo": 0.8},
        "team": {"avg_at_k": 0.25, "interval": [0.0, 0.5], "pass_at_k": 0.5},
        "per_problem": [{"id": "p", "scores": [0, 0.5]}, {"id": "q", "scores": [0.5, 0]}],
        "failures": {"policy": {}, "world": {}},
    }  # fmt: skip
    (baseline / "report.json").write_text(json.dumps(found))
    report = write_report([run, baseline])
    assert report.complaints == []
    _, data, _ = parts(report.page)
    reward = data["several"][0]["items"][0]
    assert reward["rules"] == [{"y": 0.25, "label": "eval"}]
    assert [section["id"] for section in data["runs"][1]["sections"]] == [
        "reward",
        "trouble",
        "recipe",
    ]
    assert data["conversations"]["parts"] == ["evaluation", "training"]
    (baseline / "report.json").write_text(json.dumps(found | {"team": None}))
    assert any("report.json" in line for line in write_report([run, baseline]).complaints)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run", stages=1) for name in "ab"]
    _, data, _ = parts(write_report(runs, tmp_path / "both.html").page)
    assert [run["name"] for run in data["runs"]] == [str(run) for run in runs]
    with pytest.raises(UserError, match="given twice"):
        write_report([runs[0], runs[0]])


def test_the_command(tmp_path: Path, satune: Run) -> None:
    run = write_run(tmp_path / "run", stages=1)
    code, out, _ = satune("report", run, "--out", tmp_path / "deep" / "page.html", "--json")
    assert code == 0
    assert json.loads(out)["page"] == str(tmp_path / "deep" / "page.html")
    (run / "recipe.yaml").unlink()
    code, out, err = satune("report", run)
    assert code == 0
    assert err.splitlines()[0] == f"note: {run / 'recipe.yaml'}: is missing"
    assert out.startswith(f"{run / 'report.html'}: 30 conversations")
    _, out, _ = satune("--help")
    assert "report" in out


@pytest.mark.parametrize("name", ["empty", "missing", "file"])
def test_a_directory_that_is_no_run(tmp_path: Path, satune: Run, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert refused(satune("report", tmp_path / name)).startswith(str(tmp_path / name))
