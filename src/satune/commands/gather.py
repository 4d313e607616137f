"""A run's team made whole: agents that hosts of one's own have trained take the places of the
references to them. Files are linked where the disk can; no model is loaded."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from satune.agents.sources import saved_adapter
from satune.config.schema import Recipe
from satune.files.manifest import MANIFEST
from satune.files.writing import link, write_atomically, written_beside
from satune.loading import LAUNCH_VARIABLE
from satune.team import critic_file, manifest_of
from satune.tiny.zoo import is_tiny
from satune.training.run_directory import RunDirectory


def gather(run: RunDirectory, recipe: Recipe) -> None:
    """Write the team of a run that is over anew, with the agents that its own hosts have saved;
    nothing where it has no reference to them. Raises UserError where the disk refuses."""
    manifest = manifest_of(run.team)
    agents: dict[str, Any] = manifest["agents"]
    models = {name: str(recipe.team.agents[name].model) for name in agents}
    theirs = [
        name for name, entry in agents.items() if entry.get("host_token_env") == LAUNCH_VARIABLE
    ]
    if not theirs:
        return
    with written_beside(run.team) as beside:
        _link_all(run.team, beside)
        bases = {
            _origin(models[name]): base.name
            for name in agents
            if name not in theirs and (base := _base(run.team / name))
        }
        for name in theirs:
            saved = run.hosts / name / "agent" / name
            _link_all(saved, beside / name)
            critic = critic_file(saved.parent, name)
            if critic.is_file():
                link(critic, critic_file(beside, name))
            agents[name] = _entry(name, models[name], agents[name])
            base = _base(saved)
            if base is not None:
                names = (f"base-{number}" for number in itertools.count())
                free = next(each for each in names if not (beside / each).exists())
                kept = bases.setdefault(_origin(models[name]), free)
                if kept == free:
                    _link_all(base, beside / kept)
                _rest_on(beside / name, run.team.resolve() / kept)
        # Links: a file of a host's, or of the old team's, is replaced and never written into.
        write_atomically(beside / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _entry(name: str, model: str, reference: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of an agent that lies in the team, as ``Team.entry``."""
    lies_here = Path(model).exists() or is_tiny(model)
    kept = {k: v for k, v in reference.items() if k not in ("host", "host_token_env", "digest")}
    return {"dir": name, "base": None if lies_here else model, **kept}


def _origin(model: str) -> str:
    """The model whose weights an agent of ``model`` rests on, if it is an adapter."""
    saved = saved_adapter(model)
    return model if saved is None else saved.base


def _base(saved: Path) -> Path | None:
    """The base of the adapter in a directory, where it lies here."""
    adapter = saved_adapter(str(saved))
    return Path(adapter.base) if adapter is not None and Path(adapter.base).is_dir() else None


def _rest_on(saved: Path, base: Path) -> None:
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(base)
    write_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _link_all(source: Path, target: Path) -> None:
    shutil.copytree(
        source, target, copy_function=lambda a, b: link(Path(a), Path(b)), dirs_exist_ok=True
    )
