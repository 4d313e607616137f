"""``satune push``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from satune.cli.common import AsJson, open_console, show_result
from satune.types import UserError


def push(
    team: Annotated[
        Path, typer.Argument(metavar="RUN_OR_TEAM", help="a finished run, or a team's directory")
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="the repository on the hub")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show every file and the card, send nothing")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="for everybody to see")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="in place of what the repository holds")
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            help="of the run, as it stands: recipe, events, episodes, report or critics; repeat it",
            show_default="none of it",
        ),
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIRECTORY=ID",
            help="the hub id of a base of adapters that lies in the team (base-0=org/name)",
            show_default="it is sent along",
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="of the team", show_default="what its bases say"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a trained team on the Hugging Face hub, with a card made of what its run measured.

    The repository is private unless told otherwise. Weights, tokenizers and the manifest go;
    paths, addresses, the recipe, conversations and data stay.
    """
    from satune.commands.push import licence_on_hub, pack, send

    named = dict(_named_base(text) for text in base or [])
    parcel = pack(
        team,
        repo,
        include=include or [],
        bases=named,
        licence=licence,
        look_up=(lambda model: None) if dry_run else licence_on_hub,
    )
    address = None
    if not dry_run:
        if not sys.stderr.isatty():
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()
        address = send(parcel, public=public, overwrite=overwrite)
    summary = {
        "repo": repo,
        "address": address,
        "dry_run": dry_run,
        "public": public,
        "files": [
            {"path": file.path, "bytes": file.size, "state": file.state} for file in parcel.files
        ],
        "left_out": parcel.left_out,
        "card": parcel.card,
    }
    show_result(summary, as_json, _show)


def _named_base(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not (name and equals and model):
        raise UserError(f"--base {text}: expected DIRECTORY=ID, as in base-0=org/name")
    return name, model


def _show(summary: dict[str, Any]) -> None:
    console = open_console()

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    for file in summary["files"]:
        line(f"{file['bytes']:>15,}  {file['path']}  ({file['state']})")
    for path in summary["left_out"]:
        line(f"{'stays here':>15}  {path}")
    if summary["dry_run"]:
        line("")
        for text in summary["card"].splitlines():
            line(text)
        line("")
    sent, size = len(summary["files"]), sum(file["bytes"] for file in summary["files"])
    how = "public" if summary["public"] else "private"
    done = f"sent to {summary['address']}" if summary["address"] else "nothing was sent"
    line(f"{summary['repo']} ({how}): {sent} files, {size:,} bytes; {done}")
