"""What counts as a reply, and what one that failed is called."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from satune.engines.failures import (
    BROKEN,
    FILTERED,
    MALFORMED,
    OVERFLOW,
    REFUSAL,
    TOOL_CALL,
    Failed,
    Kind,
)
from satune.engines.replies import MOST_TOKENS, Reply, ReplyReader, retry_after

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "13_server_replies.jsonl"


def read(*pieces: bytes | str, charset: str = "utf-8") -> Reply:
    reader = ReplyReader(charset)
    for piece in pieces:
        reader.feed(piece if isinstance(piece, bytes) else piece.encode())
    return reader.end()


def failed(*pieces: bytes | str) -> Failed:
    with pytest.raises(Failed) as error:
        read(*pieces)
    return error.value


def whole(message: Any, finish: Any = "stop", **more: Any) -> str:
    return json.dumps({"choices": [{"message": message, "finish_reason": finish, **more}]})


def said(content: Any, finish: Any = "stop", **more: Any) -> str:
    return whole({"role": "assistant", "content": content}, finish, **more)


def event(delta: Any, finish: Any = None) -> str:
    return "data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]}) + "\n\n"


A, END = event({"role": "assistant", "content": "a"}), event({}, "stop")


# Whole


@pytest.mark.parametrize(
    "body",
    [
        "", " \n", "[]", "{}", '{"choices": []}', '{"choices": null}', '{"choices": [null]}',
        '{"choices": [{}]}', '{"choices": {"a": 1}}', '{"choices": "abc"}', "<html>no</html>", "7",
        '{"choices": [{"message": "a", "finish_reason": "stop"}]}',
        '{"choices": [{"message": {"content": "a"}}]}', "null", '"text"', '{"choices": 5}',
        "[" * 100_000, said(7), said([7]), said([{"type": "image_url"}]), said({}),
        said("a", None), said("a", 3), said("a", ["stop"]), said("a", {"reason": "stop"}),
    ],
)  # fmt: skip
def test_bodies_that_are_no_reply(body: str) -> None:
    assert failed(body).kind is MALFORMED


def test_content_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}, "c"]
    assert read(said(parts)).text == "abc"
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    assert read(said([thought, {"type": "text", "text": "a"}])) == Reply("a", "stop", 0, 0)
    assert read(said({"type": "text", "text": "a"})).text == "a"
    assert read(said([])).text == "" == read(said(None)).text
    assert read(event({"content": parts}) + END).text == "abc"


def test_thoughts_alone_are_noted() -> None:
    message = {"content": None, "reasoning_content": "so it is 2"}
    for finish in ("stop", "length"):
        reply = read(whole(message, finish))
        assert (reply.text, reply.finish_reason) == ("", finish)
        assert reply.note == "no content, reasoning alone (10 characters)"
    streamed = event({"reasoning": "so it"}) + event({"reasoning": " is 2"}) + END
    assert read(streamed).note == reply.note
    assert read(whole({"content": "2", "reasoning_content": "so"})).note == ""


FINISHED: dict[str, str | Kind] = {
    **dict.fromkeys(("stop", "STOP", "eos", "end_turn", "stop_sequence", "COMPLETE"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "MAX_TOKENS", "model_length"), "length"),
    **dict.fromkeys(("content_filter", "SAFETY", "content_filter: HATE"), FILTERED),
    "refusal": REFUSAL,
    **dict.fromkeys(("tool_calls", "function_call", "tool_use"), TOOL_CALL),
    **dict.fromkeys(("error", "abort", "cancelled", "insufficient_system_resource"), BROKEN),
    "never heard of": "stop",
}


@pytest.mark.parametrize("reason", FINISHED)
def test_every_finish_reason_has_a_meaning(reason: str) -> None:
    want = FINISHED[reason]
    for body in (said("text", reason), event({"content": "text"}) + event({}, reason)):
        if isinstance(want, Kind):
            assert failed(body).kind is want
        else:
            assert read(body) == Reply("text", want, 0, 0)  # type: ignore[arg-type]


def test_what_else_is_no_answer() -> None:
    assert failed(said("", "never heard of")).kind is BROKEN
    broken = failed(said("", "stop", error={"code": 502, "message": "up\nstream"}))
    assert (broken.kind, broken.said) == (BROKEN, "up stream")
    assert failed(whole({"content": None, "refusal": "I will not."})).kind is REFUSAL
    assert failed(event({"refusal": "I will"}) + event({"refusal": " not."}, "stop")).said == (
        "I will not."
    )
    assert failed(whole({"content": None, "tool_calls": [{"id": 1}]})).kind is TOOL_CALL
    # Under a good status, as a proxy or a stream that has begun tells of it.
    assert failed('{"error": {"message": "engine is dead"}}').kind is BROKEN
    assert failed('{"object": "error", "message": "dead"}').said == "dead"
    assert failed(A, 'data: {"error": {"message": "dead"}}\n\n').kind is BROKEN
    assert failed(A, 'error: {"message": "the context size is too small"}\n\n').kind is OVERFLOW
    assert failed('{"error": "maximum context length is 9"}').kind is OVERFLOW
    assert len(failed(json.dumps({"error": [{"why": "a" * 10**6}]})).said) < 1000
    assert failed('{"error": ' + "[" * 900 + "1" + "]" * 900 + "}").kind is BROKEN


def test_an_empty_answer_is_one() -> None:
    assert read(said("")) == Reply("", "stop", 0, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "value",
    [-1, "7", 10**30, MOST_TOKENS + 1, 1.5, True, None, [7], {"a": 1}, float("inf"), float("nan")],
)
def test_counts_that_are_none_count_nothing(value: Any, stream: bool) -> None:
    usage = {"prompt_tokens": value, "completion_tokens": 3}
    body = json.loads(said("a")) | {"usage": usage}
    last = "data: " + json.dumps({"choices": [], "usage": usage}) + "\n\n"
    assert read(A + END + last if stream else json.dumps(body)) == Reply("a", "stop", 0, 3)
    assert read(json.dumps(body | {"usage": value and [usage]})).completion_tokens == 0


def test_a_failed_reply_tells_its_cost() -> None:
    body = json.loads(said("a", "content_filter"))
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    assert failed(json.dumps(body | {"usage": usage})).tokens == 7


def test_halves_of_surrogate_pairs() -> None:
    body = r'{"choices":[{"message":{"content":"\ud83d \\boxed{2}"},"finish_reason":"stop"}]}'
    assert read(body).text == "\ufffd \\boxed{2}"
    assert (
        read(event({"content": "\ud83d"}), event({"content": "\ude00"}), END).text == "\U0001f600"
    )


# Streams


def test_a_stream_is_whole_once_its_finish_reason_came() -> None:
    usage = 'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}\n\n'
    noise = ": ping\n\n\nevent: x\nid: 5\nretry: 9\ndata:\n\ndata: \ndata\n\n"
    got = read(noise, A, noise, A, END, usage, "data: [DONE]\n\ndata: nonsense\n\n")
    assert got == Reply("aa", "stop", 5, 2)
    assert read(A, END).text == "a" == read(A, END.rstrip()).text
    for broken in ([": ping"], [A], [A, "data: [DONE]\n\n"], [A, "data: {\n\n", END]):
        assert failed(*broken).kind is MALFORMED


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@given(cuts=st.lists(st.integers(0, 500), max_size=12))
def test_whatever_the_pieces_and_line_ends(end: str, cuts: Sequence[int]) -> None:
    text = "\ufeff: a comment\n\n" + A + event({"content": "é\u2028\u2029\x85b"}) + END
    text += 'data: {"choices": [],\ndata: "usage":\ndata:{"completion_tokens": 4}}\n\n'
    body = json_unescaped(text).replace("\n", end).encode()
    places = sorted({0, len(body), *(c for c in cuts if c < len(body))})
    pieces = [body[a:b] for a, b in itertools.pairwise(places)]
    assert read(*pieces) == Reply("aé\u2028\u2029\x85b", "stop", 0, 4)


def json_unescaped(text: str) -> str:
    """Characters as they are, as servers send them, in place of JSON's escapes."""
    for code in ("00e9", "2028", "2029", "0085"):
        text = text.replace(f"\\u{code}", chr(int(code, 16)))
    return text


def test_events_that_end_with_one_line_end() -> None:
    assert read((A + A + END).replace("\n\n", "\n"), "data: [DONE]\n", "data: x\n").text == "aa"


def test_deltas_of_odd_forms() -> None:
    assert read(A, event(None), 'data: {"choices": null}\n\n', END).text == "a"
    assert read('data: {"choices": [{"message": {"content": "a"}}]}\n\n', END).text == "a"
    other = 'data: {"choices": [{"index": 1, "delta": {"content": "b"}}]}\n\n'
    assert read(A, other, END).text == "a"
    for odd in ("a", [1], 7):
        assert failed(A, event(odd), END).kind is MALFORMED
    for odd in ('{"choices": [null]}', "[]", "7", "null", "[" * 50_000):
        assert failed(A, f"data: {odd}\n\n", END).kind is MALFORMED


def test_the_first_character_tells_the_form_and_no_type() -> None:
    assert read("\ufeff\n\n", said("a")).text == "a"
    assert read(said("é").encode("utf-16")).text == "é"
    assert read("event: x\n", A, END).text == "a"


def test_long_streams_are_read_in_linear_work() -> None:
    # 50,000 deltas, and one line of a megabyte in pieces of a byte: the second would take minutes
    # if each piece were looked at with all before it.
    assert len(read(A * 50_000, END).text) == 50_000
    long = event({"content": "b" * 10**6}).encode()
    assert len(read(*(long[i : i + 1] for i in range(len(long))), END).text) == 10**6


NAMES = [
    "choices", "message", "delta", "content", "finish_reason", "index", "error", "usage", "type",
    "text", "refusal", "reasoning_content", "prompt_tokens", "object", "tool_calls",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(NAMES),
            inner,
            max_size=6,
        )
    ),
    max_leaves=25,
)


@given(JSON, st.booleans())
def test_no_json_is_more_than_a_failure(value: Any, stream: bool) -> None:
    body = json.dumps(value)
    try:
        reply = read(f"data: {body}\n\n" if stream else body, END if stream else b"")
    except Failed as error:
        assert error.said or error.kind in (BROKEN, REFUSAL)
    else:
        reply.text.encode()


@given(st.binary(max_size=300))
def test_no_bytes_are_more_than_a_failure(body: bytes) -> None:
    for piece in (body, b"data: " + body + b"\n\n", b'{"choices": [' + body):
        with pytest.raises(Failed):
            read(piece)


# Retry-After


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("2.5") == 2.5 and retry_after("-1") == 0.0
    assert retry_after(None) is None and retry_after("soon") is None
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    ahead = retry_after("Wed, 21 Oct 2099 07:28:00 GMT")
    assert ahead is not None and ahead > 1e9


@pytest.mark.parametrize(
    "value",
    ["inf", "nan", "-inf", "1e999", "9" * 5000, "Wed, 21 Oct 99999 07:28:00 GMT", "\x00", ",", "-",
     "Mon, 01 Jan 0001 00:00:00 -9999", "Mon, 99 Jan 2030 99:99:99 GMT", "0x10", "²"],
)  # fmt: skip
def test_retry_after_that_makes_no_sense(value: str) -> None:
    wait = retry_after(value)
    assert wait is None or 0 <= wait < float("inf")


# Replies that were got wrong


@pytest.mark.skipif(not CASES.is_file(), reason="no shared cases here")
def test_replies_of_other_servers() -> None:
    rows = {}
    for line in CASES.read_bytes().splitlines():
        row = json.loads(line)
        body = row.get("body_ascii", row.get("body"))
        rows[row["case"]] = body if isinstance(body, str) else json.dumps(body)
    assert "\\boxed{2}" in read(rows["stream, raw U+2028 in content"], "\n\n", END).text
    assert read(rows["content parts"]).text == "\\boxed{2}"
    assert failed(rows["choice error"]).kind is BROKEN
    assert read(rows["lone surrogate, then a second seat"]).text == "\ufffd \\boxed{2}"
    assert failed(rows["400 context length for one problem"]).kind is OVERFLOW
    assert read(rows["answer in reasoning_content"]).note
