"""The endpoint over scripted teams: what is answered, and to whom."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from satune.serve.replies import Reply
from satune.serve.requests import read_request
from satune.serve.served import ServedTeam
from satune.types import EpisodeFailure, Turn, UserError
from scripted import ScriptedEngine, by_seat
from serving import CHAT, Client, Stuck, asked, client, events, scripted


def run(served: ServedTeam, script: Any, **more: Any) -> Any:
    """What ``script(client)`` gives, within a minute."""
    return asyncio.run(asyncio.wait_for(script(client(served, **more)), 60))


def test_the_answer_is_the_content_and_the_conversation_the_reasoning() -> None:
    with scripted() as served:
        reply = run(served, lambda c: c.ask(seed=5))
    assert reply["status"] == 200 and reply["object"] == "chat.completion"
    assert re.fullmatch("chatcmpl-[0-9a-f]+", reply["id"])
    assert (reply["model"], reply["seed"], reply["system_fingerprint"]) == ("team", 5, "fp_test")
    (choice,) = reply["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "bob0 of 5.0",
        "reasoning_content": "ann: ann0 of 5.0\n\nbob: bob0 of 5.0",
        "refusal": None,
    }
    assert choice["finish_reason"] == "stop"
    # Ann reads the problem, Bob her message too; each writes 11 characters, a token each.
    assert reply["usage"] == {
        "prompt_tokens": 1 + 2,
        "completion_tokens": 22,
        "total_tokens": 25,
        "completion_tokens_details": {"reasoning_tokens": 11},
    }


def test_a_seat_alone_and_several_answers() -> None:
    with scripted() as served:
        reply = run(served, lambda c: c.ask(model="team/ann", seed=5, n=3))
    contents = [choice["message"]["content"] for choice in reply["choices"]]
    assert contents == ["ann0 of 5.0", "ann0 of 5.1", "ann0 of 5.2"]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert reply["usage"]["completion_tokens"] == 33


def test_a_stream_says_the_same_turn_by_turn() -> None:
    fields: dict[str, Any] = {"seed": 5, "n": 2, "stop": "o"}
    with scripted() as served:
        whole = run(served, lambda c: c.ask(**fields))
        usage = {"include_usage": True}
        found = run(served, lambda c: c.stream(**fields, stream_options=usage))
        without = run(served, lambda c: c.stream(**fields))
    *pieces, last = found
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(piece["usage"] is None for piece in pieces)
    assert not any("usage" in piece for piece in without)
    assert len({piece["id"] for piece in found}) == 1
    assert {piece["object"] for piece in found} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        deltas = [
            piece["choices"][0]
            for piece in pieces
            if piece["choices"][0]["index"] == choice["index"]
        ]
        said = [delta["delta"] for delta in deltas]
        assert said[0] == {"role": "assistant", "content": ""}
        turns = [delta["reasoning_content"] for delta in said if "reasoning_content" in delta]
        assert len(turns) == 2
        assert "".join(turns) == choice["message"]["reasoning_content"]
        content = "".join(delta.get("content", "") for delta in said)
        assert content == choice["message"]["content"] == "b"
        finishes = [delta["finish_reason"] for delta in deltas]
        assert finishes[-1] == "stop" and set(finishes[:-1]) == {None}


def test_turns_are_streamed_before_the_answer_is_there() -> None:
    class Waits(ScriptedEngine):
        """Bob writes once somebody has heard Ann."""

        heard = False

        async def generate(self, seat, prompt, sampling, key):
            if seat == "bob":
                while not self.heard:
                    await asyncio.sleep(0.001)
            return await super().generate(seat, prompt, sampling, key)

    engine = Waits(by_seat(ann=["a"], bob=["b"]))

    def hear(piece: bytes) -> None:
        engine.heard = engine.heard or b"ann: a" in piece

    with scripted(engine=engine) as served:
        _, _, body = run(served, lambda c: c.send(body=asked(stream=True), hear=hear))
    assert b"bob: b" in body


def test_thoughts_are_no_content() -> None:
    with scripted(by_seat(ann=["<think>7?</think> seven"]), "solo", ["ann"]) as served:
        message = run(served, Client.ask)["choices"][0]["message"]
    assert message["content"] == "seven"
    assert message["reasoning_content"] == "ann: <think>7?</think> seven"


def test_a_thought_that_was_cut_is_an_answer_cut_by_length() -> None:
    with scripted(by_seat(ann=["<think>7"]), "solo", ["ann"]) as served:
        choice = run(served, Client.ask)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")


def test_no_majority_is_an_empty_answer() -> None:
    with scripted(by_seat(ann=["A"], bob=["B"]), "vote") as served:
        choice = run(served, Client.ask)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")


# Failures


class Fails(ScriptedEngine):
    def __init__(self, error: Exception) -> None:
        super().__init__(lambda *_: "a")
        self.error = error

    async def generate(self, seat, prompt, sampling, key):
        if seat == "bob":
            raise self.error
        return await super().generate(seat, prompt, sampling, key)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EpisodeFailure("context: 9 tokens", policy=True), 400, "context_length_exceeded"),
        (EpisodeFailure("context overflow: 9", policy=True), 400, "context_length_exceeded"),
        (EpisodeFailure("connection: lost", policy=False), 502, "failed"),
        (EpisodeFailure("prompt rejected: no", policy=True), 500, "failed"),
        (UserError("the protocol is wrong"), 500, "misconfigured"),
        (RuntimeError("secret"), 500, "internal_error"),
    ],
)
def test_failures_have_openais_shape(error: Exception, status: int, code: str) -> None:
    with scripted(engine=Fails(error)) as served:
        reply = run(served, Client.ask)
        assert (reply["status"], reply["error"]["code"]) == (status, code)
        assert "secret" not in json.dumps(reply)
        *_, last = run(served, Client.stream)
        assert last["error"]["code"] == code
        assert served.asked == 0
        # The others are answered all the same.
        assert run(served, lambda c: c.ask(model="team/ann"))["status"] == 200


def test_a_filtered_answer_says_so() -> None:
    error = EpisodeFailure("content filter: violence", policy=True)
    with scripted(engine=Fails(error)) as served:
        choice = run(served, Client.ask)["choices"][0]
    assert choice["finish_reason"] == "content_filter"


def test_a_conversation_that_a_server_broke_off_is_told_of_anew() -> None:
    class Once(ScriptedEngine):
        broken = False

        async def generate(self, seat, prompt, sampling, key):
            if seat == "bob" and not self.broken:
                self.broken = True
                raise EpisodeFailure("connection: lost", policy=False)
            return await super().generate(seat, prompt, sampling, key)

    with scripted(engine=Once(by_seat(ann=["a"], bob=["b"]))) as served:
        found = run(served, Client.stream)
    turns = [piece["choices"][0]["delta"].get("reasoning_content", "") for piece in found]
    assert "".join(turns) == (
        "ann: a\n\n(a server failed; the conversation begins anew)\n\nann: a\n\nbob: b"
    )


def test_seats_of_one_moment_are_told_of_in_any_order() -> None:
    """That two speak at once, or one again in a later moment, is no new beginning."""
    request = read_request(json.dumps(asked(n=2)).encode(), ["team"], 2, 0)
    reply = Reply(request, "fp")

    def told(index: int, *turns: tuple[int, str]) -> list[bool]:
        said = [
            reply.turn(index, Turn(seat, seat, moment, 0, "x", "stop", 0)) for moment, seat in turns
        ]
        return [b"begins anew" in each for each in said]

    assert told(0, (0, "bob"), (0, "ann"), (1, "ann")) == [False] * 3
    assert told(1, (0, "bob")) == [False]
    # Cut off in the next moment, and once more.
    assert told(0, (0, "ann"), (0, "bob")) == [True, False]
    assert told(0, (0, "bob"), (0, "ann"), (1, "ann")) == [True, False, False]


# Limits and gates


async def until(true: Any) -> None:
    while not true():
        await asyncio.sleep(0.001)


def test_so_many_at_a_time_and_so_many_wait() -> None:
    engine = Stuck()

    async def script(c: Client) -> Any:
        first = [asyncio.create_task(c.ask(seed=i)) for i in range(5)]
        await until(lambda: served.asked == 5 and engine.waiting == 2)
        status, headers, body = await c.send(body=asked())
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(body)["error"]["code"] == "overloaded"
        assert (await c.ask(n=6))["error"]["param"] == "n"
        assert engine.waiting == 2
        engine.go = True
        replies = await asyncio.gather(*first)
        assert [reply["seed"] for reply in replies] == list(range(5))
        return await c.ask()

    with scripted(engine=engine, concurrency=2, waiting=3) as served:
        assert run(served, script)["status"] == 200
        assert served.asked == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_conversation(stream: bool) -> None:
    engine = Stuck()

    async def script(c: Client) -> None:
        leave = asyncio.Event()
        going = asyncio.create_task(c.send(body=asked(stream=stream, n=3), leave=leave))
        await until(lambda: engine.waiting == 3)
        leave.set()
        status, _, body = await going
        assert status == (200 if stream else 0) and b"[DONE]" not in body
        await until(lambda: engine.waiting == 0 and len(engine.ended) == 3)
        assert served.asked == 0
        assert b'status="gone"} 1' in (await c.send("GET", "/metrics"))[2]
        engine.go = True
        assert (await c.ask())["status"] == 200

    with scripted(engine=engine) as served:
        run(served, script)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"localhost", 200), (b"localhost:8000", 200), (b"127.0.0.1:1", 200), (b"[::1]:8000", 200),
        (b"LOCALHOST", 200), (b"evil.example", 421), (b"evil.example:8000", 421), (b"", 421),
        (b"localhost.evil.example", 421), (b"127.0.0.1.evil.example", 421), (b"10.0.0.7", 421),
        (b"gate.example", 200),
    ],
)  # fmt: skip
def test_other_hosts_names_are_refused(host: bytes, status: int) -> None:
    async def script(c: Client) -> int:
        return (await c.send("GET", "/v1/models", headers=[(b"host", host)]))[0]

    with scripted() as served:
        assert run(served, script, hosts=["gate.example"]) == status


def test_two_hosts_or_none_are_refused_and_numbers_pass_where_all_are_listened_at() -> None:
    async def script(c: Client) -> list[int]:
        given = [[], [(b"host", b"localhost")] * 2, [(b"host", b"10.0.0.7:80")]]
        return [(await c.send("GET", "/health", headers=headers))[0] for headers in given]

    with scripted() as served:
        assert run(served, script, numbers=True) == [421, 421, 200]


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/nothing", CHAT])
def test_nothing_is_had_without_the_key(path: str) -> None:
    async def script(c: Client) -> list[int]:
        host = (b"host", b"localhost")
        sent = [
            None,
            b"",
            b"Bearer",
            b"Bearer wrong",
            b"Basic s3cret",
            b"s3cret",
            b"Bearer s3cretx",
        ]
        found = []
        for value in sent:
            headers = [host] if value is None else [host, (b"authorization", value)]
            status, _, body = await c.send("GET", path, headers=headers)
            assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
        for value in (b"Bearer s3cret", b"bearer  s3cret"):
            found.append((await c.send("GET", path, headers=[host, (b"authorization", value)]))[0])
        return found

    with scripted() as served:
        found = run(served, script, key="s3cret")
    assert found == [{"/nothing": 404, CHAT: 405}.get(path, 200)] * 2


def test_a_body_has_its_limit_however_it_comes() -> None:
    kind = (b"content-type", b"application/json")
    host = (b"host", b"localhost")

    async def script(c: Client) -> None:
        long = json.dumps(asked("7" * 1000)).encode()
        for more in ([], [(b"content-length", b"99999")], [(b"content-length", b"9" * 5000)]):
            status, headers, body = await c.send(body=long, headers=[host, kind, *more])
            assert status == 413 and headers["connection"] == "close"
            assert json.loads(body)["error"]["code"] == "too_large"
        assert (await c.ask(text="7" * 900))["status"] == 200
        assert (await c.send(body=long, headers=[host]))[0] == 415
        form = (b"content-type", b"text/plain")
        assert (await c.send(body=asked(), headers=[host, form]))[0] == 415

    with scripted(body=1000) as served:
        run(served, script)


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def script(c: Client) -> int:
        sent: list[dict[str, Any]] = []

        async def never() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers,
                 "query_string": b"", "root_path": "", "http_version": "1.1"}  # fmt: skip
        await c.app(scope, never, send)
        return sent[0]["status"]

    with scripted(arrival=0.01) as served:
        assert run(served, script) == 408


# What else there is


def test_models_health_and_what_is_not_offered() -> None:
    async def script(c: Client) -> None:
        async def get(path: str, method: str = "GET") -> tuple[int, Any]:
            status, _, body = await c.send(method, path)
            return status, json.loads(body)

        status, listed = await get("/v1/models")
        assert [model["id"] for model in listed["data"]] == ["team", "team/ann", "team/bob"]
        assert (await get("/v1/models/team/bob"))[1] == listed["data"][2]
        status, reply = await get("/v1/models/team/bo")
        assert status == 404 and "nearest: team/bob" in reply["error"]["message"]
        assert await get("/health") == (200, {"status": "ok"})
        for path, said in (("/v1/completions", "log-likelihoods"), ("/v1/embeddings", "embeds")):
            status, reply = await get(path, "POST")
            assert status == 404 and said in reply["error"]["message"]
        assert (await get("/v1/models/"))[0] == 404
        assert (await get(CHAT))[0] == 405

    with scripted() as served:
        run(served, script)


def test_metrics_count_what_happened() -> None:
    parser = pytest.importorskip("prometheus_client.parser")

    async def script(c: Client) -> str:
        await c.ask(n=2)
        await c.stream()
        await c.ask(n=0)
        await c.ask(model="none")
        return (await c.send("GET", "/metrics"))[2].decode()

    with scripted() as served:
        text = run(served, script)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["satune_requests_total", "200"] == 2
    assert found["satune_requests_total", "400"] == found["satune_requests_total", "404"] == 1
    assert found["satune_answers_total", "stop"] == 3
    assert found["satune_turns_total",] == 6
    assert found["satune_prompt_tokens_total",] == 9
    assert found["satune_request_seconds_count",] == 2
    assert found["satune_request_seconds_bucket", "+Inf"] == 2
    assert found["satune_asked",] == 0


def test_events_are_read_as_they_are_sent() -> None:
    with pytest.raises(AssertionError):
        events(b'data: {"a": 1}\n\n')
