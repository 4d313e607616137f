"""vLLM's engine against a stand-in for its server: what is sent, and what is noticed."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from satune.agents.policy import Policy
from satune.engines.vllm import place as places
from satune.engines.vllm import server as servers
from satune.engines.vllm.engine import VLLMEngine
from satune.engines.vllm.proof import compared, finding
from satune.engines.vllm.settings import VLLMSettings
from satune.engines.vllm.worker import satune_worker
from satune.types import Completion, EpisodeFailure, Key, Prompt, Sampling, UserError, ids_of
from tiny_models import EOS, Letters, completion_logprobs, tiny_config, tiny_lm
from vllm_standin import StandIn, serving

KEY = Key(0, "train", stage=1, step=1)
SAMPLING = Sampling(12, temperature=0.8)
PROMPT = (3, 5, 2)
PROBE = 40  # more than two blocks of the stand-in's cache


class Saved(Letters):
    """Letters that can be written beside a model."""

    def save_pretrained(self, directory: str) -> None: ...


def policy_of(name: str = "a", **changes: Any) -> Policy:
    return Policy(name, tiny_lm("llama", **changes).float(), Saved(), 0.8)


def adapters(names: Sequence[str] = ("a", "b")) -> dict[str, Policy]:
    """Policies that have an adapter each on one base; none has changed anything yet."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny_lm("llama").float(), config, adapter_name=f"agent_{names[0]}")
    for name in names[1:]:
        model.add_adapter(f"agent_{name}", config)
    return {n: Policy(n, model, Saved(), 0.8, adapter=f"agent_{n}") for n in names}


def settings(*addresses: str, **changes: Any) -> VLLMSettings:
    return VLLMSettings(servers=addresses, probe=PROBE, **changes)


def draw(
    engine: VLLMEngine,
    keys: Sequence[Key] = (KEY,),
    sampling: Sampling = SAMPLING,
    seat: str = "a",
    ids: Sequence[int] = PROMPT,
) -> list[Completion]:
    async def all_of_them() -> list[Completion]:
        try:
            prompt = Prompt((), ids=ids_of(ids))
            asked = [engine.generate(seat, prompt, sampling, key) for key in keys]
            return list(await asyncio.gather(*asked))
        finally:
            await engine.close()

    return asyncio.run(all_of_them())


def moved(policy: Policy, by: float = 0.05, seed: int = 1) -> dict[str, torch.Tensor]:
    """The policy's weights after a step, which are in place."""
    draws = torch.Generator().manual_seed(seed)
    stepped = {
        name: p + by * torch.randn(p.shape, generator=draws) for name, p in policy.export().items()
    }
    policy.load_weights(stepped)
    return stepped


def keys(count: int) -> list[Key]:
    return [KEY.at(problem="p", sample=n) for n in range(count)]


# -- tokens ----------------------------------------------------------------------------------------


def test_tokens_and_their_log_probabilities_are_the_learners():
    policy = policy_of()
    with serving(StandIn(policy.model)) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address))
        for found in draw(engine, keys(4)):
            assert found.ids is not None and found.logprobs is not None
            expected = completion_logprobs(policy, PROMPT, found.ids)
            torch.testing.assert_close(
                torch.tensor(list(found.logprobs)), expected, atol=1e-5, rtol=0
            )
            assert found.finish_reason == ("stop" if found.ids[-1] == EOS else "length")
            assert EOS not in found.ids[:-1]
            assert found.text == policy.tokenizer.decode(found.ids)
            assert (found.prompt_tokens, found.completion_tokens) == (3, len(found.ids))


def test_a_key_draws_the_same_and_another_one_does_not():
    policy = policy_of()
    with serving(StandIn(policy.model)) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address))
        first, again = draw(engine, keys(6)), draw(engine, keys(6)[::-1])[::-1]
    assert [c.ids for c in first] == [c.ids for c in again]
    assert len({tuple(c.ids or ()) for c in first}) > 3


def test_greedy_and_filters_reach_the_server():
    policy = policy_of()
    standin = StandIn(policy.model)
    with serving(standin) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address))
        (whole,) = draw(engine)
        (found,) = draw(engine, sampling=Sampling(4, temperature=0.0, top_p=0.9, top_k=3))
    asked = standin.asked[-1][1]
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.0, 0.9, 3)
    # What a filter left is not the policy.
    assert found.logprobs is None and whole.logprobs is not None
    assert asked["stop_token_ids"] == [EOS] and asked["ignore_eos"]


def test_a_prompt_without_room_fails_its_conversation_alone():
    policy = policy_of()
    with serving(StandIn(policy.model)) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address))
        with pytest.raises(EpisodeFailure, match="context overflow") as failed:
            draw(engine, ids=[3] * 128)
        assert failed.value.policy
        assert draw(engine)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seat": "b"}, "no seat 'b'; there are: a"),
        ({"ids": ()}, "seat a: vLLM is given token ids, the prompt has none"),
    ],
)
def test_what_cannot_be_asked(change, said):
    policy = policy_of()
    with serving(StandIn(policy.model)) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address))
        with pytest.raises(UserError) as refused:
            draw(engine, **change)
    assert str(refused.value) == said


def test_models_that_it_is_not_given(monkeypatch):
    monkeypatch.setenv(servers.PYTHON, sys.executable)
    double = policy_of()
    double.model.double()
    with pytest.raises(UserError, match="agent a: vLLM does not compute in float64"):
        VLLMEngine({"a": double}, {"a": "a"}, settings())
    with pytest.raises(UserError, match="agent a: Qwen3MoeForCausalLM names its weights otherwise"):
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        sizes = {**tiny_config("qwen3").to_dict(), **experts, "model_type": "qwen3_moe"}
        config = Qwen3MoeConfig(**sizes)
        model = Qwen3MoeForCausalLM(config)
        VLLMEngine({"a": Policy("a", model, Saved(), 0.8)}, {"a": "a"}, settings("http://x"))
    with pytest.raises(UserError, match=r"engine.servers: 1 addresses for 2 models \(a; b\)"):
        VLLMEngine({n: policy_of(n) for n in "ab"}, {"a": "a"}, settings("http://x"))


# -- weights ---------------------------------------------------------------------------------------


def test_weights_are_there_before_the_next_request_and_are_told_apart():
    policy = policy_of()
    standin = StandIn(policy.model)
    with serving(standin) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address))
        assert engine.publish("a", 0, policy.export())["error"] < 1e-5
        before = draw(engine, keys(8))
        shown = engine.publish("a", 1, moved(policy))
        after = draw(engine, keys(8))
    assert shown["told_apart"] and shown["z"] > 100 and shown["error"] < 1e-5
    assert {c.version for c in before} == {0} and {c.version for c in after} == {1}
    assert [c.ids for c in before] != [c.ids for c in after]
    for found in after:
        expected = completion_logprobs(policy, PROMPT, found.ids or ())
        torch.testing.assert_close(
            torch.tensor(list(found.logprobs or ())), expected, atol=1e-5, rtol=0
        )
    salts = [b["cache_salt"] for path, b in standin.asked if path == "/v1/completions"]
    assert len({salt for salt in salts if salt.startswith("0-")}) == 1
    assert len({salt for salt in salts if salt.startswith("1-")}) == 1


def test_the_probe_is_what_the_agent_wrote_last():
    policy = policy_of()
    standin = StandIn(policy.model)
    with serving(standin) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address))
        wrote = [c.ids for c in draw(engine, keys(8))]
        engine.publish("a", 1, moved(policy))
    probed = [b["prompt"] for _, b in standin.asked if "prompt_logprobs" in b][-1]
    assert len(probed) == PROBE
    assert probed[-len(wrote[-1] or ()) :] in [
        list(ids or ())[-len(wrote[-1] or ()) :] for ids in wrote
    ]


@pytest.mark.parametrize(
    "fault, said",
    [
        ("swallow every second", "vLLM still answers with version 0: it moved by"),
        ("stale cache", "where it goes by its cache of prefixes, which is of older weights"),
        ("half loaded", "vLLM and learner differ by"),
        ("untied head", "vLLM and learner differ by"),
        ("lies of digests", "vLLM did not take the weights a@"),
    ],
)
def test_a_server_with_other_weights_is_noticed(fault, said):
    policy = policy_of()
    with serving(StandIn(policy.model, frozenset({fault}))) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address))
        with pytest.raises(UserError) as refused:
            engine.publish("a", 0, policy.export())
            draw(engine, keys(8))
            engine.publish("a", 1, moved(policy))
    assert said in str(refused.value)


def test_a_swallowed_step_is_noticed_where_the_learner_hardly_moved():
    """Far below what server and learner may differ by."""
    policy = policy_of()
    with serving(StandIn(policy.model, frozenset({"swallow every second"}))) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address))
        engine.publish("a", 0, policy.export())
        with pytest.raises(UserError, match="still answers with version 0"):
            engine.publish("a", 1, moved(policy, by=1e-5))


def test_the_same_weights_are_given_once_and_older_ones_again():
    policy = policy_of()
    first = policy.export()
    standin = StandIn(policy.model)
    with serving(standin) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address))
        engine.publish("a", 0, first)
        assert engine.publish("a", 0, first) is None
        assert standin.loads == 1
        engine.publish("a", 1, moved(policy))
        policy.load_weights(first)
        engine.publish("a", 0, first)
        assert standin.loads == 3
        assert {c.version for c in draw(engine)} == {0}


def test_adapters_share_a_server_and_go_by_a_fresh_name_each():
    policies = adapters()
    base = policies["a"].causal_lm
    standin = StandIn(tiny_lm("llama").float())
    assert not any("lora" in name for name, _ in standin.model.named_parameters())
    with serving(standin) as address:
        engine = VLLMEngine(policies, {"a": "a", "b": "b"}, settings(address))
        for name, policy in policies.items():
            engine.publish(name, 0, policy.export())
        same = [c.ids for c in draw(engine, keys(4))]
        assert same == [c.ids for c in draw(engine, keys(4), seat="b")]
        shown = engine.publish("b", 1, moved(policies["b"], by=0.3))
        assert shown["told_apart"]
        assert same == [c.ids for c in draw(engine, keys(4))]
        other = draw(engine, keys(4), seat="b")
    assert same != [c.ids for c in other] and {c.version for c in other} == {1}
    for found in other:
        expected = completion_logprobs(policies["b"], PROMPT, found.ids or ())
        torch.testing.assert_close(
            torch.tensor(list(found.logprobs or ())), expected, atol=1e-5, rtol=0
        )
    asked = [b["lora_name"] for path, b in standin.asked if path == "/v1/load_lora_adapter"]
    names = list(dict.fromkeys(asked))  # a server of others is asked before every rollout
    assert [name.split("@")[:2] for name in names] == [["a", "0"], ["b", "0"], ["b", "1"]]
    gone = [b["lora_name"] for path, b in standin.asked if path == "/v1/unload_lora_adapter"]
    assert gone == [names[1]]
    assert base is policies["b"].causal_lm


def test_a_server_elsewhere_that_was_away_is_given_its_weights_again():
    policy = policy_of()
    standin = StandIn(policy.model)
    with serving(standin) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address))
        engine.publish("a", 0, policy.export())
        expected = [c.ids for c in draw(engine, keys(3))]
        standin.restart(policy_of(seed=9).model)
        assert [c.ids for c in draw(engine, keys(3))] == expected
        assert standin.loads == 2
        standin.dead = 1  # and well: it is asked again
        assert [c.ids for c in draw(engine, keys(3))] == expected
        assert standin.loads == 2


def test_a_server_that_never_answers(monkeypatch):
    monkeypatch.setattr(places, "_ATTEMPTS", 2)
    policy = policy_of()
    standin = StandIn(policy.model)
    with serving(standin) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address, restarts=1))
        engine.publish("a", 0, policy.export())
        standin.dead = 1000
        with pytest.raises(UserError, match="vLLM died or did not answer 2 times") as ended:
            draw(engine)
        assert "\n" not in str(ended.value)


# -- what a proof can show -------------------------------------------------------------------------


def test_a_slope_by_hand():
    """The server moved by 1, 2 and 3 where the learner did by 1, 2 and 2: the slope is (1 + 4 + 6)
    / 9, what is left over -2/9, -4/9 and 5/9, and z their ratio by √Σ(learnt²)."""
    old, new = [0.0, 0.0, 0.0], [1.0, 2.0, 2.0]
    found = compared(finding(new, [1.0, 2.0, 3.0]), new, [1.0, 2.0, 3.0], old, old)
    assert found.slope == pytest.approx(11 / 9)
    left_over = (((2 / 9) ** 2 + (4 / 9) ** 2 + (5 / 9) ** 2) / 3) ** 0.5
    assert found.z == pytest.approx(11 / 9 / (left_over / 3))
    assert (found.error, found.most) == (pytest.approx(1 / 3), 1.0)


def test_noise_beyond_the_step_shows_nothing():
    draws = torch.Generator().manual_seed(0)
    old = torch.randn(300, generator=draws)
    new = old + 0.003 * torch.randn(300, generator=draws)
    noise = [0.06 * torch.randn(300, generator=draws) for _ in range(2)]
    said, before = new + noise[0], old + noise[1]
    found = compared(finding(new.tolist(), said.tolist()), *_lists(new, said, old, before))
    assert not found.told_apart and not found.unchanged
    sharp = compared(finding(new.tolist(), new.tolist()), *_lists(new, new, old, old))
    assert sharp.told_apart and sharp.slope == pytest.approx(1.0)


def _lists(*columns: torch.Tensor) -> list[list[float]]:
    return [column.tolist() for column in columns]


# -- inside vLLM -----------------------------------------------------------------------------------


class Runner:
    """What a worker has: a model that takes weights as vLLM does, and its configuration."""

    def __init__(self, model: Any, directory: Path) -> None:
        self.model = model
        config = type("Config", (), {"model": str(directory)})
        self.vllm_config = type("All", (), {"model_config": config})

    def get_model(self) -> Any:
        return self.model

    def reload_weights(self, weights_iterator: Any, is_checkpoint_format: bool) -> None:
        assert is_checkpoint_format
        self.model.load_state_dict(dict(weights_iterator), strict=False)


class Worker(satune_worker.Extension):
    """vLLM's worker with the extension mixed in."""

    def __init__(self, model: Any, directory: Path) -> None:
        self.model_runner = Runner(model, directory)

    def reload_weights(self, **given: Any) -> None:
        self.model_runner.reload_weights(**given)


def test_a_worker_loads_all_weights_or_none(tmp_path):
    model = tiny_lm("llama").float()
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(held, tmp_path / "model.safetensors")
    worker = Worker(model, tmp_path)
    (tmp_path / "new").mkdir()
    new, half = tmp_path / "new" / "a.safetensors", tmp_path / "new" / "half.safetensors"
    save_file({name: p + 1 for name, p in held.items()}, new)
    save_file({name: p + 2 for name, p in list(held.items())[1:]}, half)
    digest = worker.satune_load(str(new))["digest"]
    assert worker.satune_loaded() == {"digest": digest}
    assert worker.satune_load(str(half)) == {
        "fault": f"1 tensors are missing, {next(iter(held))} first"
    }
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, held[name] + 1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_shares_the_embeddings_is_packed_anew(tmp_path, tied):
    packed = []

    class Packs:
        def process_weights_after_loading(self, layer: Any) -> None:
            packed.append(layer)

    model = tiny_lm("llama", tie_word_embeddings=tied)
    model.lm_head.quant_method = Packs()
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    Worker(model, tmp_path).satune_load(str(tmp_path / "model.safetensors"))
    assert packed == ([model.lm_head] if tied else [])


# -- processes -------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path, monkeypatch) -> Iterator[Path]:
    """An interpreter of an environment whose vLLM has no model; gives the file of its starts."""
    stand_in = Path(__file__).parent / "vllm_process"
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nexport PYTHONPATH="$PYTHONPATH{os.pathsep}{stand_in}"\n'
        f'exec "{sys.executable}" -S "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(servers.PYTHON, str(python))
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    yield tmp_path / "starts"


def notes(starts: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in starts.read_text().splitlines()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    end = time.monotonic() + 60
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_a_server_that_dies_is_started_with_its_weights_and_asked_the_same(started):
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))
    try:
        engine.publish("a", 0, policy.export())
        expected = [c.ids for c in draw(engine, keys(4))]
        engine.publish("a", 1, moved(policy))
        loaded = notes(started)[-1]["loaded"]
        for cause in ("/v1/completions", "killed", "killed before weights come"):
            first = notes(started)[-1]["pid"]
            if cause == "killed before weights come":
                os.kill(first, signal.SIGKILL)
                gone(first)
                engine.publish("a", 2, moved(policy, seed=2))
                loaded = notes(started)[-1]["loaded"]
                found = draw(engine, keys(4))
                assert [c.ids for c in found] == expected and {c.version for c in found} == {2}
                continue
            if cause == "killed":
                os.kill(first, signal.SIGKILL)
            else:
                Path(f"{started}.die").write_text(cause)
            found = draw(engine, keys(4))
            assert [c.ids for c in found] == expected and {c.version for c in found} == {1}
            begun = [note for note in notes(started) if "arguments" in note][-1]
            assert begun["digest"] == loaded and notes(started)[-1]["loaded"] == loaded
            assert gone(first)
    finally:
        engine.stop()
    assert gone(notes(started)[-1]["pid"])


def test_a_server_that_dies_while_it_takes_weights(started):
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))
    try:
        engine.publish("a", 0, policy.export())
        Path(f"{started}.die").write_text("/collective_rpc")
        engine.publish("a", 1, moved(policy))
        assert {c.version for c in draw(engine)} == {1}
        begun, given, _ = notes(started)[-3:]
        assert begun["digest"] != given["loaded"]
        (written,) = Path(begun["arguments"]["--model"]).parent.glob("*.safetensors")
        assert given["loaded"] in written.name
    finally:
        engine.stop()


def test_without_publishing_a_team_plays_with_the_weights_that_it_has(started):
    policies = {n: policy_of(n) for n in "ab"}
    engine = VLLMEngine(policies, {"a": "a", "b": "b"}, VLLMSettings(probe=0, devices=("2", "5")))
    try:
        assert {c.version for c in draw(engine, keys(3))} == {0}
        assert draw(engine, seat="b")
    finally:
        engine.stop()
    begun = [note for note in notes(started) if "arguments" in note]
    assert len(begun) == 2
    assert all(note["arguments"]["--dtype"] == "float32" for note in begun)
    assert begun[0]["arguments"]["--generation-config"] == "vllm"


def test_who_gives_up_while_a_server_starts_waits_for_nothing(started, monkeypatch):
    monkeypatch.setenv("SLOW", "1")
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))

    async def given_up() -> None:
        prompt = Prompt((), ids=ids_of(PROMPT))
        asked = asyncio.ensure_future(engine.generate("a", prompt, SAMPLING, KEY))
        while not started.exists():
            await asyncio.sleep(0.02)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await engine.close()

    try:
        asyncio.run(given_up())  # which waits for its threads
        assert len(notes(started)) == 1
        Path(f"{started}.ready").touch()
        assert {c.version for c in draw(engine)} == {0}
        assert len([note for note in notes(started) if "arguments" in note]) == 1
    finally:
        engine.stop()


def test_a_server_that_does_not_start(started, monkeypatch):
    monkeypatch.setenv("BROKEN", "1")
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))
    with pytest.raises(UserError) as refused:
        engine.publish("a", 0, policy.export())
    said, _, log = str(refused.value).partition("; its log: ")
    assert said == "agent a: vLLM did not start (exit code 3): ImportError: no module named torch"
    assert "INFO starting" in Path(log).read_text()
    Path(log).unlink()


def test_a_process_that_is_killed_leaves_no_server(started):
    code = (
        "import time\n"
        "from satune.engines.vllm.server import Server\n"
        "from pathlib import Path\n"
        f"folder = Path({str(started.parent)!r})\n"
        "(folder / 'model.safetensors').write_bytes(b'')\n"
        "server = Server('agent a', None, 10, 60)\n"
        "server.launch(['--model', str(folder)], folder / 'log', {})\n"
        "server.wait()\n"
        "print('there', flush=True)\n"
        "time.sleep(600)\n"
    )
    source = Path(servers.__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
    finally:
        process.kill()
        process.wait()
    assert gone(notes(started)[-1]["pid"])


def test_no_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv(servers.PYTHON, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"\$SATUNE_VLLM_PYTHON: .*none: no such file; make"):
        servers.interpreter()


def test_adapters_have_room_for_one_more_than_there_are(tmp_path):
    from satune.engines.vllm.arguments import arguments_of

    words = arguments_of(adapters(("a", "b", "c")), VLLMSettings(), tmp_path, 1)
    given = dict(itertools.pairwise(words))
    assert (given["--max-loras"], given["--max-cpu-loras"]) == ("4", "7")
    assert given["--max-lora-rank"] == "8"
    assert "--no-enable-chunked-prefill" in words


def test_settings_of_a_recipe():
    from satune.engines.base import engine_settings

    found = engine_settings("vllm", {"devices": (0, 1), "probe": 0})
    assert found.conversations == 512
