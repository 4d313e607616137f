"""What a body asks for, and what is said of one that asks for what there is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from satune.serve.refusal import Refusal
from satune.serve.requests import CANNOT, LARGEST, Request, read_request
from satune.types import Sampling
from serving import asked

MODELS = ["team", "team/ann"]
OWN = Sampling(20, temperature=0.8)


def read(body: dict[str, Any] | bytes, seed: int | None = 0) -> Request:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_request(data, MODELS, 4, seed)


def refused(body: dict[str, Any] | bytes) -> Refusal:
    with pytest.raises(Refusal) as refusal:
        read(body)
    error = refusal.value.body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return refusal.value


def text_of(*messages: tuple[str, Any]) -> str:
    chat = [{"role": role, "content": content} for role, content in messages]
    return read({"model": "team", "messages": chat}).ask.problem.text


def test_a_question_is_the_problem_as_it_is() -> None:
    assert text_of(("user", " 3+4\n")) == " 3+4\n"
    assert text_of(("user", [{"type": "text", "text": "3"}, {"type": "text", "text": "+4"}])) == (
        "3+4"
    )


def test_earlier_messages_are_part_of_the_problem() -> None:
    assert text_of(("system", "Add."), ("user", "3+4")) == "Add.\n\n3+4"
    assert text_of(("developer", "Add."), ("user", "3+4")) == "Add.\n\n3+4"
    assert text_of(("user", "3+4"), ("assistant", "7"), ("user", "and 1?")) == (
        "user:\n3+4\n\nassistant:\n7\n\nuser:\nand 1?"
    )
    assert text_of(("assistant", None), ("user", "hi")) == "assistant:\n\n\nhi"


def test_what_is_given_stands_in_place_of_the_seats_own() -> None:
    plain = read(asked()).ask
    assert plain.sampling(OWN) == OWN and plain.samples == 1
    given = read(asked(temperature=0.5, top_p=0.9, top_k=-1, n=3, seed=-7)).ask
    assert given.sampling(OWN) == Sampling(20, 0.5, 0.9, 0)
    assert (given.samples, given.seed) == (3, -7)
    assert read(asked(temperature=1e-9)).ask.temperature == 0.0
    most = read(asked(top_k=LARGEST, max_tokens=10**30, seed=-(10**30))).ask
    assert most.sampling(OWN) == Sampling(20, 0.8, top_k=2**31 - 1) and most.seed == -(10**30)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_has_two_names_and_lengthens_nothing(name: str) -> None:
    assert read(asked(**{name: 5})).ask.sampling(OWN).max_new_tokens == 5
    assert read(asked(**{name: 500})).ask.sampling(OWN).max_new_tokens == 20
    both = {"max_tokens": 5, "max_completion_tokens": 5}
    assert read(asked(**both)).ask.max_new_tokens == 5
    assert refused(asked(**{**both, name: 6})).param == "max_tokens"


def test_a_request_without_a_seed_has_the_servers_or_one_of_its_own() -> None:
    assert read(asked(), seed=3).ask.seed == 3
    assert read(asked(seed=4), seed=3).ask.seed == 4
    drawn = {read(asked(), seed=None).ask.seed for _ in range(8)}
    assert len(drawn) > 1


def test_stops_and_streams() -> None:
    assert read(asked(stop="a")).stop == ("a",)
    assert read(asked(stop=["a", "b"])).stop == ("a", "b")
    assert read(asked(stop=None)).stop == ()
    assert refused(asked(stop="")).param == "stop"
    assert refused(asked(stop=["x"] * 17)).param == "stop"
    assert not read(asked(stream_options={"include_usage": False}, stream=True)).include_usage
    usage = {"include_usage": True, "include_obfuscation": False}
    assert read(asked(stream_options=usage, stream=True)).include_usage


@pytest.mark.parametrize("name", CANNOT)
def test_what_a_team_cannot_do_is_refused_and_what_asks_for_nothing_is_not(name: str) -> None:
    for harmless in (None, *CANNOT[name][0]):
        assert read(asked(**{name: harmless})).ask.samples == 1
    refusal = refused(asked(**{name: {"some": "thing"}}))
    assert (refusal.status, refusal.param, refusal.code) == (400, name, "unsupported")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "tool", "content": "7", "tool_call_id": "x"}], "messages[0].role"),
        ([{"role": "king", "content": "7"}], "messages[0].role"),
        ([{"content": "7"}], "messages[0].role"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": "user", "content": " "}], "messages[0].content"),
        ([{"role": "user"}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0]",
        ),
        ([{"role": "user", "content": ["text"]}], "messages[0].content[0]"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "messages[1]",
        ),
        (
            [
                {"role": "assistant", "content": None, "tool_calls": [{}]},
                {"role": "user", "content": "b"},
            ],
            "messages[0]",
        ),
        ("3+4", "messages"),
    ],
)
def test_messages_that_are_none_of_a_chat(messages: Any, param: str) -> None:
    refusal = refused({"model": "team", "messages": messages})
    assert (refusal.status, refusal.param) == (400, param)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 5), ("n", True), ("n", "2"), ("seed", 1.5), ("seed", "1"), ("stop", 3),
        ("temperature", -0.1), ("temperature", 2.1), ("top_p", 1.1), ("top_k", -2),
        ("top_k", 2**31), ("top_k", 10**30),
        ("max_tokens", 0), ("max_completion_tokens", 1.5), ("stream", "yes"), ("model", 3),
        ("stream_options", True),
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_field(field: str, value: Any) -> None:
    refusal = refused(asked(**{**{"model": "team"}, field: value}))
    assert (refusal.status, refusal.param) == (400, field)


def test_unknown_names_have_their_nearest() -> None:
    assert "nearest: temperature" in refused(asked(temprature=1)).message
    refusal = refused(asked(model="team/an"))
    assert refusal.status == 404 and refusal.code == "model_not_found"
    assert "nearest: team/ann" in refusal.message


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 100_000,
        b'{"seed":' + b"9" * 5000 + b"}", b'{"temperature": NaN}', b'{"n": Infinity}',
    ],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_json_object(body: bytes) -> None:
    refusal = refused(body)
    assert (refusal.status, refusal.code) == (400, "bad_body")


def test_half_a_surrogate_pair_is_mended() -> None:
    body = b'{"model":"team","messages":[{"role":"user","content":"a\\ud800b \\ud83d\\ude00"}]}'
    assert read(body).ask.problem.text == "a\ufffdb \U0001f600"
    refused(b'{"\\ud800": 1, "model": "team", "messages": []}').message.encode()
