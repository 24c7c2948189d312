"""decal quickstart: the whole way once, on a small embedded base, without the network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from decal.cli import console


def quickstart(
    out: Annotated[Path, typer.Argument(help="Folder for what it leaves.")] = Path("quickstart"),
) -> None:
    """\b
    decal quickstart

    Trains an adapter on an embedded base, measures it before and after, merges it and checks the
    result. Downloads nothing.
    """
    from decal.cli.progress import TrainingProgress
    from decal.verbs.quickstart import quickstart as show

    with TrainingProgress(console.log()) as progress:
        found = show(out, progress)
    console.facts(found)
