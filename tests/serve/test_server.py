"""The endpoint on a port: an unmodified client, many at once, and how a server ends."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import swapped_teams
import tiny_world
from command_line import ENVIRONMENT, Run, refused
from satune.serve.server import listening
from serving import CHAT, Stuck, asked, client, on_a_port, scripted, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    return swapped_teams.trained(tiny_world.build(folder), folder / "run", ["stages=1"])


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2].partition("/")[0])


def test_openais_own_client_plain_streamed_and_async() -> None:
    openai = pytest.importorskip("openai")
    chat: Any = {"model": "team", "messages": asked()["messages"], "seed": 5}
    with scripted() as served, on_a_port(served, key="s3cret") as address:
        one = openai.OpenAI(base_url=address, api_key="s3cret", max_retries=0)
        assert [model.id for model in one.models.list()] == served.models
        assert one.models.retrieve("team/bob").id == "team/bob"
        plain = one.chat.completions.create(**chat, n=2, max_completion_tokens=5)
        message = plain.choices[1].message
        assert message.content == "bob0 of 5.1"
        assert message.reasoning_content == "ann: ann0 of 5.1\n\nbob: bob0 of 5.1"
        assert plain.usage.completion_tokens_details.reasoning_tokens == 22
        pieces = list(
            one.chat.completions.create(
                **chat, stream=True, stop=[" of"], stream_options={"include_usage": True}
            )
        )
        deltas = [piece.choices[0].delta for piece in pieces[:-1]]
        assert "".join(delta.content or "" for delta in deltas) == "bob0"
        told = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert told == "ann: ann0 of 5.0\n\nbob: bob0 of 5.0"
        assert pieces[-1].choices == [] and pieces[-1].usage.total_tokens == 25

        async def together() -> list[Any]:
            many = openai.AsyncOpenAI(base_url=address, api_key="s3cret", max_retries=0)
            asks = [many.chat.completions.create(**{**chat, "seed": i}) for i in range(8)]
            stream = await many.chat.completions.create(**chat, stream=True)
            assert [piece async for piece in stream][-1].choices[0].finish_reason == "stop"
            return await asyncio.gather(*asks)

        replies = asyncio.run(together())
        assert [r.choices[0].message.content for r in replies] == [
            f"bob0 of {i}.0" for i in range(8)
        ]
        with pytest.raises(openai.NotFoundError, match="nearest: team"):
            one.chat.completions.create(**{**chat, "model": "teams"})
        with pytest.raises(openai.BadRequestError, match="calls no tools"):
            one.chat.completions.create(**chat, tools=[{"type": "function"}])
        with pytest.raises(openai.BadRequestError, match="log-probability"):
            one.chat.completions.create(**chat, logprobs=True)
        wrong = openai.OpenAI(base_url=address, api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.chat.completions.create(**chat)


def test_a_connection_that_breaks_ends_the_conversation() -> None:
    engine = Stuck()
    with scripted(engine=engine) as served, on_a_port(served) as address:
        for stream in (False, True):
            connection = http.client.HTTPConnection("127.0.0.1", port_of(address), timeout=60)
            body = json.dumps(asked(stream=stream))
            connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
            wait_until(lambda: engine.waiting == 1)
            assert connection.sock is not None
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            wait_until(lambda: engine.waiting == 0)
        engine.go = True
        connection = http.client.HTTPConnection("127.0.0.1", port_of(address), timeout=60)
        connection.request("POST", CHAT, json.dumps(asked()), {"Content-Type": "application/json"})
        assert connection.getresponse().status == 200
        connection.close()


def wait_until(true: Any) -> None:
    waited = threading.Event()
    while not true():
        waited.wait(0.001)


@pytest.mark.slow
def test_of_500_requests_of_64_clients_none_is_lost(run: Path) -> None:
    httpx = pytest.importorskip("httpx")
    questions = [(f"{i % 9}+{i % 7}", i % 11) for i in range(500)]
    served = tiny(run, "team.dtype=float64", concurrency=64, waiting=1000)
    with served.running():

        async def alone() -> dict[tuple[str, int], Any]:
            c = client(served)
            return {q: (await c.ask(text=q[0], seed=q[1]))["choices"] for q in set(questions)}

        async def clients(address: str) -> list[Any]:
            left = iter(questions)
            found: list[Any] = []

            async def one() -> None:
                async with httpx.AsyncClient(timeout=300, verify=False) as http:
                    for text, seed in left:
                        body = asked(text, seed=seed)
                        reply = await http.post(f"{address}/chat/completions", json=body)
                        assert reply.status_code == 200, reply.text
                        found.append(((text, seed), reply.json()["choices"]))

            await asyncio.gather(*(one() for _ in range(64)))
            return found

        with on_a_port(served) as address:
            found = asyncio.run(clients(address))
        assert sorted(question for question, _ in found) == sorted(questions)
        expected = asyncio.run(alone())
        assert all(choices == expected[question] for question, choices in found)
        assert served.asked == 0


# The command


def start(*words: str | Path) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "satune", "serve", *map(str, words), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), process.communicate()
    assert "team, team/ann, team/bob" in process.stdout.readline()
    return process, address


SLOW = """
import asyncio

async def slow(talk):
    turn = await talk.say(talk.seats[0])
    print("begun", flush=True)
    while not open({path!r}).read():
        await asyncio.sleep(0.01)
    return turn.text
"""


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_drains_and_a_second_one_ends_at_once(
    run: Path, tmp_path: Path, signals: int
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    (tmp_path / "slow.py").write_text(SLOW.format(path=str(gate)))
    process, address = start(run, "--protocol", f"{tmp_path / 'slow.py'}:slow")
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port_of(address), timeout=120)
        connection.request("POST", CHAT, json.dumps(asked()), {"Content-Type": "application/json"})
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert "answered first" in process.stderr.readline()
        if signals == 1:
            wait_until(lambda: not is_open(port_of(address)))
            assert process.poll() is None
            gate.write_text("open")
            assert connection.getresponse().status == 200
            assert process.wait(60) == 0
        else:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        assert process.communicate() == ("", "")
    finally:
        process.kill()
        process.communicate()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_what_cannot_be_served_is_one_line(
    satune: Run, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
        assert "in use" in refused(satune("serve", run, "--port", port))
    assert "give another one" in refused(satune("serve", run, "--host", "no such host"))
    monkeypatch.delenv("SATUNE_TEST_KEY", raising=False)
    said = refused(satune("serve", run, "--port", 0, "--api-key-env", "SATUNE_TEST_KEY"))
    assert said == "--api-key-env: $SATUNE_TEST_KEY is not set; export it"
    assert "no such team" in refused(satune("serve", "nowhere/at/all", "--port", 0))
    assert "debate" in refused(satune("serve", run, "--port", 0, "--protocol", "debat"))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("satune.serve.server", "satune.serve.app"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "pip install 'satune[serve]'" in refused(satune("serve", run, "--port", 0))
