"""What hosts and runs refuse, each in one line, and what a host answers to whoever asks."""

from __future__ import annotations

import http.client
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_world
from owners import TOKEN, Owners, owners
from satune.commands.assemble import assemble
from satune.commands.host import assemble_owners, own_agents
from satune.commands.recipe_digest import facts_of
from satune.commands.reseat import find_team
from satune.commands.trust import Trust
from satune.config.load import load_recipe
from satune.hosts import owner as owner_module
from satune.hosts import server as server_module
from satune.hosts.client import Client, HostLost
from satune.hosts.server import LARGEST, HostServer, Kept
from satune.team import load_team
from satune.types import UserError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world.build(tmp_path_factory.mktemp("refusals"))


@pytest.fixture(scope="module")
def there(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owners]:
    with owners(recipe, tmp_path_factory.mktemp("owners"), ["bob"]) as found:
        yield found


def port_of(there: Owners) -> int:
    return there.servers["bob"].server_address[1]


def refusal(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        assemble(load_recipe(recipe, overrides))
    line = str(caught.value)
    assert "\n" not in line
    return line


# -- the run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rollout.samples=3", "was started with another recipe"),
        ("objective.clip=0.1", "was started with another recipe"),
        ("team.agents.bob.temperature=0.5", "was started with another recipe"),
        ("team.agents.bob.host_token_env=NO_SUCH", "$NO_SUCH holds no token"),
    ],
)
def test_a_host_that_does_not_fit(there: Owners, recipe: Path, override: str, said: str) -> None:
    line = refusal(recipe, *there.hosts, override)
    assert "bob" in line and said in line


def test_a_host_that_is_another(
    there: Owners, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{port_of(there)}"
    assert "keeps no agent 'ann'; there is bob" in refusal(recipe, f"team.agents.ann.host={url}")
    monkeypatch.setenv("SATUNE_HOST_TOKEN", "guessed")
    assert "the token is not the owner's" in refusal(recipe, *there.hosts)


def test_what_is_no_host(recipe: Path, there: Owners) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        assert "is no satune host (status 501" in refusal(recipe, f"team.agents.bob.host={url}")
    finally:
        server.shutdown()
        server.server_close()
    line = refusal(recipe, f"team.agents.bob.host={url}")
    assert "is lost" in line and "see that it runs" in line


def test_a_host_that_does_not_answer_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client("bob", f"http://127.0.0.1:{silent.getsockname()[1]}", "t", 0.05)
        with pytest.raises(HostLost, match=r"no answer to improve in 0\.05 s"):
            client.ask("improve")
        # Nobody waits for it a second time but to see whether it is there again.
        silent.close()
        with pytest.raises(HostLost, match=r"no answer to improve"):
            client.ask("commit")
        with pytest.raises(HostLost, match="hello"):
            client.ask("hello")


def test_a_question_may_be_given_less_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client("bob", f"http://127.0.0.1:{silent.getsockname()[1]}", "t", 60)
        started = time.monotonic()
        with pytest.raises(HostLost, match=r"no answer to hello in 0\.05 s \(hosts\.wait\)"):
            client.ask("hello", timeout=0.05)
        assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [(502, b"<html>Bad Gateway</html>", "status 502"), (503, b"", "status 503"),
     (504, b'{"error": "upstream"}', "upstream")],
)  # fmt: skip
def test_a_proxy_that_finds_nobody_behind_it(status: int, body: bytes, said: str) -> None:
    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        client = Client("bob", f"http://127.0.0.1:{server.server_address[1]}", "t", 5)
        with pytest.raises(HostLost, match=f"agent bob: its host http://.* is lost .{said}"):
            client.ask("improve")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["certify.problems=8", "certify.accept=certified", "certify.evidence=balance"],
         "certify.evidence: balance rests on ratios that the hosts of bob report"),
        (["sharding={}"], "sharding: one process drives agents that live elsewhere (bob)"),
        (["engine.order=throughput"], "engine.order: throughput is not for agents"),
        (["team.agents.bob.host=bob.example.org"], "expected http://ADDRESS"),
        (["team.agents.bob.host=https://me:s3cret@bob.example.org"], "holds a user, a password"),
        (["team.agents.bob.host=https://s3cret@bob.example.org"], "holds a user, a password"),
        (["team.agents.bob.host=https://bob.example.org/x?key=s3cret"], "or a query"),
        (["team.agents.bob.trust_remote_code=true"], "no code of it runs here"),
    ],
)  # fmt: skip
def test_recipes_that_hosts_have_no_part_in(recipe: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, ["team.agents.bob.host=http://127.0.0.1:1", *overrides])
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_what_each_side_may_have_of_its_own(recipe: Path) -> None:
    ours = facts_of(load_recipe(recipe))
    for own in (
        "team.agents.bob.model=/elsewhere", "team.agents.bob.delta=0.1", "team.device=cuda",
        "team.agents.bob.device=cuda:1",
        "team.agents.bob.host=https://x.example", "task.data=/other.jsonl", "stages=9",
        "engine.max_rows=7", "hosts.wait=3",
    ):  # fmt: skip
        assert facts_of(load_recipe(recipe, [own])) == ours, own
    for common in ("seed=1", "team.dtype=float64", "optimizer.lr=1e-4", "protocol=debate"):
        assert facts_of(load_recipe(recipe, [common])) != ours, common


def test_a_saved_team_has_a_reference_in_an_agents_place(
    there: Owners, recipe: Path, tmp_path: Path
) -> None:
    cast = assemble(load_recipe(recipe, there.hosts))
    cast.team.save(tmp_path / "team", digests={"bob": "d1"})
    entry = json.loads((tmp_path / "team" / "manifest.json").read_text())["agents"]["bob"]
    assert entry["host"].startswith("http://127.0.0.1") and entry["digest"] == "d1"
    assert "dir" not in entry and not (tmp_path / "team" / "bob").exists()
    assert entry["host_token_env"] == "SATUNE_HOST_TOKEN"
    team = load_team(tmp_path / "team", device="cpu", hosts={"bob": "http://elsewhere"})
    assert list(team.policies) == ["ann"] and team.specs["bob"].host == "http://elsewhere"
    allowed = Trust.of(code=True, allowed=[f"{entry['host']}=SATUNE_HOST_TOKEN"])
    found = find_team(tmp_path / "team", None, allowed)
    assert found.recipe.team.agents["bob"].host == entry["host"] and found.digests == {"bob": "d1"}
    with pytest.raises(UserError, match="to let it, add --allow-address"):
        find_team(tmp_path / "team", None, Trust(code=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"host": "ftp://x"}, "its host is no plain http or https address"),
        ({"host": "http://me:s3cret@x"}, "its host is no plain http or https address"),
        ({"host_token_env": "A B"}, "its host_token_env is no name of an environment variable"),
        ({"host_token_env": 1}, "its host_token_env is no name of an environment variable"),
        ({"digest": None}, "it has no digest of the weights"),
        ({"digest": ""}, "it has no digest of the weights"),
    ],
)
def test_a_reference_that_is_damaged(
    there: Owners, recipe: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    cast = assemble(load_recipe(recipe, there.hosts))
    cast.team.save(tmp_path / "team", digests={"bob": "d1"})
    path = tmp_path / "team" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["agents"]["bob"].update(change)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"damaged manifest \(agents.bob: {said}"):
        load_team(tmp_path / "team")


# -- the owner -----------------------------------------------------------------------------------


def test_an_owner_of_nobody(recipe: Path, tmp_path: Path, there: Owners) -> None:
    with pytest.raises(
        UserError, match=r"--agent: the team has no agent 'bop'; did you mean 'bob'"
    ):
        assemble_owners(load_recipe(recipe), {"bop": tmp_path})
    with pytest.raises(UserError, match="--agent bob: is named twice"):
        own_agents(load_recipe(recipe), ["bob", "ann", "bob"])
    with pytest.raises(UserError, match="cannot listen there"):
        HostServer(("127.0.0.1", port_of(there)), {"bob": Kept(there.owner("bob"), TOKEN)})


def post(there: Owners, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(there), timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", path, body, {"Authorization": f"Bearer {TOKEN}", **named})
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def test_who_has_no_token_is_told_nothing(there: Owners) -> None:
    for token in ("", "Bearer", "Bearer ", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xff"):
        status, said = post(there, "/bob/hello", b"{}", Authorization=token)
        assert (status, said) == (401, {"error": "the token is not the owner's"})


def test_each_agent_of_an_owner_has_a_token_of_its_own(there: Owners) -> None:
    kept = {name: Kept(there.owner("bob"), f"token of {name}") for name in ("ann", "bob", "cem")}
    kept["dan"] = Kept(there.owner("bob"), "token of ann")
    with HostServer(("127.0.0.1", 0), kept) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"

        def hello(agent: str, token: str) -> dict[str, Any]:
            return Client(agent, url, f"token of {token}", 30).ask("hello")

        assert hello("ann", "ann")["agent"] == hello("dan", "ann")["agent"] == "bob"
        for agent in ("bob", "cem"):
            with pytest.raises(UserError, match=f"agent {agent}: .*: the token is not the owner's"):
                hello(agent, "ann")
        with pytest.raises(UserError, match=r"keeps no agent 'eve'; there is ann, dan$"):
            hello("eve", "ann")  # who may ask some is told of no others
        with pytest.raises(UserError, match="the token is not the owner's"):
            hello("eve", "eve")
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/bob/hello", b"[]", 400, "no JSON object"),
        ("/bob/hello", b"\xff{", 400, "no JSON object"),
        ("/bob/nothing", b"{}", 400, "no verb 'nothing'"),
        ("/bob/__init__", b"{}", 400, "no verb '__init__'"),
        ("/bob/begin", b"{}", 400, "of another form"),
        ("/bob/publish", b"{}", 409, "stands nowhere"),
        ("/bob/publish", b'{"run": "x", "forget": [], "version": 1}', 409, "stands nowhere"),
        (
            "/bob/stand",
            b'{"run": "x", "name": "../../etc", "digest": ""}',
            400,
            "has no checkpoint",
        ),
        ("/prefix/bob/hello", b"{}", 200, None),
        ("/ann/hello", b"{}", 404, "keeps no agent 'ann'; there is bob"),
        ("/hello", b"{}", 404, "keeps no agent ''"),
        ("hello", b"{}", 404, "keeps no agent ''"),
        ("/bob/hello/", b"{}", 404, "keeps no agent 'hello'"),
    ],
)
def test_what_an_owner_answers(
    there: Owners, path: str, body: bytes, status: int, said: str | None
) -> None:
    found, answer = post(there, path, body)
    assert found == status
    assert said in answer["error"] if said else answer["agent"] == "bob"


def test_a_message_has_to_say_how_long_it_is(there: Owners) -> None:
    status, answer = post(there, "/bob/hello", b"", Content_Length=str(LARGEST + 1))
    assert status == 413 and "at most" in answer["error"]
    status, answer = post(there, "/bob/hello", b"", Content_Length="-1")
    assert status == 411


def test_a_run_cannot_ask_for_more_than_the_recipe_has(there: Owners, recipe: Path) -> None:
    assert post(there, "/bob/begin", b'{"run": "r1"}')[0] == 200
    key = {"seed": 0, "purpose": "train", "problem": "p", "seat": "bob"}
    asked = {"number": 1, "key": key, "sampling": {"max_new_tokens": 7}, "at": 0, "entries": []}
    for change, said in (
        ({}, "at most 6 tokens"),
        ({"sampling": {"max_new_tokens": 6}, "key": {**key, "seat": "ann"}}, "no seat ann"),
        ({"sampling": {"max_new_tokens": 6}, "at": 3}, "does not know the conversation"),
    ):
        message = {"run": "r1", "forget": [], "news": [], "decode": True}
        body = json.dumps({**message, "requests": [{**asked, **change}]}).encode()
        status, answer = post(there, "/bob/decode", body)
        assert status == 400 and said in answer["error"]
    unknown = json.dumps({"run": "r1", "forget": [], "name": "0-1"}).encode()
    for verb in ("place", "revert", "digest"):
        assert post(there, f"/bob/{verb}", unknown)[0] == 400


def ask(there: Owners, verb: str, **message: Any) -> tuple[int, dict[str, Any]]:
    return post(there, f"/bob/{verb}", json.dumps({"run": "r1", "forget": [], **message}).encode())


def test_weights_are_placed_no_further_than_they_are(there: Owners) -> None:
    """Beyond them the region has not looked."""
    assert post(there, "/bob/begin", b'{"run": "r1"}')[0] == 200
    (anchor, target) = (ask(there, "hold")[1]["name"] for _ in range(2))
    for scale in (0, 0.5, 1):
        assert ask(there, "place", anchor=anchor, name=target, scale=scale)[0] == 200
    for scale in (1.001, 1000, -0.5, float("nan"), float("inf")):
        status, answer = ask(there, "place", anchor=anchor, name=target, scale=scale)
        assert (status, answer["error"]) == (400, "scale: give a share from 0 to 1")
    assert ask(there, "place", anchor=anchor, name=target)[0] == 400


def test_a_fault_of_the_host_is_not_the_messages(
    there: Owners, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise KeyError("/home/owner/secret")

    monkeypatch.setattr(owner_module, "improve", fails)
    assert post(there, "/bob/begin", b'{"run": "r1"}')[0] == 200
    told: dict[str, Any] = {
        "experience": {"episodes": [], "log_weights": [], "log_ratios": None},
        "key": {"seed": 0, "purpose": "update"},
        "beta": 0.0,
        "cap": None,
    }
    status, answer = ask(there, "improve", **told)
    assert (status, answer["error"]) == (500, "improve failed; its log says why")
    assert "/home/owner/secret" in caplog.text
    without = {name: value for name, value in told.items() if name != "beta"}
    for wrong in (without, {**told, "key": 3}, {**told, "experience": {"episodes": [{}]}}):
        status, answer = ask(there, "improve", **wrong)
        assert status == 400 and "improve: a message of another form" in answer["error"]


def test_a_connection_that_says_nothing_is_not_held(
    there: Owners, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = server_module._Handler
    assert handler.timeout == server_module._SECONDS
    monkeypatch.setattr(handler, "timeout", 0.1)
    question = (
        f"POST /hello HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 2\r\n\r\n{{}}"
    ).encode()
    # Before a token, and after an answer.
    for said in (b"", b"POST /hello HTTP/1.1\r\n", question):
        with socket.create_connection(("127.0.0.1", port_of(there)), timeout=10) as connection:
            connection.sendall(said)
            while connection.recv(4096):
                pass
