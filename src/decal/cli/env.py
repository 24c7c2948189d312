"""decal env: versions, machine and kernels, for bug reports and comparisons."""

from __future__ import annotations

from typing import Annotated

import typer

from decal.cli import console


def env(
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """\b
    decal env --json > env.json

    Shows versions, processor, memory, GPUs, and which kernels decal chose and why.
    """
    from decal.verbs.env import env as describe

    found = describe()
    if as_json:
        console.show_json(found)
    else:
        console.facts(found)
