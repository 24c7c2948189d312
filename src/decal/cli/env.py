"""decal env: versions, machine and kernels, for bug reports and comparisons."""

from __future__ import annotations

import textwrap
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
        return
    kernels = found.pop("kernels")
    console.facts(found)
    console.write("kernels")
    for choice, ops in _by_choice(kernels).items():
        console.write(f"  {choice}")
        lines = textwrap.wrap(", ".join(ops), 92, break_on_hyphens=False)
        console.write(textwrap.indent("\n".join(lines), "    "))


def _by_choice(kernels: dict[str, str]) -> dict[str, list[str]]:
    """The ops of each backend and reason together: many ops, few reasons."""
    grouped: dict[str, list[str]] = {}
    for op, choice in kernels.items():
        grouped.setdefault(choice, []).append(op)
    return grouped
