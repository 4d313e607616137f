"""vLLM's engine against a stand-in for its server: what is sent, and what is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import tiny_world
from satune.agents import memory
from satune.agents.policy import Policy
from satune.engines.vllm import files, scratch
from satune.engines.vllm import place as places
from satune.engines.vllm import server as servers
from satune.engines.vllm.arguments import arguments_of
from satune.engines.vllm.engine import VLLMEngine
from satune.engines.vllm.files import Published, write_weights
from satune.engines.vllm.log import Log, may_pass
from satune.engines.vllm.proof import compared, finding
from satune.engines.vllm.scratch import Scratch
from satune.engines.vllm.server import Server
from satune.engines.vllm.settings import VLLMSettings
from satune.engines.vllm.worker import satune_worker
from satune.training.ahead import correction
from satune.training.self_check import Tolerance
from satune.training.trainer import train
from satune.types import Completion, EpisodeFailure, Key, Prompt, Sampling, UserError, ids_of
from tiny_models import EOS, Letters, completion_logprobs, tiny_config, tiny_lm
from vllm_standin import StandIn, serving
from vllm_starts import environment_of, gone, notes

KEY = Key(0, "train", stage=1, step=1)
SAMPLING = Sampling(12, temperature=0.8)
PROMPT = (3, 5, 2)
SOURCES = Path(servers.__file__).parents[3]
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
        torch.testing.assert_close(  # so large a step costs float32 up to 5e-5
            torch.tensor(list(found.logprobs or ())), expected, atol=2e-4, rtol=0
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
    begun = satune_worker.digest_of(tmp_path / "model.safetensors")
    assert Worker(model, tmp_path).satune_loaded() == {"digest": ""}
    assert Worker(model, tmp_path).satune_has() == {"digest": begun}
    digest = worker.satune_load(str(new))["digest"]
    assert digest != begun
    assert worker.satune_loaded() == worker.satune_has() == {"digest": digest}
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
    for name, value in environment_of(tmp_path).items():
        monkeypatch.setenv(name, value)
    yield tmp_path / "starts"


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
            assert begun["digest"] == loaded and notes(started)[-1]["has"] == loaded
            assert gone(first)
    finally:
        engine.stop()
    assert gone(notes(started)[-1]["pid"])


def test_weights_that_a_server_was_started_with_are_written_once_and_not_loaded(
    started, monkeypatch
):
    """A file for each agent, whatever number its weights have, and no load; the server says which
    file it has."""
    written: list[str] = []

    def counted(directory: Path, policy: Policy, *given: Any) -> Published:
        written.append(policy.name)
        return write_weights(directory, policy, *given)

    monkeypatch.setattr(places, "write_weights", counted)
    policies = {n: policy_of(n, seed=s) for s, n in enumerate("ab")}
    engine = VLLMEngine(policies, {"a": "a", "b": "b"}, VLLMSettings(probe=0))
    try:
        engine.publish("a", 0, policies["a"].export())
        engine.publish("b", 7, policies["b"].export())
        assert written == ["a", "b"]
        begun = {note["digest"] for note in notes(started) if "arguments" in note}
        said = [note["has"] for note in notes(started) if "has" in note]
        assert not any("loaded" in note for note in notes(started))
        assert len(begun) == 2 and set(said) == begun
        assert {c.version for c in draw(engine, seat="b")} == {7}
        # Others are written and loaded, and the same ones again neither.
        for _ in range(2):
            engine.publish("b", 8, moved(policies["b"]) if written == ["a", "b"] else stood(engine))
        assert written == ["a", "b", "b"]
        (loaded,) = [note["loaded"] for note in notes(started) if "loaded" in note]
        folder = engine._places["b"]._directory
        (file,) = folder.glob("*.safetensors")
        assert file.name == f"b@8@{loaded}.safetensors"
        assert (folder / "model" / "model.safetensors").resolve() == file.resolve()
    finally:
        engine.stop()


def stood(engine: VLLMEngine) -> dict[str, torch.Tensor]:
    return engine._places["b"].policies["b"].export()


def test_one_weight_that_differs_is_loaded(started):
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))
    try:
        engine._launch_all()
        held = {name: tensor.clone() for name, tensor in policy.export().items()}
        list(held.values())[-1].view(-1)[-1] += 1e-6
        engine.publish("a", 0, held)
        assert len([note for note in notes(started) if "loaded" in note]) == 1
    finally:
        engine.stop()


def test_a_server_that_began_with_other_weights_is_noticed(started):
    Path(f"{started}.lies").touch()
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))
    try:
        with pytest.raises(UserError, match=r"vLLM did not take the weights a@0@.*: it has 000"):
            engine.publish("a", 0, policy.export())
        # What a start begins with still lies there, and is given as anything else would be.
        Path(f"{started}.lies").unlink()
        engine.publish("a", 1, policy.export())
        assert {c.version for c in draw(engine)} == {1}
    finally:
        engine.stop()


@pytest.mark.parametrize("how", ["killed", "core killed", "silent"])
def test_a_server_that_is_ended_while_it_starts_is_started_again(started, how):
    Path(f"{started}.ends").write_text(f"{how}\n{how}\n")
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0, restarts=2))
    try:
        engine.publish("a", 0, policy.export())
        assert [note["ends"] for note in notes(started) if "ends" in note] == [how, how]
        # They count until an update is through, and a restart may itself be ended.
        Path(f"{started}.ends").write_text(f"{how}\n")
        os.kill(notes(started)[-1]["pid"], signal.SIGKILL)
        assert {c.version for c in draw(engine)} == {0}
        assert engine._places["a"].server.starts == 5
    finally:
        engine.stop()


def test_a_server_that_is_killed_at_every_start(started):
    Path(f"{started}.ends").write_text("killed\n" * 9)
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0, restarts=1))
    with pytest.raises(UserError) as ended:
        engine.publish("a", 0, policy.export())
    said, _, log = str(ended.value).partition("; its log: ")
    assert said == (
        "agent a: vLLM died or did not answer 2 times (last: it was killed (signal 9) while it "
        "started); mend that, then give the same command again"
    )
    assert Path(log).read_text() == "INFO starting\n" * 2
    Path(log).unlink()
    assert len(notes(started)) == 2


def test_a_restart_that_fails_by_itself_is_told_by_its_own_error(started):
    """Not by what an earlier start has written, and once."""
    Path(f"{started}.ends").write_text("core killed\nerror\nerror\n")
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))
    with pytest.raises(UserError, match=r"exit code 3\): ImportError: no module") as told:
        engine.publish("a", 0, policy.export())
    Path(str(told.value).rpartition(" ")[2]).unlink()
    assert [note["ends"] for note in notes(started)] == ["core killed", "error"]


def test_a_port_that_somebody_else_has_by_then(started, monkeypatch):
    """Who has it answers as if all were well, and is asked for nothing."""
    policy = policy_of()
    other = StandIn(policy_of(seed=5).model)
    with serving(other) as address:
        ports = iter([int(address.rpartition(":")[2]), *(servers._free_port() for _ in range(3))])
        monkeypatch.setattr(servers, "_free_port", lambda: next(ports))
        engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))
        try:
            engine.publish("a", 0, policy.export())
            assert engine._places["a"].server.address != address
            assert engine._places["a"].server.starts == 2
            assert not other.asked
        finally:
            engine.stop()


def test_no_proxy_is_asked_for_servers_of_this_machine(started, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))
    try:
        engine.publish("a", 0, policy.export())
        assert draw(engine)
    finally:
        engine.stop()
    with serving(StandIn(policy.model)) as address:
        engine = VLLMEngine({"a": policy}, {"a": "a"}, settings(address))
        engine.publish("a", 0, policy.export())
        assert draw(engine)


def test_a_key_in_the_environment_is_not_the_servers(started, monkeypatch):
    """With it vLLM would refuse what it is asked."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))
    try:
        engine.publish("a", 0, policy.export())
        environment = Path(f"/proc/{notes(started)[-2]['pid']}/environ").read_bytes()
        assert b"VLLM_NO_USAGE_STATS=1" in environment and b"VLLM_API_KEY" not in environment
        place = servers.meeting_place(engine._places["a"]._directory)
        assert f"VLLM_RPC_BASE_PATH={place}".encode() in environment
    finally:
        engine.stop()


def test_a_long_path_to_the_weights_is_no_place_for_sockets():
    """The system takes one of 107 bytes, and none that is longer."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        fits = Path(short) / ("d" * (107 - 37 - len(short) - 1))
        long = Path(f"{fits}d")
        for folder, place in ((fits, str(fits)), (long, "/tmp")):
            folder.mkdir()
            assert servers.meeting_place(folder) == place
            with socket.socket(socket.AF_UNIX) as found, contextlib.ExitStack() as refused:
                if folder == long:
                    refused.enter_context(pytest.raises(OSError, match="too long"))
                found.bind(f"{folder}/{'s' * 36}")


def test_an_interpreter_that_cannot_be_run(started, monkeypatch):
    python = Path(os.environ[servers.PYTHON])
    python.chmod(0o644)
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))
    with pytest.raises(UserError) as refused:
        engine.publish("a", 0, policy.export())
    assert str(refused.value) == (
        f"agent a: vLLM did not start: {python}: Permission denied; look at $SATUNE_VLLM_PYTHON, "
        "or give another TMPDIR"
    )


def test_a_disk_that_is_full_while_weights_are_written(started, monkeypatch):
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))

    def full(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    try:
        engine.publish("a", 0, policy.export())
        folder = engine._places["a"]._directory
        before = {path.name for path in folder.glob("*@*")}
        stepped = moved(policy)
        with monkeypatch.context() as filled:
            filled.setattr(files, "save_file", full)
            with pytest.raises(UserError) as refused:
                engine.publish("a", 1, stepped)
        said = str(refused.value)
        assert said.startswith(str(folder)) and "\n" not in said
        assert said.endswith("the disk is full; free some space or give another TMPDIR")
        # Nothing of it lies there, and the server has what it had.
        assert {path.name for path in folder.glob("*@*")} == before
        assert {c.version for c in draw(engine)} == {0}
        engine.publish("a", 1, stepped)
        assert {c.version for c in draw(engine)} == {1}
    finally:
        engine.stop()


def test_what_a_log_says(tmp_path):
    path = tmp_path / "server.log"
    path.write_bytes(b"ValueError: of the start before\n")
    log = Log(path)
    assert log.last() == "it said nothing" and may_pass(1, log)
    with path.open("ab") as file:
        file.write(b"WARNING 11-30 21:14:56 [utils.py:255] errors like OSError may come\n")
    assert may_pass(1, log)
    said = b"\x1b[0;36m(EngineCore pid=7)\x1b[0;0m ERROR ValueError: no room\x00\xff \r\n"
    with path.open("ab") as file:
        file.write(said + b"RuntimeError: it failed. See root cause above.\n")
    assert log.last() == "(EngineCore pid=7) ERROR ValueError: no room\ufffd"
    assert not may_pass(1, log) and may_pass(-9, log) and may_pass(137, log)
    with path.open("ab") as file:
        file.write(b"x" * 1000)
    kept = log.kept()
    assert kept is not None and kept.read_bytes() == path.read_bytes()
    kept.unlink()
    path.unlink()
    assert log.last() == "it said nothing" and log.kept() is None


def test_a_server_that_dies_while_it_takes_weights(started):
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))
    try:
        engine.publish("a", 0, policy.export())
        Path(f"{started}.die").write_text("/collective_rpc")
        engine.publish("a", 1, moved(policy))
        assert {c.version for c in draw(engine)} == {1}
        begun, given, asked = notes(started)[-3:]
        assert begun["digest"] != given["loaded"] == asked["has"]
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


@pytest.mark.parametrize("devices", [(), ("0",)])
def test_who_gives_up_while_a_server_starts_waits_for_nothing(started, monkeypatch, devices):
    """Also where servers on a GPU are waited for in turn."""
    monkeypatch.setenv("SLOW", "1")
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0, devices=devices))

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


def test_a_server_that_does_not_start(started):
    Path(f"{started}.ends").write_text("error\nerror\n")
    policy = policy_of()
    engine = VLLMEngine({"a": policy}, {"a": "a"}, VLLMSettings(probe=0))
    with pytest.raises(UserError) as refused:
        engine.publish("a", 0, policy.export())
    said, _, log = str(refused.value).partition("; its log: ")
    assert said == "agent a: vLLM did not start (exit code 3): ImportError: no module named torch"
    assert "INFO starting" in Path(log).read_text()
    Path(log).unlink()
    assert [note.get("ends") for note in notes(started)] == ["error"]  # once


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("slow", [False, True])
def test_a_process_that_is_ended_leaves_no_server(started, monkeypatch, sent, slow):
    """Neither one that is there nor one that is waited for."""
    if slow:
        monkeypatch.setenv("SLOW", "1")
    code = (
        "import time\n"
        "from satune.engines.vllm.server import Server\n"
        "from pathlib import Path\n"
        f"folder = Path({str(started.parent)!r})\n"
        "(folder / 'model.safetensors').write_bytes(b'')\n"
        "server = Server('agent a', None, 10, 60)\n"
        "server.launch(['--model', str(folder)], folder / 'log', {})\n"
        f"{'' if slow else 'server.wait()'}\n"
        "print('there', flush=True)\n"
        "server.wait()\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        while not started.exists():
            time.sleep(0.02)
        process.send_signal(sent)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert gone(notes(started)[-1]["pid"])


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, time\n"
        "from satune.engines.vllm.scratch import Scratch\n"
        "scratch = Scratch()\n"
        "(scratch.path / 'weights').write_bytes(b'0' * 1000)\n"
        "print(scratch.path, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert process.stdout is not None
        held = Path(process.stdout.readline().decode().strip())
        beside = Scratch()  # whose holder lives in this process
        first = Scratch()
        assert {p.name for p in held.iterdir()} == {".lock", "weights"} and beside.path.is_dir()
        first.remove()
        elsewhere = tmp_path / "satune-vllm-elsewhere"
        elsewhere.mkdir()
        (elsewhere / ".lock").write_text("another machine")
    finally:
        process.kill()
        process.wait()
    second = Scratch()
    assert sorted(tmp_path.iterdir()) == sorted([second.path, beside.path, elsewhere])
    second.remove()
    beside.remove()
    assert list(tmp_path.iterdir()) == [elsewhere]


@pytest.mark.parametrize("lacking", ["", "machine", "boot"])
def test_what_lay_there_when_the_machine_was_started_is_removed(tmp_path, monkeypatch, lacking):
    """Not what another machine has on the disk, which may be alive there, nor anything where nobody
    says which machine this is."""
    names = {name: tmp_path / f"{name}_id" for name in ("machine", "boot")}
    monkeypatch.setattr(scratch, "_MACHINE", names["machine"])
    monkeypatch.setattr(scratch, "_BOOT", names["boot"])
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def left(machine: str, boot: str) -> Path:
        """What a process leaves that is ended with its machine."""
        for name, said in (("machine", machine), ("boot", boot)):
            names[name].unlink(missing_ok=True)
            if name != lacking:
                names[name].write_text(f"{said}\n")
        found = Scratch()
        os.close(found._handle)
        return found.path

    other = left("one", "first")
    mine = left("another", "second")
    assert other.is_dir()
    last = left("another", "third")
    assert other.is_dir() and mine.exists() == bool(lacking)
    # A name that two machines have by mistake: whoever holds the lock is alive.
    held = Scratch()
    left("another", "fourth")
    assert held.path.is_dir() and last.exists() == (lacking == "boot")
    held.remove()


def test_a_directory_for_weights_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    policy = policy_of()
    with pytest.raises(UserError, match="a part of the path is a file; give another TMPDIR"):
        VLLMEngine({"a": policy}, {"a": "a"}, settings("http://127.0.0.1:9"))


def test_no_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv(servers.PYTHON, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"\$SATUNE_VLLM_PYTHON: .*none: no such file; make"):
        servers.interpreter()


def test_adapters_have_room_for_one_more_than_there_are(tmp_path):
    words = arguments_of(adapters(("a", "b", "c")), VLLMSettings(), tmp_path, 1)
    given = dict(itertools.pairwise(words))
    assert (given["--max-loras"], given["--max-cpu-loras"]) == ("4", "7")
    assert given["--max-lora-rank"] == "8"
    assert "--no-enable-chunked-prefill" in words


# -- runs ------------------------------------------------------------------------------------------


class Gated(StandIn):
    """A server that draws nothing while its gate is closed; ``waiting``: somebody has asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.gate.set()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions" and "prompt_logprobs" not in body:
            self.waiting.set()
            assert self.gate.wait(60)
        return super().answer(path, body)


@pytest.fixture
def two(tmp_path) -> Iterator[tuple[Path, list[Gated], list[str]]]:
    """A recipe of two agents, their servers, and the words by which it draws ahead with them."""
    recipe = tiny_world.build(tmp_path / "world")
    standins = [Gated(recipe.parent / f"model-{n}") for n in range(2)]
    with serving(standins[0]) as one, serving(standins[1]) as other:
        engine = f"engine={{name: vllm, servers: ['{one}', '{other}'], probe: {PROBE}}}"
        yield recipe, standins, ["schedule=reuse", "rollout.ahead=1", engine]


def test_batches_are_drawn_ahead_by_the_weights_that_they_say(two, tmp_path):
    """What the server said of each token is what the learner says under those weights."""
    recipe, standins, words = two
    run = tiny_world.training(recipe, tmp_path / "run", [*words, "stages=3"])
    train(run, tolerance=Tolerance(1e-3, 1e-3))
    rollouts = tiny_world.events(tmp_path / "run", "rollout")
    assert all(e["accepted"] for e in tiny_world.events(tmp_path / "run", "update"))
    assert "ahead" not in rollouts[0]
    for event in rollouts[1:]:
        wrote = event["stage"] - 2
        assert event["ahead"]["versions"] == {"ann": wrote, "bob": wrote}
        assert event["ahead"]["scored"] == 2 * event["tokens"]["sampled"]
        assert event["ahead"]["mismatch"]["max"] < 1e-4
        assert event["ahead"]["ess"] < 11.99
    # Each version once, and no older one again; one that nothing is asked of may be left out.
    for standin in standins:
        loaded = [b["args"][0] for _, b in standin.asked if b.get("method") == "satune_load"]
        versions = [int(Path(file).name.split("@")[1]) for file in loaded]
        assert versions == sorted(set(versions)) and {0, 1, 3} <= set(versions)


def test_a_server_keeps_its_weights_until_the_batch_is_drawn(two, tmp_path):
    recipe, standins, words = two
    run = tiny_world.training(recipe, tmp_path / "run", words)
    for name in run.learners:
        run.publish(name)
    standins[1].gate.clear()
    run._draw_ahead(1)
    assert standins[1].waiting.wait(60)
    for name in ("ann", "bob"):
        learner: Any = run.learners[name]
        learner.load_weights({n: w + 0.01 for n, w in learner.export().items()})
        run.state.versions[name] = 1
        run.publish(name)
    assert [standin.loads for standin in standins] == [1, 1]
    standins[1].gate.set()
    drawn = run.ahead.drawn(run.state.early[0])
    assert {t.version for e in drawn for t in e.turns} == {0}
    found = correction(run.learners, drawn, run.state.versions, run.state.past)
    assert found.figures["mismatch"]["max"] < 1e-4 < found.log_weights_E.abs().max()
    world: Any = run.world
    world._settle()
    assert [standin.loads for standin in standins] == [2, 2]
    fresh = run.supply.batch(2, 1).episodes
    assert {t.version for e in fresh for t in e.turns} == {1}
    run.ahead.stop()


def test_drawing_ahead_is_given_up_while_a_server_is_started_again(started, tmp_path, monkeypatch):
    """By whoever draws while it gives weights, which no event loop can cancel; what waits behind it
    is not begun."""
    monkeypatch.setenv("SLOW", "1")
    ready = Path(f"{started}.ready")
    ready.touch()
    engine = "engine={name: vllm, probe: 0, start_seconds: 120}"
    words = ["schedule=reuse", "rollout.ahead=2", engine]
    run = tiny_world.training(tiny_world.build(tmp_path / "world"), tmp_path / "run", words)
    world: Any = run.world
    try:
        for name in run.learners:
            run.publish(name)
        ready.unlink()
        Path(f"{started}.die").write_text("/collective_rpc")
        learner: Any = run.learners["bob"]
        team = {"bob": (1, {n: w + 0.01 for n, w in learner.export().items()})}
        drawn = [world.draw_ahead(KEY.at(sample=n), 0, 3, team) for n in range(2)]
        while sum("arguments" in note for note in notes(started)) < 3:
            time.sleep(0.02)
        run.ahead.stop()
        with pytest.raises(servers.Cut):
            drawn[0].result()
        assert drawn[1].cancelled()
    finally:
        world.cast.engine.stop()
    assert all(gone(note["pid"]) for note in notes(started))


@pytest.mark.parametrize(
    "devices, shares",
    [
        (("0", "1", "2"), [0.6, 0.6, 0.6]),
        (("0", "1"), [0.3, 0.6, 0.3]),
        (("4",), [0.2, 0.2, 0.2]),
        (("4", "4", "1"), [0.3, 0.3, 0.6]),
    ],
)
def test_servers_on_one_device_share_its_memory(monkeypatch, devices, shares):
    monkeypatch.setenv(servers.PYTHON, sys.executable)
    begun: list[tuple[dict[str, str], Any]] = []

    def launched(server: Server, words: Sequence[str], log: Path, own: Any) -> None:
        server.starts += 1
        begun.append((dict(itertools.pairwise(words)), own))

    monkeypatch.setattr(Server, "launch", launched)
    monkeypatch.setattr(Server, "wait", lambda server: None)
    policies = {n: policy_of(n) for n in "abc"}
    chosen = VLLMSettings(probe=0, devices=devices, memory=0.6)
    VLLMEngine(policies, {n: n for n in "abc"}, chosen)._launch_all()
    given = [float(words["--gpu-memory-utilization"]) for words, _ in begun]
    assert given == pytest.approx(shares)
    placed = [own["CUDA_VISIBLE_DEVICES"] for _, own in begun]
    assert placed == [devices[n % len(devices)] for n in range(3)]


def test_servers_on_a_cpu_share_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8_000_000_000)
    shares = []
    for chosen in (VLLMSettings(memory=0.5), VLLMSettings(memory=5e8)):
        words = arguments_of({"a": policy_of()}, chosen, tmp_path, 2)
        assert "--gpu-memory-utilization" not in words
        shares.append(dict(itertools.pairwise(words))["--kv-cache-memory-bytes"])
    assert shares == ["2000000000", "500000000"]


def test_settings_of_a_recipe():
    from satune.engines.base import engine_settings

    found = engine_settings("vllm", {"devices": (0, 1), "probe": 0})
    assert found.conversations == 512
