"""The endpoint over a trained team: the evaluation's answers, whatever else is asked meanwhile."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import swapped_teams
import tiny_world
from command_line import Run, refused
from satune.agents.policy import Policy
from satune.engines.local import LocalEngine
from satune.engines.rows import Rows
from satune.files.lines import JsonLines
from satune.play.rows import episode_from_row
from satune.serve.replies import reasoning
from satune.serve.served import ServedTeam
from satune.thoughts import without_thoughts
from serving import Client, client, tiny

EXACT = "team.dtype=float64"
SEED = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return swapped_teams.trained(tiny_world.build(folder), folder / "run", ["stages=1"])


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[ServedTeam]:
    # Each seat speaks twice, and so goes on with what the engine has kept of its first turn.
    wanted = {"protocol_options": ["rounds=2"]}
    found = tiny(run, EXACT, wanted=wanted, concurrency=64, waiting=10_000)
    with found.running():
        yield found


def engine_of(served: ServedTeam) -> LocalEngine:
    engine = served._engine
    assert isinstance(engine, LocalEngine)
    return engine


def within(work: Any) -> Any:
    async def script() -> Any:
        return await asyncio.wait_for(work, 120)

    return asyncio.run(script())


def said(reply: dict[str, Any]) -> list[tuple[str, str]]:
    messages = [choice["message"] for choice in reply["choices"]]
    return [(message["content"], message["reasoning_content"]) for message in messages]


@pytest.mark.parametrize("seat", [None, "bob"])
def test_answers_are_those_of_an_evaluation_with_keys_of_texts(
    satune: Run, run: Path, served: ServedTeam, tmp_path: Path, seat: str | None
) -> None:
    out = tmp_path / "eval"
    alone = ["--seat", seat] if seat else ["--protocol-option", "rounds=2"]
    words = [run, EXACT, "--keys", "text", "-k", "3", "--seed", SEED, "--out", out, *alone]
    assert satune("eval", *words, "--json")[0] == 0
    expected: dict[str, dict[int, tuple[str, str]]] = {}
    for row in JsonLines(out / "conversations.jsonl").read():
        episode = episode_from_row(row)
        answer = without_thoughts(episode.answer or "")
        samples = expected.setdefault(episode.problem.text, {})
        samples[episode.sample] = answer, reasoning(episode.turns)
    assert len(expected) == 3
    model = "team/bob" if seat else "team"

    async def script(c: Client) -> dict[str, Any]:
        asks = [c.ask(text=text, model=model, seed=SEED, n=3) for text in expected]
        return dict(zip(expected, await asyncio.gather(*asks), strict=True))

    for text, reply in within(script(client(served))).items():
        assert said(reply) == [expected[text][sample] for sample in range(3)]
    # The same by the problem's id are other draws.
    other = ["--keys", "id", "--out", tmp_path / "other", *alone]
    assert satune("eval", run, EXACT, "-k", "3", "--seed", SEED, *other, "--json")[0] == 0
    rows = JsonLines(tmp_path / "other" / "conversations.jsonl").read()
    episodes = [episode_from_row(row) for row in rows]
    assert any(reasoning(e.turns) != expected[e.problem.text][e.sample][1] for e in episodes)
    assert "another keys" in refused(
        satune("eval", run, EXACT, "-k", "3", "--seed", SEED, "--out", out, *alone)
    )


def test_two_problems_of_one_text_cannot_have_keys_of_texts(
    satune: Run, run: Path, tmp_path: Path
) -> None:
    rows = [{"id": name, "prompt": "1+1", "answer": "2"} for name in ("a", "b")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [run, "--data", data, "-k", "1", "--out", tmp_path / "out"]
    assert "have the same text" in refused(satune("eval", *words, "--keys", "text"))
    assert satune("eval", *words)[0] == 0


def test_answers_do_not_depend_on_what_else_is_asked(served: ServedTeam) -> None:
    questions = [f"{i % 7}+{i % 5}" for i in range(24)]

    async def alone(c: Client) -> list[Any]:
        return [said(await c.ask(text=text, seed=i)) for i, text in enumerate(questions)]

    async def together(c: Client) -> list[Any]:
        # Each twice at one time, among others that ask the same of another seed, seat and heat.
        asks: list[Any] = []
        for i, text in enumerate(questions):
            asks += [c.ask(text=text, seed=i), c.ask(text=text, seed=i)]
            asks += [c.ask(text=text, seed=i + 1), c.ask(text=text, seed=i, temperature=2)]
            asks.append(c.ask(text=text, seed=i, model="team/ann", max_tokens=2))
        replies = await asyncio.gather(*asks)
        first, second = replies[::5], replies[1::5]
        assert list(map(said, first)) == list(map(said, second))
        heated = replies[3::5]
        assert list(map(said, first)) != list(map(said, heated))
        return list(map(said, first))

    assert within(alone(client(served))) == within(together(client(served)))


def test_requests_share_batches(served: ServedTeam, monkeypatch: pytest.MonkeyPatch) -> None:
    widest: list[int] = []
    step = Rows.step

    def counted(self: Rows) -> Any:
        widest.append(len(self.requests))
        return step(self)

    monkeypatch.setattr(Rows, "step", counted)

    async def script(c: Client) -> None:
        await asyncio.gather(*(c.ask(seed=i, model="team/ann") for i in range(32)))

    within(script(client(served)))
    # 32 messages of up to 6 tokens, the first of which comes with the prompt.
    assert max(widest) > 8 and len(widest) < 32 * 5 / 2


def test_a_client_that_goes_away_frees_its_rows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tiny(run, wanted={"max_new_tokens": 400})
    engine = engine_of(served)
    # Nobody ends a message: it goes on to its limit, unless nobody waits for it.
    monkeypatch.setattr(Policy, "eos_ids", frozenset())
    begun, gone = threading.Event(), threading.Event()
    rows_of_steps: list[int] = []
    step = Rows.step

    def held(self: Rows) -> Any:
        rows_of_steps.append(len(self.requests))
        if len(rows_of_steps) == 3:
            begun.set()
            gone.wait(60)
        return step(self)

    monkeypatch.setattr(Rows, "step", held)

    async def script(c: Client) -> None:
        leave = asyncio.Event()
        body = {"model": "team/ann", "messages": [{"role": "user", "content": "3+4"}], "n": 8}
        going = asyncio.create_task(c.send(body=body, leave=leave))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        leave.set()
        await going
        gone.set()
        while engine._decoding or engine._pending or engine._open:
            await asyncio.sleep(0.001)
        # The step that was under way, and one or two until the news was there; of 400.
        assert rows_of_steps[:3] == [8] * 3 and len(rows_of_steps) < 8
        assert engine.sampled_tokens == 0
        reply = await c.ask(model="team/ann", max_tokens=3)
        assert reply["usage"]["completion_tokens"] == engine.sampled_tokens == 3

    with served.running():
        within(script(client(served)))


def test_a_prompt_that_does_not_fit_is_the_clients_fault(served: ServedTeam) -> None:
    reply = within(client(served).ask(text="3+4 " * 400))
    assert reply["status"] == 400
    assert reply["error"]["code"] == "context_length_exceeded"


def test_a_team_whose_data_are_gone_is_served_unless_it_votes(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "team"
    shutil.copytree(run / "team", moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["task"]["data"] = str(tmp_path / "gone.jsonl")
    (moved / "manifest.json").write_text(json.dumps(manifest))
    assert tiny(moved).models == ["team", "team/ann", "team/bob"]
    with pytest.raises(ValueError, match=r"gone\.jsonl"):
        tiny(moved, wanted={"protocol": "vote"})


def test_the_fingerprint_tells_in_which_numbers_a_team_computes(run: Path) -> None:
    types = ["float32", "float64", "bfloat16", "float32"]
    first, *others, again = (tiny(run, f"team.dtype={name}").fingerprint for name in types)
    assert first == again and len({first, *others}) == 3
