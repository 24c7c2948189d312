"""decal inspect: what a folder or file is, and whether it is whole."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from decal.cli import console
from decal.errors import DecalError


def inspect(
    path: Annotated[str, typer.Argument(help="Folder or hub id, owner/name[@revision].")],
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="What the adapter learned: its singular values.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="For --spectrum the base, if it is not where the adapter says."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """\b
    decal inspect runs/tickets/adapter
    decal inspect runs/tickets --spectrum

    Shows what an adapter, model or run folder holds, without loading a model. With --spectrum:
    how large each module's update is beside the base, and how many directions it uses.
    """
    if base is not None and not spectrum:
        raise DecalError("--base is for --spectrum", hint="add --spectrum, or leave --base out")
    from decal.verbs.inspect import inspect as inspect_path

    found = inspect_path(path)
    learned = _spectrum(path, base) if spectrum else None
    if as_json:
        console.show_json(found if learned is None else {**found, "spectrum": learned})
    elif learned is None:
        console.facts(_readable(found))
    else:
        from decal.report.spectra import lines

        console.write("\n".join(lines(learned)))


def _spectrum(path: str, base: str | None) -> dict[str, Any]:
    from decal.cli.waiting import Waiting
    from decal.verbs.spectrum import spectrum

    with Waiting(console.log()) as progress:
        return spectrum(path, base=base, observe=progress.observe)


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
