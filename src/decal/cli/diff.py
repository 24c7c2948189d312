"""decal diff: in what two adapters or two models differ."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from decal.cli import console

SHOWN = 10


def diff(
    a: Annotated[str, typer.Argument(help="Folder or hub id, owner/name[@revision].")],
    b: Annotated[str, typer.Argument(help="Another one of the same kind.")],
    everything: Annotated[
        bool, typer.Option("--all", help=f"List all that differ, not the first {SHOWN}.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """\b
    decal diff runs/first runs/second

    Compares two adapters by what they add to the base, or two models tensor by tensor. Exit code 0
    means that they are the same, 1 that they differ.
    """
    from decal.cli.bytes import Bytes
    from decal.verbs.diff import diff as compare

    with Bytes(console.log(), "hashing") as progress:
        found = compare(a, b, observe=progress.observe)
    if as_json:
        console.show_json(found)
    else:
        _show(found, None if everything else SHOWN)
    if not found["identical"]:
        raise typer.Exit(1)


def _show(found: dict[str, Any], most: int | None) -> None:
    what = "modules" if found["kind"] == "adapter" else "tensors"
    if found["identical"]:
        console.write(f"identical: {found['compared']:,} {what}, settings included")
        return
    console.write(f"a: {found['a']}")
    console.write(f"b: {found['b']}")
    _rows("differing settings", found["config"], most)
    _rows("differing other files (sha256)", found.get("files", []), most)
    for side in ("a", "b"):
        only = [{"name": name} for name in found[f"only_in_{side}"]]
        _rows(f"{what} only in {side}", only, most)
    _rows(f"{what} of different shapes", found["shapes"], most)
    _rows(f"{what} of different dtypes", found.get("dtypes", []), most)
    of = f" of {found['compared']:,} in both"
    _rows(f"differing {what}", found["different"], most, of)
    if found["relative"] is not None:
        console.write(f"together they differ by {found['relative']:.3g} of their norm")


def _rows(headline: str, rows: list[dict[str, Any]], most: int | None, of: str = "") -> None:
    """A heading and the first rows below it; nothing at all where there are no rows."""
    if not rows:
        return
    console.write(f"{headline}: {len(rows):,}{of}")
    shown = rows[:most]
    named = ("key", "name")
    cells = [{k: v if k in named else _short(v) for k, v in row.items()} for row in shown]
    console.table(cells, indent=2)
    if len(rows) > len(shown):
        console.write(f"  (and {len(rows) - len(shown):,} more; --all lists them)")


def _short(value: Any) -> Any:
    """A value in at most 20 characters, for two beside a name: lists of modules are long."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int | None):
        return value
    text = str(value)
    return text if len(text) <= 20 else text[:17] + "..."
