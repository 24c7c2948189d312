"""decal push: an adapter or a model onto the hub, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from decal.cli import console


def push(
    target: Annotated[Path, typer.Argument(help="A run, adapter or model folder.")],
    repo: Annotated[str, typer.Argument(help="The repository, owner/name; made if missing.")],
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to commit to; made if missing.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """\b
    decal push runs/tickets me/tickets-lora --private

    Uploads weights, settings, tokenizer and a model card in one commit; never checkpoints, rows or
    paths of this machine. Log in first: `hf auth login`, or HF_TOKEN.
    """
    from decal.verbs.push import push as push_to_hub

    done = push_to_hub(
        target, repo, private=private, revision=revision, message=message, say=console.say
    )
    if as_json:
        console.show_json(done.summary())
    else:
        console.facts(done.summary())
