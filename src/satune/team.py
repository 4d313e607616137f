"""A team: which agent fills which seat; its directory on disk."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from satune.agents.entries import fault_of_agent, fault_of_host, is_name, model_of
from satune.agents.messages import EntryRenderer, MessageRenderer, TemplateSettings
from satune.agents.mixture import MixturePolicy
from satune.agents.policy import Policy
from satune.agents.pretrained import AgentSpec, Precision, load_policies
from satune.agents.rendering import ChatRenderer
from satune.agents.sources import convert, source_of
from satune.agents.specs import ALL_LINEAR, LoraSpec
from satune.files.manifest import FORMAT, MANIFEST, read_manifest
from satune.files.writing import written_beside
from satune.loading import HOST_VARIABLE, nearest_hint
from satune.types import Renderer, Sampling, Seat, UserError


@dataclass(slots=True)
class Team:
    """Agents by name, and the agent of each seat in speaking order.

    An agent whose model is served elsewhere, or that lives with its owner, has a spec alone.
    ``protocol``, ``task`` and ``max_new_tokens`` (a message) are the recipe's, kept so that a saved
    team says how it plays.
    """

    policies: dict[str, Policy]
    specs: dict[str, AgentSpec]
    seats: dict[str, str]
    sharing: str = "separate"
    protocol: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    renderers: dict[str, Renderer] = field(init=False)

    def __post_init__(self) -> None:
        self.renderers = {
            name: ChatRenderer(policy.tokenizer, spec.template, policy.context_limit)
            if (policy := self.policies.get(name)) is not None
            else MessageRenderer(spec.template)
            if spec.host is None
            else EntryRenderer()
            for name, spec in self.specs.items()
        }

    def leave_room(self, context: int | None) -> None:
        """Have prompts and messages fit into so many tokens together, where an engine takes no
        more."""
        for renderer in self.renderers.values():
            if context is not None and isinstance(renderer, ChatRenderer):
                renderer.context_limit = min(renderer.context_limit, context)

    @property
    def served(self) -> dict[str, AgentSpec]:
        """The agents whose models are served elsewhere."""
        return {name: spec for name, spec in self.specs.items() if spec.served is not None}

    def seats_for(self, max_new_tokens: int, **sampling: Any) -> list[Seat]:
        """The seats as rollout takes them, each at its agent's temperature unless overridden."""
        return [
            Seat(
                seat,
                agent,
                self.renderers[agent],
                Sampling(
                    max_new_tokens,
                    **{"temperature": self.specs[agent].temperature, **sampling},
                ),
            )
            for seat, agent in self.seats.items()
        ]

    def seats_of(self, agent: str) -> list[str]:
        return [seat for seat, filled_by in self.seats.items() if filled_by == agent]

    def save(
        self,
        directory: Path,
        *,
        final: Path | None = None,
        critics: Mapping[str, Mapping[str, Tensor]] | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        """Write the team: manifest.json and a Hugging Face (or PEFT) directory an agent.

        Written beside, safely on the disk, and renamed, so that ``directory`` is always whole.
        ``final``: where it will lie in the end, if elsewhere. ``critics`` has the parameters of
        agents' critics, which go to ``NAME.critic.safetensors``: no part of what is loaded again.
        ``digests`` are those of the weights of agents that live with their owners.
        Raises UserError where the disk refuses.
        """
        with written_beside(directory) as beside:
            self._write(beside, final or directory, digests or {})
            for name, tensors in (critics or {}).items():
                save_critic(tensors, critic_file(beside, name))

    def _write(self, beside: Path, final: Path, digests: Mapping[str, str]) -> None:
        bases: dict[str, str] = {}
        for name in self.policies:
            self.save_agent(name, beside, final, bases)
        manifest = {
            "format": FORMAT,
            "seats": self.seats,
            "agents": {
                name: self.entry(name) | ({"digest": digests[name]} if name in digests else {})
                for name in self.specs
            },
            "protocol": dict(self.protocol),
            "task": dict(self.task),
            "max_new_tokens": self.max_new_tokens,
        }
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    def entry(self, name: str) -> dict[str, Any]:
        """What the manifest says of an agent. ``base`` is the hub id of the model it was made from,
        None where that lay here."""
        spec, policy = self.specs[name], self.policies.get(name)
        entry: dict[str, Any]
        if policy is None:
            there = {"host": spec.host, "host_token_env": spec.host_token_env}
            entry = there if spec.host else {"served": str(spec.model)}
        else:
            # Whether a name is the hub's is told by what lies here, which others cannot see.
            entry = {"dir": name, "base": None if Path(spec.source).exists() else spec.source}
        entry |= {
            "temperature": spec.temperature,
            "template": asdict(spec.template),
            "sharing": self.sharing,
            "delta": spec.delta,
            "lora": asdict(spec.lora) if spec.lora else None,
            "attention": spec.attention,
        }
        if "served" in entry:
            entry["server"] = dict(spec.server)
        if isinstance(policy, MixturePolicy):
            entry["mixture"] = {"dir": f"{name}-newcomer", "delta": policy.delta}
        return entry

    def save_agent(self, name: str, beside: Path, final: Path, bases: dict[str, str]) -> None:
        """Write an agent's directory into ``beside``, which will lie at ``final``; ``bases`` has
        those that are written already, by where they came from."""
        policy = self.policies[name]
        if isinstance(policy, MixturePolicy):
            _save_policy(policy.newcomer, f"{name}-newcomer", beside, final, bases)
            policy = policy.incumbent
        _save_policy(policy, name, beside, final, bases)


def _save_policy(
    policy: Policy, name: str, beside: Path, final: Path, bases: dict[str, str]
) -> None:
    target = beside / name
    if policy.adapter:
        _save_adapter(policy, target, _save_base(policy, beside, final, bases))
    else:
        _plain_generation(policy)
        policy.causal_lm.save_pretrained(target)
    policy.tokenizer.save_pretrained(target)


def _save_base(policy: Policy, beside: Path, final: Path, bases: dict[str, str]) -> str:
    """A base that lies in a local directory goes along; one from the hub keeps its id. What came
    from a GGUF file is written as safetensors, so that PEFT finds it."""
    source = str(policy.causal_lm.config._name_or_path)
    if not Path(source).exists():
        return source
    if source not in bases:
        names = (f"base-{number}" for number in itertools.count())
        name = next(name for name in names if not (beside / name).exists())
        files = source_of(source)
        if files.gguf is None:
            shutil.copytree(source, beside / name)
        else:
            convert(files, beside / name)
        bases[source] = str(final.resolve() / name)
    return bases[source]


def _save_adapter(policy: Policy, target: Path, base: str) -> None:
    model: PeftModel = policy.model  # type: ignore[assignment]
    assert policy.adapter is not None
    model.save_pretrained(str(target), selected_adapters=[policy.adapter])
    nested = target / policy.adapter  # PEFT puts a named adapter into a folder of its own
    for path in nested.iterdir():
        path.rename(target / path.name)
    nested.rmdir()
    config_path = target / "adapter_config.json"
    config = json.loads(config_path.read_text())
    config["base_model_name_or_path"] = base
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _plain_generation(policy: Policy) -> None:
    """A saved agent samples as it was trained to: its temperature, no filters."""
    old = policy.causal_lm.generation_config
    policy.causal_lm.generation_config = GenerationConfig(
        do_sample=True,
        temperature=policy.temperature,
        top_p=1.0,
        top_k=0,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )


def manifest_of(directory: Path) -> dict[str, Any]:
    """The manifest of a team directory, which anybody may have written.

    Raises UserError as ``read_manifest``, and where it names what lies elsewhere: whatever it says
    of files stays in ``directory``.
    """
    manifest = read_manifest(directory)
    path = directory / MANIFEST
    for seat in manifest["seats"]:
        if not is_name(seat):
            raise UserError(f"{path}: damaged manifest (the seat {seat!r} has no plain name)")
    for name, entry in manifest["agents"].items():
        fault = fault_of_agent(name, entry, directory)
        if fault is not None:
            raise UserError(f"{path}: damaged manifest (agents.{name}: {fault})")
    return manifest


def refuse_hosted(manifest: Mapping[str, Any], directory: Path) -> None:
    """Raise UserError where an agent of a saved team lives with its owner."""
    for name, entry in manifest["agents"].items():
        if "host" in entry:
            raise UserError(
                f"{directory}: agent {name} lives with its owner ({entry['host']}), and this holds "
                "a reference only; ask the owner for the agent"
            )


def digests_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The digests of the weights of a saved team's agents that live with their owners."""
    agents = manifest["agents"].items()
    return {name: entry["digest"] for name, entry in agents if "host" in entry}


def moved_hosts(manifest: Mapping[str, Any], hosts: Mapping[str, str]) -> dict[str, Any]:
    """The manifest with other addresses for agents that live with their owners. Raises UserError
    for an agent that does not, and for what is no address."""
    agents = dict(manifest["agents"])
    for name, url in hosts.items():
        if "host" not in agents.get(name, {}):
            hint = nearest_hint(name, list(digests_of(manifest)))
            raise UserError(f"--agent-host: no agent {name!r} lives with its owner{hint}")
        agents[name] = {**agents[name], "host": url}
        fault = fault_of_host(agents[name])
        if fault is not None:
            raise UserError(f"--agent-host {name}: {fault}")
    return {**manifest, "agents": agents}


def critic_file(directory: Path, agent: str) -> Path:
    """Where an agent's critic lies in a team's directory, or beside the agent at its host."""
    return directory / f"{agent}.critic.safetensors"


def save_critic(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, file)


def load_team(
    directory: Path,
    *,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
    hosts: Mapping[str, str] | None = None,
) -> Team:
    """The team in a directory written by ``Team.save``. Of agents that live with their owners there
    is a spec alone; ``hosts`` has the addresses of those that have moved."""
    manifest = manifest_of(directory)
    specs: list[AgentSpec] = []
    sharing = "separate"
    for name, entry in manifest["agents"].items():
        sharing = entry["sharing"]
        specs.append(
            AgentSpec(
                name=name,
                model=model_of(entry, directory),
                temperature=entry["temperature"],
                template=TemplateSettings(**entry["template"]),
                lora=_lora(entry.get("lora")),
                delta=entry["delta"],
                attention=entry.get("attention"),
                server=entry.get("server", {}),
                host=(hosts or {}).get(name, entry.get("host")),
                host_token_env=entry.get("host_token_env", HOST_VARIABLE),
            )
        )
    team = build_team(
        specs,
        manifest["seats"],
        sharing=sharing,
        dtype=dtype,
        device=device,
        seed=seed,
        protocol=manifest["protocol"],
        task=manifest["task"],
        max_new_tokens=manifest.get("max_new_tokens"),
    )
    add_mixtures(team, directory, manifest, dtype=dtype)
    return team


def add_mixtures(team: Team, directory: Path, manifest: Mapping[str, Any], *, dtype: str) -> None:
    """Put the newcomers beside the agents that a swap has left as mixtures of two models, each on
    the device of its incumbent."""
    for name, entry in manifest["agents"].items():
        mixture = entry.get("mixture")
        if mixture is None:
            continue
        source = str(directory / mixture["dir"])
        spec = replace(team.specs[name], model=source, lora=None, device=None)
        device = str(team.policies[name].device)
        newcomer = load_policies(
            [spec], shared_base=False, precision=Precision.of(dtype), device=device, seed=0
        )[name]
        team.policies[name] = MixturePolicy(name, team.policies[name], newcomer, mixture["delta"])


def _lora(entry: Mapping[str, Any] | None) -> LoraSpec | None:
    if entry is None:
        return None
    targets = entry["targets"]
    return LoraSpec(entry["rank"], entry["alpha"], tuple(targets) if targets else ALL_LINEAR)


def build_team(
    specs: Sequence[AgentSpec],
    seats: Mapping[str, str],
    *,
    sharing: str,
    dtype: str = "float32",
    autocast: str | None = None,
    device: str = "auto",
    seed: int = 0,
    protocol: Mapping[str, Any] | None = None,
    task: Mapping[str, Any] | None = None,
    max_new_tokens: int | None = None,
) -> Team:
    """Load every local agent's model. Raises UserError as ``load_policies`` does."""
    policies = load_policies(
        [spec for spec in specs if spec.here],
        shared_base=sharing == "lora",
        precision=Precision.of(dtype, autocast),
        device=device,
        seed=seed,
    )
    return Team(
        policies,
        {spec.name: spec for spec in specs},
        dict(seats),
        sharing,
        protocol or {},
        task or {},
        max_new_tokens,
    )
