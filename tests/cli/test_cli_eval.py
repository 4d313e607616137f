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
import yaml

import faulty_server
import tiny_world
from benchmark_rows import rows_of
from faulty_server import FAULTS, Server, written
from satune.agents.pretrained import misspelt_path
from satune.cli.main import main
from satune.commands.evaluate import GENERATED, OTHER_SAMPLES, place
from satune.engines.servers import Servers
from satune.engines.settings import ServerSettings
from satune.types import UserError

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[2]
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
        "--timeout", "600", "--concurrency", "8", "--out", str(out), *more, "--json",
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
    code, _, stderr = satune(*served(server.url, tmp_path / "faults", *few, "--timeout", "1"))
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
    while answered(out) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_was_killed_asks_only_for_what_is_missing(
    satune: Run, server: Server, tmp_path: Path, how: signal.Signals
) -> None:
    assert satune(*served(server.url, tmp_path / "plain"))[0] == 0
    plain = (tmp_path / "plain" / "report.json").read_bytes()
    total = server.seen()["requests"]
    out = tmp_path / "killed"
    server.fresh(limit=20)
    process = command(*served(server.url, out))
    until(out, 15, process)
    process.send_signal(how)
    _, stderr = process.communicate()
    if how is signal.SIGINT:
        assert process.returncode == 130
        (line,) = [line for line in stderr.splitlines() if "go on with" in line]
        words = shlex.split(line.partition("go on with: ")[2])
        assert words == ["satune", "eval", *served(server.url, out)]
    else:
        assert process.returncode == -9
    held = answered(out)
    assert 15 <= held < total
    server.idle()  # what was under way is over before the count begins
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


# Roles of an environment at a server


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"id": f"p{i}", "surface": f"{i}+{i}", "bottom": str(2 * i), "key_question": []}
        for i in range(1, 3)
    ]
    path = tmp_path_factory.mktemp("puzzles") / "puzzles.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ASKING = """
async def asking(talk):
    await talk.say(talk.seats[0])
    return "Q: is it so?"
"""


def spent(bodies: list[dict[str, Any]]) -> int:
    """Tokens as the server counts them: characters of the messages, and of what it wrote."""
    return sum(len(json.dumps(body["messages"])) + len(written(body)[0]) for body in bodies)


def test_detectives_question_suspects_at_one_server(
    satune: Run, server: Server, tmp_path: Path
) -> None:
    turns, out = 4, tmp_path / "killed"

    def cases(out: Path) -> list[str]:
        return [
            "detective,detective", "--base-url", server.url, "--environment-model", "suspect",
            "--benchmark", "arbench_dc", "--data", str(rows_of("arbench_dc.jsonl")),
            "--protocol", "round_robin", "--limit", "3", "-k", "2", "--concurrency", "4", "--json",
            "--out", str(out), f"task.max_turns={turns}",
        ]  # fmt: skip

    code, stdout, stderr = satune(*cases(tmp_path / "plain"))
    assert code == 0, stderr
    report = json.loads(stdout)
    bodies = server.seen()["bodies"]
    asked = [body for body in bodies if body["model"] == "detective"]
    roles = [body for body in bodies if body["model"] == "suspect"]
    # A message a turn and the choice; a suspect is asked in every turn but those that were lost.
    rows = (tmp_path / "plain" / "conversations.jsonl").read_text().splitlines()
    grades = [json.loads(row)["grade"] for row in rows]
    lost = round(sum(turns * grade["components"]["malformed"] for grade in grades))
    assert len(grades) == 6 and 0 < lost < 6 * turns
    assert len(asked) == 6 * (turns + 1) and len(roles) == 6 * turns - lost
    assert len(bodies) == len(asked) + len(roles)
    assert report["environment_tokens"] == spent(roles)
    team = report["budget"]["team"]
    assert team["prompt_tokens"] + team["completion_tokens"] == spent(asked)
    assert report["tokens"] == sum(len(written(body)[0]) for body in asked)
    assert report["team"]["avg_at_k"] == pytest.approx(sum(g["score"] for g in grades) / 6)
    for body in roles:
        assert (body["temperature"], body["top_p"]) == (0.7, 0.7)
        first, *rest = body["messages"]
        assert first["role"] == "system" and first["content"].startswith("You play ")
        assert [m["role"] for m in rest] == ["user", *("assistant", "user") * (len(rest) // 2)]
        assert "what did you see" in rest[-1]["content"]
    # Killed on the way and begun anew: no answer that is on file is asked for again.
    server.fresh(limit=18)
    process = command(*cases(out))
    until(out, 12, process)
    process.kill()
    process.communicate()
    held = answered(out)
    assert 12 <= held < len(bodies)
    server.idle()
    server.fresh()
    assert satune(*cases(out))[0] == 0
    again = server.seen()["bodies"]
    assert len(again) == len(bodies) - held
    assert (out / "report.json").read_bytes() == (tmp_path / "plain" / "report.json").read_bytes()
    server.fresh()
    assert satune(*cases(out))[1] == stdout.replace(str(tmp_path / "plain"), str(out))
    assert server.seen()["requests"] == 0


def test_a_server_has_one_pace_whoever_asks(
    satune: Run, server: Server, puzzles: Path, tmp_path: Path
) -> None:
    game = ["--benchmark", "arbench_sp", "--data", str(puzzles), "task.max_turns=3", "-k", "1"]
    code, stdout, stderr = satune(
        "detective", "--base-url", server.url, *game, "--rpm", "1200", "--limit", "1",
        f"task.host={server.url}/#poor", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0, stderr
    seen = server.seen()
    models = [body["model"] for body in seen["bodies"]]
    assert models == ["detective", "poor"] * 3 + ["detective"]
    assert json.loads(stdout)["environment_tokens"] == spent(seen["bodies"][1::2])
    # 1200 a minute are one every .05 s: seven take .3 s, less by what the first was late. With a
    # pace each, the four of one model would take .15 s.
    assert max(seen["times"]) - min(seen["times"]) > 0.2
    host = refused(satune(
        "good", "--base-url", server.url, *game, "task.host=scripted", "--environment-model",
        "poor", "--out", tmp_path / "twice",
    ))  # fmt: skip
    assert "is also said by --environment-*" in host


def test_a_key_goes_to_its_own_server_only(
    satune: Run, server: Server, puzzles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM_KEY", "sk-team")
    monkeypatch.setenv("ROLE_KEY", "sk-role")
    monkeypatch.delenv("ENVIRONMENT_API_KEY", raising=False)

    def played(role: Server, name: str, *more: str) -> tuple[int, str, str]:
        return satune(
            "detective", "--base-url", server.url, "--benchmark", "arbench_sp", "--data", puzzles,
            "task.max_turns=1", "-k", "1", "--environment-url", role.url, "--environment-model",
            "poor", "--api-key-env", "TEAM_KEY", "--out", tmp_path / name, "--json", *more,
        )  # fmt: skip

    with faulty_server.running() as role:
        server.fresh(key="sk-team")
        assert played(role, "open")[0] == 0
        assert server.seen()["keys"] == ["Bearer sk-team"] * 4 and role.seen()["keys"] == [""] * 2
        role.fresh(key="sk-role")
        assert "wants a key; set $ENVIRONMENT_API_KEY" in refused(played(role, "closed"))
        assert played(role, "both", "--environment-key-env", "ROLE_KEY")[0] == 0
        monkeypatch.setenv("ENVIRONMENT_API_KEY", "sk-role")
        assert played(role, "usual")[0] == 0
        assert set(role.seen()["keys"]) == {"", "Bearer sk-role"}
    two = refused(played(server, "two", "--environment-key-env", "ROLE_KEY"))
    assert f"{server.url}: its key is in $TEAM_KEY and in $ROLE_KEY; name one" in two
    assert "is for --base-url" in refused(satune("good", "--api-key-env", "TEAM_KEY"))


def test_an_address_has_one_engine_and_all_share_the_answers(tmp_path: Path) -> None:
    servers = Servers({}, "ROLE_KEY", tmp_path / "answers.jsonl")
    one = servers.at("http://host:80/v1", "TEAM_KEY")
    assert servers.at("http://HOST/v1/") is one and servers.at("http://host/v1", "TEAM_KEY") is one
    two = servers.at("http://host:81/v1")
    assert (one.settings.api_key_env, two.settings.api_key_env) == ("TEAM_KEY", "ROLE_KEY")
    assert servers.engines == [one, two] and one._answers is two._answers
    with pytest.raises(UserError, match="not an address"):
        servers.at("host/v1")


def test_a_recipe_whose_roles_are_at_a_server(
    satune: Run, server: Server, world: Path, puzzles: Path, tmp_path: Path
) -> None:
    raw = yaml.safe_load(world.read_text())
    model = str(tiny_world.save_model(tmp_path / "model", context=8192))
    raw["team"]["agents"] = {"ann": {"model": model}}
    raw["task"] = {
        "name": "arbench_sp", "data": str(puzzles), "max_turns": 2, "eval_fraction": 0.5,
        "host": f"{server.url}#good",
    }  # fmt: skip
    (tmp_path / "asking.py").write_text(ASKING)
    raw["protocol"] = f"{tmp_path / 'asking.py'}:asking"
    recipe = tmp_path / "served.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    arguments = ["--data", str(puzzles), "-k", "2", "--out", str(tmp_path / "out"), "--json"]
    code, stdout, stderr = satune(recipe, *arguments)
    assert code == 0, stderr
    bodies = server.seen()["bodies"]
    assert [body["model"] for body in bodies] == ["good"] * 2 * 2 * 2
    assert json.loads(stdout)["environment_tokens"] == spent(bodies)


# Models in this process


@pytest.mark.slow
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
    code, stdout, _ = satune(out, "--seat", "bob", "-k", "2", "--out", tmp_path / "alone")
    labels = [line.partition("  ")[0] for line in stdout.splitlines()]
    assert code == 0 and labels[1:2] == ["seat bob"] and labels[2].startswith("rows: 3 problems")
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
    assert not (tmp_path / "out").exists(), "nothing was answered"
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
    assert "unknown option 'colour'" in said(model, *relay, "task.colour=red")
    assert "unknown option 'colour'" in said("good", *at, *relay, "task.colour=red")
    assert "team: unknown here" in said("good", *at, *relay, "team.device=cpu")
    assert not (tmp_path / "out").exists()


def test_a_misspelt_path_is_not_sought_at_the_hub(
    satune: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    line = refused(satune("runs/on", "--benchmark", "relay"))
    assert line == (
        "runs/on: no such team, recipe or model (runs has no on; did you mean runs/one?)"
    )
    assert "nothing there is named like it" in refused(satune("./zebra", "--benchmark", "relay"))
    # An agent's model in a recipe, and whatever else is loaded, the same way.
    line = refused(satune(world, "team.agents.ann.model=runs/onee", "--out", "out"))
    assert line.startswith("agent ann: cannot load model 'runs/onee' (runs has no onee; did you")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]
    # Not taken for one: what is there, an id whose first half lies not here, one that is cached.
    (tmp_path / "hub" / "models--runs--two").mkdir(parents=True)
    assert not any(map(misspelt_path, ("runs/one", "org/on", "on", "runs/two")))


def test_a_directory_is_left_as_it_was_until_something_is_answered(
    satune: Run, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relay = ["good", "--base-url", server.url, "--benchmark", "relay", "--limit", "1", "-k", "1"]
    refused(satune(*relay, "--protocol", "debat"))
    refused(satune(*relay, "--protocol", "debat", "--out", "deep/er"))
    server.fresh(key="sk-right")
    refused(satune(*relay))
    assert list(tmp_path.iterdir()) == []
    # Made by somebody else, it stays; so do answers that were put there.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "answers.jsonl").write_text("")
    refused(satune(*relay, "--out", "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["answers.jsonl"]
    with pytest.raises(KeyboardInterrupt), place(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "settings.json").write_text("{}")
        raise KeyboardInterrupt
    assert not (tmp_path / "a").exists()
    with pytest.raises(KeyboardInterrupt), place(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "settings.json").write_text("{}")
        (tmp_path / "a" / "b" / "answers.jsonl").write_text("{}\n")
        raise KeyboardInterrupt
    # What was begun before is gone on with, whatever a later try ends with.
    with pytest.raises(UserError), place(tmp_path / "a" / "b"):
        raise UserError("later")
    assert len(list((tmp_path / "a" / "b").iterdir())) == 2


def test_the_help_names_every_default(satune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    code, stdout, _ = satune("--help")
    assert code == 0
    shown: dict[str, str] = {}
    for line in stdout.splitlines():
        found = re.match(r"│ +(?:--no-[a-z-]+ )?(-[a-z-]+) ", line)
        if found:
            shown[found[1]] = line.partition("[default: ")[2]
    flags = {"--greedy", "--stream", "--json", "--help"}
    flags |= {"--trust", "--unsafe-checks", "--break-lock"}
    assert {name for name, default in shown.items() if not default} == flags
    settings = ServerSettings()
    for name, part in {
        "-k": f"the paper's for the benchmark, {OTHER_SAMPLES} where",
        "--limit": f"{GENERATED} of",
        "--concurrency": f"{settings.concurrency} at",
        "--timeout": f"{settings.timeout:g}",
        "--retries": str(settings.retries),
        "--max-new-tokens": "the recipe's, else the paper's 32768",
        "--temperature": "the paper's 0.8",
    }.items():
        assert part in shown[name], name


def test_a_piped_table_keeps_its_rows(
    satune: Run, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    arguments = served(server.url, tmp_path / "out", "--limit", "1")[:-1]
    code, stdout, _ = satune(*arguments)
    lines = stdout.splitlines()
    labels = ["team", "seat good-1", "seat poor", "seat good-2", "all messages", "oracle"]
    assert code == 0 and [line.partition("  ")[0] for line in lines[1:7]] == labels
    assert all(line.count(" + ") == 1 for line in lines[1:7]) and max(map(len, lines[:7])) < 200
    # One place opens consoles, for every command.
    source = ROOT / "src" / "satune"
    opens = [p for p in source.rglob("*.py") if re.search(r"Console\(", p.read_text())]
    assert opens == [source / "cli" / "common.py"]


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
