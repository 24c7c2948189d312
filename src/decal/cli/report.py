"""decal report: what runs came to, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from decal.cli import console


def report(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Run folders, or a sweep folder.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The file; else report.html in DIR.")
    ] = None,
    samples: Annotated[
        int,
        typer.Option(min=0, help="Load the model and answer so many evaluation rows first."),
    ] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that is no report.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for programs.")] = False,
) -> None:
    """\b
    decal report runs/r8 runs/r16 -o ranks.html

    Curves, numbers, samples, hints and what the adapters learned, on one page without network,
    with a recommendation where several runs can be compared. Runs may be unfinished.
    """
    from decal.cli.waiting import Waiting
    from decal.verbs.report import facts, gather, write_report

    with Waiting(console.log()) as progress:
        found, place = gather(folders, out, samples=samples, force=force, observe=progress.observe)
        written = write_report(found, place)
    if as_json:
        console.show_json(facts(found, written))
        return
    if found.several:
        console.write(found.advice.text)
        if found.advice.more:
            console.write(found.advice.more)
    for name, shown in found.hints.items():
        for hint in shown:
            console.write(f"{name}: {hint.seen} Try: {hint.advice}")
    console.write(f"report  {written}")
