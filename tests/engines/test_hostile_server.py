"""One bad reply never ends a run: what is asked again, what fails one conversation and by whose
fault, and what stops at once because every request would meet it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from hostile_server import (
    BLIPS,
    HARMLESS,
    PASSING,
    Fault,
    HostileServer,
    Play,
    refusal,
    respond,
    storm,
)
from satune.agents.messages import MessageRenderer, TemplateSettings
from satune.engines.client import STREAM, Client
from satune.engines.openai import OpenAIEngine
from satune.engines.settings import ServerSettings
from satune.play.evaluation import Evaluation, evaluate_async
from satune.play.match import Match
from satune.protocols.sequential import chain
from satune.tasks.catalog import take
from satune.tasks.relay import Relay
from satune.types import Completion, EpisodeFailure, Key, Prompt, Sampling, Seat, UserError
from virtual_time import run_virtually

URL = "http://models.example/v1"
MODELS = {"ann": "good", "bob": "poor", "eve": "good"}
SAMPLING = Sampling(64, temperature=0.8)
SECRET = "sk-very-secret-1234"


def engine_of(server: httpx.AsyncBaseTransport, **more: Any) -> OpenAIEngine:
    """Made inside the loop, whose clock it takes."""
    clock = asyncio.get_running_loop().time
    return OpenAIEngine(URL, MODELS, transport=server, clock=clock, **more)


def prompt(number: int) -> Prompt:
    return Prompt(({"role": "user", "content": f"{number}+4-2"},))


def key(number: int) -> Key:
    return Key(0, "evaluate", problem=str(number), seat="ann")


Outcome = Completion | EpisodeFailure | UserError


def ask(play: Play, count: int = 1, **more: Any) -> tuple[list[Outcome], OpenAIEngine]:
    """What ``count`` prompts get that are asked at once."""

    async def all_of_them() -> tuple[list[Any], OpenAIEngine]:
        engine = engine_of(HostileServer(play), **more)
        wanted = [engine.generate("ann", prompt(i), SAMPLING, key(i)) for i in range(count)]
        got = await asyncio.gather(*wanted, return_exceptions=True)
        await engine.close()
        return got, engine

    got, engine = run_virtually(all_of_them())
    for outcome in got:
        assert isinstance(outcome, Completion | EpisodeFailure | UserError), repr(outcome)
    return got, engine


def clean(count: int = 1) -> list[Outcome]:
    return ask(lambda body, before: None, count)[0]


def always(fault: Fault) -> Play:
    """For every prompt, the plainest too."""
    return lambda body, before: fault


def for_one(fault: Fault, number: int = 0) -> Play:
    """For the prompt of one number, whenever it is asked."""
    asked = prompt(number).messages[0]["content"]
    return lambda body, before: fault if body["messages"][0]["content"] == asked else None


def once_each(fault: Fault) -> Play:
    return lambda body, before: fault if before == 0 else None


def failure(outcome: Outcome) -> EpisodeFailure:
    assert isinstance(outcome, EpisodeFailure), repr(outcome)
    assert outcome.reason == str(outcome) and outcome.reason.isprintable()
    return outcome


def mistake(play: Play, **more: Any) -> str:
    (outcome,) = ask(play, **more)[0]
    assert isinstance(outcome, UserError), repr(outcome)
    assert str(outcome).isprintable()
    return str(outcome)


# What does no harm, what passes


@pytest.mark.parametrize("name", HARMLESS)
def test_answers_of_odd_forms_are_answers(name: str) -> None:
    got, engine = ask(always(HARMLESS[name]), 3)
    assert got == clean(3) and engine.repeated == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_asked_again(name: str, stream: bool) -> None:
    settings = ServerSettings(stream=stream, timeout=30.0)
    got, engine = ask(once_each(PASSING[name]), 3, settings=settings)
    assert got == clean(3)
    assert engine.repeated == 3 and engine.requests == 6


@pytest.mark.parametrize("name", BLIPS)
def test_what_is_the_users_mistake_at_first_is_asked_again_later(name: str) -> None:
    async def first_then_blip() -> list[Completion]:
        server = HostileServer()
        engine = engine_of(server)
        first = await engine.generate("ann", prompt(0), SAMPLING, key(0))
        server.play = once_each(BLIPS[name])
        second = await engine.generate("ann", prompt(1), SAMPLING, key(1))
        assert engine.repeated == 1 and set(server.hosts) == {"models.example"}
        return [first, second]

    assert run_virtually(first_then_blip()) == clean(2)


# A storm


def evaluated(play: Play, problems: int) -> tuple[Evaluation, OpenAIEngine]:
    """Four conversations each, three seats."""

    async def evaluation() -> tuple[Evaluation, OpenAIEngine]:
        settings = ServerSettings(timeout=30.0, tokens_per_minute=100_000)
        engine = engine_of(HostileServer(play), settings=settings)
        renderer = MessageRenderer(TemplateSettings())
        seats = [Seat(name, name, renderer, SAMPLING) for name in MODELS]
        match = Match(seats, chain, engine, Relay())
        chosen = take(Relay(), "eval", problems)
        got = await evaluate_async(match, chosen, 4, Key(0, "evaluate"), per_seat=True)
        await engine.close()
        return got, engine

    return run_virtually(evaluation())


@pytest.fixture
def graded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread takes real time, which in a loop of virtual time is for ever."""

    async def at_once(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr("satune.play.grading.in_thread", at_once)


SIZES = [10, pytest.param(125, marks=pytest.mark.slow)]


@pytest.mark.usefixtures("graded_at_once")
@pytest.mark.parametrize("problems", SIZES)
def test_the_report_of_an_evaluation_in_a_storm_is_that_of_a_clean_server(problems: int) -> None:
    want, plain = evaluated(lambda body, before: None, problems)
    got, engine = evaluated(storm(seed=1), problems)
    assert got == want and 0.05 < want.avg_at_k < 0.95
    assert plain.requests == 12 * problems and engine.repeated > 5 * problems


def under(status: int, body: str) -> Fault:
    return lambda text: respond(body, status)


OVERFLOWS: dict[str, Fault] = {
    "vLLM": refusal(400, "This model's maximum context length is 200 tokens. However, you "
        "requested 300 tokens (236 in the messages, 64 in the completion).", code=400),
    "vLLM, longer": refusal(400, "The decoder prompt (length 300) is longer than the maximum "
        "model length of 200. Make sure that `max_model_len` is no smaller."),
    "vLLM, the limit": refusal(400, "'max_tokens' or 'max_completion_tokens' is too large: 64. "
        "This model's maximum context length is 200 tokens and your request has 150 input tokens"),
    "OpenAI": refusal(400, "Please shorten it.", type="invalid", code="context_length_exceeded"),
    "OpenAI, newer": refusal(400, "Your input exceeds the context window of this model."),
    "OpenAI, tokens": refusal(400, "Input tokens exceed the configured limit of 200 tokens."),
    "llama.cpp": refusal(500, "the request exceeds the available context size. try increasing it"),
    "llama.cpp, newer": refusal(400, "too much", type="exceed_context_size_error", n_ctx=200),
    "llama.cpp, cache": refusal(500, "Context size has been exceeded.", type="server_error"),
    "SGLang": under(400, '{"object": "error", "message": "The input (300 tokens) is longer than '
        'the model\'s context length (200 tokens).", "code": 400}'),
    "Ollama": under(400, '{"error": "the input length exceeds the context length"}'),
    "LM Studio": refusal(400, "Trying to keep the first 300 tokens when context the overflows."),
    "LM Studio, n_keep": under(400, '{"error": "The number of tokens to keep from the initial '
        'prompt is greater than the context length (n_keep: 300>= n_ctx: 200)"}'),
    "LM Studio, stream": under(200, 'event: error\ndata: {"error": {"message": "Trying to keep the '
        'first 300 tokens when context the overflows."}}\n\n'),
    "TGI": under(422, '{"error": "`inputs` tokens + `max_new_tokens` must be <= 200"}'),
    "Anthropic": refusal(400, "prompt is too long: 300 tokens > 200 maximum"),
    "Gemini": refusal(400, "The input token count (300) exceeds the maximum number of tokens"),
    "Mistral": refusal(400, "Prompt contains 300 tokens, too large for model with 200 maximum "
        "context length"),
    "nginx": under(413, "<html>413 Request Entity Too Large</html>"),
    "OpenRouter": under(200, '{"error": {"code": 400, "message": "This endpoint\'s maximum context '
        'length is 200 tokens."}}'),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERFLOWS)
def test_a_prompt_beyond_the_servers_context_fails_alone_and_at_once(name: str) -> None:
    got, engine = ask(for_one(OVERFLOWS[name], 1), 3)
    failed = failure(got[1])
    assert failed.policy and failed.reason.startswith("context overflow: ")
    assert [got[0], got[2]] == [clean(3)[0], clean(3)[2]]
    # Asked once; where nothing had been answered before, the plainest prompt was asked too.
    assert engine.repeated == 0 and engine.requests <= 4


@pytest.mark.parametrize("name", sorted(set(OVERFLOWS) - {"LM Studio, stream", "OpenRouter"}))
def test_a_context_in_which_nothing_fits_is_the_users_mistake(name: str) -> None:
    said = mistake(always(OVERFLOWS[name]))
    assert "even a prompt of one word does not fit" in said and "lower max_new_tokens" in said


LASTING: dict[str, tuple[Fault, str, bool, int]] = {
    # what is sent: the kind of failure, whether it is the policy's, how often it is asked
    "a filter": (PASSING["filtered"], "content filter", True, 9),
    "a refusal": (PASSING["refuses"], "refusal", True, 9),
    "a call": (PASSING["tool"], "tool call", True, 9),
    "Azure's filter": (refusal(400, "triggering Azure's content management policy"),
        "content filter", True, 1),
    "a filter by code": (refusal(400, "no", code="content_filter"), "content filter", True, 1),
    "unlawful": (refusal(451, "unavailable"), "content filter", True, 1),
    "an odd prompt": (refusal(400, "roles must alternate"), "prompt rejected", True, 1),
    "an odd form": (refusal(422, [{"loc": ["body"], "msg": "bad"}]), "prompt rejected", True, 1),
    "a failed reply": (PASSING["finish error"], "failed reply", False, 9),
    "an error": (PASSING["error"], "failed reply", False, 9),
    "a choice's error": (PASSING["choice's error"], "failed reply", False, 9),
    "half": (PASSING["half"], "malformed reply", False, 9),
    "deep": (PASSING["deep"], "malformed reply", False, 9),
    "a bomb": (PASSING["bomb"], "oversized reply", False, 9),
    "500": (PASSING["500"], "server error", False, 9),
    "502": (PASSING["502"], "server error", False, 9),
    "429": (PASSING["429 for ever"], "busy server", False, 9),
    "a reset": (PASSING["reset on the way"], "connection", False, 9),
    "nobody": (PASSING["unreached"], "connection", False, 9),
    "silence": (PASSING["hangs"], "timeout", False, 9),
    "a trickle": (PASSING["trickles"], "timeout", False, 9),
}  # fmt: skip


@pytest.mark.parametrize("name", LASTING)
def test_what_does_not_pass_fails_one_conversation(name: str) -> None:
    fault, kind, policy, times = LASTING[name]
    got, engine = ask(for_one(fault, 1), 3, settings=ServerSettings(timeout=30.0))
    failed = failure(got[1])
    assert (failed.reason.partition(": ")[0], failed.policy) == (kind, policy)
    assert ("(9 attempts)" in failed.reason) == (times == 9)
    assert [got[0], got[2]] == [clean(3)[0], clean(3)[2]]
    assert engine.repeated == times - 1


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_each_request_gets_the_clean_answer_or_a_failure_with_its_flag(count: int) -> None:
    """Every third prompt meets one thing for ever, the others a storm."""
    lasting = [(f, policy) for f, _, policy, _ in LASTING.values()]
    lasting += [(f, True) for f in OVERFLOWS.values()]
    stormy = storm(seed=2)

    def play(body: dict[str, Any], before: int) -> Fault | None:
        number = body["messages"][0]["content"].partition("+")[0]
        if number.isdigit() and int(number) % 3 == 1:
            return lasting[int(number) // 3 % len(lasting)][0]
        return stormy(body, before)

    got, _ = ask(play, count, settings=ServerSettings(timeout=30.0))
    want = clean(count)
    for number, outcome in enumerate(got):
        if number % 3 == 1:
            assert failure(outcome).policy == lasting[number // 3 % len(lasting)][1]
        else:
            assert outcome == want[number]


# What stops at once


MISTAKES: dict[str, tuple[Fault, str]] = {
    "no right": (refusal(401, "who?"), "refuses the key in $OPENAI_API_KEY (status 401: who?)"),
    "forbidden": (refusal(403, "no"), "refuses the key in $OPENAI_API_KEY"),
    "no model": (refusal(404, "no such"), "name a model that it serves, or mend the base URL"),
    "no post": (refusal(405, "GET only"), "name a model that it serves, or mend the base URL"),
    "no money": (refusal(402, "pay"), "the quota is used up (pay)"),
    "no quota": (refusal(429, "pay", code="insufficient_quota"), "the quota is used up (pay)"),
    "sent on": (BLIPS["307"], "it sends on to https://evil.example/v1; give that"),
    "sent with a password": (lambda text: respond("", 301, {"location": "//me:pw@host:9/v1?k=1"}),
        "it sends on to ://host:9/v1; give that"),
    "not modified": (lambda text: respond("", 304, {}), "it sends on to another address"),
    "an option": (refusal(400, "Unrecognized argument: top_k"), "refuses the request to 'good'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_the_users_mistake_stops_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    fault, words = MISTAKES[name]
    (outcome,), engine = ask(always(fault))
    assert isinstance(outcome, UserError) and words in str(outcome)
    assert "pw" not in str(outcome) and "k=1" not in str(outcome) and SECRET not in str(outcome)
    # An option is told from a prompt by the plainest prompt.
    assert engine.requests == (2 if name == "an option" else 1)


def test_an_option_that_one_vendor_names_otherwise() -> None:
    def play(body: dict[str, Any], before: int) -> Fault | None:
        wanted = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return refusal(400, wanted) if "max_tokens" in body else None

    got, engine = ask(play, settings=ServerSettings(retries=0))
    assert isinstance(got[0], Completion) and engine.requests == 2


@pytest.mark.parametrize("name", ["401", "403", "404", "307"])
def test_what_is_refused_from_now_on_stops_the_run_and_one_prompt_does_not(name: str) -> None:
    async def after_an_answer(play: Play) -> Outcome:
        server = HostileServer()
        engine = engine_of(server)
        await engine.generate("ann", prompt(0), SAMPLING, key(0))
        server.play = play
        try:
            return await engine.generate("ann", prompt(1), SAMPLING, key(1))
        except (EpisodeFailure, UserError) as error:
            return error

    assert isinstance(run_virtually(after_an_answer(always(BLIPS[name]))), UserError)
    # A firewall that dislikes what one prompt says.
    alone = failure(run_virtually(after_an_answer(for_one(BLIPS[name], 1))))
    assert alone.policy and alone.reason.startswith(f"prompt rejected: status {name}")


@pytest.mark.parametrize("name", ["unreached", "hangs", "502", "503", "no HTTP"])
def test_a_server_that_was_never_there_is_one_line(name: str) -> None:
    settings = ServerSettings(retries=2, timeout=30.0)
    said = mistake(always(PASSING[name]), settings=settings)
    assert "no answer after 3 attempts" in said and "see that the server runs" in said


def test_a_server_that_goes_away_fails_conversations() -> None:
    def play(body: dict[str, Any], before: int) -> Fault | None:
        seen.update(["asked"])
        return PASSING["unreached"] if seen["asked"] > 2 else None

    seen: Counter[str] = Counter()
    got, _ = ask(play, 6)
    assert sum(isinstance(g, Completion) for g in got) == 2
    assert all(not failure(g).policy for g in got if not isinstance(g, Completion))


# Bounds


def test_the_time_of_a_stream_is_bounded_and_of_a_whole_reply_too() -> None:
    async def spent(stream: bool, fault: Fault) -> float:
        settings = ServerSettings(retries=0, timeout=30.0, stream=stream)
        engine = engine_of(HostileServer(for_one(fault, 1)), settings=settings)
        await engine.generate("ann", prompt(0), SAMPLING, key(0))
        begun = asyncio.get_running_loop().time()
        with pytest.raises(EpisodeFailure, match="timeout"):
            await engine.generate("ann", prompt(1), SAMPLING, key(1))
        return asyncio.get_running_loop().time() - begun

    for fault in (PASSING["trickles"], PASSING["hangs"]):
        assert run_virtually(spent(False, fault)) == pytest.approx(30.0)
        assert run_virtually(spent(True, fault)) == pytest.approx(30.0 * STREAM)


def test_no_count_and_no_header_keeps_the_others_waiting_for_ever() -> None:
    async def hours() -> float:
        faults = [HARMLESS["vast counts"], PASSING["429 for ever"], PASSING["429 till then"]]
        settings = ServerSettings(tokens_per_minute=1000, requests_per_minute=600)
        server = HostileServer()
        engine = engine_of(server, settings=settings)
        for number in range(9):
            server.play = once_each(faults[number % 3])
            await engine.generate("ann", prompt(number), SAMPLING, key(number))
        return asyncio.get_running_loop().time() / 3600

    # A date far ahead is a pause of ten minutes, three times; the others are no number.
    assert 0.5 <= run_virtually(hours()) < 0.51


# Secrets, terminals, records


def messages_of(fault: Fault) -> list[str]:
    return [str(outcome) for play in (always(fault), for_one(fault)) for outcome in ask(play, 2)[0]]


@pytest.mark.parametrize("status", [200, 307, 400, 401, 404, 429, 500])
def test_no_message_holds_a_secret_or_steers_a_terminal(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    evil = (
        f"key {SECRET}\x1b]0;title\x07\x1b[2J\r\n\u2028{SECRET}\x9b31m\u202egnol\ud83d " + "x" * 290
    )
    evil += SECRET
    for body in (json.dumps({"error": {"message": evil}}), json.dumps({"error": {"a": [evil]}})):
        said = messages_of(lambda text, b=body: respond(b, status, {"location": "/" + SECRET}))
        assert len(said) == 4
        for line in said:
            if not line.startswith("Completion"):
                assert SECRET not in line and SECRET[:12] not in line and line.isprintable()
                assert len(line) < 700
    raw = evil.encode("utf-8", "replace")
    for line in messages_of(lambda text: respond(raw, status, {"content-type": "text/plain"})):
        if not line.startswith("Completion"):
            assert SECRET not in line and line.isprintable()


def test_half_a_key_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    client = Client(URL, ServerSettings(), None, lambda: 0.0)
    for before in range(270, 310):  # a message is cut at 300
        assert "sk-" not in client.short("x" * before + SECRET + "y" * 99)


def test_the_key_goes_to_its_own_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)

    async def sent_on() -> Counter[str]:
        server = HostileServer(always(BLIPS["307"]))
        with pytest.raises(UserError, match="sends on"):
            await engine_of(server).generate("ann", prompt(0), SAMPLING, key(0))
        return server.hosts

    assert run_virtually(sent_on()) == {"models.example": 1}


def test_a_reply_without_a_text_is_noted_on_file(tmp_path: Path) -> None:
    silent = '{"choices": [{"message": {"content": null, "reasoning_content": "so it is 2"}, '
    silent += '"finish_reason": "stop"}]}'
    file = tmp_path / "answers.jsonl"
    got, engine = ask(for_one(lambda text: respond(silent), 1), 2, answers=file)
    assert isinstance(got[1], Completion) and got[1].text == "" and engine.silent == 1
    notes = [json.loads(line).get("note") for line in file.read_text().splitlines()]
    assert sorted(notes, key=str) == [None, "no content, reasoning alone (10 characters)"]
    # The file serves again, notes and all.
    away = ask(always(PASSING["unreached"]), 2, answers=file)
    assert away[0] == got and away[1].reused == 2


def test_prompts_with_halves_of_surrogate_pairs_are_asked() -> None:
    async def asked() -> Completion:
        odd = Prompt(({"role": "user", "content": "3+4-2 \ud83d \u2028"},))
        return await engine_of(HostileServer()).generate("ann", odd, SAMPLING, key(0))

    assert run_virtually(asked()).text in ("7-2", "8-2")


def test_the_storm_is_no_calm() -> None:
    """None of what passes is an answer, as it comes."""
    for name, fault in PASSING.items():
        got, _ = ask(always(fault), settings=ServerSettings(retries=0, timeout=1.0))
        assert isinstance(got[0], EpisodeFailure | UserError), name
