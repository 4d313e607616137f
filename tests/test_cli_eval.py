"""``satune eval`` as a person meets it: with a server that fails, killed, given nonsense."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import faulty_server
import tiny_world
from faulty_server import FAULTS, Server
from satune.cli.main import main

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def process() -> Iterator[Server]:
    with faulty_server.running() as server:
        yield server


@pytest.fixture
def server(process: Server) -> Server:
    process.fresh()
    return process


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def satune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["satune", "eval", *map(str, arguments)])
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def refused(ended: tuple[int, str, str]) -> str:
    code, out, err = ended
    assert code == 2 and out == "", err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


def served(url: str, out: Path, *more: str) -> list[str]:
    return [
        "good,poor,good", "--base-url", url, "--benchmark", "relay", "--protocol", "debate",
        "--protocol-option", "rounds=2", "--limit", "4", "-k", "2", "--max-new-tokens", "16",
        "--timeout", "0.5", "--concurrency", "8", "--out", str(out), *more, "--json",
    ]  # fmt: skip


# A server


def test_a_report_is_the_same_whatever_went_wrong(
    satune: Run, server: Server, tmp_path: Path
) -> None:
    few = ("--limit", "2")  # the last one given counts
    code, stdout, _ = satune(*served(server.url, tmp_path / "plain", *few))
    assert code == 0
    report = json.loads(stdout)
    assert {"benchmark", "problems", "k", "team", "seats", "tokens"} <= set(report)
    assert (report["benchmark"], report["problems"], report["k"]) == ("relay", 2, 2)
    assert list(report["seats"]) == ["good-1", "poor", "good-2"]
    for row in (report["team"], *report["seats"].values()):
        assert set(row) == {"avg_at_k", "pass_at_k", "majority", "interval"}
        assert 0 <= row["avg_at_k"] <= row["pass_at_k"] <= 1
    assert report["budget"]["pooled"]["answers"] == 6 and report["tokens"] > 0
    assert server.seen()["requests"] == 2 * 2 * 3 * 2
    plain = (tmp_path / "plain" / "report.json").read_bytes()

    server.fresh(FAULTS)
    code, _, stderr = satune(*served(server.url, tmp_path / "faults", *few))
    assert code == 0 and "of them repetitions" in stderr
    assert (tmp_path / "faults" / "report.json").read_bytes() == plain
    # A second call asks for nothing; more samples ask for what is new.
    server.fresh()
    assert satune(*served(server.url, tmp_path / "plain", *few))[1] == stdout
    assert (tmp_path / "plain" / "report.json").read_bytes() == plain
    assert server.seen()["requests"] == 0
    arguments = served(server.url, tmp_path / "plain", *few)
    arguments[arguments.index("-k") + 1] = "3"
    assert satune(*arguments)[0] == 0
    assert server.seen()["requests"] == 2 * 3 * 2


def command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "satune", "eval", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip


def answered(out: Path) -> int:
    file = out / "answers.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def until(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if answered(out) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("it never came so far")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_was_killed_asks_only_for_what_is_missing(
    satune: Run, server: Server, tmp_path: Path, how: signal.Signals
) -> None:
    assert satune(*served(server.url, tmp_path / "plain"))[0] == 0
    plain = (tmp_path / "plain" / "report.json").read_bytes()
    total = server.seen()["requests"]
    out = tmp_path / "killed"
    server.fresh(delay=0.03)
    process = command(*served(server.url, out))
    until(out, 15, process)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    if how is signal.SIGINT:
        assert process.returncode == 130
        (line,) = [line for line in stderr.splitlines() if "go on with" in line]
        words = shlex.split(line.partition("go on with: ")[2])
        assert words == ["satune", "eval", *served(server.url, out)]
    else:
        assert process.returncode == -9
    held = answered(out)
    assert 15 <= held < total
    # What was under way is over before the count begins.
    time.sleep(0.2)
    server.fresh()
    assert satune(*served(server.url, out))[0] == 0
    assert server.seen()["requests"] == total - held
    assert (out / "report.json").read_bytes() == plain


def test_an_environment_has_the_teams_rows_only(
    satune: Run, server: Server, tmp_path: Path
) -> None:
    code, stdout, _ = satune(
        "good,poor", "--base-url", server.url, "--benchmark", "guess_number", "--protocol",
        "round_robin", "--limit", "2", "-k", "2", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    report = json.loads(stdout)
    assert code == 0 and report["seats"] == {} and "pooled" not in report
    assert set(report["team"]) == {"avg_at_k", "pass_at_k", "majority", "interval"}
    assert set(report["budget"]["seats"]) == {"good", "poor"}


# Models in this process


def test_a_team_a_run_a_recipe_and_a_model(satune: Run, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def report(name: str, *arguments: str | Path) -> dict[str, Any]:
        code, stdout, stderr = satune(*arguments, "-k", "2", "--out", tmp_path / name, "--json")
        assert code == 0, stderr
        return json.loads(stdout)

    untrained = report("recipe", world)
    # The held-out quarter of the rows, the recipe's own protocol and limit.
    assert untrained["split"] == "eval" and untrained["protocol"] == {"name": "chain"}
    assert untrained["max_new_tokens"] == 6 and set(untrained["seats"]) == {"ann", "bob"}
    subprocess.run(
        [sys.executable, "-m", "satune", "train", str(world), "stages=1", "--out", str(out)],
        check=True, capture_output=True, env=ENVIRONMENT,
    )  # fmt: skip
    trained = report("trained", out)
    assert trained["problems"] == untrained["problems"]
    assert report("team", out / "team")["team"] == trained["team"]
    debated = report("debate", out, "--protocol", "debate", "protocol.rounds=1")
    assert debated["protocol"] == {"name": "debate", "rounds": 1}
    alone = report("alone", out, "--seat", "bob")
    assert alone["protocol"] == {"name": "solo"} and list(alone["seats"]) == ["bob"]
    assert alone["team"] == alone["seats"]["bob"]
    rows = world.parent / "rows.jsonl"
    numeric = ["--benchmark", "rows", "--data", str(rows), "task.reward=numeric"]
    model = report("model", world.parent / "model-0", *numeric, "--seats", "2", "--limit", "5")
    assert (model["split"], model["problems"]) == ("all", 5)
    assert list(model["seats"]) == ["model-0-1", "model-0-2"]
    assert model["protocol"] == {"name": "vote"}
    greedy = satune(world, "--greedy", "--out", tmp_path / "greedy", "--json")
    assert json.loads(greedy[1])["k"] == 1
    # Conversations go without ids; interrupted, the rest is played, and nothing else changes.
    file = tmp_path / "trained" / "conversations.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert all(t["completion_ids"] is None for t in json.loads(lines[0])["turns"])
    file.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert report("trained", out) == trained
    assert sorted(file.read_bytes().splitlines(keepends=True)) == sorted(lines)
    code, stdout, _ = satune(out, "-k", "2", "--out", tmp_path / "trained")
    assert code == 0 and "oracle" in stdout and "seat ann" in stdout
    # Options of the task hold for another benchmark than the team's own as well.
    two = (out, "task.numbers=2", "--benchmark", "relay", "--limit", "1", "-k", "1")
    assert satune(*two, "--max-new-tokens", "4", "--out", tmp_path / "two")[0] == 0
    row = json.loads((tmp_path / "two" / "conversations.jsonl").read_text().splitlines()[0])
    assert len(re.findall("[-+*]", row["problem"]["prompt"][0]["text"])) == 1


# Bad input


def test_what_is_wrong_is_one_line(
    satune: Run, server: Server, world: Path, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "out")]
    relay = ["--benchmark", "relay", "--limit", "1", "-k", "1"]

    def said(*arguments: str | Path) -> str:
        return refused(satune(*arguments, *out))

    at = ["--base-url", server.url]
    away = ["--base-url", "http://127.0.0.1:9/v1", "--retries", "1"]
    assert "no answer after 2 attempts" in said("good", *away, *relay)
    assert "model 'excellent'" in refused(
        satune("excellent", *at, *relay, "--out", tmp_path / "model")
    )
    server.fresh(key="sk-right")
    assert "wants a key; set $OPENAI_API_KEY" in refused(
        satune("good", *at, *relay, "--out", tmp_path / "key")
    )
    server.fresh()
    assert "$NO_SUCH_KEY is not set" in said("good", *at, *relay, "--api-key-env", "NO_SUCH_KEY")
    assert "unknown protocol 'debat' (nearest: debate" in said(
        "good", *at, *relay, "--protocol", "debat"
    )
    assert "unknown option 'round'" in said(
        "good", *at, *relay, "--protocol", "chain", "--protocol-option", "round=2"
    )
    assert "unknown task 'aime23'" in said("good", *at, "--benchmark", "aime23")
    assert "--benchmark: is needed" in said("good", *at)
    assert "-k: is 0; give at least 1" in said("good", *at, "--benchmark", "relay", "-k", "0")
    assert "--limit: is 0" in said("good", *at, "--benchmark", "relay", "--limit", "0")
    assert "it needs data" in said("good", *at, "--benchmark", "rows")
    assert "no such file" in said(
        "good", *at, "--benchmark", "rows", "--data", tmp_path / "nowhere.jsonl"
    )
    assert "not an address" in said("good", "--base-url", "localhost", *relay)
    assert "leaves a name empty" in said("good,,poor", *at, *relay)
    assert "drop it or --temperature" in said("good", "--greedy", "--temperature", "1")
    assert "--concurrency: is 0" in said("good", *at, *relay, "--concurrency", "0")
    assert "no such file" in said(tmp_path / "nowhere.yaml", *relay)
    assert "no such team, recipe or model" in said(tmp_path / "nowhere" / "at" / "all", *relay)
    (tmp_path / "empty").mkdir()
    assert "holds neither a team" in said(tmp_path / "empty", *relay)
    assert "no 'zoe'" in said(world, "--seat", "zoe")
    assert "a recipe has its own seats" in said(world, "--seats", "2")
    model = world.parent / "model-0"
    assert "stages: unknown here" in said(model, *relay, "stages=2")
    assert "only team.device and team.dtype" in said(model, *relay, "team.seats=2")
    assert "engine.max_rows" in said(model, *relay, "engine.max_rows=0")


def test_a_directory_holds_one_evaluation(satune: Run, server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert satune(*served(server.url, out))[0] == 0
    other = refused(satune(*served(server.url, out, "--temperature", "0.5")))
    assert "holds an evaluation with another sampling" in other
    models = refused(satune("poor", *served(server.url, out)[1:]))
    assert "with another team" in models
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("")
    assert "is not empty and holds no evaluation" in refused(
        satune(*served(server.url, tmp_path / "used"))
    )
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.tex"]
