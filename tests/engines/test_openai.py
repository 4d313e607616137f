"""The client of OpenAI-compatible servers against a real server process that fails on demand."""

from __future__ import annotations

import asyncio
import errno
import io
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import faulty_server
from faulty_server import FAULTS, KINDS, Server
from satune.agents.messages import MessageRenderer, TemplateSettings
from satune.agents.packing import pack
from satune.engines.openai import OpenAIEngine
from satune.engines.pace import Pace
from satune.engines.settings import ServerSettings
from satune.files.lines import JsonLines
from satune.play.match import Match
from satune.play.rollout import rollout_sync
from satune.protocols.discussion import debate
from satune.protocols.sequential import chain
from satune.tasks.catalog import take
from satune.tasks.relay import Relay
from satune.types import Completion, Entry, Episode, Key, Prompt, Sampling, Seat, UserError

KEY = Key(0, "evaluate", problem="p")
SAMPLING = Sampling(16, temperature=0.8)
PATIENT = ServerSettings(timeout=60.0)
MODELS = {"ann": "good", "bob": "poor", "eve": "good"}
LIMITS = ("max_tokens", "max_completion_tokens")
PROMPT = Prompt(({"role": "user", "content": "3+4-2"},))


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("satune.engines.openai.FIRST_DELAY", 0.02)


@pytest.fixture(scope="module")
def process() -> Iterator[Server]:
    with faulty_server.running() as server:
        yield server


@pytest.fixture
def server(process: Server) -> Server:
    process.fresh()
    return process


def ask(
    engine: OpenAIEngine, *keys: Key, seat: str = "ann", sampling: Sampling = SAMPLING
) -> list[Completion]:
    """One completion a key, all at once; a hang is a failure."""

    async def all_of_them() -> list[Completion]:
        try:
            return await asyncio.gather(*(engine.generate(seat, PROMPT, sampling, k) for k in keys))
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(all_of_them(), 600))


def play(engine: OpenAIEngine, protocol: Any = chain, samples: int = 4) -> list[Episode]:
    renderer = MessageRenderer(TemplateSettings())
    return rollout_sync(
        Match([Seat(name, name, renderer, SAMPLING) for name in MODELS], protocol, engine, Relay()),
        take(Relay(), "eval", 6),
        samples,
        Key(0, "evaluate"),
    )


def keys(count: int) -> list[Key]:
    return [KEY.at(sample=i, seat="ann") for i in range(count)]


def refused(engine: OpenAIEngine) -> str:
    with pytest.raises(UserError) as error:
        ask(engine, KEY)
    assert "\n" not in str(error.value)
    return str(error.value)


# What is asked and what comes back


def test_a_request_and_its_completion(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server.fresh(key="sk-secret")
    engine = OpenAIEngine(server.url + "/", MODELS, replace(PATIENT, api_key_env="MY_KEY"))
    (got,) = ask(engine, KEY, sampling=Sampling(16, 0.3, top_p=0.9, top_k=5))
    (body,) = server.seen()["bodies"]
    assert body.pop("seed") == KEY.rng("server").getrandbits(31)
    assert body == {
        "model": "good", "messages": [{"role": "user", "content": "3+4-2"}], "max_tokens": 16,
        "temperature": 0.3, "top_p": 0.9, "top_k": 5,
    }  # fmt: skip
    assert got.text in ("7-2", "8-2") and got.finish_reason == "stop"
    assert got.ids is None and got.logprobs is None and got.version == 0
    assert got.completion_tokens == 3 and got.prompt_tokens > 3
    (cut,) = ask(engine, KEY, sampling=Sampling(1))
    assert len(cut.text) == 1 and cut.finish_reason == "length"
    ask(OpenAIEngine(server.url, MODELS, ServerSettings("MY_KEY", seed=False)), KEY)
    assert "seed" not in server.seen()["bodies"][-1] and "top_p" not in server.seen()["bodies"][-1]


def test_each_request_has_its_own_seed_and_the_same_one_again(server: Server) -> None:
    ask(OpenAIEngine(server.url, MODELS, PATIENT), *keys(8))
    seeds = [body["seed"] for body in server.seen()["bodies"]]
    assert len(set(seeds)) == 8
    server.fresh()
    ask(OpenAIEngine(server.url, MODELS, PATIENT), *keys(8))
    assert sorted(body["seed"] for body in server.seen()["bodies"]) == sorted(seeds)


def test_turns_cannot_be_trained_on_and_weights_not_given(server: Server) -> None:
    engine = OpenAIEngine(server.url, MODELS, PATIENT)
    episodes = play(engine, samples=1)
    assert all(t.prompt_ids is None and t.completion_ids is None for t in episodes[0].turns)
    with pytest.raises(ValueError, match="no token ids: it cannot be trained on"):
        pack([episodes[0].turns])
    with pytest.raises(UserError, match="cannot be given new weights"):
        engine.publish("ann", 1, {})
    with pytest.raises(UserError, match="no model for the seat 'zoe'; there are: ann, bob, eve"):
        asyncio.run(engine.generate("zoe", PROMPT, SAMPLING, KEY))


def test_messages_are_those_of_the_transcript() -> None:
    view = MessageRenderer(TemplateSettings()).view("ann")
    problem = Entry("problem", parts=({"type": "text", "text": "3+4-2"},))
    assert view.prompt([problem], 16).messages == ({"role": "user", "content": "3+4-2"},)
    # Bob spoke in the same moment and stands first in the log; the own message answers the prompt.
    bob, own = Entry("foreign", "<think>7?</think>8-2", "bob"), Entry("own", "7-2", "ann")
    prompt = view.prompt([problem, bob, own], 16)
    assert prompt.ids is None
    assert [m["content"] for m in prompt.messages] == ["3+4-2", "7-2", "bob: 8-2"]
    assert [m["role"] for m in prompt.messages] == ["user", "assistant", "user"]


# Trouble that passes


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", KINDS)
def test_each_fault_is_survived(server: Server, fault: str, stream: bool) -> None:
    plain = ask(OpenAIEngine(server.url, MODELS, PATIENT), *keys(3))
    settings = ServerSettings(retries=8, timeout=0.5, stream=stream)
    # Whatever the order, the second, fourth and sixth request fail.
    server.fresh(["", fault])
    engine = OpenAIEngine(server.url, MODELS, settings)
    assert ask(engine, *keys(3)) == plain
    assert engine.repeated >= 1 and engine.requests == 3 + engine.repeated


@pytest.mark.parametrize("stream", [False, True])
def test_all_faults_together_change_nothing(server: Server, stream: bool) -> None:
    plain = play(OpenAIEngine(server.url, MODELS, PATIENT), debate, 1)
    server.fresh(FAULTS)
    settings = ServerSettings(concurrency=8, retries=20, timeout=0.5, stream=stream)
    engine = OpenAIEngine(server.url, MODELS, settings)
    assert play(engine, debate, 1) == plain
    assert engine.repeated > 10
    assert server.seen()["most"] <= 8 + 4  # at once, and those that were given up as too slow


def test_a_server_that_comes_later_is_waited_for(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = OpenAIEngine(f"http://127.0.0.1:{port}/v1", MODELS, replace(PATIENT, retries=1000))
    got: list[Completion] = []
    asking = threading.Thread(target=lambda: got.extend(ask(engine, KEY)))
    asking.start()
    while engine.repeated < 2:
        time.sleep(0.01)
    with faulty_server.running(port):
        asking.join(120)
    assert got == ask(OpenAIEngine(server.url, MODELS, PATIENT), KEY)
    assert engine.repeated >= 2


def test_the_limit_is_renamed_where_the_server_wants_it(server: Server) -> None:
    server.fresh(["renamed"])
    engine = OpenAIEngine(server.url, MODELS, PATIENT)
    ask(engine, *keys(2))
    # Two at once: either may be refused before or after the other was asked again.
    named = [[f for f in LIMITS if f in body] for body in server.seen()["bodies"]]
    assert named.count(["max_completion_tokens"]) == 2
    assert 1 <= named.count(["max_tokens"]) == len(named) - 2 <= 2
    ask(engine, KEY.at(sample=9))
    last = server.seen()["bodies"][-1]
    assert [f for f in LIMITS if f in last] == ["max_completion_tokens"]


# Trouble that stays


def test_what_will_not_pass_is_one_line_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url = server.url
    said = refused(OpenAIEngine(url, {"ann": "excellent"}, PATIENT))
    assert "404 for the model 'excellent' (The model `excellent` does not exist.)" in said
    assert "404" in refused(OpenAIEngine(url + "/v2", MODELS, PATIENT))
    server.fresh(["400"])
    said = refused(OpenAIEngine(url, MODELS, PATIENT))
    assert "status 400: maximum context length is 10 tokens" in said
    server.fresh(["quota"])
    assert "the quota is used up (pay)" in refused(OpenAIEngine(url, MODELS, PATIENT))
    server.fresh(key="sk-right")
    assert "wants a key; set $OPENAI_API_KEY" in refused(OpenAIEngine(url, MODELS, PATIENT))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    said = refused(OpenAIEngine(url, MODELS, PATIENT))
    assert "refuses the key in $OPENAI_API_KEY" in said
    assert "sk-wrong" not in said and "Incorrect key: Bearer ***" in said
    assert server.seen()["requests"] == 2  # nothing of this was asked twice


def test_a_server_that_stays_away_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ServerSettings(retries=2, timeout=1.0)
    said = refused(OpenAIEngine(f"http://127.0.0.1:{port}/v1", MODELS, settings))
    assert "no answer after 3 attempts" in said and "ConnectError" in said


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000/v1", "not an address"),
        ("ftp://host/v1", "not an address"),
        ("http://host:port/v1", "not an address"),
        ("https://me:sk-1@host/v1", "holds a key"),
        ("https://host/v1?key=sk-1", "holds a key"),
    ],
)
def test_addresses_that_are_none(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        OpenAIEngine(url, MODELS)
    assert "sk-1" not in str(error.value)


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"server\.concurrency 0: give a number of at least 1"):
        ServerSettings(concurrency=0)
    with pytest.raises(ValueError, match=r"server\.requests_per_minute -1: give a number above 0"):
        ServerSettings(requests_per_minute=-1)


# Answers on file


def test_what_was_answered_is_not_asked_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    file = tmp_path / "deep" / "answers.jsonl"
    plain = play(OpenAIEngine(server.url, MODELS, PATIENT, answers=file))
    total = server.seen()["requests"]
    assert total == 6 * 4 * 3
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == total and b"sk-secret" not in b"".join(lines)
    # A crash: 50 answers are whole, the next is torn.
    file.write_bytes(b"".join(lines[:50]) + lines[50][:-9])
    server.fresh()
    engine = OpenAIEngine(server.url, MODELS, PATIENT, answers=file)
    assert play(engine) == plain
    assert server.seen()["requests"] == total - 50 == engine.requests
    assert sorted(file.read_bytes().splitlines(keepends=True)) == sorted(lines)
    # Another temperature, model or key is another request; another address is not.
    server.fresh()
    (first,) = ask(engine, KEY)
    ask(engine, KEY)
    ask(engine, KEY, sampling=Sampling(16, temperature=0.7))
    ask(engine, KEY, seat="bob")
    ask(engine, KEY.at(sample=1))
    assert server.seen()["requests"] == 4
    away = OpenAIEngine("http://127.0.0.1:9/v1", MODELS, PATIENT, answers=file)
    assert ask(away, KEY) == [first]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"request": 1\n')
    with pytest.raises(UserError, match=r"answers.jsonl, line 1: not JSON"):
        OpenAIEngine("http://localhost/v1", MODELS, answers=file)
    for line in ("[" * 100_000, "1" * 5000, "nonsense"):
        file.write_text(f"{line}\n")
        with pytest.raises(UserError, match=r"answers.jsonl, line 1: not JSON"):
            OpenAIEngine("http://localhost/v1", MODELS, answers=file)
    for line in ("7", "{}", '{"request": "r", "completion": {"words": "a"}}'):
        file.write_text(f"{line}\n")
        with pytest.raises(UserError, match=r"answers.jsonl, line 1: not (an answer|JSON)"):
            OpenAIEngine("http://localhost/v1", MODELS, answers=file)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        OpenAIEngine("http://localhost/v1", MODELS, answers=tmp_path / "file" / "answers.jsonl")


def test_a_full_disk_leaves_no_half_line_for_the_next_to_be_glued_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:9])

    lines = JsonLines(tmp_path / "answers.jsonl")
    lines.append({"a": 1})
    with monkeypatch.context() as disk:
        disk.setattr("builtins.open", lambda path, mode, buffering: Full(path, "ab"))
        with pytest.raises(UserError, match="the disk is full"):
            lines.append({"much": "b" * 99})
    lines.append({"c": 3})
    assert lines.read() == [{"a": 1}, {"c": 3}]


# Pace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def starts(pace: Pace, clock: Clock, costs: Sequence[int]) -> list[float]:
    async def one_by_one() -> list[float]:
        times = []
        for cost in costs:
            await pace.turn()
            times.append(clock.now - 100.0)
            pace.spent(cost)
        return times

    return asyncio.run(one_by_one())


def test_requests_are_spaced() -> None:
    clock = Clock()
    pace = Pace(requests=120, clock=clock, sleep=clock.sleep)
    assert starts(pace, clock, [0] * 4) == pytest.approx([0.0, 0.5, 1.0, 1.5])
    pace.pause(10)
    assert starts(pace, clock, [0, 0]) == pytest.approx([11.5, 12.0])


def test_tokens_are_held_to_their_rate() -> None:
    clock = Clock()
    pace = Pace(tokens=600, clock=clock, sleep=clock.sleep)
    # A minute's allowance of 600 refills by 10 a second. After 500 there are 100 left, after 300
    # more it is overdrawn by 200, which takes 20 s; then 50 are owed, which takes 5 s.
    assert starts(pace, clock, [500, 300, 50, 0]) == pytest.approx([0.0, 0.0, 20.0, 25.0])
    clock.now += 1000  # an idle time earns a minute's worth, no more
    assert starts(pace, clock, [700, 0]) == pytest.approx([1025.0, 1035.0])


def test_no_count_and_no_pause_holds_everyone_up_for_ever() -> None:
    clock = Clock()
    pace = Pace(tokens=600, clock=clock, sleep=clock.sleep)
    # Ten minutes are the most that is ever owed, and a negative count earns nothing.
    assert starts(pace, clock, [10**30, -(10**30), 0]) == pytest.approx([0.0, 600.0, 600.0])
    pace.pause(float("inf"))
    assert starts(pace, clock, [0]) == pytest.approx([1200.0])
    free = Pace(clock=clock, sleep=clock.sleep)
    assert starts(free, clock, [10**30, 0]) == pytest.approx([1200.0, 1200.0])


def test_no_more_requests_at_a_time_than_are_allowed(server: Server) -> None:
    server.fresh(delay=0.02)
    ask(OpenAIEngine(server.url, MODELS, ServerSettings(concurrency=2)), *keys(11))
    assert server.seen()["most"] == 2
