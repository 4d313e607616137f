"""Teams with agents that live with their owners, evaluated, served and talked to: what comes of it
is what one process would have made of the same team."""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import tiny_world
from command_line import Run
from owners import TOKEN as HELD
from owners import Owners, alone, owners
from satune.agents.messages import TemplateSettings
from satune.cli.served import load_served
from satune.commands.host import assemble_owners
from satune.config.load import load_recipe
from satune.engines.hosted import HostedEngine, HostedRequest, Turned
from satune.engines.request import conversation_id
from satune.hosts import visits as visits_module
from satune.hosts.client import Client, HostLost
from satune.hosts.owner import Owner
from satune.hosts.visit import VisitedAgent
from satune.hosts.wire import FORMAT, Estranged
from satune.serve.refusal import Refusal
from satune.serve.requests import Ask
from satune.serve.served import ServedTeam
from satune.serve.settings import MODEL
from satune.types import (
    Entry,
    EpisodeFailure,
    Key,
    Problem,
    Prompt,
    Sampling,
    UserError,
    ids_of,
)

TOKEN = "SATUNE_HOST_TOKEN"
READ = asdict(TemplateSettings())


@dataclass
class World:
    """One run in one process, ``one``, and the same with two owners, ``two``, who are ``there``
    still with what they have learnt."""

    recipe: Path
    one: Path
    two: Path
    there: Owners

    def allowed(self) -> list[str]:
        urls = [self.there.url(agent) for agent in self.there.servers]
        return [word for url in urls for word in ("--allow-address", f"{url}={TOKEN}")]

    def moved(self) -> list[str]:
        there = self.there
        return [w for a in there.servers for w in ("--agent-host", f"{a}={there.url(a)}")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("visits")
    recipe = tiny_world.build(folder / "world")
    alone(recipe, folder / "one", "stages=1")
    with owners(recipe, folder / "owners", ["ann", "bob"], ["stages=1"]) as there:
        there.train(folder / "two")
        yield World(recipe, folder / "one", folder / "two", there)


# -- equal to one process ------------------------------------------------------------------------


def conversations(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "conversations.jsonl").read_text().splitlines()]
    # Each set of weights has a number in the run that trains it; a visitor's is always the same.
    for row in rows:
        for turn in row["turns"]:
            turn.pop("version")
    return sorted(rows, key=lambda row: (row["problem"]["id"], row["sample"]))


def report(satune: Run, *words: str | Path, out: Path) -> dict[str, Any]:
    code, printed, said = satune("eval", *words, "--out", out, "--json")
    assert code == 0, said
    found = json.loads(printed)
    found.pop("out")
    return found


@pytest.mark.parametrize("protocol", ["chain", "debate"])
def test_an_evaluation_equals_that_of_one_process(
    world: World, satune: Run, tmp_path: Path, protocol: str
) -> None:
    how = ["-k", "3", "--protocol", protocol]
    here = report(satune, world.one, *how, out=tmp_path / "here")
    there = report(satune, world.two, *how, *world.allowed(), out=tmp_path / "there")
    assert here == there and here["tokens"]
    mine, theirs = conversations(tmp_path / "here"), conversations(tmp_path / "there")
    assert mine == theirs and len(mine) == 9
    assert len({turn["text"] for row in mine for turn in row["turns"]}) > 3


def test_a_recipe_is_evaluated_without_beginning_a_run(
    world: World, satune: Run, tmp_path: Path
) -> None:
    """The owners stand in the run that they were trained in, and stay there."""
    before = {a: world.there.owner(a)._run for a in world.there.servers}
    found = report(
        satune, world.recipe, *world.moved(), "stages=1", "-k", "3", out=tmp_path / "recipe"
    )
    here = report(satune, world.one, "-k", "3", out=tmp_path / "one")
    assert found == here  # it is who lives there now that is evaluated
    assert before == {a: world.there.owner(a)._run for a in world.there.servers}
    assert all(before.values())


def answers(served: ServedTeam, seeds: range, model: str = MODEL) -> list[list[str]]:
    async def all_of_them() -> list[list[str]]:
        asked = [served.ask(Ask(model, Problem.of("q", "3+4"), seed, 2)) for seed in seeds]
        return [[turn.text for a in found for turn in a.turns] for found in await gathered(asked)]

    return asyncio.run(all_of_them())


async def gathered(asked: list[Any]) -> list[Any]:
    return await asyncio.gather(*asked)


def loaded(run: Path, *words: str, **given: Any) -> ServedTeam:
    wanted = {"protocol": "debate", "protocol_options": None}
    return load_served(str(run), list(words), wanted, {}, False, None, **given)


def test_what_is_served_equals_one_process(world: World) -> None:
    here, there = loaded(world.one), loaded(world.two, agent_host=world.moved()[1::2])
    with here.running(), there.running():
        for model in here.models:
            mine, theirs = answers(here, range(4), model), answers(there, range(4), model)
            assert mine == theirs and len({str(each) for each in mine}) == 4
    assert not world.there.owner("bob").visits._speakers  # it has left


def test_a_chat_equals_one_process(
    world: World, satune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for words in ([world.one], [world.two, *world.allowed()]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("3+4\nand 5+6\n"))
        code, out, err = satune("chat", *words, "--seed", "1", "--seats")
        assert code == 0, err
        said.append(out)
    assert said[0] == said[1] and said[0].count("ann:") == 2


def owner_of(recipe: Path, place: Path, *more: str) -> Owner:
    return assemble_owners(load_recipe(recipe, more), {"bob": place})["bob"]


@pytest.mark.parametrize("more", [[], ["team.sharing=lora"]], ids=["whole", "adapter"])
def test_an_agent_that_was_saved_has_the_digest_of_the_one_that_was_trained(
    world: World, tmp_path: Path, more: list[str]
) -> None:
    owner = owner_of(world.recipe, tmp_path / "bob", *more)
    for tensor in owner.learner.policy.trainable().values():  # type: ignore
        tensor.data.add_(0.01)
    digest = owner.answer("visit", {"seats": ["bob"]})["digest"]
    owner.answer("begin", {"run": "r"})
    assert owner.answer("save", {"run": "r", "forget": []})["digest"] == digest
    saved = f"team.agents.bob.model={tmp_path / 'bob' / 'agent' / 'bob'}"
    again = owner_of(world.recipe, tmp_path / "again", *more, saved)
    assert again.answer("visit", {"seats": ["bob"]})["digest"] == digest


# -- beside a run that trains the agent ------------------------------------------------------------


def visited(there: Owners, agent: str = "bob", **more: Any) -> VisitedAgent:
    client = Client(agent, there.url(agent), HELD, 60)
    return VisitedAgent(agent, client, [agent], version("satune"), READ, **more)


def written(agent: VisitedAgent, samples: int = 3, tokens: int = 6) -> list[str]:
    """What the agent says to one text, a few times at once."""
    engine = HostedEngine({}, {"bob": "bob"}, {"bob": agent})
    entry = Entry("problem", parts=({"type": "text", "text": "1+1"},))
    prompt = Prompt(({"at": 0, "entries": (entry,)},))

    async def one(sample: int) -> str:
        key = Key(0, "evaluate", problem="p", sample=sample, seat="bob")
        engine.begin(key)
        said = await engine.generate("bob", prompt, Sampling(tokens - sample), key)
        engine.end(key)
        return said.text

    async def several() -> list[str]:
        return await asyncio.gather(*map(one, range(samples)))

    return asyncio.run(several())


def test_visitors_change_nothing_of_a_run(world: World, tmp_path: Path) -> None:
    """Between any two events of it somebody asks, and leaves questions half answered."""
    heard: list[list[str]] = []
    with owners(world.recipe, tmp_path / "owners", ["ann", "bob"], ["stages=1"]) as there:

        def ask(event: Any) -> None:
            agent = visited(there)
            heard.append(written(agent))
            agent.client.ask("speak", {
                "visit": agent._visit, "digest": agent.digest, "news": [], "decode": True,
                "requests": [
                    {"number": n, "at": 0, "sampling": {"max_new_tokens": 1 + 5 * n},
                     "key": {"seed": 0, "purpose": "train", "stage": 1, "step": 1, "problem": "r0",
                             "sample": n, "seat": "bob"},
                     "entries": []} for n in range(2)],
            })  # fmt: skip

        there.train(tmp_path / "two", watch=ask)
        assert tiny_world.events(world.one) == tiny_world.events(tmp_path / "two")
        for agent in ("ann", "bob"):
            beside, alone = there.owner(agent), world.there.owner(agent)
            assert beside.in_place == alone.in_place
            # No batch of the run's had a visitor's message in it.
            assert beside.engine.sampled_tokens == alone.engine.sampled_tokens
    assert len({str(each) for each in heard}) > 1  # the agent has learnt meanwhile


def test_weights_that_change_while_an_agent_is_asked(world: World, tmp_path: Path) -> None:
    with owners(world.recipe, tmp_path / "owners", ["bob"]) as there:
        agent = visited(there)
        assert written(agent) == written(agent)
        owner = there.owner("bob")
        owner.answer("begin", {"run": "r"})
        run = {"run": "r", "forget": []}
        name = owner.answer("hold", run)["name"]
        owner._kept[name] = {n: t + 0.01 for n, t in owner._kept[name].items()}  # type: ignore
        assert written(agent)
        owner.answer("place", {**run, "name": name})
        with pytest.raises(UserError, match=r"agent bob: its host \S+: has other weights than"):
            written(agent)


def test_visits_that_are_remembered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visits_module, "MOST", 3)
    visits = world.there.owner("bob").visits
    first, second, third = (visits.enter(["bob"]) for _ in range(3))
    assert visits.speaker(first) is visits.speaker(first)
    fourth = visits.enter(["a", "b"])  # the second has asked nothing for longest
    for gone in (second, "", "nobody"):
        with pytest.raises(Estranged, match="knows nothing of this visit"):
            visits.speaker(gone)
    assert len({id(visits.speaker(each)) for each in (first, third, fourth)}) == 3
    assert visits.speaker(fourth).engine.seats == {"a": "bob", "b": "bob"}
    for each in (first, third, fourth, fourth):
        visits.leave(each)
    assert not visits._speakers


# -- a host that is lost ---------------------------------------------------------------------------


def test_a_served_team_goes_on_when_its_host_is_there_again(world: World, tmp_path: Path) -> None:
    saved = f"team.agents.bob.model={world.there.out / 'bob' / 'agent' / 'bob'}"
    with owners(world.recipe, tmp_path / "owners", [], ["stages=1"]) as there:
        there.start("bob", 0, saved)
        addresses = [f"ann={world.there.url('ann')}", f"bob={there.url('bob')}"]
        served = loaded(world.two, agent_host=addresses)
        here = loaded(world.one)
        with served.running(), here.running():
            expected = answers(here, range(2))
            assert answers(served, range(2)) == expected
            port = there.stop("bob")
            with pytest.raises(Refusal, match="the host of agent bob is lost") as caught:
                answers(served, range(2))
            assert caught.value.status == 502
            there.start("bob", port, saved)
            assert answers(served, range(2)) == expected


class Scripted:
    """A client that is answered as it is told, and lost once where it is told so."""

    url = "http://bob"

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.lost = False

    def ask(self, verb: str, message: Any, timeout: float | None = None) -> dict[str, Any]:
        if verb == "visit":
            return {"format": FORMAT, "agent": "bob", "satune": "1", "template": {},
                    "digest": "d", "visit": f"v{len(self.asked)}"}  # fmt: skip
        self.asked.append((verb, message))
        if self.lost:
            self.lost = False
            raise HostLost("gone")
        said = {"text": "x", "finish_reason": "stop", "version": 0}
        numbers = [request["number"] for request in message["requests"]]
        return {"answers": [{"number": n, "said": said} for n in numbers if message["decode"]]}


def test_a_conversation_that_a_host_has_forgotten_is_played_anew() -> None:
    client: Any = Scripted()
    agent = VisitedAgent("bob", client, ["bob"], "1", {})

    def request(number: int, sample: int) -> HostedRequest:
        key = Key(0, "serve", problem="p", sample=sample, seat="bob")
        prompt = Prompt(({"at": 0, "entries": ()},))
        future: Any = concurrent.futures.Future()
        return HostedRequest(key, ids_of(), Sampling(4), future, key, number=number, prompt=prompt)

    def turned(sample: int, begun: bool = True) -> Turned:
        return Turned(conversation_id(Key(0, "serve", problem="p", sample=sample)), begun)

    def kinds(answers: Any) -> dict[int, bool]:
        """Whether each failed, and by nobody's fault here."""
        failed = {n: isinstance(a, EpisodeFailure) for n, a in answers}
        assert all(not a.policy for _, a in answers if isinstance(a, EpisodeFailure))
        return failed

    begun = [turned(0), turned(1), turned(2)]
    assert agent.decode(begun, [request(1, 0)], decode=False) == []
    client.lost = True
    assert kinds(agent.decode([], [request(2, 1)], decode=True)) == {1: True, 2: True}
    # The third was not asked about; what the host had read of it is gone all the same.
    news = [turned(1, begun=False), turned(1)]
    assert kinds(agent.decode(news, [request(3, 2), request(4, 1)], decode=True)) == {3: True}
    (verb, told) = client.asked[-1]
    assert verb == "speak" and told["visit"] == "v2" and not told["decode"]
    assert [each["number"] for each in told["requests"]] == [4]
    # What is asked for in a conversation that is over is waited for no more.
    news = [turned(1, begun=False), turned(1)]
    assert kinds(agent.decode(news, [request(5, 1)], decode=True)) == {5: False}
    assert not agent._waits


def test_an_evaluation_whose_host_goes_away(world: World, satune: Run, tmp_path: Path) -> None:
    saved = f"team.agents.bob.model={world.there.out / 'bob' / 'agent' / 'bob'}"
    with owners(world.recipe, tmp_path / "owners", [], ["stages=1"]) as there:
        there.start("bob", 0, saved)
        owner, speak = there.owner("bob"), there.owner("bob").visits.speaker

        def die(visit: str) -> Any:
            owner.visits.speaker = speak  # type: ignore[method-assign]
            there.servers["bob"].server_close()
            there.servers["bob"].kill()
            raise AssertionError

        owner.visits.speaker = die  # type: ignore[method-assign]
        words = ["--agent-host", f"ann={world.there.url('ann')}"]
        words += ["--agent-host", f"bob={there.url('bob')}", "-k", "3"]
        code, _, said = satune("eval", world.two, *words, "--out", tmp_path / "out")
        there.servers.clear()
        lines = [line for line in said.splitlines() if line.startswith("error:")]
        assert code == 2 and len(lines) == 1 and "the host of agent bob is lost" in lines[0]


# -- refusals, one line each -----------------------------------------------------------------------


def refused(satune: Run, *words: str | Path) -> str:
    code, _, said = satune("eval", *words)
    lines = [line for line in said.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1, said
    return lines[0]


def test_an_address_is_asked_about(
    world: World, satune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = world.there.url("ann")
    monkeypatch.setenv("SATUNE_STATE", str(tmp_path / "somebody"))  # who has not trained with it
    line = refused(satune, world.two, "--out", tmp_path / "out")
    assert f"--allow-address {url}={TOKEN}" in line
    # Somebody else's word for another variable is none of the user's.
    shutil.copytree(world.two / "team", tmp_path / "team")
    path = tmp_path / "team" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["agents"]["ann"]["host_token_env"] = "HOME"
    path.write_text(json.dumps(manifest))
    line = refused(satune, tmp_path / "team", *world.moved(), "--out", tmp_path / "out")
    assert "the key in $HOME" in line and f"--allow-address {url}=HOME" in line


def test_a_host_that_is_not_there_or_another(
    world: World, satune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bob = (f"{agent}={world.there.url(agent)}" for agent in ("ann", "bob"))

    def line(*words: str) -> str:
        given = [word for each in words for word in ("--agent-host", each)]
        return refused(satune, world.two, *given, "--out", tmp_path / "out")

    assert "agent bob: its host http://127.0.0.1:9 is lost" in line(ann, "bob=http://127.0.0.1:9")
    assert "keeps no agent 'bob'; there is ann" in line(ann, f"bob={world.there.url('ann')}")
    assert "no agent 'bop' lives with its owner (nearest: bob" in line(bob, "bop=http://x")
    assert "--agent-host bob: its host is no plain http or https" in line(ann, "bob=ftp://x")
    assert "--agent-host bob: give NAME=URL" in line("bob")
    assert "--agent-host bob=x: give NAME=URL, each agent once" in line(bob, "bob=x")
    with owners(world.recipe, tmp_path / "owners", ["bob"], ["stages=1"]) as there:
        digest = there.owner("bob").in_place
        said = line(ann, f"bob={there.url('bob')}")
        assert f"has weights with the digest {digest}, the team was saved with" in said
        there.stop("bob")
        there.start("bob", 0, "team.agents.bob.template.names=false")
        assert "was started with another template" in line(ann, f"bob={there.url('bob')}")
    monkeypatch.setenv(TOKEN, "guessed")
    assert "the token is not the owner's" in line(ann, bob)
    monkeypatch.delenv(TOKEN)
    assert f"team.agents.ann.host_token_env: ${TOKEN} holds no token" in line(ann, bob)
    assert not (tmp_path / "out").exists()


def test_what_a_visit_may_not_ask(world: World, satune: Run, tmp_path: Path) -> None:
    more = [*world.moved(), "--out", tmp_path / "out"]
    line = refused(satune, world.two, *more, "--max-new-tokens", "7")
    assert "writes at most 6 tokens a message" in line
    line = refused(satune, world.two, *more, "engine.order=throughput")
    assert "engine.order: agents that live elsewhere" in line
    line = refused(satune, "m", "--base-url", "http://x/v1", "--agent-host", "a=http://y")
    assert "drop it or --base-url" in line
    model = next(iter((world.recipe.parent).glob("model-0")))
    assert "--agent-host: is for a team" in refused(satune, model, *more)
