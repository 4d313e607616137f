"""A trained team as a repository on the Hugging Face hub: what goes into it, and sending it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from satune.agents.sources import saved_adapter
from satune.files.manifest import MANIFEST
from satune.files.names import refuse_links
from satune.report.card import Member, card, licence_in
from satune.report.public import without_places
from satune.report.source import Source, read_source
from satune.team import manifest_of, refuse_hosted
from satune.types import UserError

INCLUDABLE = {
    "recipe": ("recipe.yaml",),
    "events": ("events.jsonl", "certify.jsonl", "summary.json"),
    "episodes": ("episodes/*.jsonl", "episodes/*.arrays"),
    "report": ("report.html", "report-files/*"),
    "critics": ("team/*.critic.safetensors",),
}
"""What of a run stays out unless it is named; it then goes as it stands."""

NOWHERE = "http://withheld.invalid/v1"
"""In place of the address of a model that is served elsewhere."""

_OF_MODELS = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "*.jinja", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""The files of a model's directory that loading it takes, and the terms it came under."""
_LARGE = ("tokenizer.json", "vocab.json")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_CARD = "README.md"
_KEPT = {".gitattributes"}

State = Literal["as it is", "without paths", "written"]
LookUp = Callable[[str], str | None]
"""The licence of a model on the hub; None where it is not known."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of the repository: ``source`` as it lies here, or ``content``."""

    path: str
    state: State
    source: Path | None = None
    content: bytes = b""

    @property
    def size(self) -> int:
        return len(self.content) if self.source is None else self.source.stat().st_size


@dataclass(slots=True)
class Parcel:
    """What is to be sent. ``left_out`` are files of the team that stay here."""

    repo: str
    files: list[File] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def card(self) -> str:
        return next(file.content for file in self.files if file.path == _CARD).decode()


def pack(
    place: Path,
    repo: str,
    *,
    include: Sequence[str] = (),
    bases: Mapping[str, str] | None = None,
    licence: str | None = None,
    look_up: LookUp = lambda model: None,
) -> Parcel:
    """The files of the team in ``place``, a run or a team directory, as ``repo`` (OWNER/NAME) is to
    hold them; nothing is sent.

    ``include`` has names of ``INCLUDABLE``. ``bases`` tells the hub id of a base that lies in the
    team (``base-0``), which then stays here. ``licence`` goes before what the bases say.
    Raises UserError for a name that no repository can have, for what is no team, for a team with
    an agent that lives with its owner, and for adapters on several bases that lie here.
    """
    if not _NAME.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith(".git"):
        raise UserError(f"{repo!r}: no name of a repository; give OWNER/NAME, as in ann/relay-team")
    team, run = _find(place)
    manifest = manifest_of(team)
    refuse_hosted(manifest, team)
    refuse_links(team)
    parcel = Parcel(repo)
    roots = _roots(team, manifest, bases or {}, repo)
    taken: set[Path] = set()
    for name in _folders(manifest):
        _add_model(parcel, team / name, f"{name}/", taken, roots)
    for folder, at in roots.items():
        if at == repo:
            _add_model(parcel, folder, "", taken, roots)
    parcel.files.append(File(MANIFEST, "without paths", content=_manifest(manifest)))
    taken.add(team / MANIFEST)
    for what in include:
        _include(parcel, what, team, run, taken)
    source = read_source(run) if run else None
    members = list(_members(team, manifest, source, roots, repo, licence, look_up))
    plays = {key: manifest[key] for key in ("task", "protocol")}
    text = card(repo, members, plays, source)
    parcel.files.insert(0, File(_CARD, "written", content=text.encode()))
    parcel.left_out += sorted(
        str(path.relative_to(team))
        for path in team.rglob("*")
        if path.is_file() and path not in taken
    )
    return parcel


def _find(place: Path) -> tuple[Path, Path | None]:
    """The team's directory, and the run it is of where that lies around it."""
    if not place.is_dir():
        raise UserError(f"{place}: no such directory; give a run, or a team's directory")
    if (place / MANIFEST).is_file():
        above = place.resolve().parent
        is_run = place.resolve().name == "team" and (above / "events.jsonl").is_file()
        return (above / "team", above) if is_run else (place, None)
    if (place / "team" / MANIFEST).is_file():
        return place / "team", place
    if (place / "events.jsonl").is_file():
        raise UserError(f"{place}: this run has no team yet; push it when it is finished")
    raise UserError(f"{place}: no run and no team (no manifest.json in it)")


def _folders(manifest: Mapping[str, Any]) -> list[str]:
    found = [
        holder["dir"]
        for entry in manifest["agents"].values()
        for holder in (entry, entry.get("mixture") or {})
        if "dir" in holder
    ]
    return list(dict.fromkeys(found))


def _roots(
    team: Path, manifest: Mapping[str, Any], bases: Mapping[str, str], repo: str
) -> dict[Path, str]:
    """The bases of adapters that lie in the team, and by what the repository's adapters name each:
    the hub id that ``bases`` gives, else the repository itself, at whose root that base then lies.
    """
    found: dict[Path, str] = {}
    for name in _folders(manifest):
        saved = saved_adapter(str(team / name))
        if saved is not None and Path(saved.base).is_dir():
            folder = Path(saved.base)
            found[folder] = bases.get(folder.name, repo)
    unknown = sorted(set(bases) - {folder.name for folder in found})
    if unknown:
        lying = ", ".join(sorted(folder.name for folder in found)) or "none"
        raise UserError(
            f"--base {unknown[0]}: no base of that name lies in the team ({lying} does)"
        )
    homeless = [folder for folder in found if folder.name not in bases]
    if len(homeless) > 1:
        named = " ".join(f"--base {folder.name}=ID" for folder in homeless)
        raise UserError(
            f"{team}: its adapters have {len(homeless)} bases that lie here, and a repository has "
            f"room for one; say which ones are on the hub: {named}"
        )
    return found


def _add_model(
    parcel: Parcel, folder: Path, at: str, taken: set[Path], roots: Mapping[Path, str]
) -> None:
    """The files of a model's directory, at ``at`` in the repository."""
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if not any(PurePosixPath(path.name).match(pattern) for pattern in _OF_MODELS):
            continue
        taken.add(path)
        if path.suffix != ".json" or path.name in _LARGE:
            parcel.files.append(File(at + path.name, "as it is", source=path))
            continue
        values = _json(path)
        if path.name == "adapter_config.json":
            saved = saved_adapter(str(folder))
            assert saved is not None
            base = roots.get(Path(saved.base), saved.base)
            values["base_model_name_or_path"] = base
        content = json.dumps(_scrubbed(values), indent=2, sort_keys=True, ensure_ascii=False)
        parcel.files.append(File(at + path.name, "without paths", content=f"{content}\n".encode()))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged JSON ({error})") from None


def _scrubbed(value: Any) -> Any:
    """The values with every absolute path cut to its last name."""
    if isinstance(value, dict):
        return {key: _scrubbed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_scrubbed(inner) for inner in value]
    if isinstance(value, str) and "\n" not in value and value[:1] in ("/", "~"):
        return without_places(value)
    return value


def _manifest(manifest: Mapping[str, Any]) -> bytes:
    """The manifest without the places of data and code, and without servers."""
    agents = {}
    for name, entry in manifest["agents"].items():
        entry = dict(entry)
        if "served" in entry:
            entry["served"] = f"{NOWHERE}#{entry['served'].partition('#')[2]}"
            entry.pop("server", None)
        if not _NAME.fullmatch(entry.get("base") or ""):
            entry.pop("base", None)
        agents[name] = entry
    plays = {key: _told(manifest[key]) for key in ("protocol", "task")}
    return (json.dumps({**manifest, "agents": agents, **plays}, indent=2) + "\n").encode()


def _told(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _told(v) for k, v in value.items() if k != "api_key_env"}
    if isinstance(value, list):
        return [_told(each) for each in value]
    return without_places(value) if isinstance(value, str) else value


def _include(parcel: Parcel, what: str, team: Path, run: Path | None, taken: set[Path]) -> None:
    if what not in INCLUDABLE:
        raise UserError(f"--include {what}: expected one of {', '.join(INCLUDABLE)}")
    if run is None and what != "critics":
        raise UserError(f"--include {what}: {team} lies in no run; give the run's directory")
    root = run or team.parent
    paths = sorted(p for pattern in INCLUDABLE[what] for p in root.glob(pattern) if p.is_file())
    if what == "critics" and run is None:
        paths = sorted(team.glob("*.critic.safetensors"))
    if not paths:
        raise UserError(f"--include {what}: {root} has none")
    if run is not None:
        for path in paths:
            if not path.resolve().is_relative_to(run.resolve()):
                raise UserError(f"{path}: is a link that leads out of {run}; it is not sent")
    for path in paths:
        inside = path.relative_to(team) if what == "critics" else path.relative_to(root)
        name = str(inside) if what == "critics" else f"run/{inside.as_posix()}"
        parcel.files.append(File(name, "as it is", source=path))
        taken.add(path)


def _members(
    team: Path,
    manifest: Mapping[str, Any],
    run: Source | None,
    roots: Mapping[Path, str],
    repo: str,
    licence: str | None,
    look_up: LookUp,
) -> Iterator[Member]:
    for agent, entry in manifest["agents"].items():
        folder = entry.get("dir")
        saved = saved_adapter(str(team / folder)) if folder else None
        noted = run.recipe.get(f"team.agents.{agent}.model") if run else None
        beside = Path(saved.base) if saved and Path(saved.base).is_dir() else None
        named = saved.base if saved and beside is None else None
        if beside is not None and roots[beside] != repo:
            named = roots[beside]
        base, on_hub = _base_of(entry, named, noted)
        found = licence
        for place in (beside, Path(base) if base and not on_hub else None):
            if found is None and place is not None and place.is_dir():
                found = licence_in(place)
        if found is None and on_hub and base is not None:
            found = look_up(base)
        shown = base
        if base is not None and not on_hub:  # of what lay somewhere the last name
            shown = without_places(Path(base).name if folder else base)
        yield Member(
            agent,
            [seat for seat, filled_by in manifest["seats"].items() if filled_by == agent],
            folder,
            shown,
            on_hub,
            found,
            saved is not None,
            entry["temperature"],
        )


def _base_of(
    entry: Mapping[str, Any], named: str | None, noted: str | None
) -> tuple[str | None, bool]:
    """The model that an agent was made from, and whether the hub has it: as its adapter ``named``
    it, as the team says, else as the run ``noted`` it. Where the team says nothing, what is there
    by that name from here is none of the hub's."""
    if "dir" not in entry:
        return entry["served"].partition("#")[2], False
    if named is None and "base" in entry:
        base = entry["base"]
        return base or noted, base is not None and bool(_NAME.fullmatch(base))
    base = named or noted
    return base, base is not None and bool(_NAME.fullmatch(base)) and not Path(base).exists()


# Sending


def licence_on_hub(model: str) -> str | None:
    """The licence that a model's page on the hub names; None where it cannot be asked for."""
    from huggingface_hub import HfApi

    try:
        held = HfApi().model_info(model).card_data
    except (_of_http(), OSError, ValueError):
        return None  # the card then says that it is not known
    found = held.get("license") if held else None
    return found if isinstance(found, str) else None


def send(parcel: Parcel, *, public: bool, overwrite: bool) -> str:
    """Make the repository and commit the parcel to it in one commit; gives its address.

    A new repository is private unless ``public``. One that holds files is refused unless
    ``overwrite``, with which it holds the parcel and nothing else afterwards (its history keeps
    what was there). One that is public is refused unless ``public`` says so, one that is private
    where it does: neither is changed here.
    Raises UserError without a token, and for whatever the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise UserError("push: not logged in to the hub; hf auth login, or set HF_TOKEN")
    api = HfApi(library_name="satune")
    with _hub(parcel.repo):
        held: set[str] = set()
        if api.repo_exists(parcel.repo):
            info = api.model_info(parcel.repo)
            held = {file.rfilename for file in info.siblings or []} - _KEPT
            if not info.private and not public:
                raise UserError(
                    f"{parcel.repo}: is there and public; add --public, or give another name"
                )
            if info.private and public:
                raise UserError(
                    f"{parcel.repo}: is there and private; change that on the hub, or leave "
                    "--public out"
                )
            if held and not overwrite:
                raise UserError(
                    f"{parcel.repo}: holds {len(held)} files already; --overwrite puts this team "
                    "in their place, or give another name"
                )
        else:
            api.create_repo(parcel.repo, private=not public)
        coming = {file.path for file in parcel.files}
        operations: list[Any] = [CommitOperationDelete(path) for path in sorted(held - coming)]
        operations += [
            CommitOperationAdd(file.path, file.content if file.source is None else file.source)
            for file in parcel.files
        ]
        api.create_commit(parcel.repo, operations, commit_message="A team trained with satune")
    return f"{api.endpoint}/{parcel.repo}"


def _of_http() -> type[Exception]:
    """What the HTTP library raises that the hub's own works with: it differs by the version."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast(type[Exception], HfHubHTTPError.__bases__[0])


@contextmanager
def _hub(repo: str) -> Iterator[None]:
    """One line for whatever the hub or the way to it refuses."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        said = " ".join((error.server_message or str(error)).split())
        status = error.response.status_code
        mend = {401: "; hf auth login", 403: "; the token may not write there"}.get(status, "")
        raise UserError(f"{repo}: the hub refuses ({status}: {said[:200]}){mend}") from None
    except OfflineModeIsEnabled:
        raise UserError("push: HF_HUB_OFFLINE is set; unset it, or add --dry-run") from None
    except (_of_http(), OSError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{repo}: the hub cannot be reached ({said[:200]})") from None
