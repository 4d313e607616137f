"""Four clients as their makers ship them, each in a process of the clients' own environment: what
they read is what ``satune eval --keys text`` has written."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import swapped_teams
import tiny_world
from satune.cli.main import main
from satune.files.lines import JsonLines
from satune.play.rows import episode_from_row
from satune.serve.replies import reasoning
from satune.thoughts import without_thoughts
from serving import on_a_port, tiny

HERE = Path(__file__).parent
PLACE = Path(os.environ.get("SATUNE_CLIENTS", HERE.parents[1] / ".venv-clients")).absolute()
PYTHON = PLACE / "bin" / "python"
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no clients in {PLACE}: make test-clients"),
]
EXACT = "team.dtype=float64"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients")
    return swapped_teams.trained(tiny_world.build(folder), folder / "run", ["stages=1"])


@pytest.fixture(scope="module")
def expected(run: Path) -> dict[str, tuple[str, str]]:
    """Answer and conversation of each question, as an evaluation has them."""
    out = run.parent / "eval"
    words = ["satune", "eval", str(run), EXACT, "--keys", "text", "-k", "1", "--seed", "5"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("sys.argv", [*words, "--out", str(out), "--json"])
        main()
    episodes = [episode_from_row(r) for r in JsonLines(out / "conversations.jsonl").read()]
    return {
        e.problem.text: (without_thoughts(e.answer or ""), reasoning(e.turns)) for e in episodes
    }


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    served = tiny(run, EXACT)
    with served.running(), on_a_port(served) as found:
        yield found


def output(*words: str | Path, cwd: Path) -> str:
    """What a program of the clients' environment prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(cwd / "hf")}
    ended = subprocess.run(
        [str(word) for word in words],
        env=kept | offline, cwd=cwd, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def said(script: str, *words: str, cwd: Path) -> dict[str, Any]:
    return json.loads(output(PYTHON, HERE / script, *words, cwd=cwd).splitlines()[-1])


def test_openai_python(address: str, expected: dict[str, Any], tmp_path: Path) -> None:
    found = said("use_openai.py", address, *expected, cwd=tmp_path)
    answers = [answer for answer, _ in expected.values()]
    assert found["models"] == ["team", "team/ann", "team/bob"]
    assert found["plain"] == found["async"] == answers
    streamed = [(each["content"], each["reasoning"]) for each in found["streamed"]]
    assert streamed == list(expected.values())
    assert all(each["usage"]["completion_tokens"] == 12 for each in found["streamed"])


def test_langchain(address: str, expected: dict[str, Any], tmp_path: Path) -> None:
    found = said("use_langchain.py", address, *expected, cwd=tmp_path)
    answers = [answer for answer, _ in expected.values()]
    assert found["plain"] == found["streamed"] == found["async"] == answers
    assert found["system"] != answers[0] and found["usage"] > 12 and found["finish"] == "length"


def test_inspect(address: str, expected: dict[str, Any], tmp_path: Path) -> None:
    answers = [answer for answer, _ in expected.values()]
    targets = [answers[0], *("none of these" for _ in answers[1:])]
    words = (address, str(tmp_path / "logs"), json.dumps(targets), *expected)
    found = said("use_inspect.py", *words, cwd=tmp_path)
    assert found["answers"] == answers
    assert found["accuracy"] == pytest.approx(1 / len(answers))
    # Inspect keeps a model's reasoning apart from its answer.
    for content, (_, conversation) in zip(found["reasoning"], expected.values(), strict=True):
        assert content[0]["reasoning"] == conversation


def test_lm_evaluation_harness(address: str, expected: dict[str, Any], tmp_path: Path) -> None:
    task = HERE / "lm_eval_task" / "satune_sums.yaml"
    (tmp_path / task.name).write_bytes(task.read_bytes())
    answers = [answer for answer, _ in expected.values()]
    rows = [
        {"question": question, "answer": answer if at == 0 else "none of these"}
        for at, (question, answer) in enumerate(zip(expected, answers, strict=True))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = f"model=team,base_url={address}/chat/completions,num_concurrent=2"
    output(
        PYTHON.with_name("lm_eval"), "--model", "local-chat-completions", "--model_args",
        f"{arguments},tokenizer_backend=None,seed=5", "--tasks", "satune_sums", "--include_path",
        ".", "--apply_chat_template", "--output_path", "out", "--log_samples", cwd=tmp_path,
    )  # fmt: skip
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    by_question = {each["doc"]["question"]: each["resps"][0][0] for each in found}
    assert by_question == dict(zip(expected, answers, strict=True))
    (results,) = (tmp_path / "out").rglob("results_*.json")
    score = json.loads(results.read_text())["results"]["satune_sums"]["exact_match,none"]
    assert score == pytest.approx(1 / len(answers))
