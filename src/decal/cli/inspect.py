"""decal inspect: what a folder or file is, and whether it is whole."""

from __future__ import annotations

from typing import Annotated

import typer

from decal.cli import console


def inspect(
    path: Annotated[str, typer.Argument(help="A run, adapter or model folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """\b
    decal inspect runs/tickets/adapter

    Shows what an adapter, model or run folder holds, without loading a model.
    """
    from decal.verbs.inspect import inspect as inspect_path

    found = inspect_path(path)
    if as_json:
        console.show_json(found)
    else:
        console.facts(found)
