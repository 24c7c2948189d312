"""decal compare: base and adapters on the same prompts or the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from decal.cli import console
from decal.errors import DecalError


def compare(
    adapters: Annotated[
        list[str], typer.Argument(metavar="[NAME=]ADAPTER...", help="Runs or adapter folders.")
    ],
    base: Annotated[
        str | None, typer.Option(help="The base, if it is not the one they were trained on.")
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Complete this prompt with each.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Rows with known answers to measure each on.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many rows.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per answer.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """\b
    decal compare r8=runs/r8 r32=runs/r32 --data test.jsonl

    Puts the base and every adapter to the same prompts or rows, in one process, and shows them
    side by side.
    """
    named = _named(adapters)
    from decal.verbs.compare import compare as compare_adapters

    found = compare_adapters(
        base,
        named,
        prompts=prompts,
        data=str(data) if data else None,
        limit=limit,
        max_new_tokens=max_new_tokens,
    )
    if as_json:
        console.show_json(found)
    else:
        _show(found)


def _named(adapters: list[str]) -> dict[str, str]:
    """`NAME=PATH` or PATH, which is named after its folder, a run's `adapter` after the run."""
    named: dict[str, str] = {}
    for given in adapters:
        name, equals, path = given.partition("=")
        if not equals:
            folder = Path(given)
            path, name = given, folder.parent.name if folder.name == "adapter" else folder.name
        if not name or not path:
            raise DecalError(f"`{given}` needs a name and a path", hint="NAME=ADAPTER")
        if name in named:
            raise DecalError(
                f"two adapters are called `{name}`: {named[name]} and {path}",
                hint=f"name them: first={named[name]} second={path}",
            )
        named[name] = path
    return named


def _show(found: dict[str, Any]) -> None:
    """Answers under their prompts, then one line of numbers per model."""
    results: dict[str, dict[str, Any]] = found["results"]
    width = max(len(name) for name in results)
    for i, prompt in enumerate(found.get("prompts", [])):
        console.write(f"prompt: {prompt}")
        for name, values in results.items():
            console.write(f"  {name:<{width}}  {' '.join(values['outputs'][i].split())}")
    measured = [k for k in next(iter(results.values())) if k != "outputs"]
    if measured:
        console.write(f"{'':<{width}}  " + "  ".join(f"{k:>12}" for k in measured))
        for name, values in results.items():
            numbers = "  ".join(f"{values[k]:>12.6g}" for k in measured)
            console.write(f"{name:<{width}}  {numbers}")
