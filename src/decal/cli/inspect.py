"""decal inspect: what a folder or file is, and whether it is whole."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from decal.cli import console


def inspect(
    path: Annotated[str, typer.Argument(help="Folder or hub id, owner/name[@revision].")],
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
        console.facts(_readable(found))


def _readable(found: dict[str, Any]) -> dict[str, Any]:
    """Bytes in the unit that a person would choose, and trainings one below the other."""
    from decal.store.files import size_text

    def readable(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            if key == "bytes_by_dtype":
                return {dtype: size_text(size) for dtype, size in value.items()}
            return {name: readable(name, inner) for name, inner in value.items()}
        if key == "runs":
            return {f"run {i}": entry for i, entry in enumerate(value, 1)}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [readable("", row) for row in value]
        return size_text(value) if key.endswith("bytes") and isinstance(value, int) else value

    shown: dict[str, Any] = readable("", found)
    return shown
