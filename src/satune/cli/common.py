"""What the commands share: their common options, how a recipe is found, how a result is shown."""

from __future__ import annotations

import logging
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from satune.files.printing import printable
from satune.loading import KEY_VARIABLE
from satune.types import UserError

SERVERS, OTHERS = "Servers", "Files of others"
"""Panels of the help."""
RecipeFile = Annotated[str, typer.Argument(help="a recipe file, or the name of one that ships")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted.key=value")
]
Out = Annotated[Path | None, typer.Option(help="the run's directory")]
UnsafeChecks = Annotated[
    bool,
    typer.Option(
        "--unsafe-checks",
        help="run a benchmark's code even where no system calls can be filtered",
        callback=lambda value: _allow_unsafe() if value else value,
        rich_help_panel=OTHERS,
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="run the code that a run or team of somebody else names",
        rich_help_panel=OTHERS,
    ),
]
AllowAddress = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URL[=VARIABLE]",
        help="a server that such a run or team may ask, and the variable of its key",
        show_default=f"none; {KEY_VARIABLE}",
        rich_help_panel=OTHERS,
    ),
]
BreakLock = Annotated[
    bool,
    typer.Option(
        "--break-lock", help="take a lock that a process on another machine left on the directory"
    ),
]
AgentHost = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=URL",
        help="where the owner of an agent keeps it now",
        show_default="as the team says",
        rich_help_panel=SERVERS,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]

_UNBOUNDED = 1_000_000
"""Columns of what is no terminal; rich would take 80."""


class Interrupted(Exception):
    """Ctrl-C, with the command that goes on."""


def _allow_unsafe() -> bool:
    from satune.tasks.sandbox import allow_unsafe

    allow_unsafe()
    return True


def trust_of(
    code: bool,
    overrides: list[str] | None = None,
    addresses: list[str] | None = None,
    said: Any = None,
) -> Any:
    """What the command line says of other people's files (``commands.trust.Trust``): by its
    options, by its overrides, and by whatever else is ``said`` in it."""
    from satune.commands.trust import Trust
    from satune.config.load import override

    given = overrides or []
    agents = re.findall(r"^team\.agents\.([^.=]+)\.", "\n".join(given), re.MULTILINE)
    named: dict[str, Any] = {"team": {"agents": {agent: {} for agent in agents}}}
    for text in given:
        override(named, text)
    return Trust.of(code, addresses or [], [named, said])


def agent_hosts(given: list[str] | None) -> dict[str, str]:
    """The addresses in ``--agent-host NAME=URL`` by agent. Raises UserError for another form."""
    found: dict[str, str] = {}
    for text in given or []:
        name, _, url = text.partition("=")
        if not name or not url or name in found:
            raise UserError(f"--agent-host {text}: give NAME=URL, each agent once")
        found[name] = url
    return found


def said_of_hosts(hosts: Mapping[str, str]) -> Any:
    """What ``trust_of`` is told of them: with these addresses go the tokens of agents' owners."""
    return {"agents": {name: {"host": url} for name, url in hosts.items()}}


class PlainConsole(Console):
    """A console that shows every text as it stands: what looks like markup is no markup, and what
    could steer a terminal is replaced. Names, ids, paths and messages come from anybody; a style
    is given by a ``rich.text.Text``, whose parts are made ``printable`` where they are not ours."""

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        plain = "\n".join(map(printable, text.split("\n")))
        return super().render_str(plain, **{**options, "markup": False, "emoji": False})


def open_console(*, stderr: bool = False) -> Console:
    """Where results (or, with ``stderr``, progress and notes) are shown. A terminal's lines are
    wrapped to its width; into a file or a pipe each line and each row of a table stays one line."""
    made = PlainConsole(stderr=stderr)
    if not made.file.isatty():
        made.width = _UNBOUNDED
    return made


def say(line: str) -> None:
    print(printable(line), file=sys.stderr)


_Result = TypeVar("_Result", bound=Mapping[str, Any])


def show_result(value: _Result, as_json: bool, show: Callable[[_Result], None]) -> None:
    if as_json:
        from satune.files.writing import strict_json

        print(strict_json(value))
    else:
        show(value)


def find_recipe(given: str) -> Path | None:
    """``shipped_recipe``, None where there is no such recipe."""
    path = Path(given)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    found = (root / f"{given}.yaml" for root in _recipe_folders())
    return next((path for path in found if path.is_file()), None)


def own_run(recipe: Path) -> Path | None:
    """The run that keeps its recipe in this file; None for any other recipe."""
    run = recipe.parent
    return run if recipe.name == "recipe.yaml" and (run / "events.jsonl").is_file() else None


def _recipe_folders() -> list[Path]:
    """In a checkout of the repository, and where an installed package has them."""
    installed = Path(sysconfig.get_path("data")) / "share" / "satune" / "recipes"
    return [Path(__file__).parents[3] / "recipes", installed]


def shipped_recipe(given: str) -> Path:
    """A recipe file, or one that ships by its name (``relay``, ``table1/sat_3x_qwen3_4b``)."""
    path = find_recipe(given)
    if path is not None:
        return path
    from satune.loading import nearest

    roots = [root for root in _recipe_folders() if root.is_dir()]
    names = [str(p.relative_to(r).with_suffix("")) for r in roots for p in r.rglob("*.yaml")]
    near = nearest(given, sorted(names))
    mend = f"did you mean {near}?" if near else f"they lie in {roots[-1] if roots else 'none'}"
    raise UserError(f"{given}: no such file, and no recipe ships by that name; {mend}")


def quiet_libraries() -> None:
    """Progress is shown by satune; the libraries' own bars and warnings would cut through it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("peft").setLevel(logging.ERROR)
